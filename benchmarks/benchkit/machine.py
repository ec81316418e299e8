"""Where a measurement was taken, and how it is printed."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions, date."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dpa": importlib.metadata.version("dpa"),
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    found = Path("/proc/cpuinfo")
    if found.exists():
        for line in found.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first one to the left, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(widths[0]) if place == 0 else cell.rjust(widths[place]) for place, cell in enumerate(cells)
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join(line(cells) for cells in [header, *rows])

"""Times by interleaved repeats, memory by a fresh process per row."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchkit.clock import Sections, now, timed_doors
from benchkit.variants import DOORS, VARIANTS, Case, run_step

PEAK_METHODS = {
    "cpu": "fresh process whose allocator gives freed blocks back at once: peak resident set (VmHWM, reset before) of "
    "the first step, minus resident set before it",
    "cuda": "torch.cuda.max_memory_allocated of a step minus memory_allocated before it",
}


@dataclass(slots=True)
class Times:
    """Of one row."""

    loss: float = 0.0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)
    """Share of the step by part, in CPU time (CUDA: wall-clock); of the quickest of the repeats with clocks."""


def measure_times(case: Case, names: Sequence[str], *, repeats: int, budget: float) -> dict[str, Times]:
    """Every row in turn, ``repeats`` turns after one untimed turn; two turns at least, however small the budget.

    Each turn begins with another row: what follows a row that has filled caches and freed gigabytes is slower for it.
    A row that takes over three times as long as the quickest has every third turn only: noise of some percent matters
    where two rows are close, and their minimum needs the repeats.

    Args:
        budget: seconds of wall-clock after which no further turn begins.
    """
    times = {name: Times() for name in names}
    warm: dict[str, float] = {}
    for name in names:
        began = time.perf_counter()
        times[name].loss = run_step(case, VARIANTS[name])
        warm[name] = time.perf_counter() - began
    slow = {name for name in names if warm[name] > 3 * min(warm.values())}
    began = time.perf_counter()
    for turn in range(repeats):
        if turn >= 2 and time.perf_counter() - began > budget:
            break
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            if name in slow and turn >= 2 and turn % 3:
                continue
            gc.collect()
            before = now(case.device)
            run_step(case, VARIANTS[name])
            after = now(case.device)
            times[name].seconds.append(after[0] - before[0])
            times[name].cpu_seconds.append(after[1] - before[1])
    for name in names:
        times[name].parts = _shares(case, name, repeats=2)
    return times


def _shares(case: Case, name: str, *, repeats: int) -> dict[str, float]:
    """Clocks wait for the device at each door, so these steps are not timed as a whole."""
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        sections = Sections(case.device)
        with timed_doors(sections, DOORS):
            run_step(case, VARIANTS[name], sections)
        runs.append(dict(sections.wall if case.device.type == "cuda" else sections.cpu))
    best = min(runs, key=lambda run: sum(run.values()))
    return {part: seconds / sum(best.values()) for part, seconds in best.items()}


def peak_here(case: Case, name: str) -> dict[str, int]:
    """Memory of one step in this process: ``peak_bytes`` beyond ``resident_bytes``, which is there before it."""
    gc.collect()
    if case.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        run_step(case, VARIANTS[name])
        return {"peak_bytes": torch.cuda.max_memory_allocated(case.device) - before, "resident_bytes": before}
    _give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    run_step(case, VARIANTS[name])
    return {"peak_bytes": _status("VmHWM") - before, "resident_bytes": before}


def peak_in_child(script: Path, arguments: Sequence[str], name: str) -> dict[str, int]:
    """``peak_here`` in a process of its own, so that no row finds memory that another one has freed."""
    command = [sys.executable, str(script), *arguments, "--memory-of", name]
    # glibc would keep freed blocks of up to 32 MiB for later, more or fewer of them from run to run
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    found: dict[str, int] = json.loads(finished.stdout)
    return found


def child_main(make: Callable[[], Case], warm: Callable[[], Case], name: str) -> None:
    """In the child: a tiny step first, so that what libraries load at their first use is not counted."""
    run_step(warm(), VARIANTS[name])
    print(json.dumps(peak_here(make(), name)))


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this device and these threads: what MFU is a share of."""
    size = 1024 if device.type == "cpu" else 8192
    left = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        before = now(device)
        torch.mm(left, left)
        best = min(best, now(device)[0] - before[0])
    return 2.0 * size**3 / best


def _status(field_name: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field_name}: peak memory on the CPU is measured on Linux only")


def _give_back_free_memory() -> None:
    """What building the model has left free in the allocator would hide a part of the step's need."""
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)

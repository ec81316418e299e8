"""What a finished run and a plan say to people in a terminal."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dpa.evaluate.overview import overview
from dpa.evaluate.settings import PAPER
from dpa.evaluate.tables import accuracy_table

_FILES = (("log", "metrics.jsonl"), ("report", "report.html"), ("summary", "summary.json"))
_PLAN = ("method", "stage", "objective", "samples", "quarantined", "steps", "state")


def result_text(folder: Path, summary: dict[str, Any]) -> str:
    """Stages, accuracies, sample answers, and where everything is."""
    methods = summary["methods"]
    parts = [_stages(methods)]
    evaluated = {name: of["evaluation"]["lab"] for name, of in methods.items() if "lab" in of["evaluation"]}
    if evaluated:
        parts.append(accuracy_table(evaluated).text(title="Held-out questions, with and without (blind) the image"))
    for name, of in methods.items():
        if any(benchmark in PAPER for benchmark in of["evaluation"]):
            parts.append(f"{name}: {overview(of['evaluation'])}")
    parts += _samples(folder)
    parts.append(_places(folder, methods))
    return "\n\n".join(parts)


def plan_text(rows: list[dict[str, Any]]) -> str:
    """A plan as a table."""
    table = Table(box=None, pad_edge=False)
    for name in _PLAN:
        table.add_column(name, justify="right" if name in ("samples", "quarantined", "steps") else "left")
    for row in rows:
        table.add_row(*(str(row[name]) for name in _PLAN))
    return _plain(table)


def _stages(methods: dict[str, Any]) -> str:
    table = Table(box=None, pad_edge=False)
    for name in ("method", "stage", "steps", "loss, first -> last", "trained parameters", "seconds"):
        table.add_column(name, justify="left" if name in ("method", "stage") else "right")
    for method, of in methods.items():
        for stage, figures in of["stages"].items():
            table.add_row(
                method,
                stage,
                str(figures["steps"]),
                f"{figures['loss_first']:.3f} -> {figures['loss_last']:.3f}",
                f"{figures['trainable_parameters']:,}",
                "reused" if figures["reused"] else f"{figures['wall_seconds']:.0f}",
            )
    return _plain(table)


def _samples(folder: Path) -> list[str]:
    path = folder / "samples.json"
    if not path.is_file():
        return []
    lines = ["Sample answers (pictures: report.html)"]
    for sample in json.loads(path.read_text(encoding="utf-8")):
        lines.append(f"  {sample['id']}: {sample['question']}  right: {sample['answer']}")
        width = max(map(len, sample["answers"]), default=0)
        lines += [f"      {method:{width}}  {answer}" for method, answer in sample["answers"].items()]
    return ["\n".join(lines)]


def _places(folder: Path, methods: dict[str, Any]) -> str:
    rows = [(f"checkpoint, {name}", folder / of["checkpoint"]) for name, of in methods.items() if "checkpoint" in of]
    rows += [(name, folder / file) for name, file in _FILES]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {os.path.relpath(path)}" for name, path in rows if path.exists())


def _plain(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))

"""What passes between our process and the harness's: a request file, a stream of events, a result. Nothing heavy.

Events are lines of JSON on the worker's standard output; whatever libraries print goes to the log instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpa.evaluate.tables import MISSING


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """One benchmark as the harness knows it."""

    benchmark: str
    """As the user named it."""
    task: str
    """The harness's own name."""
    folder: str | None
    """Where a YAML of this task lies that is not the harness's own: our override for local data, or the user's task."""


@dataclass(frozen=True, slots=True)
class Request:
    """All that the worker needs."""

    checkpoint: str
    tasks: tuple[TaskRequest, ...]
    out: str
    batch_size: int
    limit: int | None

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Request:
        """What :meth:`write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**content, "tasks": tuple(TaskRequest(**task) for task in content["tasks"])})


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of one task, under the harness's own name and on its own scale."""

    benchmark: str
    task: str
    name: str
    filter: str
    """The harness's answer filter ("none" where the task has no such thing)."""
    value: float
    stderr: float | None
    n: int
    """Questions."""


@dataclass(frozen=True, slots=True)
class HarnessResult:
    """What ``dpa eval --harness`` prints. Not comparable with our own columns: other prompts, other rules."""

    harness: str
    """Name and version, as in "lmms-eval 0.7.3": the label of the column."""
    checkpoint: str
    predictions: Path
    metrics: tuple[Metric, ...]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        benchmarks: dict[str, list[dict[str, Any]]] = {}
        for item in self.metrics:
            row = {key: value for key, value in asdict(item).items() if key != "benchmark"}
            benchmarks.setdefault(item.benchmark, []).append(row)
        return {
            "harness": self.harness,
            "checkpoint": self.checkpoint,
            "predictions": str(self.predictions),
            "benchmarks": benchmarks,
        }

    def text(self) -> str:
        """For people."""
        head = ("benchmark", "task", "metric", "n", self.harness)
        lines = [head, *(_line(item) for item in self.metrics)]
        widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
        table = "\n".join(
            "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        return f"{table}\n\npredictions: {self.predictions}"

    def markdown(self) -> str:
        """For a README; ends without a newline."""
        head = ("benchmark", "task", "metric", "n", self.harness)
        lines = [head, ("---", "---", "---", "---:", "---:"), *(_line(item) for item in self.metrics)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _line(item: Metric) -> tuple[str, ...]:
    name = item.name if item.filter == "none" else f"{item.name} ({item.filter})"
    spread = "" if item.stderr is None else f" ± {item.stderr:.4f}"
    return item.benchmark, item.task, name, str(item.n) if item.n else MISSING, f"{item.value:.4f}{spread}"


def metrics_of(benchmark: str, results: Mapping[str, Any], counts: Mapping[str, Any]) -> list[Metric]:
    """The numbers in lmms-eval's ``results``; what is no number (files for a server, empty metrics) is left out.

    Args:
        results: task -> {"METRIC,FILTER": value, "METRIC_stderr,FILTER": value, ...}.
        counts: task -> {"effective": questions}.
    """
    found = []
    for task, values in results.items():
        for key, value in values.items():
            name, comma, chain = key.partition(",")
            if not comma or not _is_number(value) or "_stderr" in name:
                continue
            stderr = values.get(f"{name}_stderr,{chain}")
            found.append(
                Metric(
                    benchmark=benchmark,
                    task=task,
                    name=name,
                    filter=chain,
                    value=float(value),
                    stderr=float(stderr) if _is_number(stderr) else None,
                    n=int(counts.get(task, {}).get("effective", 0)),
                )
            )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

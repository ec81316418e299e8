"""From the cells' folders to one flat table: cell, metric, value; means over seeds, differences paired by seed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpa.ablation.grid import Ablation, Cell
from dpa.analyze.runs import PROBES, Run, read_run
from dpa.errors import UserError
from dpa.pipeline.measure import MEASUREMENTS, read_probes
from dpa.results import ARTEFACTS
from dpa.store import disk_errors, write_json, write_text

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, two-sided 95 %, for 1, 2 ... degrees of freedom; beyond 15 the last one is kept (a little too wide)."""
_COUNTS = ("samples_to_threshold", ".n")
_SAMPLES_TO = "pretrain.samples_to."
PER_CENT = ", %"
SMOOTHED = 20
"""Steps of the moving mean that is held against the threshold."""

Point = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell that has a result."""

    cell: Cell
    figures: dict[str, float]
    """Metric -> number."""
    curve: tuple[tuple[float, float], ...]
    """Samples seen in stage 2 and its nats per token."""


@dataclass(frozen=True, slots=True)
class Mean:
    """Over seeds."""

    mean: float
    half: float | None
    """Half the width of the 95 % t-interval; None for one seed."""
    seeds: int

    def text(self, *, scale: float = 1.0, digits: int = 1, sign: str = "") -> str:
        """``mean ± half``."""
        said = f"{scale * self.mean:{sign}.{digits}f}"
        return said if self.half is None else f"{said} ± {scale * self.half:.{digits}f}"


@dataclass(frozen=True, slots=True)
class Difference:
    """A method minus the baseline at one point, seeds paired."""

    mean: Mean
    won: int
    """Seeds in which it is better."""

    @property
    def clear(self) -> bool:
        """The interval leaves out 0."""
        return self.mean.half is not None and abs(self.mean.mean) > self.mean.half


@dataclass(frozen=True, slots=True)
class Results:
    """What the cells that are finished say."""

    ablation: Ablation
    measured: tuple[Measured, ...]
    missing: tuple[str, ...]
    """Titles of cells without a result."""

    @property
    def points(self) -> list[Point]:
        """In the grid's order."""
        return list(dict.fromkeys(item.cell.point for item in self.measured))

    @property
    def methods(self) -> list[str]:
        """Labels, in the file's order."""
        there = {item.cell.method for item in self.measured}
        return [label for label in self.ablation.methods if label in there]

    @property
    def baseline(self) -> str:
        """The file's, else the first."""
        return self.ablation.baseline if self.ablation.baseline in self.methods else self.methods[0]

    @property
    def metrics(self) -> list[str]:
        """What is shown."""
        known = list(dict.fromkeys(name for item in self.measured for name in item.figures))
        if self.ablation.metrics:
            return [name for name in self.ablation.metrics if name in known]
        chosen = [name for name in known if name.endswith(".accuracy") and not name.startswith("pretrain.")]
        return chosen or [name for name in known if name.endswith(".loss")]

    def values(self, point: Point, method: str, metric: str) -> dict[int, float]:
        """Seed -> number."""
        return {
            item.cell.seed: item.figures[metric]
            for item in self.measured
            if item.cell.point == point and item.cell.method == method and metric in item.figures
        }

    def mean(self, point: Point, method: str, metric: str) -> Mean | None:
        """None where no seed has it."""
        return mean_of(list(self.values(point, method, metric).values()))

    def difference(self, point: Point, method: str, metric: str) -> Difference | None:
        """None for the baseline itself, and where no seed has both."""
        ours, base = self.values(point, method, metric), self.values(point, self.baseline, metric)
        both = sorted(ours.keys() & base.keys())
        mean = mean_of([ours[seed] - base[seed] for seed in both])
        if method == self.baseline or mean is None:
            return None
        return Difference(mean, won=sum(better(metric, ours[seed], base[seed]) for seed in both))

    def to_dict(self) -> dict[str, Any]:
        """For results.json and ``--json``."""
        rows = []
        for point in self.points:
            for method in self.methods:
                for metric in dict.fromkeys(name for item in self.measured for name in item.figures):
                    values = self.values(point, method, metric)
                    mean, difference = self.mean(point, method, metric), self.difference(point, method, metric)
                    if mean is None:
                        continue
                    row: dict[str, Any] = {"point": dict(point), "method": method, "metric": metric}
                    row |= {"mean": mean.mean, "half": mean.half, "values": values}
                    if difference is not None:
                        paired = {"mean": difference.mean.mean, "half": difference.mean.half, "won": difference.won}
                        row["difference"] = paired
                    rows.append(row)
        return {"name": self.ablation.name, "baseline": self.baseline, "rows": rows, "missing": list(self.missing)}

    def csv(self) -> str:
        """A line per cell and metric."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*self.ablation.axes, "method", "seed", "metric", "value"])
        for item in self.measured:
            for metric, value in item.figures.items():
                point = [name for _, name in item.cell.point]
                writer.writerow([*point, item.cell.method, item.cell.seed, metric, repr(value)])
        return out.getvalue()

    def text(self) -> str:
        """Tables for a terminal and for Markdown documents."""
        parts = [table for metric in self.metrics for table in self._tables(metric)]
        if self.missing:
            parts.append(f"{len(self.missing)} runs have no result yet: " + "; ".join(self.missing[:5]))
        return "\n\n".join(parts)

    def _tables(self, metric: str) -> list[str]:
        scale, unit, digits = shown_as(metric)
        head = [" / ".join(self.ablation.axes) or "point", *self.methods]
        rows, differences = [], []
        for point in self.points:
            name = " / ".join(value for _, value in point) or "all"
            means = [self.mean(point, method, metric) for method in self.methods]
            rows.append([name, *(self.cell(mean, scale, digits) for mean in means)])
            found = [self.difference(point, method, metric) for method in self.methods]
            differences.append([name, *(said(item, scale, digits) for item in found)])
        seeds = max((mean.seeds for point in self.points for mean in self._means(point, metric)), default=0)
        titles = (
            f"**{metric}**{unit}, mean over {seeds} seeds ± half of the 95 % t-interval",
            f"**{metric}**, minus {self.baseline}, paired by seed (seeds won)",
        )
        return [f"{title}\n\n{markdown(head, body)}" for title, body in zip(titles, (rows, differences), strict=True)]

    def cell(self, mean: Mean | None, scale: float, digits: int) -> str:
        """The mean; of how many seeds, where not of all (a threshold that some never reach)."""
        if mean is None:
            return ""
        of = "" if mean.seeds == len(self.ablation.seeds) else f" [{mean.seeds} of {len(self.ablation.seeds)} seeds]"
        return mean.text(scale=scale, digits=digits) + of

    def _means(self, point: Point, metric: str) -> list[Mean]:
        found = [self.mean(point, method, metric) for method in self.methods]
        return [mean for mean in found if mean is not None]


def mean_of(values: Sequence[float]) -> Mean | None:
    """Mean and 95 % t-interval over seeds."""
    if not values:
        return None
    if len(values) == 1:
        return Mean(values[0], None, 1)
    quantile = T_975[min(len(values) - 2, len(T_975) - 1)]
    spread = float(np.std(values, ddof=1))
    return Mean(float(np.mean(values)), quantile * spread / len(values) ** 0.5, len(values))


def shown_as(metric: str) -> tuple[float, str, int]:
    """Factor, unit and digits: shares in per cent, counts whole, all else with three digits."""
    if metric.endswith(("accuracy", "_share", "mean_over_kinds")):
        return 100.0, PER_CENT, 1
    return (1.0, "", 0) if metric.endswith(_COUNTS) or metric.startswith(_SAMPLES_TO) else (1.0, "", 3)


def better(metric: str, ours: float, base: float) -> bool:
    """Losses and samples to a threshold are better when they are small."""
    small = metric.endswith((".loss", *_COUNTS)) or metric.startswith(_SAMPLES_TO)
    return ours < base if small else ours > base


def said(difference: Difference | None, scale: float, digits: int) -> str:
    """``+1.2 ± 0.8 (4/5)``, in bold where the interval leaves out 0."""
    if difference is None:
        return ""
    text = difference.mean.text(scale=scale, digits=digits, sign="+")
    return f"{f'**{text}**' if difference.clear else text} ({difference.won}/{difference.mean.seeds})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def collect(ablation: Ablation, cells: Sequence[Cell]) -> Results:
    """Reads what the cells left; needs no model and no data.

    Raises:
        UserError: no cell has a result.
    """
    measured, missing = [], []
    for cell in cells:
        found = _measured(cell, ablation)
        if found is None:
            missing.append(cell.title)
        else:
            measured.append(found)
    if not measured:
        raise UserError(f"{ablation.folder}: none of {len(cells)} runs has a result yet; dpa ablate trains them")
    return Results(ablation, tuple(measured), tuple(missing))


def _measured(cell: Cell, ablation: Ablation) -> Measured | None:
    try:
        found = read_run(cell.folder)
    except UserError:
        return None
    method = found.methods[0]
    stages: dict[str, Any] = found.summary["methods"][method].get("stages", {})
    if "finetune" not in stages:
        return None
    figures: dict[str, float] = {}
    for benchmark, result in found.evaluation(method).items():
        numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
        figures |= {f"{benchmark}.{key}": float(value) for key, value in numbers.items()}
    for stage, summary in stages.items():
        figures[f"{stage}.loss"] = float(summary["loss_last"])
    curve = _curve(found, method)
    counts = {"pretrain.samples_to_threshold": samples_to(curve, ablation.threshold)}
    probes = read_probes((cell.folder / ARTEFACTS["pretrain"]).resolve().parent / PROBES)
    for name, threshold in ablation.probe_thresholds.items():
        counts[_SAMPLES_TO + name] = samples_to_probe(curve, probes, name, threshold)
    figures |= {name: count for name, count in counts.items() if count is not None}
    return Measured(cell, figures | _more(cell.folder), curve)


def _more(folder: Path) -> dict[str, float]:
    path = folder / MEASUREMENTS
    if not path.is_file():
        return {}
    tree = json.loads(path.read_text(encoding="utf-8"))
    return {name: float(value) for name, value in tree.items() if isinstance(value, int | float)}


def _curve(found: Run, method: str) -> tuple[tuple[float, float], ...]:
    rows = [row for row in found.metrics(method) if row.get("stage") == "pretrain" and row.get("nll") is not None]
    samples = np.cumsum([row["samples"] for row in rows])
    return tuple((float(seen), float(row["nll"])) for seen, row in zip(samples, rows, strict=True))


def samples_to(curve: Sequence[tuple[float, float]], threshold: float | None) -> float | None:
    """Samples of stage 2 until the mean of the last :data:`SMOOTHED` steps is below; None: not asked, or never."""
    if threshold is None or len(curve) < SMOOTHED:
        return None
    values = np.array([value for _, value in curve])
    smooth = np.convolve(values, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")
    below = np.flatnonzero(smooth < threshold)
    return curve[int(below[0]) + SMOOTHED - 1][0] if len(below) else None


def samples_to_probe(
    curve: Sequence[tuple[float, float]], probes: Sequence[Mapping[str, float]], name: str, threshold: float
) -> float | None:
    """Samples of stage 2 until a probe's number is as high as the threshold; None: never, or not probed."""
    before: tuple[float, float] | None = None
    for line in probes:
        if name not in line or not 1 <= line["step"] <= len(curve):
            continue
        at = curve[int(line["step"]) - 1][0], line[name]
        if at[1] >= threshold:
            if before is None:
                return at[0]
            return before[0] + (at[0] - before[0]) * (threshold - before[1]) / (at[1] - before[1])
        before = at
    return None


def write_results(results: Results) -> list[Path]:
    """``results.json``, ``results.csv``, ``results.md`` in the ablation's folder.

    Raises:
        StorageError, UserError: the disk is full or not writable.
    """
    folder = results.ablation.folder
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "results.json", results.to_dict())
        write_text(folder / "results.csv", results.csv())
        write_text(folder / "results.md", results.text() + "\n")
    return [folder / name for name in ("results.json", "results.csv", "results.md")]

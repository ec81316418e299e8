"""``dpa conflict --out``: one file with scores, classes, phrases and the verdict; opens anywhere, offline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpa.analyze.conflict.intervals import Estimate
from dpa.analyze.conflict.result import ClassConflict, Conflict
from dpa.analyze.conflict.text import class_row, facts_of, figure, scores_of
from dpa.analyze.conflict.verdict import Thresholds, lab_levels, thresholds_of
from dpa.store import write_output


@dataclass(frozen=True, slots=True)
class _Bar:
    """A gap and its interval, in per cent of the widest of its table."""

    start: float
    width: float
    low: float
    reach: float


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where this score lies on the lab's scale, in per cent of its length."""

    here: float
    low: float
    reach: float
    thresholds: Thresholds
    medium: float
    high: float
    marks: tuple[tuple[int, float], ...]
    """Per cent of captions in language B, place."""


def write_conflict_report(conflict: Conflict, path: Path) -> None:
    """Writes the report. All text that comes from data is escaped.

    Raises:
        StorageError, UserError: the disk is full or not writable.
    """
    environment = Environment(
        loader=PackageLoader("dpa.analyze"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("conflict.html.j2").render(
        conflict=conflict,
        verdict=conflict.verdict,
        facts=facts_of(conflict),
        scores=[(name, *figure(estimate, unit), unit) for name, estimate, unit in scores_of(conflict)],
        groups=[_group(group) for group in (conflict.truth, conflict.classes) if group],
        scale=_scale(conflict.share),
        lab=lab_levels(),
    )
    write_output(path, html)


def _group(classes: tuple[ClassConflict, ...]) -> list[tuple[ClassConflict, list[str], _Bar]]:
    lowest = min(0.0, *(item.gap.low for item in classes))
    width = max(max(item.gap.high for item in classes) - lowest, 1e-9)

    def place(value: float) -> float:
        return round(100 * (value - lowest) / width, 2)

    return [
        (
            item,
            class_row(item),
            _Bar(
                start=place(min(0.0, item.gap.value)),
                width=round(100 * abs(item.gap.value) / width, 2),
                low=place(item.gap.low),
                reach=round(100 * (item.gap.high - item.gap.low) / width, 2),
            ),
        )
        for item in classes
    ]


def _scale(share: Estimate) -> _Scale:
    levels = lab_levels()["levels"]
    thresholds = thresholds_of(levels)
    end = 1.1 * max(share.high, *(float(row["share"]["value"]) for row in levels))

    def place(value: float) -> float:
        return round(100 * min(max(value / end, 0.0), 1.0), 2)

    return _Scale(
        here=place(share.value),
        low=place(share.low),
        reach=round(place(share.high) - place(share.low), 2),
        thresholds=thresholds,
        medium=place(thresholds.medium),
        high=place(thresholds.high),
        marks=tuple((int(row["percent_b"]), place(float(row["share"]["value"]))) for row in levels),
    )

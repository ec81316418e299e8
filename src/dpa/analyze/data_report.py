"""``dpa data check --html``: one file with figures, histograms and sample images; opens anywhere, offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpa.analyze.data_text import number, rows_of, spreads_of
from dpa.data.check import Spread, StageCheck
from dpa.data.dataset import StageData
from dpa.errors import DataError
from dpa.store import write_output

_THUMBNAIL = 240
"""Pixels of the longer side."""
_TEXT = 400
"""Characters of a turn that are shown."""


@dataclass(frozen=True, slots=True)
class _Example:
    id: str
    pictures: tuple[str, ...]
    """Data URIs."""
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Bar:
    label: str
    count: int
    height: float
    """Per cent of the tallest."""


def write_data_report(
    path: Path, stages: Sequence[StageCheck], data: Sequence[StageData], *, llm: str, title: str
) -> None:
    """Writes the report.

    Args:
        path: HTML file.
        stages: what was counted.
        data: the samples of each stage, to show some.
        llm: whose tokens were counted.
        title: what was checked.

    Raises:
        StorageError, UserError: the disk is full or not writable.
    """
    environment = Environment(
        loader=PackageLoader("dpa.analyze"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    html = environment.get_template("data.html.j2").render(
        title=title,
        can_train=all(stage.refusal is None for stage in stages),
        stages=[_stage(stage, of, llm) for stage, of in zip(stages, data, strict=True)],
    )
    write_output(path, html)


def _stage(stage: StageCheck, data: StageData, llm: str) -> dict[str, Any]:
    spreads = spreads_of(stage)
    constant = [(name, f"always {number(spread.least)}") for name, spread in spreads if spread.least == spread.most]
    return {
        "check": stage,
        "rows": [(name.strip(), value) for name, value in rows_of(stage, llm)] + constant,
        "left_out": stage.samples - stage.usable,
        "histograms": [(name, spread, _bars(spread)) for name, spread in spreads if spread.least < spread.most],
        "number": number,
        "examples": [_example(data, index) for index in stage.examples],
    }


def _bars(spread: Spread) -> list[_Bar]:
    top = max(spread.counts)
    return [
        _Bar(f"{number(low)} to {number(high - 1)}", count, round(100 * count / top, 1))
        for low, high, count in zip(spread.edges, spread.edges[1:], spread.counts, strict=False)
    ]


def _example(data: StageData, index: int) -> _Example:
    sample = data.sample(index)
    names = sample.images if data.with_images else ()
    pictures = (_thumbnail(data, index, name) for name in names[:4])
    turns = tuple(
        (turn.role, turn.text if len(turn.text) <= _TEXT else f"{turn.text[:_TEXT]} …") for turn in sample.turns[:4]
    )
    return _Example(sample.id, tuple(picture for picture in pictures if picture), turns)


def _thumbnail(data: StageData, index: int, name: str) -> str | None:
    try:
        picture = data.picture(index, name)
    except DataError:  # it was fine when it was checked; the report is still worth having
        return None
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    with io.BytesIO() as file:
        picture.save(file, format="JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

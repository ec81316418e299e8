"""``report.html``: one file that says what was run, what came out and how it got there; opens anywhere, offline."""

from __future__ import annotations

import base64
import io
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpa.analyze.compare import EMPTY, compare_runs
from dpa.analyze.curves import (
    METHOD_COLOURS,
    SHARES,
    Panel,
    evaluation_panels,
    loss_panels,
    probe_panels,
    weight_panels,
)
from dpa.analyze.maps import read_maps
from dpa.analyze.report_maps import maps_of
from dpa.analyze.runs import MAPS, PROBES, Run, read_run
from dpa.data.images import load_image, safe_join
from dpa.errors import DataError
from dpa.evaluate.generate import MAX_IMAGE_PIXELS
from dpa.evaluate.tables import MISSING, AccuracyTable, accuracy_table, percent
from dpa.store import disk_errors, write_text

REPORT = "report.html"
_DATA_URI = re.compile(r"data:image/(png|jpeg|webp|gif);base64,([A-Za-z0-9+/]+=*)")
_PIXELATED_SIDE = 160
"""Pictures up to so many pixels a side are enlarged with hard edges."""
_EMBEDDED_SIDE = 640
"""Larger pictures are scaled down before they are embedded."""


@dataclass(frozen=True, slots=True)
class _Sample:
    picture: str | None
    """Data URI; None where the picture cannot be read."""
    pixelated: bool
    question: str
    answer: str
    answers: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Stage:
    method: str
    stage: str
    steps: str
    seconds: str
    tokens: str
    trainable: str
    loss: str
    reused: bool


def write_report(run_folder: Path) -> Path:
    """Writes ``report.html`` into a run's folder from what lies there; sections without material are left out.

    Reads ``summary.json``, ``recipe.yaml``, each method's ``metrics.jsonl``, ``maps.jsonl``, ``probe.jsonl`` and
    stored scores, ``samples.json``.

    Returns:
        The file's path.

    Raises:
        UserError: no run lies in the folder, or one of its files is not ours.
        StorageError, UserError: the disk is full or not writable.
    """
    run = read_run(run_folder)
    metrics = {method: run.metrics(method) for method in run.methods}
    evaluated = any(run.evaluation(method) for method in run.methods)
    comparison = compare_runs([run_folder]) if evaluated else EMPTY
    environment = Environment(
        loader=PackageLoader("dpa.analyze"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = percent
    html = environment.get_template("report.html.j2").render(
        run=run.summary,
        missing=MISSING,
        facts=_facts(run),
        tables={name: _table(columns) for name, columns in comparison.results.items()},
        comparison=comparison,
        losses=[_safe(panel) for panel in loss_panels(metrics)],
        weights=[_safe(panel) for panel in weight_panels(metrics)],
        evaluations=[_safe(panel) for panel in evaluation_panels(_of_all(run, run.evaluations))],
        probes=[_safe(panel) for panel in probe_panels(_of_all(run, lambda method: run.lines(method, PROBES)))],
        maps=maps_of({method: read_maps(run.lines(method, MAPS)) for method in run.methods}),
        shares=SHARES,
        colours={method: METHOD_COLOURS.get(method, "--ink") for method in run.methods},
        samples=_samples(run),
        stages=_stages(run),
        versions=run.summary.get("versions", {}),
        machine=run.summary.get("machine", {}),
        recipe=run.recipe_text(),
        links=[name for name in ("checkpoint", "connector", "proxy", "metrics.jsonl") if (run_folder / name).exists()],
    )
    path = run_folder / REPORT
    with disk_errors(path):
        write_text(path, html)
    return path


def _of_all(run: Run, read: Callable[[str], list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Method -> its rows, of methods that have any."""
    return {method: rows for method in run.methods if (rows := read(method))}


def _safe(panel: Panel) -> tuple[Panel, Markup]:
    """The SVG is matplotlib's, which escapes all text in it."""
    return panel, Markup(panel.svg)


def _table(columns: Mapping[str, Mapping[str, Any]]) -> tuple[AccuracyTable, list[dict[str, Any]]]:
    """The table, and for methods with any, the shares of answers that could not count."""
    names = ("empty_share", "unparsed_share", "unfinished_share")
    notes = [
        {"method": method, **{name: result.get(name) for name in names}}
        for method, result in columns.items()
        if any(result.get(name) for name in names)
    ]
    return accuracy_table(columns), notes


def _facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in a few words each."""
    summary, recipe = run.summary, run.recipe()
    model = recipe.get("model") or {}
    facts = [
        ("methods", ", ".join(run.methods)),
        *(
            [("stage 3 starts from", model["start_from"])]
            if model.get("start_from")
            else [("LLM", model.get("llm")), ("vision tower", model.get("vision_tower"))]
        ),
        ("fidelity", summary.get("fidelity")),
        ("seed", summary.get("seed")),
        ("wall time of this start", None if summary.get("seconds") is None else duration(summary["seconds"])),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def _stages(run: Run) -> list[_Stage]:
    rows = []
    for method in run.methods:
        for stage, figures in run.summary["methods"][method].get("stages", {}).items():
            seconds = figures.get("seconds")
            losses = [figures.get("loss_first"), figures.get("loss_last")]
            rows.append(
                _Stage(
                    method=method,
                    stage=stage,
                    steps=_count(figures.get("steps")),
                    seconds=MISSING if seconds is None else duration(seconds),
                    tokens=_count(figures.get("tokens")),
                    trainable=_count(figures.get("trainable_parameters")),
                    loss=" → ".join(MISSING if loss is None else f"{loss:.3f}" for loss in losses),
                    reused=bool(figures.get("reused")),
                )
            )
    return rows


def duration(seconds: float) -> str:
    """``0.4 s``, ``42 s``, ``3 min 5 s``, ``2 h 7 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{round(value):,}".replace(",", "\u202f")


def _samples(run: Run) -> list[_Sample]:
    root = (run.recipe().get("evaluate") or {}).get("data")
    samples = []
    for item in run.samples():
        picture, pixelated = _picture(str(item["image"]), None if root is None else Path(root))
        answers = {str(method): str(answer) for method, answer in item["answers"].items()}
        samples.append(_Sample(picture, pixelated, str(item["question"]), str(item["answer"]), answers))
    return samples


def _picture(image: str, root: Path | None) -> tuple[str | None, bool]:
    """(data URI or None, whether it is small): a given data URI, or a file below the data's folder."""
    if given := _DATA_URI.fullmatch(image):
        side = _png_side(given[2]) if given[1] == "png" else None
        return image, side is not None and side <= _PIXELATED_SIDE
    if root is None:
        return None, False
    try:
        picture = load_image(safe_join(root, image), max_pixels=MAX_IMAGE_PIXELS)
    except DataError:  # the data may have moved since the run; the report is still worth having
        return None, False
    small = max(picture.size) <= _PIXELATED_SIDE
    picture.thumbnail((_EMBEDDED_SIDE, _EMBEDDED_SIDE))
    with io.BytesIO() as file:
        picture.save(file, format="PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), small


def _png_side(encoded: str) -> int | None:
    """The longer side that a PNG's first chunk states; None where there is none."""
    start = base64.b64decode(encoded[:32])
    if len(start) < 24 or start[12:16] != b"IHDR":
        return None
    return int(max(struct.unpack(">II", start[16:24])))

"""``report.html`` of an ablation: one file, opens offline, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpa.ablation.collect import Results, better, shown_as
from dpa.ablation.figures import Picture
from dpa.store import disk_errors, write_text

REPORT = "report.html"


def write_report(results: Results, pictures: Sequence[Picture]) -> Path:
    """Writes it into the ablation's folder.

    Raises:
        StorageError, UserError: the disk is full or not writable.
    """
    environment = Environment(
        loader=PackageLoader("dpa.ablation", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("ablation.html.j2").render(
        results=results,
        tables=[_table(results, metric) for metric in results.metrics],
        pictures=[(picture, _data_uri(picture)) for picture in pictures],
        seeds=", ".join(map(str, results.ablation.seeds)),
    )
    path = results.ablation.folder / REPORT
    with disk_errors(path):
        write_text(path, page)
    return path


def _data_uri(picture: Picture) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(picture.svg.encode()).decode()


def _table(results: Results, metric: str) -> dict[str, object]:
    scale, unit, digits = shown_as(metric)
    rows = []
    for point in results.points:
        cells = []
        for method in results.methods:
            mean, difference = results.mean(point, method, metric), results.difference(point, method, metric)
            cells.append(
                {
                    "mean": results.cell(mean, scale, digits) or "–",
                    "difference": ""
                    if difference is None
                    else difference.mean.text(scale=scale, digits=digits, sign="+"),
                    "won": "" if difference is None else f"{difference.won} of {difference.mean.seeds} seeds",
                    "sure": ("better" if better(metric, difference.mean.mean, 0.0) else "worse")
                    if difference is not None and difference.clear
                    else "",
                }
            )
        rows.append({"name": " / ".join(value for _, value in point) or "all", "cells": cells})
    return {"metric": metric + unit, "rows": rows}

"""Pictures of an ablation: a metric over an axis with every seed as a dot, and the curves of stage 2.

Drawn without a background, in colours that are read on light and on dark pages; methods differ by mark, too.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpa.ablation.collect import PER_CENT, Measured, Point, Results, shown_as
from dpa.recipe import METHODS
from dpa.store import disk_errors

COLOURS = ("#7a808a", "#2f6fde", "#c2620a", "#0f8a77", "#9b45d6", "#c2185b", "#7c6f00", "#4d6b2a")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<")
_INK = "#808791"
_CURVE_POINTS = 120


@dataclass(frozen=True, slots=True)
class Look:
    """How a method is drawn."""

    colour: str
    mark: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """A method of dpa's looks the same in every figure; other names take what is left, in their order."""
    every = [Look(colour, mark) for colour, mark in zip(COLOURS, MARKS, strict=True)]
    own = dict(zip(METHODS, every, strict=False))
    taken = [own[name] for name in methods if name in own]
    free = [look for look in [*every[len(own) :], *own.values()] if look not in taken] or every
    others = [name for name in methods if name not in own]
    found = own | {name: free[number % len(free)] for number, name in enumerate(others)}
    return {name: found[name] for name in methods}


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure in two formats."""

    name: str
    title: str
    about: str
    """For readers who do not see it."""
    svg: str
    png: bytes


def pictures_of(results: Results) -> list[Picture]:
    """One per metric and axis, one of the curves of stage 2."""
    found = []
    for metric in results.metrics:
        for axis in list(results.ablation.axes) or [""]:
            found.append(_over_axis(results, metric, axis))
    if any(item.curve for item in results.measured):
        found.append(_curves(results))
    return found


def write_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """NAME.png and NAME.svg each.

    Raises:
        StorageError, UserError: the disk is full or not writable.
    """
    paths = []
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            for suffix, content in (("svg", picture.svg.encode()), ("png", picture.png)):
                paths.append(folder / f"{picture.name}.{suffix}")
                paths[-1].write_bytes(content)
    return paths


def _over_axis(results: Results, metric: str, axis: str) -> Picture:
    """x: the axis' points, or the methods where there is no axis; the other axes' points side by side in panels."""
    panels: dict[Point, list[Point]] = {}
    for point in results.points:
        panels.setdefault(tuple(pair for pair in point if pair[0] != axis), []).append(point)
    scale, unit, _ = shown_as(metric)
    figure = Figure(figsize=(1.4 + 3.4 * len(panels), 3.2), layout="constrained")
    drawn: list[Axes] = list(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0])
    look_of = looks(results.methods)
    for place, (axes, (others, points)) in enumerate(zip(drawn, panels.items(), strict=True)):
        names = [dict(point)[axis] for point in points] if axis else results.methods
        for number, method in enumerate(results.methods):
            for at, point in enumerate(points):
                x = (at if axis else number) + (0.09 * (number - (len(results.methods) - 1) / 2) if axis else 0)
                _dots(axes, results, point, method, metric, x, scale, look_of[method])
        axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 8 else 25)
        axes.set_title(", ".join(f"{name} {value}" for name, value in others), fontsize=9)
        axes.set_xlabel(axis)
        axes.grid(axis="y", alpha=0.25)
        if place == 0:
            axes.set_ylabel(metric + unit)
    if unit == PER_CENT:  # an interval of few seeds may reach beyond what there is
        low, high = drawn[0].get_ylim()
        drawn[0].set_ylim(max(low, -2.0), min(high, 102.0))
    if axis:
        _legend(drawn[-1], results.methods)
    over = f" over {axis}" if axis else " by method"
    name = f"{metric}-{axis}" if axis else metric
    return _picture(figure, name, f"{metric}{over}", f"{metric}{over}: dots are seeds, bars 95 % intervals of the mean")


def _dots(
    axes: Axes, results: Results, point: Point, method: str, metric: str, x: float, scale: float, look: Look
) -> None:
    values = list(results.values(point, method, metric).values())
    mean = results.mean(point, method, metric)
    if mean is None:
        return
    axes.plot(
        [x] * len(values), [scale * value for value in values], look.mark, color=look.colour, alpha=0.4, markersize=4
    )
    half = None if mean.half is None else scale * mean.half
    axes.errorbar(x, scale * mean.mean, yerr=half, fmt="_", color=look.colour, capsize=3, markersize=9, linewidth=1.4)


def _curves(results: Results) -> Picture:
    points = results.points
    figure = Figure(figsize=(1.4 + 3.4 * len(points), 3.0), layout="constrained")
    drawn: list[Axes] = list(figure.subplots(1, len(points), sharey=True, squeeze=False)[0])
    look_of = looks(results.methods)
    for axes, point in zip(drawn, points, strict=True):
        for item in results.measured:
            if item.cell.point == point:
                xs, ys = _thinned(item)
                axes.plot(xs, ys, color=look_of[item.cell.method].colour, linewidth=0.9, alpha=0.7)
        axes.set_title(", ".join(f"{name} {value}" for name, value in point), fontsize=9)
        axes.set_xlabel("samples of stage 2")
        axes.grid(alpha=0.25)
        if results.ablation.threshold is not None:
            axes.axhline(results.ablation.threshold, color=_INK, linewidth=0.8, linestyle=":")
    drawn[0].set_ylabel("nats per token")
    _legend(drawn[-1], results.methods)
    return _picture(figure, "curves", "stage 2, every seed", "Nats per token over samples of stage 2, a line per run")


def _thinned(item: Measured) -> tuple[list[float], list[float]]:
    width = max(1, -(-len(item.curve) // _CURVE_POINTS))
    chunks = [item.curve[start : start + width] for start in range(0, len(item.curve), width)]
    return [chunk[-1][0] for chunk in chunks], [sum(value for _, value in chunk) / len(chunk) for chunk in chunks]


def _legend(axes: Axes, methods: Sequence[str]) -> None:
    look_of = looks(methods)
    for method in methods:
        axes.plot([], [], look_of[method].mark, color=look_of[method].colour, label=method, markersize=4)
    axes.legend(fontsize=7, frameon=False, labelcolor=_INK, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _picture(figure: Figure, name: str, title: str, about: str) -> Picture:
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=_INK, labelsize=8)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(_INK)
            text.set_fontsize(9)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
    figure.patch.set_alpha(0)
    with matplotlib.rc_context({"svg.hashsalt": "dpa", "svg.fonttype": "none", "font.family": ["sans-serif"]}):
        vector, bitmap = io.StringIO(), io.BytesIO()
        figure.savefig(vector, format="svg", metadata={"Date": None})
        figure.savefig(bitmap, format="png", dpi=130, facecolor="white")
    return Picture(name, title, about, vector.getvalue(), bitmap.getvalue())

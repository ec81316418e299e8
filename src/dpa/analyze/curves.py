"""Curves of a run as small inline SVGs: pure functions from metrics to text.

Colours are names of CSS variables, so that one picture serves the light and the dark page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

METHOD_COLOURS: dict[str, str] = {
    "dpa": "--dpa",
    "vanilla": "--vanilla",
    "cal": "--cal",
    "pmo": "--pmo",
    "cmo": "--cmo",
    "dpa-prior": "--prior",
}
"""Method -> CSS variable; ``--ink`` for others."""
SHARES: dict[str, tuple[str, str]] = {
    "effective": ("effective tokens of all: (Σw)² / Σw² / n", "--ink"),
    "share_at_minimum": ("tokens at the lower bound", "--low"),
    "share_at_maximum": ("tokens at the upper bound", "--high"),
}
"""What a weight-health panel shows: line -> (legend, CSS variable)."""
_DASHES: dict[str, str] = {"vanilla": "--", "cal": "-.", "pmo": ":"}
"""So that methods differ without colour too."""
POINTS = 300
"""Points of a line at most."""
MARKED = 12
"""Up to so many points of a line are marked: between them nothing was measured."""
_UNIFORM = 1e-6


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture."""

    title: str
    about: str
    """Text for readers who do not see it."""
    svg: str


@dataclass(frozen=True, slots=True)
class _Line:
    colour: str
    dash: str
    steps: list[float]
    values: list[float]


Metrics = Mapping[str, Sequence[Mapping[str, Any]]]
"""Method -> rows of metrics.jsonl."""


def loss_panels(metrics: Metrics) -> list[Panel]:
    """One panel per stage: nats per supervised token over optimizer steps, a line per method.

    Drawn is ``nll``, the mean without the objective's weights: the trained loss of two objectives cannot be compared.
    """
    panels = []
    for stage in _stages(metrics):
        lines = _lines(metrics, stage, "nll")
        if lines:
            last = ", ".join(f"{method} {line.values[-1]:.3f}" for method, line in lines.items())
            panels.append(_panel(stage, f"Nats per token over steps of stage {stage}; last: {last}", lines))
    return panels


def weight_panels(metrics: Metrics) -> list[Panel]:
    """Weight health of the stages whose weights are not uniform: mean weight of all methods, then shares of each."""
    panels = []
    for stage in _stages(metrics):
        means = {
            method: line
            for method, line in _lines(metrics, stage, "mean_weight").items()
            if any(abs(value - 1) > _UNIFORM for value in line.values)
        }
        if not means:
            continue
        last = ", ".join(f"{method} {line.values[-1]:.3f}" for method, line in means.items())
        panels.append(_panel(f"{stage}: mean weight", f"Mean weight over steps of stage {stage}; last: {last}", means))
        for method in means:
            shares = _share_lines([row for row in metrics[method] if row.get("stage") == stage])
            if shares:
                title = f"{stage}: weights of {method}"
                panels.append(_panel(title, f"Shares over steps, stage {stage}, method {method}", shares, top=1.0))
    return panels


def evaluation_panels(evaluations: Metrics) -> list[Panel]:
    """One panel per benchmark asked while stage 3 trained: per cent right over optimizer steps, a line per method."""
    names = dict.fromkeys(name for rows in evaluations.values() for row in rows for name in row["benchmarks"])
    panels = []
    for name in names:
        asked = {
            method: [
                {"step": row["step"], "right": 100 * row["benchmarks"][name]["accuracy"], **row["benchmarks"][name]}
                for row in rows
                if name in row["benchmarks"]
            ]
            for method, rows in evaluations.items()
        }
        counts = sorted({row["n"] for rows in asked.values() for row in rows})
        title = f"{name}, {' to '.join(str(count) for count in counts[:: max(1, len(counts) - 1)])} questions"
        panels += _of_methods(title, f"Per cent right over steps, {name}", asked, "right")
    return panels


def probe_panels(probes: Metrics) -> list[Panel]:
    """The lab's words over the steps of stage 2 (names of ``lab.probe.probe``): per language the log-probability of
    visual and of linguistic words and the ROC-AUC of each relevance, a line per method."""
    panels = []
    for language in ("a", "b"):
        of = f"captions in {language.upper()}"
        for words in ("visual", "linguistic"):
            title = f"{words} words, log-probability, {of}"
            panels += _of_methods(title, title, probes, f"{words}_logp_{language}")
        for kind in ("cmo", "cal", "prior"):
            title = f"ROC-AUC of {kind}, {of}"
            panels += _of_methods(title, title, probes, f"auc_{kind}_{language}")
    return panels


def _of_methods(title: str, about: str, metrics: Metrics, name: str) -> list[Panel]:
    """One panel, or none where no row has the name."""
    lines = {method: _line(method, *averaged(rows, name)) for method, rows in metrics.items()}
    lines = {method: line for method, line in lines.items() if line.steps}
    last = ", ".join(f"{method} {line.values[-1]:.3f}" for method, line in lines.items())
    return [_panel(title, f"{about}; last: {last}", lines)] if lines else []


def _line(method: str, steps: list[float], values: list[float]) -> _Line:
    return _Line(METHOD_COLOURS.get(method, "--ink"), _DASHES.get(method, "-"), steps, values)


def _stages(metrics: Metrics) -> list[str]:
    return list(dict.fromkeys(str(row["stage"]) for rows in metrics.values() for row in rows if "stage" in row))


def _lines(metrics: Metrics, stage: str, name: str) -> dict[str, _Line]:
    lines = {}
    for method, rows in metrics.items():
        steps, values = averaged([row for row in rows if row.get("stage") == stage], name)
        if steps:
            lines[method] = _line(method, steps, values)
    return lines


def _share_lines(rows: Sequence[Mapping[str, Any]]) -> dict[str, _Line]:
    full = [
        {**row, "effective": row["effective_tokens"] / row["tokens"]}
        for row in rows
        if row.get("tokens") and "effective_tokens" in row
    ]
    lines = {}
    for name, (_, colour) in SHARES.items():
        steps, values = averaged(full, name)
        if steps:
            lines[name] = _Line(colour, "-", steps, values)
    return lines


def averaged(rows: Sequence[Mapping[str, Any]], name: str, *, points: int = POINTS) -> tuple[list[float], list[float]]:
    """(steps, values) of the rows that have both; neighbours are averaged where there are more than ``points``."""
    pairs = [(float(row["step"]), float(row[name])) for row in rows if "step" in row and row.get(name) is not None]
    width = max(1, -(-len(pairs) // points))
    chunks = [pairs[start : start + width] for start in range(0, len(pairs), width)]
    means = [[sum(column) / len(chunk) for column in zip(*chunk, strict=True)] for chunk in chunks]
    return [mean[0] for mean in means], [mean[1] for mean in means]


def _panel(title: str, about: str, lines: Mapping[str, _Line], *, top: float | None = None) -> Panel:
    placeholders: dict[str, str] = {}

    def ink(variable: str) -> str:
        """matplotlib takes no CSS variables: a colour that occurs nowhere else stands for each."""
        return placeholders.setdefault(variable, f"#0a0b{len(placeholders):02x}")

    figure = Figure(figsize=(3.6, 2.2))
    axes = figure.add_axes((0.13, 0.16, 0.84, 0.8))
    for line in lines.values():
        axes.plot(
            line.steps,
            line.values,
            color=ink(line.colour),
            linestyle=line.dash,
            marker="o" if len(line.steps) <= MARKED else "",
            markersize=3.5,
            linewidth=1.6,
            solid_joinstyle="round",
        )
    _dress(axes, ink("--soft"), ink("--line"))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_xlabel("step", color=ink("--soft"), fontsize=8, loc="right", labelpad=1)
    if top is not None:
        axes.set_ylim(0, top * 1.02)
    silent = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}), StringIO() as file:
        figure.savefig(file, format="svg", metadata=silent)
        svg = file.getvalue()
    return Panel(title=title, about=about, svg=_inline(svg, placeholders, about, prefix=_slug(title)))


def _dress(axes: Axes, soft: str, line: str) -> None:
    axes.patch.set_alpha(0)
    axes.get_figure(root=True).patch.set_alpha(0)  # type: ignore[union-attr]
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(line)
    axes.grid(axis="y", color=line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=soft, labelsize=8, length=0)
    axes.margins(x=0.01)
    axes.locator_params(nbins=5)


def _inline(svg: str, placeholders: Mapping[str, str], about: str, *, prefix: str) -> str:
    """The svg element alone: CSS variables for colours, the page's font, no style sheet, ids of its own on the page."""
    svg = svg[svg.index("<svg") :]
    for variable, colour in placeholders.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    referenced = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referenced else "", svg)
    svg = re.sub(r' id="', f' id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None, "matplotlib writes a viewBox"
    label = about.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    body = svg[svg.index(">") + 1 :]
    return f'<svg role="img" aria-label="{label}" {view[0]}>{body}'


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")

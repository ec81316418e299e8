"""Figures of runs for a document: ``python scripts/run_figures.py RUN... [--curves FILE]``.

Prints Markdown: loss per stage (nats per supervised token without the objective's weights, so that methods can be
compared; mean of the first and the last 20 steps) and held-out accuracy. ``--curves`` draws the losses; the suffix
(.svg, .png) decides the format. There the faint line is each step, the strong one a mean over 20.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpa.analyze.curves import averaged
from dpa.analyze.runs import Run, read_run
from dpa.recipe import STAGES

COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#a21caf")
WIDTH = 20
"""Steps that are averaged."""

Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    """Prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--curves", type=Path)
    options = parser.parse_args()
    runs = [read_run(folder) for folder in options.runs]
    print("\n".join([*losses(runs), "", *accuracies(runs)]))
    if options.curves is not None:
        draw(runs, options.curves)


def losses(runs: Sequence[Run]) -> list[str]:
    """A row per run, method and stage."""
    lines = [
        "| run | method | stage | steps | nats per token, first -> last | seconds a step |",
        "|---|---|---|---|---|---|",
    ]
    for run, method, stage, rows in stages_of(runs):
        first, last = (mean(part, "nll") for part in (rows[:WIDTH], rows[-WIDTH:]))
        seconds = mean(rows, "seconds")
        lines.append(f"| {run.name} | {method} | {stage} | {len(rows)} | {first:.3f} -> {last:.3f} | {seconds:.1f} |")
    return lines


def accuracies(runs: Sequence[Run]) -> list[str]:
    """A row per kind of question and one for all, a column per run and method."""
    found = {f"{run.name}, {method}": run.evaluation(method).get("lab") for run in runs for method in run.methods}
    results = {name: result for name, result in found.items() if result is not None}
    if not results:
        return ["(no run has evaluated yet)"]
    some = next(iter(results.values()))
    lines = ["| % right (blind) | n | chance | " + " | ".join(results) + " |", "|---|---|---|" + "---|" * len(results)]
    for kind, row in some["by_kind"].items():
        cells = [pair(result["by_kind"][kind]) for result in results.values()]
        lines.append(f"| {kind} | {row['n']} | {row['chance']:.1%} | " + " | ".join(cells) + " |")
    cells = [f"**{pair(result)}**" for result in results.values()]
    lines.append(f"| all | {some['n']} | {some['chance']:.1%} | " + " | ".join(cells) + " |")
    cells = ["{:.1%} to {:.1%}".format(*result["accuracy_interval"]) for result in results.values()]
    lines.append("| 95 % interval | | | " + " | ".join(cells) + " |")
    return lines


def draw(runs: Sequence[Run], out: Path) -> None:
    """A panel per stage, a line per run and method."""
    found = list(stages_of(runs))
    stages = [stage for stage in STAGES if any(stage == name for _, _, name, _ in found)]
    labels = list(dict.fromkeys(f"{run.name}, {method}" for run, method, _, _ in found))
    figure = Figure(figsize=(3.4 * len(stages), 2.6), layout="constrained")
    panels: dict[str, Axes] = {
        stage: figure.add_subplot(1, len(stages), number) for number, stage in enumerate(stages, 1)
    }
    for run, method, stage, rows in found:
        label = f"{run.name}, {method}"
        colour = COLOURS[labels.index(label) % len(COLOURS)]
        panels[stage].plot(*averaged(rows, "nll", points=len(rows)), color=colour, linewidth=0.7, alpha=0.3)
        smooth = averaged(rows, "nll", points=max(1, len(rows) // WIDTH))
        panels[stage].plot(*smooth, color=colour, linewidth=1.8, label=label)
    for stage, axes in panels.items():
        axes.set_title(stage, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    figure.axes[0].set_ylabel("nats per token", fontsize=8)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    undated = {"Date": None} if out.suffix == ".svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "dpa"}):
        figure.savefig(out, dpi=110, facecolor="white", metadata=undated)


def stages_of(runs: Sequence[Run]) -> list[tuple[Run, str, str, Rows]]:
    """(run, method, stage, rows of metrics.jsonl), in order; only what has rows."""
    split = [
        (run, method, stage, [row for row in run.metrics(method) if row.get("stage") == stage])
        for run in runs
        for method in run.methods
        for stage in STAGES
    ]
    return [item for item in split if item[3]]


def mean(rows: Rows, name: str) -> float:
    """Of a column."""
    return float(sum(row[name] for row in rows) / len(rows))


def pair(result: Mapping[str, Any]) -> str:
    """Accuracy with and (blind) without the picture."""
    blind = result.get("blind_accuracy")
    return f"{result['accuracy']:.1%}" + ("" if blind is None else f" ({blind:.1%})")


if __name__ == "__main__":
    main()

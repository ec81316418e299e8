"""Loss per stage of one or more runs as a picture for a document: ``python scripts/draw_curves.py RUN... --out FILE``.

The suffix of FILE (.svg, .png) decides the format. Drawn is ``nll``, nats per supervised token without the objective's
weights, so that methods can be compared; the faint line is each step, the strong one a mean over 20.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from dpa.analyze.curves import averaged
from dpa.analyze.runs import read_run
from dpa.recipe import STAGES

COLOURS = {"dpa": "#c2410c", "vanilla": "#1d4ed8", "cal": "#15803d", "pmo": "#a21caf", "cmo": "#a16207"}
WIDTH = 20
"""Steps that the strong line averages."""


def main() -> None:
    """Draws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = {method: run.metrics(method) for run in map(read_run, options.runs) for method in run.methods}
    stages = [stage for stage in STAGES if any(row.get("stage") == stage for rows in lines.values() for row in rows)]
    figure = Figure(figsize=(3.4 * len(stages), 2.6), layout="constrained")
    for number, stage in enumerate(stages, 1):
        axes = figure.add_subplot(1, len(stages), number)
        for method, rows in lines.items():
            chosen = [row for row in rows if row.get("stage") == stage]
            for points, width, alpha in ((len(chosen) or 1, 0.7, 0.3), (max(1, len(chosen) // WIDTH), 1.8, 1.0)):
                steps, values = averaged(chosen, "nll", points=points)
                label = method if alpha == 1.0 else None
                axes.plot(
                    steps, values, color=COLOURS.get(method, "#444444"), linewidth=width, alpha=alpha, label=label
                )
        axes.set_title(stage, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("nats per token" if number == 1 else "", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    figure.axes[-1].legend(frameon=False, fontsize=8)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "dpa"}):
        figure.savefig(
            options.out, dpi=110, facecolor="white", metadata={"Date": None} if options.out.suffix == ".svg" else None
        )


if __name__ == "__main__":
    main()

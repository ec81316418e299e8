"""The paper's table for one checkpoint: a line per benchmark, their average, the paper's figures beside them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dpa.evaluate.paper import PaperRow
from dpa.evaluate.settings import PAPER
from dpa.evaluate.tables import MISSING, percent

TITLES: dict[str, str] = {
    "mmbench": "MMBench",
    "ai2d": "AI2D",
    "docvqa": "DocVQA",
    "ocrbench": "OCRBench",
    "cvbench": "CV-Bench",
    "mmvp": "MMVP",
    "naturalbench": "NaturalBench",
}
"""As the paper writes them."""


def average(results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Plain mean of the seven headline numbers, 0 to 100; None unless all seven are there."""
    if not all(name in results for name in PAPER):
        return None
    return sum(100 * float(results[name]["accuracy"]) for name in PAPER) / len(PAPER)


def overview(results: Mapping[str, Mapping[str, Any]], paper: PaperRow | None = None) -> str:
    """Plain text.

    Args:
        results: benchmark -> result as in summary.json; at least one of the seven.
        paper: figures to stand beside the average.
    """
    shown: dict[str, Mapping[str, Any]] = {name: results[name] for name in PAPER if name in results}
    partial = any(result["partial"] for result in shown.values())
    methods = {} if paper is None else paper.averages
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("benchmark")
    for head in ("number", "95 % interval", "n", "unparsed %", "empty %", *(f"paper {name}" for name in methods)):
        table.add_column(head, justify="right")
    for name, result in shown.items():
        interval = "{}–{}".format(*(percent(bound) for bound in result["accuracy_interval"]))
        shares = [percent(result["unparsed_share"]), percent(result["empty_share"])]
        title = TITLES[name] + (" (partial)" if result["partial"] else "")
        table.add_row(
            title, percent(result["accuracy"]), interval, str(result["n"]), *shares, *[MISSING] * len(methods)
        )
    mean = average(results)
    if mean is not None:
        figures = [f"{value:.1f}" for value in methods.values()]
        title = "average (partial)" if partial else "average"
        table.add_row(title, f"{mean:.1f}", "", "", "", "", *figures, style="bold")
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    lines = [line.rstrip() for line in captured.get().strip("\n").split("\n")]
    # not the table's own title, which would be wrapped to the table's width
    return "\n".join([_title(shown, partial), *lines, *_notes(paper, mean, partial)])


def _title(shown: Mapping[str, Mapping[str, Any]], partial: bool) -> str:
    first = next(iter(shown.values()))
    rules = f"profile {first['profile']}, VLMEvalKit {first['vlmevalkit']}, judge {first['judge']}"
    return f"% right; {rules}" + ("; partial: first questions only" if partial else "")


def _notes(paper: PaperRow | None, mean: float | None, partial: bool) -> list[str]:
    if paper is None:
        return []
    notes = [f"paper: {paper.llm}, {paper.captions}; only its averages are known here (arXiv 2509.14735)"]
    if mean is None:
        notes.append("no average: it needs all seven (--benchmarks paper)")
    elif partial:
        notes.append("a partial result is not comparable with the paper's")
    return notes

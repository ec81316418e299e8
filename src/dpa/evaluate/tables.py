"""Accuracies side by side: kinds of questions as rows, methods as columns, each with its blind accuracy beside it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

MISSING = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """A method's figures in a row, as text in per cent."""

    accuracy: str
    blind: str
    interval: str = ""
    """95 %, where the row has one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of questions, or a summary over them."""

    name: str
    n: str
    chance: str
    cells: tuple[Cell, ...]
    """One per method."""
    total: bool = False


@dataclass(frozen=True, slots=True)
class AccuracyTable:
    """What is shown, in any medium."""

    methods: tuple[str, ...]
    rows: tuple[Row, ...]

    def rich(self, title: str | None = None) -> Table:
        """For a terminal."""
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("% right")
        table.add_column("n", justify="right")
        for method in self.methods:
            table.add_column(escape(method), justify="right")
            table.add_column("blind", justify="right", style="dim")
        table.add_column("chance", justify="right", style="dim")
        for row, texts in self._lines():
            table.add_row(*map(escape, texts), style="bold" if row.total else None)
        return table

    def text(self, title: str | None = None) -> str:
        """The same as plain characters, as wide as it needs to be."""
        console = Console(file=io.StringIO(), width=1000, color_system=None)
        with console.capture() as captured:
            console.print(self.rich(title))
        return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))

    def markdown(self) -> str:
        """For a README; ends without a newline."""
        heads = ["% right", "n", *(head for method in self.methods for head in (method, "blind")), "chance"]
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
        for row, texts in self._lines():
            lines.append([f"**{text}**" if text else "" for text in texts] if row.total else texts)
        return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)

    def _lines(self) -> Iterator[tuple[Row, list[str]]]:
        """Rows as texts; intervals get a line of their own, or two methods would not fit into 80 characters."""
        for row in self.rows:
            yield row, [row.name, row.n, *(t for cell in row.cells for t in (cell.accuracy, cell.blind)), row.chance]
            if any(cell.interval for cell in row.cells):
                interval = replace(row, name="95 % interval", total=False)
                yield interval, [interval.name, "", *(t for cell in row.cells for t in (cell.interval, "")), ""]


def accuracy_table(results: Mapping[str, Mapping[str, Any]]) -> AccuracyTable:
    """From results as summary.json holds them (``LabResult.to_dict()``).

    Args:
        results: method (or whatever names a column) -> result. Kinds may differ between results.

    Returns:
        Kinds in order of appearance, then the mean over kinds, then all questions with the 95 % interval.
    """
    kinds = list(dict.fromkeys(kind for result in results.values() for kind in result["by_kind"]))
    rows = [_kind_row(kind, results) for kind in kinds]
    rows.append(
        Row(
            name="mean over kinds",
            n="",
            chance="",
            cells=tuple(
                Cell(percent(result["mean_over_kinds"]), percent(result["blind_mean_over_kinds"]))
                for result in results.values()
            ),
            total=True,
        )
    )
    rows.append(
        Row(
            name="all questions",
            n=_same([str(result["n"]) for result in results.values()]),
            chance=_same([percent(result["chance"]) for result in results.values()]),
            cells=tuple(
                Cell(
                    percent(result["accuracy"]),
                    percent(result["blind_accuracy"]),
                    "{}–{}".format(*(percent(bound) for bound in result["accuracy_interval"])),
                )
                for result in results.values()
            ),
            total=True,
        )
    )
    return AccuracyTable(methods=tuple(results), rows=tuple(rows))


def percent(share: float | None) -> str:
    """One decimal, without the sign."""
    return MISSING if share is None else f"{100 * share:.1f}"


def _kind_row(kind: str, results: Mapping[str, Mapping[str, Any]]) -> Row:
    found = [result["by_kind"].get(kind) for result in results.values()]
    there = [row for row in found if row is not None]
    return Row(
        name=kind,
        n=_same([str(row["n"]) for row in there]),
        chance=_same([percent(row["chance"]) for row in there]),
        cells=tuple(
            Cell(MISSING, MISSING) if row is None else Cell(percent(row["accuracy"]), percent(row["blind_accuracy"]))
            for row in found
        ),
    )


def _same(texts: list[str]) -> str:
    """One text where all columns agree; all of them where the columns are about different questions."""
    return " / ".join(dict.fromkeys(texts))

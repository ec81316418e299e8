"""A table of methods as plain text, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dpa.analyze.methods import SHOWN, MethodRow, MethodTable, Number
from dpa.evaluate.tables import MISSING

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "±": r"$\pm$",
}

_BOLD, _BOTH = "\\textbf{{{}}}", "{} {{\\scriptsize [{}]}}"


def as_text(table: MethodTable) -> str:
    """For a terminal; as wide as it needs to be."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("% right")
    for head in _heads(table):
        shown.add_column(escape(head), justify="right")
    for row in table.rows:
        shown.add_row(*map(escape, [row.name, *_texts(table, row), _wins(row)]))
        intervals = [_interval(row.numbers.get(name)) for name in table.benchmarks]
        if any(intervals):
            shown.add_row("  95 % interval", *intervals, "", style="dim")
    for row in table.paper:
        shown.add_row(*map(escape, [row.name, *_texts(table, row), ""]), style="italic")
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    with console.capture() as captured:
        console.print(shown)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").split("\n"))


def as_markdown(table: MethodTable) -> str:
    """For a README; the best of the measured rows is bold."""
    lines = [["% right", *_heads(table)], ["---", *["---:"] * (len(table.benchmarks) + 1)]]
    for row in table.rows:
        cells = [_with_interval(table, row, name, "**{}**", "{} [{}]") for name in table.benchmarks]
        lines.append([row.name, *cells, _wins(row)])
    lines += [[row.name, *_texts(table, row), ""] for row in table.paper]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def as_latex(table: MethodTable) -> str:
    """A ``tabular`` for the package booktabs; the best of the measured rows is bold."""
    heads = " & ".join(map(latex, ["% right", *_heads(table)]))
    lines = [
        "% needs \\usepackage{booktabs}; small figures: 95 % intervals, bootstrap over groups",
        f"\\begin{{tabular}}{{l{'r' * (len(table.benchmarks) + 1)}}}",
        "\\toprule",
        f"{heads} \\\\",
        "\\midrule",
    ]
    for row in table.rows:
        cells = [
            _with_interval(table, row, name, "\\textbf{{{}}}", "{} {{\\scriptsize [{}]}}", latex)
            for name in table.benchmarks
        ]
        lines.append(" & ".join([latex(row.name), *cells, _wins(row)]) + " \\\\")
    if table.paper:
        lines.append("\\midrule")
    lines += [" & ".join([latex(row.name), *map(latex, _texts(table, row)), ""]) + " \\\\" for row in table.paper]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])


def as_csv(table: MethodTable) -> str:
    """One line per number, unrounded: method, benchmark, value, low, high, sem, seeds, n, source."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "benchmark", "value", "low", "high", "sem", "seeds", "n", "source"])
    for source, rows in (("measured", table.rows), ("paper", table.paper)):
        for row in rows:
            for name in table.benchmarks:
                number = row.numbers.get(name)
                if number is not None:
                    low, high = number.interval or (None, None)
                    writer.writerow([row.name, name, number.value, low, high, number.sem, row.seeds, number.n, source])
    return out.getvalue().rstrip("\n")


def latex(text: str) -> str:
    """Escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _heads(table: MethodTable) -> list[str]:
    return [*(SHOWN.get(name, name) for name in table.benchmarks), "wins"]


def _texts(table: MethodTable, row: MethodRow) -> list[str]:
    return [_text(row.numbers.get(name)) for name in table.benchmarks]


def _text(number: Number | None) -> str:
    if number is None:
        return MISSING
    return f"{number.value:.1f}" + ("" if number.sem is None else f" ± {number.sem:.1f}")


def _interval(number: Number | None) -> str:
    return "" if number is None or number.interval is None else "{:.1f}–{:.1f}".format(*number.interval)


def _with_interval(
    table: MethodTable, row: MethodRow, name: str, bold: str, both: str, clean: Callable[[str], str] = str
) -> str:
    number = row.numbers.get(name)
    text = clean(_text(number))
    if number is not None and number.value == table.best(name):
        text = bold.format(text)
    found = clean(_interval(number))
    return both.format(text, found) if found else text


def _wins(row: MethodRow) -> str:
    return "" if row.wins is None else f"{row.wins:g}"

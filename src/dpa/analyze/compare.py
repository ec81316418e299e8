"""Methods of runs, checkpoints and folders of scores side by side, with paired differences on the same questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpa.analyze.columns import Column, combined, read_columns, stacked
from dpa.analyze.formats import as_csv, as_latex, as_markdown, as_text
from dpa.analyze.methods import AVERAGE, SHOWN, MethodTable, Paper, averaged_benchmarks, draws_of, method_table
from dpa.errors import UserError
from dpa.evaluate.paper import paper_row
from dpa.evaluate.scores import Scored
from dpa.evaluate.settings import PAPER
from dpa.evaluate.statistics import Floats, Units, interval, paired, resample
from dpa.evaluate.tables import accuracy_table
from dpa.store import write_output

BASELINE = "vanilla"

LETTER_RULES = ("mmbench", "ai2d")
"""Benchmarks whose answers are read by VLMEvalKit's letter rules, which depend on its date."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A column minus its baseline on the same questions."""

    benchmark: str
    """Or ``average``: of the benchmarks' averages."""
    column: str
    baseline: str
    n: int
    groups: int
    difference: float
    """Of the accuracies, -1 to 1."""
    interval: tuple[float, float]
    """95 %, paired bootstrap over groups (scenes), and over seeds where there are several."""
    better: float
    """Share of the resamples in which the column is above its baseline, ties half."""
    groups_won: int
    groups_lost: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``dpa compare`` prints."""

    table: MethodTable
    results: dict[str, dict[str, dict[str, Any]]]
    """Benchmark -> column (method, or run/method) -> result as in summary.json, where there is one."""
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """Pairs that could not be made, and why."""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "table": self.table.to_dict(),
            "results": self.results,
            "differences": [asdict(item) for item in self.differences],
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """For a terminal."""
        parts = [as_text(self.table)] if len(self.table.rows) + len(self.table.benchmarks) > 2 else []
        parts += [_sentence(item) for item in self.differences if item.benchmark == AVERAGE]
        for benchmark in self.table.benchmarks:
            columns = self.results.get(benchmark)
            if columns:
                parts.append(accuracy_table(columns).text(title=SHOWN.get(benchmark, benchmark)))
            found = [_sentence(item) for item in self.differences if item.benchmark == benchmark]
            parts += found if benchmark != AVERAGE else []
        return "\n".join([*parts, *self.notes])

    def markdown(self) -> str:
        """For a document."""
        parts = [as_markdown(self.table)]
        for benchmark in self.table.benchmarks:
            columns = self.results.get(benchmark)
            if columns:
                parts.append(f"### {SHOWN.get(benchmark, benchmark)}\n\n{accuracy_table(columns).markdown()}")
            found = [f"- {_sentence(item)}" for item in self.differences if item.benchmark == benchmark]
            parts += ["\n".join(found)] if found else []
        return "\n\n".join([*parts, *self.notes])

    def latex(self) -> str:
        """The table; differences and notes as comments below."""
        names = ("" if item.benchmark == AVERAGE else f"{item.benchmark}: " for item in self.differences)
        below = [*(name + _sentence(item) for name, item in zip(names, self.differences, strict=True)), *self.notes]
        return "\n".join([as_latex(self.table), *(f"% {line}" for line in below)])

    def csv(self) -> str:
        """The table, one line per number."""
        return as_csv(self.table)


EMPTY = Comparison(MethodTable((), ()), {}, (), ())
"""Of nothing."""

FORMATS: dict[str, Callable[[Comparison], str]] = {
    "text": Comparison.text,
    "markdown": Comparison.markdown,
    "latex": Comparison.latex,
    "csv": Comparison.csv,
    "json": lambda comparison: json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False),
}


def render(comparison: Comparison, form: str) -> str:
    """Raises UserError for a format that is not in ``FORMATS``."""
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose {', '.join(FORMATS)}")
    return FORMATS[form](comparison)


def save(text: str, path: Path) -> None:
    """Writes a rendered comparison. Raises StorageError, UserError where it cannot be written."""
    write_output(path, text + "\n")


def compare_runs(
    folders: Sequence[Path], *, paper: Paper | None = None, combine: bool = True, baseline: str | None = None
) -> Comparison:
    """Reads summaries and stored scores; no model, no data set.

    A run's baseline is its own ``vanilla``; else the first ``vanilla`` of all; else the first column.

    Args:
        folders: see :func:`dpa.analyze.columns.read_columns`.
        paper: rows of the paper to show below the measured ones, where the settings match.
        combine: runs that differ in their seed alone are one column.
        baseline: name of a column that all others are compared with.

    Raises:
        UserError: a folder holds nothing to compare, no column has the baseline's name, or columns were scored by
            different rules.
        CheckpointError: stored scores are broken.
    """
    columns = read_columns(folders, combine=combine)
    there = list(dict.fromkeys(name for column in columns for name in column.benchmarks))
    benchmarks = sorted(there, key=lambda name: list(SHOWN).index(name) if name in SHOWN else len(SHOWN))
    if not benchmarks:
        raise UserError(f"nothing to compare: no evaluation in {', '.join(map(str, folders))} (evaluate.benchmarks)")
    if baseline is not None and baseline not in [column.name for column in columns]:
        raise UserError(f"no column {baseline!r} to compare with; there are {', '.join(c.name for c in columns)}")
    _check_rules(columns)
    below, notes = _matching(paper or {}, columns, benchmarks)
    notes += _partial(columns, benchmarks)
    table = method_table(columns, benchmarks, below)
    rows = {row.name: row for row in table.rows}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in benchmarks:
        for column in columns:
            found = [seed.results[name] for seed in column.seeds if name in seed.results]
            if len(found) == len(column.seeds):
                shown = rows[column.name].numbers[name].interval
                low_high = None if shown is None else (shown[0] / 100, shown[1] / 100)
                results.setdefault(name, {})[column.name] = combined(found, low_high)
    differences, told = _differences(columns, benchmarks, baseline)
    return Comparison(table=table, results=results, differences=tuple(differences), notes=(*notes, *told))


def _check_rules(columns: Sequence[Column]) -> None:
    """All numbers of a table are of one profile; of VLMEvalKit's letter rules too, where they decide."""
    letters: dict[str, str] = {}
    profiles: dict[str, str] = {}
    for column in columns:
        for name, result in (of for seed in column.seeds for of in seed.results.items()):
            if "profile" not in result:
                continue  # the lab has one way of reading answers
            where, profile = f"{column.name}, {name}", result["profile"]
            profiles.setdefault(profile, where)
            if profile == "paper" and name in LETTER_RULES and "vlmevalkit" in result:
                letters.setdefault(result["vlmevalkit"], where)
    for setting, found in (("profile", profiles), ("vlmevalkit", letters)):
        if len(found) > 1:
            told = "; ".join(f"{where}: {value}" for value, where in found.items())
            raise UserError(
                f"scored by different rules, which are not comparable ({setting} of {told}); "
                f"start dpa eval again with one --{setting}: answers that are there are only scored anew"
            )


def _partial(columns: Sequence[Column], benchmarks: Sequence[str]) -> list[str]:
    """Which numbers are of a part of the questions; a table's cells do not show it."""
    notes = []
    for name in benchmarks:
        found = [c.name for c in columns if any(seed.results.get(name, {}).get("partial") for seed in c.seeds)]
        if found:
            notes.append(f"{name}: {', '.join(found)} answered a part of the questions (--limit)")
    return notes


def _matching(paper: Paper, columns: Sequence[Column], benchmarks: Sequence[str]) -> tuple[Paper, list[str]]:
    """What of the paper's rows may stand below these columns, and why the rest may not."""
    results = [(column.name, *of) for column in columns for seed in column.seeds for of in seed.results.items()]
    for column, name, result in results if paper else ():
        if result.get("partial"):
            return {}, [f"the paper's rows are left out: {column} answered a part of {name} (--limit)"]
        if result.get("profile", "paper") != "paper":
            return {}, [f"the paper's rows are left out: {column}, {name}: profile {result['profile']}"]
    missing = [SHOWN[name] for name in PAPER if name not in benchmarks]
    if not missing or not any(AVERAGE in of for of in paper.values()):
        return paper, []
    without = {row: {name: value for name, value in of.items() if name != AVERAGE} for row, of in paper.items()}
    return without, [f"the paper's averages are left out: they are of seven benchmarks, {', '.join(missing)} missing"]


def paper_rows(name: str) -> Paper:
    """One of the paper's settings as rows below the table.

    Raises:
        UserError: the setting is not known.
    """
    row = paper_row(name)
    return {f"paper ({row.llm}, {row.captions}): {of}": {AVERAGE: value} for of, value in row.averages.items()}


def paired_difference(
    first: Iterable[Scored], second: Iterable[Scored]
) -> tuple[float, tuple[float, float], int, int] | None:
    """Mean of first - second, its 95 % interval, units and groups; None unless both scored the very same units."""
    ours, theirs = stacked([list(first)]), stacked([list(second)])
    if ours is None or theirs is None or ours[1] != theirs[1]:
        return None
    found = paired(ours[0], theirs[0])
    return found.difference, found.interval, len(ours[1]), len(set(ours[0].groups))


def _differences(
    columns: Sequence[Column], benchmarks: Sequence[str], baseline: str | None
) -> tuple[list[Difference], list[str]]:
    found: list[Difference] = []
    notes: list[str] = []
    averaged = averaged_benchmarks(benchmarks)
    for benchmark in benchmarks:
        there = [column for column in columns if benchmark in column.benchmarks]
        for column in there:
            base = _baseline(column, there, baseline)
            if column is not base:
                item = _difference(benchmark, column, base)
                (found if isinstance(item, Difference) else notes).append(item)  # type: ignore[arg-type]
    whole = [column for column in columns if set(averaged) <= set(column.benchmarks)]
    for column in whole if len(averaged) > 1 else []:
        base = _baseline(column, whole, baseline)
        own = {item.benchmark: item for item in found if (item.column, item.baseline) == (column.name, base.name)}
        if column is not base and set(averaged) <= set(own):
            found.append(_of_averages(column, base, [own[name] for name in averaged]))
    return found, notes


def _baseline(column: Column, columns: Sequence[Column], name: str | None) -> Column:
    named = [item for item in columns if item.name == name]
    vanilla = [item for item in columns if item.method == BASELINE]
    own = [item for item in vanilla if item.source == column.source]
    return (named or own or vanilla or list(columns))[0]


def _difference(benchmark: str, column: Column, base: Column) -> Difference | str:
    pair = f"{benchmark}: {column.name} and {base.name}"
    if any(seed.scores(benchmark) is None for seed in (*column.seeds, *base.seeds)):
        return f"{pair}: no paired difference, stored scores are missing; run again to evaluate again"
    ours, theirs = column.units(benchmark), base.units(benchmark)
    if ours is None or theirs is None or ours[1] != theirs[1]:
        return f"{pair}: no paired difference, they answered different questions"
    found = paired(ours[0], theirs[0], seed=draws_of(benchmark))
    return Difference(
        benchmark=benchmark,
        column=column.name,
        baseline=base.name,
        n=len(ours[1]),
        groups=len(set(ours[0].groups)),
        difference=found.difference,
        interval=found.interval,
        better=found.better,
        groups_won=found.groups_won,
        groups_lost=found.groups_lost,
    )


def _of_averages(column: Column, base: Column, of: Sequence[Difference]) -> Difference:
    """Each benchmark's pairs are drawn by themselves, then averaged, as the averages are."""
    total_R: Floats | float = 0.0
    for item in of:
        total_R = total_R + _deltas(column, base, item.benchmark) / len(of)
    assert not isinstance(total_R, float)
    return Difference(
        benchmark=AVERAGE,
        column=column.name,
        baseline=base.name,
        n=sum(item.n for item in of),
        groups=sum(item.groups for item in of),
        difference=sum(item.difference for item in of) / len(of),
        interval=interval(total_R),
        better=float((total_R > 0).mean() + (total_R == 0).mean() / 2),
        groups_won=sum(item.groups_won for item in of),
        groups_lost=sum(item.groups_lost for item in of),
    )


def _deltas(column: Column, base: Column, benchmark: str) -> Floats:
    found: list[Units] = []
    for of in (column, base):
        units = of.units(benchmark)
        assert units is not None, "a difference was made of them"
        found.append(units[0])
    seed = draws_of(benchmark)
    return resample(found[0], seed=seed) - resample(found[1], seed=seed, stream=1)


def _sentence(item: Difference) -> str:
    low, high = (100 * bound for bound in item.interval)
    verdict = "" if low > 0 or high < 0 else "; not distinguishable"
    of = "averages: " if item.benchmark == AVERAGE else ""
    return (
        f"{of}{item.column} - {item.baseline}: {100 * item.difference:+.1f} points "
        f"[{low:+.1f}, {high:+.1f}] on {item.n} questions, {item.groups} groups "
        f"({item.groups_won} better, {item.groups_lost} worse){verdict}"
    )

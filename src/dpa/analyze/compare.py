"""Methods of one or several runs side by side, with paired differences where they answered the same questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpa.analyze.runs import Run, read_run
from dpa.errors import UserError
from dpa.evaluate.scores import Scored
from dpa.evaluate.statistics import group_interval
from dpa.evaluate.tables import accuracy_table

BASELINE = "vanilla"


@dataclass(frozen=True, slots=True)
class Difference:
    """A column minus its baseline on the same questions."""

    benchmark: str
    column: str
    baseline: str
    n: int
    groups: int
    difference: float
    """Of the accuracies, -1 to 1."""
    interval: tuple[float, float]
    """95 %, paired bootstrap over groups (scenes)."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What ``dpa compare`` prints."""

    results: dict[str, dict[str, dict[str, Any]]]
    """Benchmark -> column (method, or run/method) -> result as in summary.json."""
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]
    """Pairs that could not be made, and why."""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "results": self.results,
            "differences": [asdict(item) for item in self.differences],
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """For a terminal."""
        parts = []
        for benchmark, columns in self.results.items():
            parts.append(accuracy_table(columns).text(title=benchmark))
            parts += [_sentence(item) for item in self.differences if item.benchmark == benchmark]
        return "\n".join([*parts, *self.notes])

    def markdown(self) -> str:
        """For a document."""
        parts = []
        for benchmark, columns in self.results.items():
            parts.append(f"### {benchmark}\n\n{accuracy_table(columns).markdown()}")
            found = [f"- {_sentence(item)}" for item in self.differences if item.benchmark == benchmark]
            parts += ["\n".join(found)] if found else []
        return "\n\n".join([*parts, *self.notes])


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    run: Run
    method: str


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Reads summaries and stored scores; no model, no data set.

    A run's baseline is its own ``vanilla``; else the first ``vanilla`` of all runs; else the first column.

    Raises:
        UserError: a folder holds no run, or none of the runs was evaluated.
        CheckpointError: stored scores are broken.
    """
    columns = list(_columns([read_run(folder) for folder in folders]))
    benchmarks = list(dict.fromkeys(name for column in columns for name in column.run.evaluation(column.method)))
    if not benchmarks:
        raise UserError(f"nothing to compare: no evaluation in {', '.join(map(str, folders))} (evaluate.benchmarks)")
    results: dict[str, dict[str, dict[str, Any]]] = {}
    differences: list[Difference] = []
    notes: list[str] = []
    for benchmark in benchmarks:
        there = [column for column in columns if benchmark in column.run.evaluation(column.method)]
        results[benchmark] = {column.name: column.run.evaluation(column.method)[benchmark] for column in there}
        for column in there:
            base = _baseline(column, there)
            if column is base:
                continue
            found = _difference(benchmark, column, base)
            if isinstance(found, Difference):
                differences.append(found)
            else:
                notes.append(found)
    return Comparison(results=results, differences=tuple(differences), notes=tuple(notes))


def paired_difference(
    first: Iterable[Scored], second: Iterable[Scored]
) -> tuple[float, tuple[float, float], int, int] | None:
    """Mean of first - second, its 95 % interval, units and groups; None unless both scored the very same units."""
    ours = {item.id: item for item in first}
    theirs = {item.id: item for item in second}
    same = {name: (item.group, item.answer) for name, item in ours.items()} == {
        name: (item.group, item.answer) for name, item in theirs.items()
    }
    if not same or not ours:
        return None
    deltas = [item.score - theirs[name].score for name, item in ours.items()]
    groups = [item.group for item in ours.values()]
    return sum(deltas) / len(deltas), group_interval(deltas, groups), len(deltas), len(set(groups))


def _columns(runs: Sequence[Run]) -> Iterable[_Column]:
    names = [run.name for run in runs]
    for run in runs:
        # two folders may hold runs of one name (other outputs, other seeds)
        title = run.name if names.count(run.name) == 1 else str(run.folder)
        for method in run.methods:
            yield _Column(name=method if len(runs) == 1 else f"{title}/{method}", run=run, method=method)


def _baseline(column: _Column, columns: Sequence[_Column]) -> _Column:
    vanilla = [item for item in columns if item.method == BASELINE]
    own = [item for item in vanilla if item.run is column.run]
    return (own or vanilla or list(columns))[0]


def _difference(benchmark: str, column: _Column, base: _Column) -> Difference | str:
    pair = f"{benchmark}: {column.name} and {base.name}"
    ours, theirs = column.run.scores(column.method, benchmark), base.run.scores(base.method, benchmark)
    if ours is None or theirs is None:
        return f"{pair}: no paired difference, stored scores are missing; run again to evaluate again"
    found = paired_difference(ours, theirs)
    if found is None:
        return f"{pair}: no paired difference, they answered different questions"
    difference, interval, n, groups = found
    return Difference(benchmark, column.name, base.name, n, groups, difference, interval)


def _sentence(item: Difference) -> str:
    low, high = (100 * bound for bound in item.interval)
    verdict = "" if low > 0 or high < 0 else "; not distinguishable"
    return (
        f"{item.column} - {item.baseline}: {100 * item.difference:+.1f} points "
        f"[{low:+.1f}, {high:+.1f}] on {item.n} questions, {item.groups} groups{verdict}"
    )

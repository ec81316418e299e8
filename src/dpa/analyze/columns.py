"""What ``dpa compare`` is pointed at, as columns: one per method of a run, evaluated checkpoint, or folder of scores.

Runs that differ in nothing but their seed are one column with several seeds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpa.analyze.runs import Run, read_run
from dpa.errors import UserError
from dpa.evaluate.scores import PREDICTIONS, RESULTS, Scored, read_results, read_scores, scores_path
from dpa.evaluate.statistics import Units, strata_of, units

_OF_A_RUN = {"name", "seed", "output", "store", "methods", "gpus", "evaluate"}
"""Settings in which runs of several seeds may differ."""


@dataclass(frozen=True, slots=True)
class Seed:
    """One evaluated model."""

    seed: int | None
    predictions: Path
    results: dict[str, dict[str, Any]]
    """Benchmark -> result as in summary.json; empty where scores alone are there."""

    def scores(self, benchmark: str) -> list[Scored] | None:
        """None where there are none. Raises CheckpointError where the file is broken."""
        path = scores_path(self.predictions, benchmark)
        return read_scores(path) if path.is_file() else None


@dataclass(frozen=True, slots=True)
class Column:
    """One method."""

    name: str
    method: str | None
    """None: a checkpoint of unknown origin."""
    source: Path
    """Run, checkpoint or folder of scores (the first one's)."""
    seeds: tuple[Seed, ...]

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Those of the first seed, in its order; others' that are missing there do not count."""
        first = self.seeds[0]
        if self.method is not None:
            return tuple(first.results)  # a run's summary says what was evaluated
        stored = [path.name.removesuffix(".scores.jsonl") for path in sorted(first.predictions.glob("*.scores.jsonl"))]
        # rankings are a second figure of their benchmark, not a benchmark
        return tuple(dict.fromkeys([*first.results, *(name for name in stored if not name.endswith(".ranked"))]))

    def units(self, benchmark: str) -> tuple[Units, tuple[str, ...]] | None:
        """Scores of all seeds, and what was asked (ids and answers, sorted); None unless all seeds have the same."""
        found = [seed.scores(benchmark) for seed in self.seeds]
        return None if any(not scores for scores in found) else stacked([scores or [] for scores in found])


def stacked(seeds: Sequence[Sequence[Scored]]) -> tuple[Units, tuple[str, ...]] | None:
    """[S][N] scores of the same units, sorted by id; None where they are not the same."""
    ordered = [sorted(scores, key=lambda item: item.id) for scores in seeds]
    asked = [tuple(f"{item.id}\0{item.group}\0{item.answer}\0{item.weight}" for item in scores) for scores in ordered]
    if not asked[0] or any(other != asked[0] for other in asked):
        return None
    first = ordered[0]
    groups, weights = [item.group for item in first], [item.weight for item in first]
    scores = [[item.score for item in of] for of in ordered]
    return units(scores, groups, weights=weights, strata=strata_of(groups, weights)), asked[0]


def read_columns(paths: Sequence[Path], *, combine: bool = True) -> list[Column]:
    """
    Args:
        paths: run folders, folders of scores (``dpa eval --out``), or checkpoints beside which ``dpa eval`` left
            ``NAME.eval``.
        combine: runs that differ in their seed alone are one column.

    Raises:
        UserError: a path is none of those.
    """
    runs = [(path, read_run(path)) for path in paths if _is_run(path)]
    groups = _seeds_of(runs) if combine else [[item] for item in runs]
    names = [group[0][1].name for group in groups]
    alone = len(groups) == 1 and len(runs) == len(paths)  # nothing to tell apart by the run's name
    columns: dict[Path, list[Column]] = {}
    for group in groups:
        path, run = group[0]
        # two folders may hold runs of one name (other outputs, other seeds)
        title = run.name if names.count(run.name) == 1 else str(path)
        columns[path] = [_of_run(group, method, "" if alone else f"{title}/") for method in run.methods]
    for path in paths:
        if not _is_run(path):
            columns[path] = [_of_scores(path)]
    return _told_apart([column for path in paths for column in columns.pop(path, [])])


def _is_run(path: Path) -> bool:
    return (path / "summary.json").is_file()


def _seeds_of(runs: Sequence[tuple[Path, Run]]) -> list[list[tuple[Path, Run]]]:
    """Runs of one recipe with seeds that all differ; others stay alone."""
    groups: dict[str, list[tuple[Path, Run]]] = {}
    for number, (path, run) in enumerate(runs):
        recipe = {name: value for name, value in run.recipe().items() if name not in _OF_A_RUN}
        key = json.dumps([recipe, run.methods], sort_keys=True, default=str) if recipe else str(number)
        groups.setdefault(key, []).append((path, run))
    split: list[list[tuple[Path, Run]]] = []
    for group in groups.values():
        seeds = [run.summary.get("seed") for _, run in group]
        split += [group] if len(set(seeds)) == len(seeds) else [[item] for item in group]
    return split


def _of_run(group: Sequence[tuple[Path, Run]], method: str, prefix: str) -> Column:
    seeds = tuple(
        Seed(run.summary.get("seed"), run.folder_of(method) / PREDICTIONS, run.evaluation(method)) for _, run in group
    )
    several = f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""
    return Column(name=f"{prefix}{method}{several}", method=method, source=group[0][0], seeds=seeds)


def _of_scores(path: Path) -> Column:
    beside = path.with_name(path.name + ".eval")
    for folder in (path, beside):
        if (folder / RESULTS).is_file() or any(folder.glob("*.scores.jsonl")):
            seed = Seed(None, folder, read_results(folder))
            return Column(name=path.name.removesuffix(".eval"), method=None, source=path, seeds=(seed,))
    if (path / "config.json").is_file():
        raise UserError(
            f"{path} is a checkpoint that was not evaluated ({beside} is missing): dpa eval {path} --data DIR"
        )
    raise UserError(
        f"{path} is neither a run's folder (summary.json) nor one with scores (*.scores.jsonl, which dpa eval writes), "
        "nor a checkpoint"
    )


def _told_apart(columns: list[Column]) -> list[Column]:
    names = [column.name for column in columns]
    return [
        column if names.count(column.name) == 1 else replace(column, name=f"{column.source}: {column.name}")
        for column in columns
    ]


def combined(results: Sequence[dict[str, Any]], interval: tuple[float, float] | None) -> dict[str, Any]:
    """One result of several seeds': means of all figures; the interval is that of the mean."""
    if len(results) == 1:
        return results[0]
    mean: dict[str, Any] = _mean(list(results))
    if interval is not None:
        mean["accuracy_interval"] = list(interval)
    return mean


def _mean(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        common = [key for key in first if all(key in value for value in values)]
        return {key: _mean([value[key] for value in values]) for key in common}
    if isinstance(first, list):
        return [_mean(list(of)) for of in zip(*values, strict=False)]
    if isinstance(first, float) and all(isinstance(value, float | int) for value in values):
        return float(np.mean(values))
    return first

"""The table of methods x benchmarks: numbers with intervals, their average, wins, and the paper's rows below."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpa.analyze.columns import Column
from dpa.evaluate.overview import TITLES
from dpa.evaluate.statistics import Floats, Units, interval, mean_and_sem, resample, wins

AVERAGE = "average"
LAB = "lab"

SHOWN: dict[str, str] = {**TITLES, LAB: "lab", AVERAGE: "average"}
"""Benchmarks in the order of the paper's table, and how they are written there; then ours."""


@dataclass(frozen=True, slots=True)
class Number:
    """A cell, in per cent."""

    value: float
    """Mean over seeds."""
    interval: tuple[float, float] | None
    """95 %: bootstrap over groups, and over seeds where there are several. None: the paper's, or scores are missing."""
    sem: float | None = None
    """Standard error of the mean over seeds; None for one."""
    n: int | None = None
    """Units that count."""


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One column of the comparison, which is a row here."""

    name: str
    numbers: dict[str, Number]
    """Benchmark, or ``average``, -> number; what is missing is not there."""
    wins: float | None
    """Benchmarks on which it is the best of the measured rows, ties shared; None: the paper's."""
    seeds: int | None


@dataclass(frozen=True, slots=True)
class MethodTable:
    """What is shown, in any medium."""

    benchmarks: tuple[str, ...]
    """In the order shown; ``average`` last where there is one."""
    rows: tuple[MethodRow, ...]
    paper: tuple[MethodRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)

    def best(self, benchmark: str) -> float | None:
        """Of the measured rows."""
        values = [row.numbers[benchmark].value for row in self.rows if benchmark in row.numbers]
        return max(values) if len(values) > 1 else None


Paper = Mapping[str, Mapping[str, float]]
"""Name of a row -> benchmark or ``average`` -> number, 0 to 100."""


def draws_of(benchmark: str) -> int:
    """Seed of a benchmark's draws: the same for all methods (pairs), another for each benchmark (independent)."""
    return zlib.crc32(benchmark.encode())


def method_table(columns: Sequence[Column], benchmarks: Sequence[str], paper: Paper | None = None) -> MethodTable:
    """
    Args:
        columns: measured methods.
        benchmarks: in the order to show.
        paper: rows to put below them.
    """
    averaged = averaged_benchmarks(benchmarks)
    shown = (*benchmarks, AVERAGE) if len(averaged) > 1 else tuple(benchmarks)
    numbers = {column.name: _numbers(column, benchmarks, averaged) for column in columns}
    won = wins(
        {name: {key: number.value for key, number in of.items() if key != AVERAGE} for name, of in numbers.items()}
    )
    rows = tuple(
        MethodRow(column.name, numbers[column.name], won[column.name], len(column.seeds)) for column in columns
    )
    below = tuple(
        MethodRow(name, {key: Number(value, None) for key, value in of.items() if key in shown}, None, None)
        for name, of in (paper or {}).items()
    )
    return MethodTable(benchmarks=shown, rows=rows, paper=tuple(row for row in below if row.numbers))


def averaged_benchmarks(benchmarks: Sequence[str]) -> tuple[str, ...]:
    """Those of which the average is: all but the lab, which is our own."""
    others = tuple(name for name in benchmarks if name != LAB)
    return others or tuple(benchmarks)


def _numbers(column: Column, benchmarks: Sequence[str], averaged: Sequence[str]) -> dict[str, Number]:
    found: dict[str, Number] = {}
    drawn: dict[str, Floats] = {}
    per_seed: dict[str, list[float]] = {}
    for name in benchmarks:
        if name not in column.benchmarks:
            continue
        stacked = column.units(name)
        if stacked is None:
            accuracies = [seed.results[name]["accuracy"] for seed in column.seeds if name in seed.results]
            if not accuracies:
                continue
            value, sem = mean_and_sem(accuracies)
            found[name] = _number(value, None, sem, None)
            continue
        sample = stacked[0]
        drawn[name], per_seed[name] = resample(sample, seed=draws_of(name)), sample.means().tolist()
        value, sem = mean_and_sem(per_seed[name])
        found[name] = _number(value, interval(drawn[name]), sem, _count(sample))
    if len(averaged) > 1 and all(name in found for name in averaged):
        value = float(np.mean([found[name].value for name in averaged])) / 100
        if all(name in drawn for name in averaged):
            of_seeds = np.mean([per_seed[name] for name in averaged], axis=0).tolist()
            sem, low_high = mean_and_sem(of_seeds)[1], interval(np.mean([drawn[name] for name in averaged], axis=0))
            found[AVERAGE] = _number(value, low_high, sem, None)
        else:
            found[AVERAGE] = _number(value, None, None, None)
    return found


def _number(value: float, low_high: tuple[float, float] | None, sem: float | None, n: int | None) -> Number:
    per_cent = None if low_high is None else (100 * low_high[0], 100 * low_high[1])
    return Number(100 * value, per_cent, None if sem is None else 100 * sem, n)


def _count(sample: Units) -> int:
    return int(sample.scores.shape[1])

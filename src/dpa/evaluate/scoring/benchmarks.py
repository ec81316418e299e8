"""The table of benchmarks, and the door: :func:`score`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpa.errors import UserError
from dpa.evaluate.scoring.free_text import score_docvqa, score_lab, score_ocrbench
from dpa.evaluate.scoring.multiple_choice import (
    score_ai2d,
    score_cvbench,
    score_mmbench,
    score_mmvp,
    score_naturalbench,
)
from dpa.evaluate.scoring.rows import Row, rows_of
from dpa.evaluate.scoring.types import BenchmarkScore, Outcome, ScoringRules

Scorer = Callable[[Sequence[Row], ScoringRules, bool], Outcome]
"""(rows, rules, complete) -> outcome; raises DataError."""

_PAPER: dict[str, Scorer] = {
    "mmbench": score_mmbench,
    "ai2d": score_ai2d,
    "docvqa": score_docvqa,
    "ocrbench": score_ocrbench,
    "cvbench": score_cvbench,
    "mmvp": score_mmvp,
    "naturalbench": score_naturalbench,
}
_SCORERS: dict[str, Scorer] = {**_PAPER, "lab": score_lab}

BENCHMARK_NAMES: tuple[str, ...] = tuple(_PAPER)
"""The paper's seven, in its order; its average is their plain mean."""
SCORED_NAMES: tuple[str, ...] = tuple(_SCORERS)
"""The seven and the lab."""
_DEFAULT = ScoringRules()


def score(
    benchmark: str,
    records: Sequence[Mapping[str, Any]],
    rules: ScoringRules = _DEFAULT,
    *,
    complete: bool = True,
) -> BenchmarkScore:
    """Scores answers.

    Args:
        benchmark: one of ``SCORED_NAMES``.
        records: see docs/evaluation.md for each benchmark's fields; further ones are ignored. A text under ``where``
            names the record in errors.
        complete: what the headline counts as one must be whole (rolls, pairs, groups of four, sources); False: scored
            from what is there, for a part of a benchmark whose number is nobody's.

    Raises:
        UserError: an unknown benchmark.
        DataError: a field is missing or wrong, ids or indices are there twice, or something is not whole; names
            record and field, or counts what is missing.
    """
    if benchmark not in _SCORERS:
        raise UserError(f"no benchmark {benchmark!r}; known: {', '.join(SCORED_NAMES)}")
    outcome = _SCORERS[benchmark](rows_of(benchmark, records), rules, complete)
    n = len(outcome.records)
    return BenchmarkScore(
        benchmark=benchmark,
        rules=rules,
        n=n,
        metrics=outcome.metrics,
        headline=outcome.headline,
        records=outcome.records,
        units=outcome.units,
        unparsed_share=sum(not record.empty and not record.parsed for record in outcome.records) / n,
        empty_share=sum(record.empty for record in outcome.records) / n,
    )

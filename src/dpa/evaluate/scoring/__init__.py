"""Scores of answers, without a model and without images: what the toolkits of the paper's table make of a text.

Imports only :mod:`dpa.errors` and the standard library, so that answers of any origin can be scored anywhere. The
rules are in ``options.py`` and ``texts.py``, the benchmarks in ``multiple_choice.py`` and ``free_text.py``;
docs/evaluation.md has fields, metrics and the differences between the profiles.
"""

from dpa.evaluate.scoring.benchmarks import BENCHMARK_NAMES, SCORED_NAMES, score
from dpa.evaluate.scoring.rows import read_records
from dpa.evaluate.scoring.types import BenchmarkScore, ScoredRecord, ScoringRules, Unit

__all__ = [
    "BENCHMARK_NAMES",
    "SCORED_NAMES",
    "BenchmarkScore",
    "ScoredRecord",
    "ScoringRules",
    "Unit",
    "read_records",
    "score",
]

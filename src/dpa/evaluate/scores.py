"""Scored answers of any benchmark on disk: what comparisons pair up, without the model and without the data.

One line per scored unit. A benchmark that counts groups of answers as one (circular choice, pairs) writes one line per
group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpa.errors import CheckpointError
from dpa.store import disk_errors, write_json, write_text

PREDICTIONS = "predictions"
"""Folder inside a method's folder of a run: ``NAME.jsonl``, ``NAME.blind.jsonl``, ``NAME.scores.jsonl``."""

RESULTS = "results.json"
"""Inside a folder of predictions: what the scores come to."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One unit that counts."""

    id: str
    group: str
    """Units of a group are not independent: the bootstrap draws groups."""
    kind: str
    """A row of the table."""
    answer: str
    prediction: str
    score: float
    """0 to 1."""
    blind_prediction: str | None = None
    """Without the image; None where it was not asked."""
    blind_score: float | None = None
    weight: float = 1.0
    """In the benchmark's number, the weighted mean of the scores (CV-Bench: its sources count alike)."""


def scores_path(predictions: Path, benchmark: str) -> Path:
    """Where a benchmark's scores lie in the folder ``predictions``."""
    return predictions / f"{benchmark}.scores.jsonl"


def write_results(predictions: Path, checkpoint: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """``results.json`` beside the scores: each benchmark's result as in summary.json; other benchmarks' stay.

    Raises:
        StorageError, UserError: the disk is full or not writable.
    """
    path = predictions / RESULTS
    known = read_results(predictions)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"checkpoint": checkpoint, "benchmarks": {**known, **results}})


def read_results(predictions: Path) -> dict[str, dict[str, Any]]:
    """Benchmark -> result; empty where there is no file.

    Raises:
        CheckpointError: the file is not ours.
    """
    path = predictions / RESULTS
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it and evaluate again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: benchmarks must be an object; remove it and evaluate again")
    return found


def write_scores(path: Path, scores: Iterable[Scored]) -> None:
    """Whole or not at all.

    Raises:
        StorageError, UserError: the disk is full or not writable.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in scores))


def read_scores(path: Path) -> list[Scored]:
    """In the order of the file.

    Raises:
        CheckpointError: missing or not written by ``write_scores``; names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: answers may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); start the evaluation again") from None
    scores = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            scores.append(Scored(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{path}, line {number}: no scored answer ({error}); evaluate again") from None
    return scores

"""DocVQA, OCRBench and the lab's questions."""

from __future__ import annotations

from collections.abc import Sequence

from dpa.evaluate.scoring.multiple_choice import NO_KIND, mean, means_by
from dpa.evaluate.scoring.options import folded
from dpa.evaluate.scoring.rows import Row
from dpa.evaluate.scoring.texts import anls, normalise, ocrbench_exact, ocrbench_hit
from dpa.evaluate.scoring.types import Outcome, ScoredRecord, ScoringRules, Unit

_MATHEMATICS = "Handwritten Mathematical Expression Recognition"
_TEXT_RECOGNITION = "Text Recognition"
_QUESTION_TYPES: dict[str, str] = {
    "Regular Text Recognition": _TEXT_RECOGNITION,
    "Irregular Text Recognition": _TEXT_RECOGNITION,
    "Artistic Text Recognition": _TEXT_RECOGNITION,
    "Handwriting Recognition": _TEXT_RECOGNITION,
    "Digit String Recognition": _TEXT_RECOGNITION,
    "Non-Semantic Text Recognition": _TEXT_RECOGNITION,
    "Scene Text-centric VQA": "Scene Text-centric VQA",
    "Doc-oriented VQA": "Doc-oriented VQA",
    "Key Information Extraction": "Key Information Extraction",
    _MATHEMATICS: _MATHEMATICS,
}
"""OCRBench's question types -> its five categories."""


def score_docvqa(rows: Sequence[Row], rules: ScoringRules, complete: bool) -> Outcome:
    """Mean ANLS."""
    strict = rules.profile == "strict"
    records = tuple(
        _record(row, anls(row.prediction, row.texts("answer"), strict=strict), group=row.text("document", row.id))
        for row in rows
    )
    return Outcome({"anls": mean(record.score for record in records)}, "anls", records, _units(records))


def score_ocrbench(rows: Sequence[Row], rules: ScoringRules, complete: bool) -> Outcome:
    """``hits`` ("Final Score", of 1000 in the whole benchmark) and ``score``, the share of hits on 0 to 100.

    On all 1,000 rows ``score`` is the final score divided by ten ("Final Score Norm").
    """
    right = ocrbench_exact if rules.profile == "strict" else ocrbench_hit
    records = []
    for row in rows:
        kind, golds = row.name("question_type", _QUESTION_TYPES), row.texts("answer")
        if not all(gold.strip() for gold in golds):
            raise row.wrong("answer", f"is {list(golds)!r}: an empty text would be contained in every answer")
        hit = right(row.prediction, golds, mathematics=kind == _MATHEMATICS)
        records.append(_record(row, float(hit), group=row.id, kind=kind))
    metrics = {
        "score": mean(record.score for record in records),
        "hits": sum(record.score for record in records),
        **means_by("category", ((_QUESTION_TYPES[record.kind], record.score) for record in records)),
        **means_by("question_type", ((record.kind, record.score) for record in records)),
    }
    return Outcome(metrics, "score", tuple(records), _units(records))


def score_lab(rows: Sequence[Row], rules: ScoringRules, complete: bool) -> Outcome:
    """Exact match of one of the choices; the profiles differ in what is folded."""
    fold = folded if rules.profile == "strict" else normalise
    records = []
    for row in rows:
        choices, right, answer = [fold(c) for c in row.texts("choices")], fold(row.text("answer")), fold(row.prediction)
        if right not in choices:
            raise row.wrong("answer", f"is {row.text('answer')!r}, none of the choices {list(row.texts('choices'))}")
        records.append(
            ScoredRecord(
                id=row.id,
                group=row.text("scene", row.id),
                kind=row.text("kind", NO_KIND),
                score=float(answer == right),
                parsed=answer in choices,
                empty=not answer,
            )
        )
    metrics = {
        "accuracy": mean(record.score for record in records),
        **means_by("kind", ((record.kind, record.score) for record in records)),
    }
    return Outcome(metrics, "accuracy", tuple(records), _units(records))


def _record(row: Row, score: float, *, group: str, kind: str = NO_KIND) -> ScoredRecord:
    empty = not row.prediction.strip()
    return ScoredRecord(id=row.id, group=group, kind=kind, score=score, parsed=not empty, empty=empty)


def _units(records: Sequence[ScoredRecord]) -> tuple[Unit, ...]:
    return tuple(Unit(id=record.id, group=record.group, score=record.score) for record in records)

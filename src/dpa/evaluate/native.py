"""The seven benchmarks: files to questions, answers to scores, scores to a result that tables and reports show.

Reading is :mod:`dpa.evaluate.data`, scoring :mod:`dpa.evaluate.scoring`; here they meet the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, ProcessorMixin

from dpa.evaluate.data.read import read_benchmark, source_of
from dpa.evaluate.data.rows import Task, group_of
from dpa.evaluate.generate import Prediction, Progress, Question
from dpa.evaluate.passes import ask
from dpa.evaluate.scores import Scored, scores_path, write_scores
from dpa.evaluate.settings import EvaluateSettings
from dpa.evaluate.statistics import group_interval

if TYPE_CHECKING:
    from dpa.evaluate.scoring import BenchmarkScore, Unit

MAX_NEW_TOKENS: dict[str, int] = {
    "mmbench": 128,
    "ai2d": 128,
    "docvqa": 64,
    "ocrbench": 128,
    "cvbench": 32,
    "mmvp": 64,
    "naturalbench": 32,
}
"""Longest answer in tokens. VLMEvalKit and Cambrian allow 512, which no answer that can be scored needs; lmms-eval
allows 16 (letters), 32 (DocVQA) and 128 (OCRBench). Here an option's text or a sentence around it fits. A result says
which share of the answers was cut (``unfinished_share``)."""


@dataclass(frozen=True, slots=True)
class NativeResult:
    """One benchmark's result."""

    score: BenchmarkScore
    summary: dict[str, Any]
    """What the score itself does not say; shares are 0 to 1."""

    def to_dict(self) -> dict[str, Any]:
        """For summary.json: the score's own keys, then those that every benchmark has."""
        return {**self.score.to_dict(per_sample=False), **self.summary}


def check_native(name: str, folder: Path, *, limit: int | None = None) -> object:
    """Raises DataError where the benchmark's files in ``folder`` cannot be used."""
    return read_benchmark(name, folder, limit=limit)


def evaluate_native(
    name: str,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: Path,
    settings: EvaluateSettings,
    out: Path,
    *,
    progress: Progress | None = None,
    identity: str | None = None,
) -> NativeResult:
    """Asks all questions (twice with ``settings.blind``), scores them, writes predictions and scores.

    Args:
        name: one of the seven.
        folder: see :func:`dpa.evaluate.data.read.read_benchmark`.
        out: gets ``NAME.jsonl``, ``NAME.blind.jsonl`` and ``NAME.scores.jsonl``; a killed evaluation continues.
        progress: called with (answers, all answers), the blind ones included.
        identity: digest of the weights; None: computed.

    Raises:
        DataError: files or rows cannot be used.
        DpaError: see :func:`dpa.evaluate.generate.generate_answers`.
    """
    tasks = read_benchmark(name, folder, limit=settings.limit)
    answers, blind = ask(
        model,
        processor,
        [Question(id=task.id, text=task.text, images=task.images, where=task.where) for task in tasks],
        name,
        out,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens or MAX_NEW_TOKENS[name],
        blind=bool(settings.blind),
        progress=progress,
        identity=identity,
    )
    result, scored = score_native(name, tasks, answers, blind, settings, source=source_of(name, folder))
    write_scores(scores_path(out, name), scored)
    return result


def score_native(
    name: str,
    tasks: Sequence[Task],
    answers: Sequence[Prediction],
    blind: Sequence[Prediction] | None,
    settings: EvaluateSettings,
    *,
    source: str,
) -> tuple[NativeResult, list[Scored]]:
    """The result, and the units that count; answers are in the order of the tasks, at least one.

    Raises:
        DataError: rows or rolls are missing although ``settings.limit`` is None.
    """
    from dpa.evaluate.scoring import ScoringRules, score

    rules = ScoringRules(profile=settings.profile, vlmevalkit=settings.vlmevalkit)
    complete = settings.limit is None
    seen = score(name, _records(tasks, answers), rules, complete=complete)
    without = None if blind is None else score(name, _records(tasks, blind), rules, complete=complete)
    members = _members(name, tasks, seen.units)
    texts = {answer.id: answer.prediction for answer in answers}
    blind_texts = {} if blind is None else {answer.id: answer.prediction for answer in blind}
    blind_scores = {} if without is None else {unit.id: unit.score for unit in without.units}
    kinds = {record.id: record.kind for record in seen.records}
    scored = [
        Scored(
            id=unit.id,
            group=unit.group,
            kind=kinds[members[unit.id][0].id],
            answer=_joined(_answer(task) for task in members[unit.id]),
            prediction=_joined(texts[task.id] for task in members[unit.id]),
            score=unit.score,
            blind_prediction=None if blind is None else _joined(blind_texts[task.id] for task in members[unit.id]),
            blind_score=blind_scores.get(unit.id),
            weight=unit.weight,
        )
        for unit in seen.units
    ]
    chances = {unit.id: math.prod(_chance(task.record) for task in members[unit.id]) for unit in seen.units}
    summary = {
        **_figures(scored, chances),
        "accuracy": seen.metrics[seen.headline] / 100,
        "blind_accuracy": None if without is None else without.metrics[without.headline] / 100,
        "unfinished_share": sum(not answer.finished for answer in answers) / len(answers),
        "partial": not complete,
        "source": source,
    }
    return NativeResult(score=seen, summary=summary), scored


def _records(tasks: Sequence[Task], answers: Sequence[Prediction]) -> list[dict[str, Any]]:
    pairs = list(zip(tasks, answers, strict=True))
    assert all(task.id == answer.id for task, answer in pairs), "answers are out of order"
    return [{**task.record, "prediction": answer.prediction} for task, answer in pairs]


def _members(name: str, tasks: Sequence[Task], units: Sequence[Unit]) -> dict[str, list[Task]]:
    """Unit -> its questions: one each, or a group (rolls, a pair) where groups count."""
    if len(units) == len(tasks) and {unit.id for unit in units} == {task.id for task in tasks}:
        return {task.id: [task] for task in tasks}
    groups: dict[int | None, list[Task]] = {}
    for task in tasks:
        groups.setdefault(group_of(name, task.record), []).append(task)
    assert len(groups) == len(units), (name, len(groups), len(units))
    return {unit.id: group for unit, group in zip(units, groups.values(), strict=True)}


def _figures(scored: Sequence[Scored], chances: Mapping[str, float]) -> dict[str, Any]:
    kinds = {kind: [item for item in scored if item.kind == kind] for kind in dict.fromkeys(s.kind for s in scored)}
    by_kind = {
        kind: {
            "n": len(items),
            "accuracy": _mean(items, [item.score for item in items]),
            "blind_accuracy": _blind_mean(items),
            "chance": _mean(items, [chances[item.id] for item in items]),
        }
        for kind, items in kinds.items()
    }
    blind = [accuracy for items in kinds.values() if (accuracy := _blind_mean(items)) is not None]
    weights = [item.weight for item in scored]
    low, high = group_interval([item.score for item in scored], [item.group for item in scored], weights=weights)
    return {
        "accuracy_interval": [low, high],
        "mean_over_kinds": sum(_mean(items, [item.score for item in items]) for items in kinds.values()) / len(kinds),
        "blind_mean_over_kinds": sum(blind) / len(blind) if blind else None,
        "chance": _mean(scored, [chances[item.id] for item in scored]),
        "by_kind": by_kind,
    }


def _mean(scored: Sequence[Scored], values: Sequence[float]) -> float:
    weights = [item.weight for item in scored]
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def _blind_mean(scored: Sequence[Scored]) -> float | None:
    values = [item.blind_score for item in scored if item.blind_score is not None]
    return _mean(scored, values) if values else None


def _chance(record: Mapping[str, Any]) -> float:
    """Of guessing among the options; free text cannot be guessed."""
    if "choices" in record:
        return 1 / len(record["choices"])
    return 0.5 if record.get("question_type") in ("yes_no", "multiple_choice") else 0.0


def _answer(task: Task) -> str:
    answer = task.record["answer"]
    return answer if isinstance(answer, str) else " / ".join(answer)


def _joined(texts: Any) -> str:
    return " | ".join(texts)

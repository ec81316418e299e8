"""The lab's own benchmark: held-out questions with one right answer out of a few, asked with and without the picture.

Chance is what guessing among a question's possible answers gives; blind accuracy is what the trained model gets from
the question alone. Only what is above both was seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from dpa.data.images import safe_join
from dpa.errors import DataError
from dpa.evaluate.generate import Prediction, Progress, Question
from dpa.evaluate.passes import ask
from dpa.evaluate.scores import Scored, scores_path, write_scores
from dpa.evaluate.scoring.texts import normalise
from dpa.evaluate.settings import EvaluateSettings
from dpa.evaluate.statistics import group_interval

QUESTIONS = "questions.jsonl"
MAX_NEW_TOKENS = 16
"""Answers are a few words."""


@dataclass(frozen=True, slots=True)
class LabQuestion:
    """A line of ``questions.jsonl``."""

    id: str
    scene: str
    image: Path
    question: str
    answer: str
    kind: str
    choices: tuple[str, ...]
    where: str


@dataclass(frozen=True, slots=True)
class KindResult:
    """One kind of questions. Accuracies are shares of right answers, 0 to 1."""

    n: int
    accuracy: float
    blind_accuracy: float | None
    chance: float


@dataclass(frozen=True, slots=True)
class LabResult:
    """All shares are 0 to 1. Blind figures are None where the settings ask for no blind pass."""

    n: int
    scenes: int
    accuracy: float
    """Over questions."""
    accuracy_interval: tuple[float, float]
    """95 %, bootstrap over scenes."""
    mean_over_kinds: float
    blind_accuracy: float | None
    blind_mean_over_kinds: float | None
    chance: float
    """Mean of 1 / number of choices."""
    empty_share: float
    """Answers without any text."""
    unparsed_share: float
    """Answers with text that is none of the choices; together with ``empty_share`` all that cannot be right."""
    unfinished_share: float
    """Answers cut at ``max_new_tokens``."""
    by_kind: dict[str, KindResult]

    def to_dict(self) -> dict[str, Any]:
        """For summary.json."""
        kinds = {
            kind: {"n": row.n, "accuracy": row.accuracy, "blind_accuracy": row.blind_accuracy, "chance": row.chance}
            for kind, row in self.by_kind.items()
        }
        return {
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval),
            "mean_over_kinds": self.mean_over_kinds,
            "blind_accuracy": self.blind_accuracy,
            "blind_mean_over_kinds": self.blind_mean_over_kinds,
            "chance": self.chance,
            "by_kind": kinds,
            "empty_share": self.empty_share,
            "unparsed_share": self.unparsed_share,
            "unfinished_share": self.unfinished_share,
            "n": self.n,
            "scenes": self.scenes,
        }


def read_questions(folder: Path, *, limit: int | None = None) -> list[LabQuestion]:
    """The questions of a folder that ``dpa lab make`` wrote.

    Args:
        folder: with ``questions.jsonl`` and the pictures that it names, or with such a folder as ``lab/``.
        limit: first so many.

    Raises:
        DataError: a file, field or picture is missing or wrong; names file and line.
    """
    if not (folder / QUESTIONS).exists() and (folder / "lab" / QUESTIONS).exists():
        folder = folder / "lab"  # beside other benchmarks' files
    path = folder / QUESTIONS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} is missing: evaluate.data must be a folder that `dpa lab make` wrote") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()][:limit]
    if not numbered:
        raise DataError(f"{path} holds no question")
    questions = [_question(folder, line, f"{path}, line {number}") for number, line in numbered]
    for image, where in {question.image: question.where for question in reversed(questions)}.items():
        if not image.is_file():
            raise DataError(f"{where}: the picture {image} is missing")
    return questions


def _question(folder: Path, line: str, where: str) -> LabQuestion:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a question is an object, this is {type(record).__name__}")
    names = ("id", "scene", "image", "question", "answer", "kind")
    missing = [name for name in names if not isinstance(record.get(name), str)]
    if missing:
        raise DataError(f"{where}: {', '.join(missing)} must be there and be text")
    choices = record.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: choices must be a list of texts")
    if normalise(record["answer"]) not in map(normalise, choices):
        raise DataError(f"{where}: the answer {record['answer']!r} is none of the choices {choices}")
    return LabQuestion(
        image=safe_join(folder, record["image"]),
        choices=tuple(choices),
        where=where,
        **{name: record[name] for name in names if name != "image"},
    )


def evaluate_lab(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: Path,
    settings: EvaluateSettings,
    out: Path,
    *,
    progress: Progress | None = None,
    identity: str | None = None,
) -> LabResult:
    """Asks all questions (twice unless ``settings.blind`` is False), scores them, writes predictions and scores.

    Args:
        folder: see :func:`read_questions`.
        out: folder of predictions; gets ``lab.jsonl``, ``lab.blind.jsonl``, ``lab.scores.jsonl``. A killed
            evaluation continues from them.
        progress: called with (answers, all answers), the blind ones included.
        identity: digest of the weights; None: computed.

    Raises:
        DataError: see :func:`read_questions`.
        DpaError: see :func:`dpa.evaluate.generate.generate_answers`.
    """
    questions = read_questions(folder, limit=settings.limit)
    answers, blind = ask(
        model,
        processor,
        [Question(id=item.id, text=item.question, images=(item.image,), where=item.where) for item in questions],
        "lab",
        out,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens or MAX_NEW_TOKENS,
        blind=settings.blind is not False,
        progress=progress,
        identity=identity,
    )
    scores = score_lab(questions, answers, blind)
    write_scores(scores_path(out, "lab"), scores)
    return summarise(questions, answers, scores)


def score_lab(
    questions: Sequence[LabQuestion], predictions: Sequence[Prediction], blind: Sequence[Prediction] | None
) -> list[Scored]:
    """Normalised exact match; predictions are in the order of the questions."""
    without_image: Sequence[Prediction | None] = [None] * len(questions) if blind is None else blind
    return [
        Scored(
            id=question.id,
            group=question.scene,
            kind=question.kind,
            answer=question.answer,
            prediction=prediction.prediction,
            score=_right(question, prediction),
            blind_prediction=None if without is None else without.prediction,
            blind_score=None if without is None else _right(question, without),
        )
        for question, prediction, without in zip(questions, predictions, without_image, strict=True)
    ]


def _right(question: LabQuestion, prediction: Prediction) -> float:
    assert question.id == prediction.id, f"answers are out of order: {prediction.id} stands at {question.id}"
    return float(normalise(prediction.prediction) == normalise(question.answer))


def summarise(
    questions: Sequence[LabQuestion], predictions: Sequence[Prediction], scores: Sequence[Scored]
) -> LabResult:
    """The figures of :class:`LabResult`; all three in the same order, at least one question."""
    chances = {question.id: 1 / len(question.choices) for question in questions}
    kinds = {kind: [item for item in scores if item.kind == kind] for kind in dict.fromkeys(s.kind for s in scores)}
    by_kind = {
        kind: KindResult(
            n=len(rows),
            accuracy=_mean([row.score for row in rows]),
            blind_accuracy=_blind_mean(rows),
            chance=_mean([chances[row.id] for row in rows]),
        )
        for kind, rows in kinds.items()
    }
    normalised = [normalise(prediction.prediction) for prediction in predictions]
    known = [answer in map(normalise, question.choices) for answer, question in zip(normalised, questions, strict=True)]
    blind_kinds = [row.blind_accuracy for row in by_kind.values() if row.blind_accuracy is not None]
    return LabResult(
        n=len(scores),
        scenes=len({item.group for item in scores}),
        accuracy=_mean([item.score for item in scores]),
        accuracy_interval=group_interval([item.score for item in scores], [item.group for item in scores]),
        mean_over_kinds=_mean([row.accuracy for row in by_kind.values()]),
        blind_accuracy=_blind_mean(scores),
        blind_mean_over_kinds=_mean(blind_kinds) if blind_kinds else None,
        chance=_mean(list(chances.values())),
        empty_share=_mean([not answer for answer in normalised]),
        unparsed_share=_mean([bool(answer) and not parsed for answer, parsed in zip(normalised, known, strict=True)]),
        unfinished_share=_mean([not prediction.finished for prediction in predictions]),
        by_kind=by_kind,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _blind_mean(scores: Sequence[Scored]) -> float | None:
    blind = [item.blind_score for item in scores if item.blind_score is not None]
    return _mean(blind) if blind else None

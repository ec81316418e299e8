"""A few questions with all methods' answers, pictures included: what a report shows."""

from __future__ import annotations

import base64
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpa.errors import DataError
from dpa.evaluate.lab import LabQuestion, read_questions
from dpa.evaluate.scores import Scored


def pick_samples(
    folder: Path, scores: Mapping[str, Sequence[Scored]], *, count: int = 3, seed: int = 0
) -> list[dict[str, Any]]:
    """Content of a run's ``samples.json``: drawn, not chosen, so that a report flatters nobody.

    Args:
        folder: of the lab's data.
        scores: method -> its scored answers (``read_scores``).
        count: samples, of different scenes, and of different kinds while there are some left.
        seed: the same seed, the same questions, whatever the answers.

    Returns:
        ``{"id", "image" (data URI of the PNG), "question", "answer", "kind", "answers": {method: prediction}}`` each.

    Raises:
        DataError: see ``read_questions``.
    """
    answers = {method: {item.id: item.prediction for item in of} for method, of in scores.items()}
    common = [item for item in read_questions(folder) if all(item.id in of for of in answers.values())]
    return [
        {
            "id": question.id,
            "image": _data_uri(question),
            "question": question.question,
            "answer": question.answer,
            "kind": question.kind,
            "answers": {method: of[question.id] for method, of in answers.items()},
        }
        for question in _drawn(common, count, seed)
    ]


def _drawn(questions: Sequence[LabQuestion], count: int, seed: int) -> list[LabQuestion]:
    order = list(questions)
    random.Random(f"samples:{seed}").shuffle(order)
    drawn: list[LabQuestion] = []
    while len(drawn) < count:
        scenes = {item.scene for item in drawn}
        kinds = [item.kind for item in drawn]
        left = [item for item in order if item.scene not in scenes]
        if not left:
            break
        drawn.append(min(left, key=lambda item: kinds.count(item.kind)))  # the first of the rarest kinds
    return drawn


def _data_uri(question: LabQuestion) -> str:
    try:
        data = question.image.read_bytes()
    except OSError as error:
        raise DataError(f"{question.where}: {question.image} cannot be read ({error.strerror})") from None
    return "data:image/png;base64," + base64.b64encode(data).decode()

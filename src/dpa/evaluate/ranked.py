"""Multiple choice by ranking the options: a second number beside the generated one (``--rank-options``).

The option that :mod:`dpa.evaluate.rank` puts first is scored as if the model had written it, by the benchmark's own
scorer; so circular rolls, pairs and weights count as they do for generated answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import ProcessorMixin

from dpa.evaluate.devices import Answerer
from dpa.evaluate.generate import Prediction, Progress, Question
from dpa.evaluate.images import ImageSource
from dpa.evaluate.lab import read_questions, score_lab, summarise
from dpa.evaluate.rank import Choices, rank_options
from dpa.evaluate.scores import scores_path, write_scores
from dpa.evaluate.settings import EvaluateSettings

FIGURE = "log-probability of the option and the end of the turn"
"""By which an option is chosen; stands in the result."""


class Task(Protocol):
    """A benchmark's row, read."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def images(self) -> tuple[ImageSource, ...]: ...
    @property
    def record(self) -> Mapping[str, Any]:
        """The score record without its prediction."""

    @property
    def where(self) -> str: ...


@dataclass(frozen=True, slots=True)
class _LabTask:
    id: str
    text: str
    images: tuple[ImageSource, ...]
    record: Mapping[str, Any]
    where: str


def options_of(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    """What the question may be answered with, as its prompt asks for it; None where it is no choice.

    Letters where the options stand in the prompt under letters (a mapping), the texts where they are a list, Yes and No
    where that is the question's type.
    """
    choices = record.get("choices")
    if isinstance(choices, Mapping) and choices:
        return tuple(sorted(choices))
    if isinstance(choices, Sequence) and not isinstance(choices, str) and choices:
        return tuple(choices)
    return {"yes_no": ("Yes", "No"), "multiple_choice": ("A", "B")}.get(str(record.get("question_type")))


def rank_tasks(
    name: str,
    model: Answerer,
    processor: ProcessorMixin,
    tasks: Sequence[Task],
    settings: EvaluateSettings,
    out: Path,
    *,
    progress: Progress | None = None,
    identity: str | None = None,
) -> list[Prediction] | None:
    """The first-ranked option of each task as a prediction; rankings lie in ``NAME.ranked.jsonl``.

    Returns:
        In the order of the tasks; None where the benchmark's questions are no choices.

    Raises:
        DpaError: see ``rank_options``.
    """
    choices = []
    for task in tasks:
        options = options_of(task.record)
        if options is None:
            return None
        choices.append(Choices(Question(task.id, task.text, task.images, task.where), options))
    rankings = rank_options(
        model,
        processor,
        choices,
        batch_size=settings.batch_size,
        out=out / f"{name}.ranked.jsonl",
        progress=progress,
        identity=identity,
    )
    return [
        Prediction(id=of.question.id, prediction=of.options[ranking.best], tokens=0, finished=True)
        for of, ranking in zip(choices, rankings, strict=True)
    ]


def ranked_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """What of a result goes under the key ``ranked``; blind passes, unparsed and unfinished answers there are none."""
    names = ("accuracy", "accuracy_interval", "mean_over_kinds", "n", "metrics")
    kinds = {kind: {"n": row["n"], "accuracy": row["accuracy"]} for kind, row in result["by_kind"].items()}
    return {"by": FIGURE, **{name: result[name] for name in names if name in result}, "by_kind": kinds}


def rank_lab(
    model: Answerer,
    processor: ProcessorMixin,
    folder: Path,
    settings: EvaluateSettings,
    out: Path,
    *,
    progress: Progress | None = None,
    identity: str | None = None,
) -> dict[str, Any] | None:
    """The lab's questions; units lie in ``lab.ranked.scores.jsonl``.

    Raises:
        DpaError: see ``read_questions`` and ``rank_options``.
    """
    questions = read_questions(folder, limit=settings.limit)
    tasks = [_LabTask(of.id, of.question, (of.image,), {"choices": of.choices}, of.where) for of in questions]
    picked = rank_tasks("lab", model, processor, tasks, settings, out, progress=progress, identity=identity)
    assert picked is not None, "the lab's questions are choices"
    scores = score_lab(questions, picked, None)
    write_scores(scores_path(out, "lab.ranked"), scores)
    return ranked_result(summarise(questions, picked, scores).to_dict())

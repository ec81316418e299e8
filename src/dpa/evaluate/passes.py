"""A benchmark's questions with the image and, where asked for, without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, ProcessorMixin

from dpa.evaluate.generate import Prediction, Progress, Question, generate_answers
from dpa.models.digest import digest_of_model


def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    name: str,
    out: Path,
    *,
    batch_size: int,
    max_new_tokens: int,
    blind: bool,
    progress: Progress | None = None,
    identity: str | None = None,
) -> tuple[list[Prediction], list[Prediction] | None]:
    """Answers, and blind ones where ``blind``; both continue from ``NAME.jsonl`` and ``NAME.blind.jsonl`` in ``out``.

    Args:
        progress: called with (answers, all answers), the blind ones included.
        identity: digest of the weights; None: computed.

    Raises:
        DpaError: see :func:`dpa.evaluate.generate.generate_answers`.
    """
    weights = digest_of_model(model.state_dict()) if identity is None else identity
    passes = (True, False) if blind else (True,)
    answers = [
        generate_answers(
            model,
            processor,
            questions,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            with_image=with_image,
            out=out / (f"{name}.jsonl" if with_image else f"{name}.blind.jsonl"),
            progress=_part(progress, number * len(questions), len(passes) * len(questions)),
            identity=weights,
        )
        for number, with_image in enumerate(passes)
    ]
    return answers[0], answers[1] if blind else None


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)

"""Our generation behind lmms-eval's interface. For the worker alone: lmms_eval patches and reseeds what it likes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image
from transformers import ProcessorMixin

from dpa.errors import DpaError, UserError
from dpa.evaluate.generate import Progress, Question, generate_answers

_DEFAULT_NEW_TOKENS = 1024
"""lmms-eval's own, where a task names none."""


@dataclass(frozen=True, slots=True)
class DocumentImage:
    """One image of one document; it is decoded when it is opened."""

    task: Any
    """``datasets.Dataset`` of the split."""
    to_visual: Any
    doc_id: int
    number: int
    name: str

    def open(self) -> Image.Image:
        """RGB.

        Raises:
            DpaError: the task's visual is no image.
        """
        visual = (self.to_visual(self.task[self.doc_id]) or [])[self.number]
        if not isinstance(visual, Image.Image):
            raise DpaError(f"{self.name}: a {type(visual).__name__} is asked about; this wrapper shows images only")
        return visual.convert("RGB")

    def digest(self) -> str:
        """Of the data set's fingerprint and the place in it, so that no image is decoded for it."""
        return hashlib.sha256(f"{self.task._fingerprint}:{self.doc_id}:{self.number}".encode()).hexdigest()


class _Generator:
    """Holds the model: lmms-eval deletes each attribute of its own model that is an ``nn.Module`` after a task."""

    def __init__(self, model: Any, processor: ProcessorMixin, identity: str, out: Path, batch_size: int) -> None:
        self.model, self.processor, self.identity = model, processor, identity
        self.out, self.batch_size = out, batch_size


class DpaModel(lmms):  # type: ignore[misc]  # lmms_eval has no types
    """Greedy, batched, left-padded, continued after a kill; an error is an error and no empty answer.

    Args:
        identity: digest of the weights.
        out: folder of ``TASK.jsonl``.
        progress: called over each task.
    """

    is_simple = True

    def __init__(
        self,
        model: Any,
        processor: ProcessorMixin,
        *,
        identity: str,
        out: Path,
        batch_size: int,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._generator = _Generator(model, processor, identity, out, batch_size)
        self._progress = progress

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests.

        Raises:
            UserError: a task asks for sampling or beams.
            DpaError: see :func:`dpa.evaluate.generate.generate_answers`.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        for place, request in enumerate(requests):
            _, settings, _, _, task, _ = request.args
            groups.setdefault((task, _new_tokens(task, settings)), []).append(place)
        answers = [""] * len(requests)
        for (task, new_tokens), places in groups.items():
            texts = self._ask(task, new_tokens, [requests[place].args for place in places])
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
        return answers

    def _ask(self, task: str, new_tokens: int, requests: Sequence[tuple[Any, ...]]) -> list[str]:
        own = self._generator
        predictions = generate_answers(
            own.model,
            own.processor,
            [self._question(*request) for request in requests],
            batch_size=own.batch_size,
            max_new_tokens=new_tokens,
            out=own.out / f"{task}.jsonl",
            progress=self._progress,
            identity=own.identity,
        )
        return [_until(item.prediction, request[1]) for item, request in zip(predictions, requests, strict=True)]

    def _question(self, text: str, _: Any, to_visual: Any, doc_id: int, task: str, split: str) -> Question:
        documents = self.task_dict[task][split]
        name = f"lmms-eval task {task}, {split} row {doc_id}"
        count = len(to_visual(documents[doc_id]) or [])
        images = tuple(DocumentImage(documents, to_visual, doc_id, number, name) for number in range(count))
        return Question(id=f"{split}-{doc_id}", text=text, images=images, where=name)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{_task_of(requests)} ranks options by likelihood; this wrapper generates: dpa eval --rank-options"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered.

        Raises:
            UserError: always.
        """
        raise UserError(f"{_task_of(requests)} has several rounds; this wrapper answers one question at a time")


def _task_of(requests: Sequence[Any]) -> str:
    return "lmms-eval task " + str(requests[0].task_name if requests else "?")


def _new_tokens(task: str, settings: dict[str, Any]) -> int:
    if settings.get("do_sample") or (settings.get("temperature") or 0) > 0 or (settings.get("num_beams") or 1) > 1:
        raise UserError(f"lmms-eval task {task} asks for sampling or beams ({settings}); dpa answers greedily")
    return int(settings.get("max_new_tokens") or _DEFAULT_NEW_TOKENS)


def _until(text: str, settings: dict[str, Any]) -> str:
    """Cut before the first stop string, as the name of the interface says."""
    stops = settings.get("until") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        if stop:
            text = text.split(stop)[0]
    return text.strip()

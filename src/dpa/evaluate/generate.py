"""Questions to answers: greedy, batched, continued after a kill. Any image-text-to-text model of transformers.

Legend: B questions of a batch, L padded length, N new tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, GenerationConfig, PreTrainedModel, ProcessorMixin

from dpa.data.images import load_image
from dpa.data.settings import DataSettings
from dpa.errors import DataError, DpaError
from dpa.evaluate.predictions import Prediction, PredictionFile
from dpa.models.digest import digest_of_model

__all__ = ["MAX_IMAGE_PIXELS", "Prediction", "Progress", "Question", "generate_answers"]

MAX_IMAGE_PIXELS: int = DataSettings.model_fields["max_image_pixels"].default
"""Larger images are refused, in evaluation as in training."""

Progress = Callable[[int, int], None]
"""Called with (questions answered, all questions)."""


@dataclass(frozen=True, slots=True)
class Question:
    """One user turn: its images, then its text."""

    id: str
    """Unique among the questions of a call."""
    text: str
    images: tuple[Path, ...] = ()
    where: str = ""
    """File and line, for messages."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question as this model's processor renders it."""

    question: Question
    text: str
    """With special tokens and one placeholder per image."""
    length: int
    """Tokens of ``text``; placeholders count as one."""
    images: tuple[Path, ...]
    """Empty in a blind pass."""


def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    *,
    batch_size: int,
    max_new_tokens: int,
    with_image: bool = True,
    out: Path | None = None,
    progress: Progress | None = None,
    identity: str | None = None,
) -> list[Prediction]:
    """Asks every question as a chat of one user turn and decodes greedily.

    Questions of similar length share a batch, padded on the left; in float32 the answers are those of one-by-one
    generation. The model's own sampling settings (temperature, repetition penalty) are left aside; its end-of-turn ids
    are used. Afterwards training flags, generation settings and random generators are as they were.

    Args:
        model: in one floating-point dtype, on the device where it shall run.
        processor: its processor, with a chat template for typed parts.
        questions: see :class:`Question`.
        batch_size: B.
        max_new_tokens: N at most.
        with_image: False asks the text alone, without an image part.
        out: JSONL that answers are appended to, batch by batch; the same call after a kill asks what is missing.
        progress: called at the start and after each batch.
        identity: digest of the weights where the caller knows it; None: computed where ``out`` needs it.

    Returns:
        One prediction per question, in their order.

    Raises:
        DataError: two questions share an id, or an image cannot be read; names id and file.
        DpaError: rendering, encoding or generation failed; names the ids. Never an empty answer in its stead.
        StorageError: ``out`` cannot be written.
    """
    _check_ids(questions)
    asked = [_render(processor, question, with_image) for question in questions]
    done: dict[str, Prediction] = {}
    digests: dict[str, str] = {}
    with ExitStack() as stack:
        file = None
        if out is not None:
            weights = digest_of_model(model.state_dict()) if identity is None else identity
            file = stack.enter_context(PredictionFile(out, _run_digest(weights, processor, max_new_tokens)))
            digests = _digests(asked)
            done = file.restore(digests)
        if progress is not None:
            progress(len(done), len(asked))
        stack.enter_context(_answering(model, processor, max_new_tokens))
        for batch in _batches([item for item in asked if item.question.id not in done], batch_size):
            answers = _answer(model, processor, batch)
            if file is not None:
                file.append(answers, digests)
            done |= {answer.id: answer for answer in answers}
            if progress is not None:
                progress(len(done), len(asked))
    return [done[question.id] for question in questions]


def _check_ids(questions: Sequence[Question]) -> None:
    seen: dict[str, str] = {}
    for question in questions:
        if question.id in seen:
            raise DataError(f"two questions have the id {question.id!r}: {seen[question.id]} and {question.where}")
        seen[question.id] = question.where or "no file"


def _name(question: Question) -> str:
    return f"question {question.id!r}" + (f" ({question.where})" if question.where else "")


@contextmanager
def _named(question: Question, doing: str) -> Iterator[None]:
    """Errors inside name the question."""
    try:
        yield
    except DpaError as error:
        raise type(error)(f"{_name(question)}: {error}") from None
    except Exception as error:
        raise DpaError(f"{_name(question)}: {doing} failed: {type(error).__name__}: {error}") from error


def _render(processor: ProcessorMixin, question: Question, with_image: bool) -> _Asked:
    images = question.images if with_image else ()
    parts: Any = [*({"type": "image"} for _ in images), {"type": "text", "text": question.text}]
    with _named(question, "rendering the chat template"):
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    return _Asked(question=question, text=text, length=length, images=images)


def _batches(asked: Sequence[_Asked], batch_size: int) -> Iterator[list[_Asked]]:
    """Longest first, so that what does not fit into memory fails at once; a batch has images everywhere or nowhere."""
    for count in sorted({len(item.images) for item in asked}, reverse=True):
        alike = sorted((item for item in asked if len(item.images) == count), key=lambda item: -item.length)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def _answer(model: Any, processor: ProcessorMixin, batch: Sequence[_Asked]) -> list[Prediction]:
    images = [[_load(item.question, path) for path in item.images] for item in batch]
    inputs = _encode(processor, batch, images).to(model.device, dtype=model.dtype)
    try:
        output_BL: Tensor = model.generate(**inputs)
    except Exception as error:
        names = ", ".join(_name(item.question) for item in batch[:3])
        more = f" and {len(batch) - 3} more" if len(batch) > 3 else ""
        hint = "; choose a smaller batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        raise DpaError(f"generation failed in the batch of {names}{more}: {error}{hint}") from error
    new_BN = output_BL[:, inputs["input_ids"].shape[1] :].tolist()
    ends = _ends(model.generation_config)
    return [_prediction(item.question.id, new, ends, processor) for item, new in zip(batch, new_BN, strict=True)]


def _load(question: Question, path: Path) -> Image.Image:
    with _named(question, f"reading {path}"):
        return load_image(path, max_pixels=MAX_IMAGE_PIXELS)


def _encode(
    processor: ProcessorMixin, batch: Sequence[_Asked], images: Sequence[Sequence[Image.Image]]
) -> BatchFeature:
    """Left-padded ids, mask and pixels; where it fails, each question is tried alone to name the one at fault."""
    try:
        encoded: BatchFeature = processor(
            text=[item.text for item in batch],
            images=[list(pictures) for pictures in images] if batch[0].images else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            # what processor.apply_chat_template(tokenize=True) does: a template's own BOS is not doubled
            add_special_tokens=not _starts_with_bos(processor.tokenizer, batch[0].text),
        )
        return encoded
    except Exception as error:
        if len(batch) > 1:
            for item, pictures in zip(batch, images, strict=True):
                _encode(processor, [item], [pictures])
        raise DpaError(f"{_name(batch[0].question)}: encoding failed: {type(error).__name__}: {error}") from error


def _starts_with_bos(tokenizer: Any, text: str) -> bool:
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def _prediction(name: str, new_N: list[int], ends: set[int], processor: ProcessorMixin) -> Prediction:
    """Cuts at the first end of turn; what follows is padding of a batch whose other answers were longer."""
    end = next((place for place, token in enumerate(new_N) if token in ends), None)
    own = new_N if end is None else new_N[: end + 1]
    text: str = processor.tokenizer.decode(own, skip_special_tokens=True)
    return Prediction(id=name, prediction=text.strip(), tokens=len(own), finished=end is not None)


def _ends(config: GenerationConfig) -> set[int]:
    ends = config.eos_token_id
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


@contextmanager
def _answering(model: Any, processor: ProcessorMixin, max_new_tokens: int) -> Iterator[None]:
    """Evaluation mode, no gradients, plain greedy decoding; everything is put back.

    transformers fills what a caller's GenerationConfig leaves open from the model's own (Qwen2.5: a repetition
    penalty), so the model's own is exchanged for the time being.
    """
    own = model.generation_config
    pad = processor.tokenizer.pad_token_id
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id if pad is None else pad,
    )
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    model.generation_config = greedy
    try:
        # not inference_mode: buffers that a module caches meanwhile could not take part in a later training step
        with torch.no_grad():
            yield
    finally:
        model.generation_config = own
        for module, flag in training:
            module.training = flag


def _run_digest(weights: str, processor: ProcessorMixin, max_new_tokens: int) -> str:
    image_processor = json.loads(processor.image_processor.to_json_string())
    return _digest([weights, image_processor, max_new_tokens])


def _digests(asked: Sequence[_Asked]) -> dict[str, str]:
    """Question id -> digest over its rendered text and its images' bytes."""

    @cache
    def of_file(path: Path) -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    digests = {}
    for item in asked:
        images = []
        for path in item.images:
            try:
                images.append(of_file(path))
            except OSError as error:
                raise DataError(f"{_name(item.question)}: {path} cannot be read ({error.strerror})") from None
        digests[item.question.id] = _digest([item.text, images])
    return digests


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

"""Questions as a model's processor wants them: rendered, batched by length, encoded with its images.

Legend: B questions of a batch, L padded length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from dpa.errors import DataError, DpaError, ModelError
from dpa.evaluate.images import ImageSource, image_digest, open_image

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Question:
    """One user turn: its images, then its text."""

    id: str
    """Unique among the questions of a call."""
    text: str
    images: tuple[ImageSource, ...] = ()
    where: str = ""
    """File and line, for messages."""

    def named(self) -> str:
        """For messages."""
        return f"question {self.id!r}" + (f" ({self.where})" if self.where else "")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as this model's processor renders it."""

    question: Question
    text: str
    """With special tokens and one placeholder per image; ends where the answer begins."""
    length: int
    """Tokens of ``text``; placeholders count as one."""
    images: tuple[ImageSource, ...]
    """Empty in a blind pass."""


def check_ids(questions: Sequence[Question]) -> None:
    """Raises DataError where two questions share an id."""
    seen: dict[str, str] = {}
    for question in questions:
        if question.id in seen:
            raise DataError(f"two questions have the id {question.id!r}: {seen[question.id]} and {question.where}")
        seen[question.id] = question.where or "no file"


@contextmanager
def naming(question: Question, doing: str) -> Iterator[None]:
    """Errors inside name the question."""
    try:
        yield
    except DpaError as error:
        raise type(error)(f"{question.named()}: {error}") from None
    except Exception as error:
        raise DpaError(f"{question.named()}: {doing} failed: {type(error).__name__}: {error}") from error


def check_template(processor: Any) -> None:
    """
    Raises:
        ModelError: the processor has no chat template, so nobody knows how the model wants to be asked.
    """
    if processor.chat_template is not None or processor.tokenizer.chat_template is not None:
        return
    raise ModelError(
        f"this checkpoint's {type(processor).__name__} has no chat template, so how to ask it is not known: put a "
        "chat_template.jinja into its folder that renders messages of typed parts (image, text) in the format it was "
        "trained with (for PaliGemma: the image token, the text, a newline)"
    )


def render(processor: ProcessorMixin, question: Question, *, with_image: bool = True, answer: str | None = None) -> str:
    """The prompt as text; with ``answer`` the whole conversation, up to and including the assistant's turn.

    Raises:
        ModelError: there is no chat template.
        DpaError: the template refuses the question; names it.
    """
    check_template(processor)
    pictures = question.images if with_image else ()
    parts: Any = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question.text}]
    turns: Any = [{"role": "user", "content": parts}]
    if answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    with naming(question, "rendering the chat template"):
        beside: Any = None if processor.chat_template is not None else processor.tokenizer.chat_template
        text: str = processor.apply_chat_template(
            turns, chat_template=beside, add_generation_prompt=answer is None, tokenize=False
        )
        if question.text.strip() not in text:
            raise TemplateError("the template leaves the question's text out; it must render typed parts (image, text)")
    return text


def asked(processor: ProcessorMixin, question: Question, *, with_image: bool = True) -> Asked:
    """A question, rendered and measured. See :func:`render`."""
    text = render(processor, question, with_image=with_image)
    with naming(question, "tokenising"):
        length = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Asked(question=question, text=text, length=length, images=question.images if with_image else ())


def batches(items: Sequence[Asked], batch_size: int) -> Iterator[list[Asked]]:
    """Longest first, so that what does not fit into memory fails at once; a batch has images everywhere or nowhere."""
    for count in sorted({len(item.images) for item in items}, reverse=True):
        alike = sorted((item for item in items if len(item.images) == count), key=lambda item: -item.length)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def open_images(item: Asked) -> list[Image.Image]:
    """Raises DataError that names question and image."""
    pictures = []
    for source in item.images:
        with naming(item.question, f"reading {source}"):
            pictures.append(open_image(source))
    return pictures


def encode(
    processor: ProcessorMixin,
    batch: Sequence[Asked],
    images: Sequence[Sequence[Image.Image]],
    *,
    side: PaddingSide,
) -> BatchFeature:
    """Ids [B, L], mask [B, L] and pixels as this processor makes them (and whatever else it makes: sizes, grids).

    Args:
        batch: as many images in each.
        images: of each question.
        side: where shorter rows are padded; compared with what comes back.

    Raises:
        DpaError: it fails, or pads on the other side. Where it fails, each question is tried alone to name the one at
            fault.
    """
    try:
        encoded = _encode(processor, batch, images, side)
    except Exception as error:
        if len(batch) > 1:
            for item, pictures in zip(batch, images, strict=True):
                encode(processor, [item], [pictures], side=side)
        told = str(error) if isinstance(error, DpaError) else f"encoding failed: {type(error).__name__}: {error}"
        raise DpaError(f"{batch[0].question.named()}: {told}") from error
    return encoded


def _encode(
    processor: ProcessorMixin, batch: Sequence[Asked], images: Sequence[Sequence[Image.Image]], side: PaddingSide
) -> BatchFeature:
    with _padding(processor.tokenizer, side):
        encoded: BatchFeature = processor(
            text=[item.text for item in batch],
            images=[list(pictures) for pictures in images] if batch[0].images else None,
            padding=True,
            padding_side=side,
            return_tensors="pt",
            # what processor.apply_chat_template(tokenize=True) does: a template's own BOS is not doubled
            add_special_tokens=adds_special_tokens(processor.tokenizer, batch[0].text),
        )
    if len(batch) > 1:
        mask_BL = encoded["attention_mask"]
        column = -1 if side == "left" else 0
        if not bool(mask_BL[:, column].all()):
            raise DpaError(
                f"{type(processor).__name__} does not pad on the {side} as it was told, and answers of a batch would "
                "differ from those of single questions: use batch_size 1"
            )
    return encoded


def adds_special_tokens(tokenizer: Any, text: str) -> bool:
    """Whether the tokenizer may add its BOS: not where the template has written one."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


@contextmanager
def _padding(tokenizer: Any, side: PaddingSide) -> Iterator[None]:
    """The side also as the tokenizer's own setting, for processors that do not hand the argument on; a padding token
    for tokenizers without one (the mask hides it). Both are put back."""
    own_side, own_token = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = side
    if own_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.padding_side = own_side
        if own_token is None:
            tokenizer.pad_token = None


def asked_digests(items: Sequence[Asked]) -> dict[str, str]:
    """Question id -> digest over its rendered text and its images' bytes.

    Raises:
        DataError: an image cannot be read; names the question.
    """
    digests = {}
    for item in items:
        with naming(item.question, "reading its images"):
            digests[item.question.id] = digest([item.text, [image_digest(source) for source in item.images]])
    return digests


def digest(value: Any) -> str:
    """Of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]

"""A conversation with a checkpoint: the chat text of training and serving, greedy answers, word by word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from dpa.data.images import load_image
from dpa.data.samples import IMAGE_MARKER
from dpa.errors import DataError, DpaError, UserError
from dpa.evaluate.generate import MAX_IMAGE_PIXELS
from dpa.models.vlm import Vlm

Role = Literal["user", "assistant"]
Turns = Sequence[tuple[Role, str]]
"""Who says what, in order; user and assistant take turns."""
MAX_NEW_TOKENS = 512
"""Tokens of an answer."""


class _Stop(StoppingCriteria):
    """Ends a generation that runs in another thread."""

    def __init__(self, wanted: Event) -> None:
        self._wanted = wanted

    def __call__(self, input_ids: Tensor, scores: Any, **arguments: Any) -> Any:
        return torch.full((len(input_ids),), self._wanted.is_set(), dtype=torch.bool, device=input_ids.device)


def stream_answer(
    vlm: Vlm, turns: Turns, picture: Image.Image | None, *, max_new_tokens: int = MAX_NEW_TOKENS
) -> Iterator[str]:
    """The answer to the last turn, in pieces as they are made. Leaving the iteration early ends the generation.

    Args:
        vlm: in evaluation mode; its generation settings are greedy (``models.vlm.generation_config``).
        turns: the conversation, a user's turn last.
        picture: what the first turn is about; None: the text alone.
        max_new_tokens: at most; fewer where the model's context ends.

    Raises:
        DataError: the template refuses the turns, or a turn spells out the image token.
        UserError: the conversation fills the model's context.
        DpaError: generation failed.
    """
    inputs = _inputs(vlm, turns, picture)
    room = _room(vlm, int(inputs["input_ids"].shape[1]))
    stop = Event()
    failed: list[BaseException] = []
    streamer = TextIteratorStreamer(vlm.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def generate() -> None:
        model: Any = vlm.model
        try:
            with torch.no_grad():
                model.generate(
                    **inputs,
                    streamer=streamer,
                    max_new_tokens=min(max_new_tokens, room),
                    stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                )
        except BaseException as error:  # it belongs to the thread that waits for the answer
            failed.append(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        for piece in streamer:
            if piece:
                yield piece
    finally:
        stop.set()
        thread.join()
    if failed:
        hint = "; shorten the conversation" if isinstance(failed[0], torch.OutOfMemoryError) else ""
        raise DpaError(f"the answer failed: {type(failed[0]).__name__}: {failed[0]}{hint}") from failed[0]


def _inputs(vlm: Vlm, turns: Turns, picture: Image.Image | None) -> dict[str, Tensor]:
    """What the model is given, on its device and in its dtype."""
    assert turns, "a conversation starts with a question"
    assert turns[-1][0] == "user", "a user's turn comes last"
    for _, text in turns:
        for mark in (IMAGE_MARKER, vlm.rules.image_token):
            if mark in text:
                raise DataError(f"{mark} in a question stands for an image; give the image itself, and leave it out")
    messages = [
        {
            "role": role,
            "content": [
                *([{"type": "image"}] if place == 0 and picture is not None else []),
                {"type": "text", "text": text},
            ],
        }
        for place, (role, text) in enumerate(turns)
    ]
    processor: Any = vlm.processor
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (TemplateError, TypeError) as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from None
    bos = vlm.tokenizer.bos_token
    encoded = processor(
        text=[text],
        images=None if picture is None else [[picture]],
        return_tensors="pt",
        add_special_tokens=not (bos is not None and text.startswith(bos)),  # as in evaluate.generate
    )
    model: Any = vlm.model
    moved: dict[str, Tensor] = dict(encoded.to(model.device, dtype=model.dtype))
    return moved


def _room(vlm: Vlm, length: int) -> int:
    """Tokens that an answer may have behind so many.

    Raises:
        UserError: none.
    """
    config: Any = vlm.model.config
    most = int(config.get_text_config().max_position_embeddings)
    if length >= most:
        raise UserError(f"the conversation has {length} tokens, the model takes {most}: start anew (/reset)")
    return most - length


@dataclass(slots=True)
class Conversation:
    """Turns and at most one picture, which belongs to the first of them."""

    vlm: Vlm
    max_new_tokens: int = MAX_NEW_TOKENS
    picture: Image.Image | None = None
    blind: bool = False
    """The picture is kept back."""
    turns: list[tuple[Role, str]] = field(default_factory=list)

    def look_at(self, path: Path) -> None:
        """Another picture, another conversation.

        Raises:
            DataError: it cannot be read; everything is then as before.
        """
        self.picture = load_image(path, max_pixels=MAX_IMAGE_PIXELS)
        self.reset()

    def reset(self) -> None:
        """Forgets the turns; the picture stays."""
        self.turns.clear()

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces. What was said of it is remembered, even if somebody stopped listening.

        Raises:
            DpaError: see :func:`stream_answer`; the question is then forgotten.
        """
        said: list[str] = []
        turns: list[tuple[Role, str]] = [*self.turns, ("user", question)]
        try:
            seen = None if self.blind else self.picture
            for piece in stream_answer(self.vlm, turns, seen, max_new_tokens=self.max_new_tokens):
                said.append(piece)
                yield piece
        except DpaError:
            said.clear()
            raise
        finally:
            if answer := "".join(said).strip():
                self.turns = [*turns, ("assistant", answer)]


def both_ways(
    vlm: Vlm,
    seeing: Turns,
    blind: Turns | None,
    picture: Image.Image | None,
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Iterator[tuple[str, str]]:
    """With the picture, then without it.

    Args:
        seeing: the conversation with the picture.
        blind: the one without, which has had answers of its own; None: only the first is wanted.

    Yields:
        Both answers so far.
    """
    answers = ["", ""]
    ways = [(0, seeing, picture)] + ([] if blind is None else [(1, blind, None)])
    for place, turns, shown in ways:
        for piece in stream_answer(vlm, turns, shown, max_new_tokens=max_new_tokens):
            answers[place] += piece
            yield answers[0], answers[1]


__all__ = ["MAX_NEW_TOKENS", "Conversation", "Role", "Turns", "both_ways", "stream_answer"]

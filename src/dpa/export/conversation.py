"""Prompts of LLaVA's own code, to find the ``conv-mode`` that serves what was trained.

Facts of ``llava/conversation.py`` (``conv_templates``) and of ``tokenizer_image_token`` in ``llava/mm_utils.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpa.data.chat import Encoded
from dpa.data.samples import Sample

IMAGE_INDEX = -200
"""LLaVA's ``IMAGE_TOKEN_INDEX``."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One entry of ``conv_templates``, for one question."""

    name: str
    where: str
    before: str
    after: str


_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: "
)
_USER, _ASSISTANT = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"

CONVERSATIONS: tuple[Conversation, ...] = (
    Conversation("vicuna_v1", "LLaVA and LLaVA-NeXT", _VICUNA, " ASSISTANT:"),
    Conversation("mistral_instruct", "LLaVA and LLaVA-NeXT", "[INST] ", " [/INST]"),
    Conversation(
        "qwen_1_5",
        "LLaVA-NeXT",
        f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{_USER}",
        _ASSISTANT,
    ),
    Conversation(
        "qwen_2_5",
        "LLaVA-NeXT",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n" + _USER,
        _ASSISTANT,
    ),
)


def find_conversation(conversations: tuple[tuple[Sample, Encoded], ...], tokenizer: Any) -> Conversation | None:
    """The entry whose prompts are, token for token, those of training; None where there is none.

    Args:
        conversations: the probes; those with one question are compared, up to where the answer begins.
        tokenizer: the exported one, as LLaVA's code loads it.
    """
    single = [(sample, encoded) for sample, encoded in conversations if len(sample.turns) == 2]
    for entry in CONVERSATIONS:
        if all(
            prompt_ids(entry.before + sample.turns[0].text + entry.after, tokenizer) == prompt_of(encoded)
            for sample, encoded in single
        ):
            return entry
    return None


def prompt_of(encoded: Encoded) -> list[int]:
    """Ids up to the answer, with one ``IMAGE_INDEX`` per image."""
    ids = encoded.input_ids[: encoded.supervised.index(True)]
    for start, end in reversed(encoded.image_spans):
        ids[start:end] = [IMAGE_INDEX]
    return ids


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """A prompt's ids as LLaVA's code makes them: piece by piece, each with BOS, all but the first BOS dropped."""
    pieces: list[list[int]] = [tokenizer(piece)["input_ids"] for piece in prompt.split("<image>")]
    has_bos = bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id
    ids: list[int] = pieces[0][:1] if has_bos else []
    for number, piece in enumerate(pieces):
        ids += [IMAGE_INDEX] if number else []
        ids += piece[1:] if has_bos else piece
    return ids

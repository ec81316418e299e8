"""What an LLM thinks of captions: each token's surprise from the text before it, as stage 2 sees it without image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dpa.analyze.conflict.tokens import TokenCaption, one_placeholder
from dpa.data.collate import collate
from dpa.errors import UserError
from dpa.models.text_pass import text_only_logprobs
from dpa.types import TextRules

BATCH_TOKENS = {"cpu": 4096}
"""Tokens of a forward by device; others: ``_ACCELERATOR_TOKENS``."""
_ACCELERATOR_TOKENS = 16384

Surprise = NDArray[np.float64]
"""[T] nats, -log p(token | text before it); NaN where nothing at all precedes the token (a family without a token that
starts documents)."""


def batch_tokens(device: torch.device, wanted: int | None) -> int:
    """Tokens per forward, padding included."""
    return BATCH_TOKENS.get(device.type, _ACCELERATOR_TOKENS) if wanted is None else wanted


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of the lengths in batches of similar length, longest first: what does not fit, fails at once.

    A batch's number of items times its longest is at most ``budget``; a longer item goes alone.
    """
    batches: list[list[int]] = []
    longest = 0
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        if batches and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(place)
        else:
            batches.append([place])
            longest = lengths[place]
    return batches


def surprise_of(
    llm: nn.Module,
    captions: Sequence[TokenCaption],
    rules: TextRules,
    *,
    device: torch.device,
    tokens_per_batch: int,
    autocast: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Surprise]:
    """The surprise of every token of every caption: the numbers of stage 2's pass without image.

    The first token is read after the family's document start (BOS, or e.g. ``<|endoftext|>``), the others after the
    caption so far; no image, no prompt.

    Args:
        llm: an LLM with its head on ``device``, with or without an adapter; its training flags are left alone.
        rules: of its family.
        tokens_per_batch: see :func:`by_length`.
        autocast: compute in this type (an adapter's float32 matrices on a bf16 LLM); None: in the parameters' own.
        progress: called with (captions done, all captions).

    Raises:
        UserError: a batch does not fit the device's memory.
    """
    rules = one_placeholder(rules)
    found: list[Surprise] = [np.empty(0)] * len(captions)
    lengths = [len(caption.blind.input_ids) for caption in captions]
    done = 0
    for places in by_length(lengths, tokens_per_batch):
        chosen = [captions[place] for place in places]
        batch = collate([caption.item(blind=True) for caption in chosen], rules, text_only=True).to(device)
        low = torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None)
        with enough_memory(tokens_per_batch), low:
            # contiguous: what an image would have stood in between is not there
            nll: Any = -text_only_logprobs(llm, batch, text_positions="contiguous").logp.double().cpu().numpy()
        parts = np.split(nll, np.cumsum([caption.count for caption in chosen])[:-1])
        for place, part in zip(places, parts, strict=True):
            found[place] = part
        done += len(places)
        if progress is not None:
            progress(done, len(captions))
    return found


@contextmanager
def enough_memory(tokens: int) -> Iterator[None]:
    """
    Raises:
        UserError: the accelerator's memory is full, in words.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"the accelerator's memory is full at {tokens} tokens per forward; give less with --batch-tokens, or a "
            "smaller LLM"
        ) from None

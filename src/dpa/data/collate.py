"""Items to a batch: right-padded, positions fixed. Legend: B samples, L padded length, I images of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpa.data.dataset import Item
from dpa.types import Batch, TextRules


def collate(items: Sequence[Item], rules: TextRules, *, filler: bool = False, text_only: bool = False) -> Batch:
    """One micro-batch.

    Args:
        items: B of them.
        rules: pad id, image token.
        filler: nothing is supervised: the batch only keeps a rank in step with the others.
        text_only: the items come without their images, for a pass that reads the text alone.
    """
    rows, length = len(items), max(len(item.encoded.input_ids) for item in items)
    input_ids_BL = torch.full((rows, length), rules.pad_id, dtype=torch.int64)
    attention_mask_BL = torch.zeros((rows, length), dtype=torch.int64)
    position_ids_BL = torch.zeros((rows, length), dtype=torch.int64)
    supervised_BL = torch.zeros((rows, length), dtype=torch.bool)
    is_image_BL = torch.zeros((rows, length), dtype=torch.bool)
    for row, item in enumerate(items):
        encoded = item.encoded
        real = len(encoded.input_ids)
        input_ids_BL[row, :real] = torch.tensor(encoded.input_ids)
        attention_mask_BL[row, :real] = 1
        position_ids_BL[row, :real] = torch.arange(real)
        if not filler:
            supervised_BL[row, :real] = torch.tensor(encoded.supervised)
        for start, end in encoded.image_spans:
            is_image_BL[row, start:end] = True
    texts = [item.text.none() if filler else item.text for item in items if item.text is not None]
    batch = Batch(
        input_ids=input_ids_BL,
        attention_mask=attention_mask_BL,
        position_ids=position_ids_BL,
        supervised=supervised_BL,
        is_image=is_image_BL,
        pixel_values=_joined([item.pixel_values for item in items]),
        image_counts=tuple(len(item.encoded.image_spans) for item in items),
        sample_ids=tuple(item.sample_id for item in items),
        document_start_id=rules.document_start_id,
        features=_joined([item.features for item in items]),
        logp_without=_joined([text.logp for text in texts]),
        logit_without=_joined([text.logit for text in texts]),
        marked=None if filler else _marked(items),
    )
    _check(batch, rules, text_only=text_only)
    return batch


def _marked(items: Sequence[Item]) -> Tensor | None:
    """float32 [N]; NaN in samples that mark nothing, None where none does."""
    if all(item.encoded.marked is None for item in items):
        return None
    parts = []
    for item in items:
        supervised = torch.tensor(item.encoded.supervised)
        marked = item.encoded.marked
        parts.append(
            torch.full((int(supervised.sum()),), torch.nan)
            if marked is None
            else torch.tensor(marked)[supervised].float()
        )
    return torch.cat(parts)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """In the samples' order; None where no sample has any."""
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


def _check(batch: Batch, rules: TextRules, *, text_only: bool) -> None:
    """What ``types.Batch`` promises."""
    read = batch.features if batch.pixel_values is None else batch.pixel_values
    images = 0 if read is None else read.shape[0]
    counts_B = torch.tensor(batch.image_counts)
    assert images == (0 if text_only else sum(batch.image_counts)), (batch.image_counts, images)
    for numbers in (batch.logp_without, batch.logit_without, batch.marked):
        assert numbers is None or len(numbers) == batch.supervised.sum(), (len(numbers), batch.supervised.sum())
    assert torch.equal(batch.is_image.sum(dim=1), counts_B * rules.image_tokens)
    assert torch.equal(batch.is_image & (batch.input_ids == rules.image_token_id), batch.is_image)
    assert not batch.supervised[:, 0].any()
    assert not (batch.supervised & (batch.is_image | (batch.attention_mask == 0))).any()

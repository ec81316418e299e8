"""Items to a batch: right-padded, positions fixed. Legend: B samples, L padded length, I images of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpa.data.dataset import Item
from dpa.types import Batch, TextRules


def collate(items: Sequence[Item], rules: TextRules, *, filler: bool = False) -> Batch:
    """One micro-batch.

    Args:
        items: B of them.
        rules: pad id, image token.
        filler: nothing is supervised: the batch only keeps a rank in step with the others.
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
    pixels = [item.pixel_values for item in items if item.pixel_values is not None]
    batch = Batch(
        input_ids=input_ids_BL,
        attention_mask=attention_mask_BL,
        position_ids=position_ids_BL,
        supervised=supervised_BL,
        is_image=is_image_BL,
        pixel_values=torch.cat(pixels) if pixels else None,
        image_counts=tuple(len(item.encoded.image_spans) for item in items),
        sample_ids=tuple(item.sample_id for item in items),
        document_start_id=rules.document_start_id,
    )
    _check(batch, rules)
    return batch


def _check(batch: Batch, rules: TextRules) -> None:
    """What ``types.Batch`` promises."""
    images = 0 if batch.pixel_values is None else batch.pixel_values.shape[0]
    counts_B = torch.tensor(batch.image_counts)
    assert sum(batch.image_counts) == images, (batch.image_counts, images)
    assert torch.equal(batch.is_image.sum(dim=1), counts_B * rules.image_tokens)
    assert torch.equal(batch.is_image & (batch.input_ids == rules.image_token_id), batch.is_image)
    assert not batch.supervised[:, 0].any()
    assert not (batch.supervised & (batch.is_image | (batch.attention_mask == 0))).any()

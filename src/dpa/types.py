"""The two plain types that data, models and training hand to each other. A leaf: imports torch only.

Legend: B samples (rows), L padded length, N supervised tokens, I images of a batch, C channels (of pixels or of the
tower), R image side in pixels, P rows per image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TextRules:
    """What a family's tokenizer and a tower's size fix about sequences. From ``models.families``, for ``data.chat``."""

    image_token: str
    """Text of the placeholder in rendered prompts (an unused or added special token of the family)."""
    image_token_id: int
    image_tokens: int
    """Placeholders per image = rows that tower and connector give per image."""
    bos_id: int | None
    """Token that the plain format puts first; None where the family has none (Qwen2.5)."""
    document_start_id: int | None
    """Token that may stand before the first text token in the text-only pass (BOS, else e.g. ``<|endoftext|>``)."""
    end_of_turn: str
    """Special token that closes an assistant turn and is supervised with it."""
    pad_id: int
    chat_template: str
    """The Jinja template that training and serving both render (accepts plain strings and typed parts)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch, one sample per row, right-padded; passes lay out rows of their own (``models.rows``).

    Labels: ``input_ids`` where ``supervised``; position t is predicted at t - 1.
    """

    input_ids: Tensor
    """int64 [B, L]; ``image_token_id`` at placeholders, pad id at padding."""
    attention_mask: Tensor
    """int64 [B, L]; 1 for real tokens."""
    position_ids: Tensor
    """int64 [B, L]; 0, 1, 2 ... with the image in place; 0 at padding."""
    supervised: Tensor
    """bool [B, L]; never True at t = 0, at placeholders or at padding."""
    is_image: Tensor
    """bool [B, L]; the placeholders."""
    pixel_values: Tensor | None
    """float32 [I, C, R, R], images in reading order over the batch; None without images, or where they are not read."""
    image_counts: tuple[int, ...]
    """Images per sample, length B; sums to I."""
    sample_ids: tuple[str, ...]
    """For messages, length B."""
    document_start_id: int | None
    """See TextRules."""
    features: Tensor | None = None
    """float16 [I, P, C], the frozen tower's rows of the images, in place of ``pixel_values``: from ``VisionCache``."""
    logp_without: Tensor | None = None
    """float32 [N], text-only log-prob of each supervised token (row-major over ``supervised``), NaN where there is
    none: from ``TextCache``, in place of the text-only pass."""
    logit_without: Tensor | None = None
    """float32 [N], the labels' raw logits of the same pass, for objectives that read them."""
    marked: Tensor | None = None
    """float32 [N], 1 where the data marks a supervised token as visual, 0 where not, NaN in samples without marks.
    None: not asked for, or no sample has any."""

    @property
    def has_image(self) -> Tensor:
        """bool [B]."""
        return torch.tensor([count > 0 for count in self.image_counts], device=self.input_ids.device)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Called by the DataLoader where pinned memory helps (CUDA)."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Every tensor changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

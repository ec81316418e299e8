"""How far our passes are from transformers' own forward, family by family. For tests and ``benchmarks/families.py``.

The reference is as plain as can be: the LLM's folder loaded by ``AutoModelForCausalLM`` (so with its own head and
soft-cap), one sample at a time, without padding, mask or position ids; for images transformers' whole LLaVA.

Legend: B samples, L padded length, N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpa.models.attention import DENSE_ROW
from dpa.models.rows import Rows, arrange
from dpa.models.settings import ModelSettings
from dpa.models.text_pass import text_only_logprobs
from dpa.models.vlm import Vlm, build_vlm, head, hidden_states
from dpa.objectives import label_logprobs
from dpa.testing.models import tiny_batch
from dpa.testing.parts import SIDE, write_tiny_llm, write_tiny_tower
from dpa.testing.tiny_families import TINY_FAMILIES, WINDOWED, TinyFamily
from dpa.types import Batch

TEXTS = ("text:4 label:19", "text:2 label:3 text:5 label:1", "label:40", "text:9 label:2")
IMAGES = (
    "text:2 image label:12 text:3 label:6",
    "image label:5 text:6 label:2",
    "text:1 image text:2 image text:3 label:9",
    "text:7 label:8",
)
"""Text before and after an image, an image first, two images, none; all longer than ``WINDOW``."""
WINDOW = 5
"""Tokens; shorter than the samples."""

CASES: tuple[tuple[TinyFamily, int | None], ...] = (
    *((family, None) for family in TINY_FAMILIES),
    *((family, WINDOW) for family in WINDOWED),
)
"""Every family, and those that may have a sliding window with one that is felt."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Largest absolute differences, over all real positions and the whole vocabulary, of one family in one dtype."""

    family: str
    model_type: str
    window: int | None
    dtype: str
    attention: str
    logits: float
    """Text, one sample per row, right-padded: our hidden states through our head, with soft-cap."""
    packed: float
    """The same, several samples in a row."""
    text_only: float
    """Log-probs of labels in samples with images, the images left out; against the plain LLM on the text before each
    label alone. Padded and packed."""
    image: float
    """Logits with images against ``LlavaForConditionalGeneration`` (which knows no final soft-cap: without it here)."""
    loss: float
    """Mean negative log-likelihood of a sample with images against the loss that LLaVA's own forward returns."""
    largest: float
    """Largest absolute logit, for the scale."""


@torch.no_grad()
def measure(folder: Path, family: TinyFamily, *, window: int | None, dtype: torch.dtype) -> Agreement:
    """One row of the table.

    Args:
        folder: an empty place; gets a tiny LLM and a tiny tower.
        window: sliding window in tokens where the family may have one (``CASES``).
        dtype: of all weights.
    """
    llm = write_tiny_llm(folder / "llm", family, sliding_window=window)
    tower = write_tiny_tower(folder / "tower", "clip")
    vlm = build_vlm(ModelSettings(llm=str(llm), vision_tower=str(tower)), dtype=dtype, tower_dtype=dtype)
    torch.nn.Module.to(vlm.model.model.multi_modal_projector, dtype)
    config: Any = vlm.model.config
    attention = config.text_config._attn_implementation
    plain: Any = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, attn_implementation=attention)
    texts, images = tiny_batch(TEXTS), _image_batch(vlm)
    expected = [plain(input_ids=ids.unsqueeze(0)).logits[0] for ids in _samples(texts)]
    with_images = [_own_forward(vlm, images, sample) for sample in range(len(IMAGES))]
    ours = _logits(vlm, images, capped=False)
    return Agreement(
        family=family,
        model_type=config.text_config.model_type,
        window=window,
        dtype=str(dtype).removeprefix("torch."),
        attention=attention,
        logits=_farthest(_logits(vlm, texts, capped=True), expected, vocabulary=plain.vocab_size),
        packed=_farthest(_logits(vlm, texts, capped=True, packed=True), expected, vocabulary=plain.vocab_size),
        text_only=_text_only(vlm, plain, images),
        image=_farthest(ours, [logits for logits, _ in with_images]),
        loss=max(
            abs(_loss(vlm, images, sample) - loss) for sample, (_, loss) in enumerate(with_images) if loss is not None
        ),
        largest=max(float(logits.abs().max()) for logits in expected),
    )


def _image_batch(vlm: Vlm) -> Batch:
    """Placeholders as this model has them; pixels for its tower."""
    batch = tiny_batch(IMAGES, image_tokens=vlm.rules.image_tokens, document_start_id=vlm.rules.document_start_id)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(sum(batch.image_counts), 3, SIDE, SIDE, generator=generator)
    ids_BL = batch.input_ids.masked_fill(batch.is_image, vlm.rules.image_token_id)
    return replace(batch, input_ids=ids_BL, pixel_values=pixels.to(vlm.model.dtype))


def _samples(batch: Batch) -> list[Tensor]:
    """The real tokens of each sample."""
    return [ids[mask.bool()] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def _logits(vlm: Vlm, batch: Batch, *, capped: bool, packed: bool = False) -> list[Tensor]:
    """Ours at all real positions, sample by sample: [N, V] each."""
    rows: Rows | None = arrange(batch.attention_mask.bool(), DENSE_ROW) if packed else None
    hidden = hidden_states(vlm.model, batch, rows=rows)
    weight_VH, cap = head(vlm.model)
    found = []
    for sample, mask in enumerate(batch.attention_mask):
        column_N = mask.nonzero().flatten()
        place = (torch.full_like(column_N, sample), column_N)
        logits_NV = hidden[place if rows is None else rows.places(*place)] @ weight_VH.T
        found.append(logits_NV if cap is None or not capped else cap * torch.tanh(logits_NV / cap))
    return found


def _own_forward(vlm: Vlm, batch: Batch, sample: int) -> tuple[Tensor, float | None]:
    """LLaVA's own forward of one sample: logits [N, V], and its loss (None for a sample without images)."""
    ids, real = batch.input_ids[sample], batch.attention_mask[sample].bool()
    first, count = sum(batch.image_counts[:sample]), batch.image_counts[sample]
    assert batch.pixel_values is not None
    pixels = batch.pixel_values[first : first + count] if count else None
    labels = ids.where(batch.supervised[sample], -100)[real]
    output = vlm.model(input_ids=ids[real].unsqueeze(0), pixel_values=pixels, labels=labels.unsqueeze(0))
    return output.logits[0], float(output.loss) if count else None


def _loss(vlm: Vlm, batch: Batch, sample: int) -> float:
    weight_VH, _ = head(vlm.model)
    label_N = batch.supervised[sample].nonzero().flatten()
    hidden_NH = hidden_states(vlm.model, batch)[sample, label_N - 1]
    return -float(label_logprobs(hidden_NH, weight_VH, batch.input_ids[sample, label_N]).mean())


def _text_only(vlm: Vlm, plain: Any, batch: Batch) -> float:
    """Position ids are contiguous ones: the plain LLM knows no image that might have left a gap."""
    expected = []
    for sample, ids in enumerate(_samples(batch)):
        text = ~batch.is_image[sample, : len(ids)]
        logits_TV = plain(input_ids=ids[text].unsqueeze(0)).logits[0]
        for label in batch.supervised[sample].nonzero().flatten().tolist():
            before = int(text[:label].sum())
            logits_V = logits_TV[before - 1] if before else _after_start(plain, batch)
            expected.append(_padded(logits_V, vlm).log_softmax(-1)[ids[label]])
    found = [
        text_only_logprobs(vlm.model, batch, text_positions="contiguous", all_samples=True, packing=packing).logp
        for packing in (False, True)
    ]
    return max(float((logp - torch.stack(expected)).abs().max()) for logp in found)


def _after_start(plain: Any, batch: Batch) -> Tensor:
    assert batch.document_start_id is not None
    logits_V: Tensor = plain(input_ids=torch.tensor([[batch.document_start_id]])).logits[0, -1]
    return logits_V


def _padded(logits_V: Tensor, vlm: Vlm) -> Tensor:
    """With the logits of rows that the image token made grow, which the plain LLM has not: the mean of its own."""
    missing = int(head(vlm.model)[0].shape[0]) - len(logits_V)
    return torch.cat([logits_V, logits_V.mean().expand(missing)])


def _farthest(found: list[Tensor], expected: list[Tensor], vocabulary: int | None = None) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((ours[:, :vocabulary] - theirs).abs().max()) for ours, theirs in pairs)

"""Logits and token ids of a fixed probe, before and after.

Legend: T tokens of a probe, S of them text, V vocabulary, C channels, R image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from dpa.data.collate import collate
from dpa.data.dataset import Item
from dpa.data.probe import PROBES, encode_probe
from dpa.errors import CheckpointError
from dpa.export.origin import Gate, Origin
from dpa.models.vlm import Vlm, head, hidden_states
from dpa.types import Batch, TextRules

TOLERANCE = 1e-4
"""Largest difference of two logits, as a share of the largest logit. Both sides hold the same weights and compute in
float32; kernels and the order of sums differ (training packs and masks its own way), which moves float32 logits of deep
models by some 1e-5. A permuted head, a wrong rotary base or a lost bias moves them by more than 1e-1."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The probes as a model gets them."""

    batches: tuple[Batch, ...]
    """One per conversation, B = 1."""

    def text(self, index: int) -> Tensor:
        """bool [T]: what is compared; V numbers at each image placeholder would say nothing new."""
        return ~self.batches[index].is_image[0]


def picture() -> Image.Image:
    """Noise, wider than high: what is cropped, padded or mirrored shows."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def make_probe(vlm: Vlm) -> Probe:
    """Encodes the probes as training does; pixels come from the checkpoint's own processor."""
    pixels: Tensor = vlm.processor.image_processor(picture(), return_tensors="pt")["pixel_values"]
    batches = []
    for sample in PROBES:
        encoded = encode_probe(sample, vlm.tokenizer, vlm.rules)
        item = Item(encoded, pixels.float() if sample.images else None, sample.id, sample.where)
        batches.append(collate([item], vlm.rules))
    return Probe(tuple(batches))


@torch.inference_mode()
def trained_logits(vlm: Vlm, probe: Probe) -> list[Tensor]:
    """[S, V] per probe by the training forward, float32, without a final soft-cap."""
    weight_VH, _ = head(vlm.model)
    found = []
    for index, batch in enumerate(probe.batches):
        hidden_TH = hidden_states(vlm.model, batch)[0]
        found.append((hidden_TH[probe.text(index)] @ weight_VH.T).float())
    return found


@torch.inference_mode()
def served_logits(model: Any, probe: Probe) -> list[Tensor]:
    """[S, V] per probe by the stock class's own forward."""
    found = []
    for index, batch in enumerate(probe.batches):
        images = {} if batch.pixel_values is None else {"pixel_values": batch.pixel_values}
        logits_TV = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **images).logits[0]
        found.append(logits_TV[probe.text(index)].float())
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two sets of logits."""

    largest: float
    scale: float
    """Largest logit."""
    same_choice: float
    """Share of positions where both have the same most probable token."""

    @property
    def share(self) -> float:
        """``largest`` in units of ``scale``."""
        return self.largest / max(self.scale, 1e-12)


def compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> Difference:
    """Both lists of [S, V]; a model with fewer rows is compared where both have some."""
    rows = min(before[0].shape[1], after[0].shape[1])
    left, right = (torch.cat([item[:, :rows] for item in items]) for items in (before, after))
    return Difference(
        largest=float((left - right).abs().max()),
        scale=float(left.abs().max()),
        same_choice=float((left.argmax(1) == right.argmax(1)).float().mean()),
    )


def check_logits(before: Sequence[Tensor], after: Sequence[Tensor], reader: str) -> Gate:
    """What was written gives what was trained.

    Args:
        before: of the checkpoint, its weights rounded as the export rounds them.
        after: of the export, read back.
        reader: who read it, for the report.

    Raises:
        CheckpointError: they differ by more than ``TOLERANCE``, or are not finite.
    """
    difference = compare(before, after)
    said = f"largest difference {difference.largest:.2e} of logits up to {difference.scale:.3g}"
    if not difference.share <= TOLERANCE:  # also where it is NaN
        raise CheckpointError(
            f"the exported model is not the checkpoint: {said}, read back by {reader}; allowed is {TOLERANCE:g} of the "
            "largest logit. Nothing was written; please report it with the names of LLM and tower"
        )
    return Gate("logits before = after", "passed", f"{said}; allowed {TOLERANCE:g} of it; read back by {reader}")


def check_template(folder: Path, vlm: Vlm, origin: Origin, digest: str) -> Gate:
    """The folder's own processor gives the ids that training gave, for typed and for plain messages.

    Args:
        folder: the export, with its processor.
        vlm: the checkpoint.
        origin: may know what training encoded.
        digest: of the probes as this checkpoint encodes them.

    Raises:
        CheckpointError: they differ.
    """
    trained = None if origin.stage is None else origin.stage.get("template_ids")
    if trained is not None and trained != digest:
        raise CheckpointError(
            f"{origin.checkpoint}: its tokenizer and template give other token ids than training had (digest "
            f"{digest[:12]}, the manifest says {trained[:12]}): a file of the folder was changed since; put the run's own "
            "tokenizer and chat template back"
        )
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    for sample in PROBES:
        encoded = encode_probe(sample, vlm.tokenizer, vlm.rules)
        messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
        ids = {
            "as plain strings": _served(processor, messages, bool(sample.images)),
            "as typed parts": _served(processor, [_typed(message) for message in messages], bool(sample.images)),
        }
        for how, served in ids.items():
            if served != encoded.input_ids:
                raise CheckpointError(
                    _differ(sample.id, how, encoded.input_ids, served, vlm.rules, processor.tokenizer)
                )
    detail = f"{len(PROBES)} conversations, typed and plain, by the folder's own processor"
    if trained is None:
        return Gate("template token ids train = serve", "passed", f"{detail}; training's own ids were not written down")
    return Gate(
        "template token ids train = serve", "passed", f"{detail}; as the run's manifest says (sha256 {trained})"
    )


def _served(processor: Any, messages: list[dict[str, Any]], with_image: bool) -> list[int]:
    text = processor.apply_chat_template(messages, tokenize=False)
    images = {"images": picture()} if with_image else {}
    found: list[int] = processor(text=text, return_tensors="pt", **images)["input_ids"][0].tolist()
    return found


def _typed(message: dict[str, Any]) -> dict[str, Any]:
    before, mark, after = message["content"].partition("<image>\n")
    if not mark:
        return {**message, "content": [{"type": "text", "text": before}]}
    return {**message, "content": [{"type": "image"}, {"type": "text", "text": after}]}


def _differ(name: str, how: str, trained: list[int], served: list[int], rules: TextRules, tokenizer: Any) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(trained, served, strict=False)) if a != b), min(len(trained), len(served))
    )
    around = [tokenizer.convert_ids_to_tokens(ids[max(0, at - 3) : at + 4]) for ids in (trained, served)]
    return (
        f"the exported processor would serve another prompt than was trained: conversation {name!r} {how} has "
        f"{len(served)} tokens, in training {len(trained)}; from token {at} on: trained {around[0]}, served {around[1]} "
        f"(image token {rules.image_token})"
    )

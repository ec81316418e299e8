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

from dpa.data.chat import Encoded
from dpa.data.collate import collate
from dpa.data.dataset import Item
from dpa.data.probe import encode_probes, probe_digest
from dpa.data.samples import Sample
from dpa.errors import CheckpointError, ModelError
from dpa.export.origin import Gate, Origin
from dpa.models.vlm import Vlm, head, hidden_states
from dpa.types import Batch

TOLERANCE = 1e-4
"""Largest difference of two logits, as a share of the largest logit. Both sides hold the same weights and compute in
float32; kernels and the order of sums differ (training packs and masks its own way), which moves float32 logits of deep
models by some 1e-5. A permuted head, a wrong rotary base or a lost bias moves them by more than 1e-1."""


TEMPLATE = "template token ids train = serve"


@dataclass(frozen=True, slots=True)
class Probe:
    """The probes as a model gets them."""

    conversations: tuple[tuple[Sample, Encoded], ...]
    batches: tuple[Batch, ...]
    """One per conversation, B = 1."""
    digest: str
    """Of ids and labels, as training's manifest has it."""

    def text(self, index: int) -> Tensor:
        """bool [T]: what is compared; V numbers at each image placeholder would say nothing new."""
        return ~self.batches[index].is_image[0]


def picture() -> Image.Image:
    """Noise, wider than high: what is cropped, padded or mirrored shows."""
    noise = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def make_probe(vlm: Vlm) -> Probe:
    """Encodes the probes as training does; pixels come from the checkpoint's own processor.

    Raises:
        ModelError: the checkpoint's chat template takes none of the probes.
    """
    pixels: Tensor = vlm.processor.image_processor(picture(), return_tensors="pt")["pixel_values"]
    conversations = tuple(encode_probes(vlm.tokenizer, vlm.rules))
    digest = probe_digest(vlm.tokenizer, vlm.rules)
    if digest is None:
        raise ModelError(f"the chat template of family {vlm.family.name} takes none of the probe conversations")
    batches = []
    for sample, encoded in conversations:
        item = Item(encoded, pixels.float() if sample.images else None, sample.id, sample.where)
        batches.append(collate([item], vlm.rules))
    return Probe(conversations, tuple(batches), digest)


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


def check_template(folder: Path, vlm: Vlm, origin: Origin, probe: Probe) -> Gate:
    """The folder's own processor gives the ids that training gave, for typed and for plain messages.

    Args:
        folder: the export, with its processor.
        vlm: the checkpoint.
        origin: may know what training encoded.
        probe: as this checkpoint encodes it.

    Raises:
        CheckpointError: they differ.
    """
    said = check_trained_ids(origin, probe)
    processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")  # type: ignore[no-untyped-call]
    for sample, encoded in probe.conversations:
        messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
        ids = {
            "as plain strings": _served(processor, messages, bool(sample.images)),
            "as typed parts": _served(processor, [_typed(message) for message in messages], bool(sample.images)),
        }
        for how, served in ids.items():
            if served != encoded.input_ids:
                raise CheckpointError(
                    f"the exported processor would serve another prompt than was trained: conversation {sample.id!r} "
                    f"{how} has {differ(encoded.input_ids, served, vlm.tokenizer)}"
                )
    detail = f"{len(probe.conversations)} conversations, typed and plain, by the folder's own processor; {said}"
    return Gate(TEMPLATE, "passed", detail)


def check_trained_ids(origin: Origin, probe: Probe) -> str:
    """What can be said about training's own ids.

    Raises:
        CheckpointError: they were others.
    """
    trained = None if origin.stage is None else origin.stage.get("template_ids")
    if trained is None:
        return "what training itself encoded was not written down"
    if trained != probe.digest:
        raise CheckpointError(
            f"{origin.checkpoint}: its tokenizer and template give other token ids than training had (digest "
            f"{probe.digest[:12]}, the manifest says {trained[:12]}): a file of the folder was changed since; put the "
            "run's own tokenizer and chat template back"
        )
    return f"as the run's manifest says (sha256 {trained})"


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


def differ(trained: list[int], served: list[int], tokenizer: Any) -> str:
    """Where two lists of ids part, in words."""
    pairs = zip(trained, served, strict=False)
    at = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(trained), len(served)))
    around = [
        [tokenizer.convert_ids_to_tokens(i) if i >= 0 else "<image>" for i in ids[max(0, at - 3) : at + 4]]
        for ids in (trained, served)
    ]
    return (
        f"{len(served)} tokens, in training {len(trained)}; about token {at}: trained {around[0]}, served {around[1]}"
    )

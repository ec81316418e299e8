"""What training does to the lab's visual and linguistic words, on held-out scenes whose truth is known.

The paper argues by words (its word-level analysis): which gain from the image, which from the captions' style. Here
every token of a caption is known to be one or the other, so log-probabilities are averaged apart, and the weights of
each objective are held against the truth (ROC-AUC: 0.5 says nothing, 1 ranks every visual token above every other).

Legend: N supervised tokens of all captions, B samples of a batch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from dpa.data.chat import encode_plain
from dpa.data.collate import collate
from dpa.data.dataset import Item
from dpa.data.records import Sample, Turn
from dpa.lab.language import LANGUAGES, Language, caption
from dpa.lab.render import render
from dpa.lab.scenes import Scene, draw_scene
from dpa.models.contrast import contrast
from dpa.models.vlm import Vlm
from dpa.objectives import OBJECTIVES, relevance, roc_auc, token_weights
from dpa.types import Batch

PROBE_SEED: Final = 970_000
"""World of the probe's scenes; no data set and no pretraining draws from it."""
OPENING: Final = 4
"""First tokens of a caption that count as its opening: how a language begins before it says anything about a scene."""
_BATCH: Final = 16
_LENGTH: Final = 1024


@dataclass(frozen=True, slots=True)
class Said:
    """The captions of all scenes in one language."""

    batches: tuple[Batch, ...]
    visual: Tensor
    """bool [N]: the token belongs to a word that says something about this scene."""
    opening: Tensor
    """bool [N]: among the first :data:`OPENING` tokens of its caption."""


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """The same held-out scenes in both languages."""

    said: Mapping[Language, Said]
    pixels: Tensor
    """float32 [S, C, R, R]: the scenes' pictures."""


def make_probe_set(vlm: Vlm, *, scenes: int = 64, seed: int = PROBE_SEED) -> ProbeSet:
    """Draws scenes, says them in both languages, renders and encodes them as stage 2 does.

    Args:
        vlm: gives tokenizer, text rules and image processor.
        scenes: S.
        seed: of scenes and wording.
    """
    drawn = [draw_scene(seed, index) for index in range(scenes)]
    pixels = vlm.processor.image_processor(images=[render(scene) for scene in drawn], return_tensors="pt")
    values: Tensor = pixels["pixel_values"]
    return ProbeSet(said={name: _say(vlm, drawn, values, name, seed) for name in LANGUAGES}, pixels=values)


def _say(vlm: Vlm, scenes: list[Scene], pixels: Tensor, language: Language, seed: int) -> Said:
    rng = random.Random(f"probe:{seed}:{language}")
    items, visual, opening = [], [], []
    for index, scene in enumerate(scenes):
        written = caption(scene, language, rng)
        sample = Sample(
            id=f"probe-{index}",
            turns=(Turn("user", "<image>"), Turn("assistant", written.text)),
            images=("picture",),
            where="probe",
            visual_spans=written.visual_spans,
        )
        encoded = encode_plain(sample, vlm.tokenizer, vlm.rules, max_length=_LENGTH, with_image=True, marks=True)
        assert encoded.marked is not None
        truth = [mark for mark, said in zip(encoded.marked, encoded.supervised, strict=True) if said]
        items.append(Item(encoded=encoded, pixel_values=pixels[index : index + 1], sample_id=sample.id, where="probe"))
        visual += truth
        opening += [place < OPENING for place in range(len(truth))]
    batches = tuple(collate(items[start : start + _BATCH], vlm.rules) for start in range(0, len(items), _BATCH))
    return Said(batches=batches, visual=torch.tensor(visual), opening=torch.tensor(opening))


@dataclass(frozen=True, slots=True)
class Words:
    """Per-token numbers of one language, over all captions. float32 [N] each; NaN where not known."""

    logp_with: Tensor
    logp_without: Tensor
    logit_with: Tensor
    logit_without: Tensor
    segment_ids: Tensor
    """int64 [N]: one number per caption."""


def _asked(numbers: Tensor | None) -> Tensor:
    assert numbers is not None
    return numbers.float().cpu()


@torch.no_grad()
def read_words(model: nn.Module, said: Said) -> Words:
    """Both passes of the training forward over the captions. The model is left as it was."""
    device = next(model.parameters()).device
    parts: list[dict[str, Tensor]] = []
    captions = 0
    for batch in said.batches:
        found = contrast(model, batch.to(device), logits=True)
        parts.append(
            {
                "logp_with": found.logp_with.float().cpu(),
                "logp_without": _asked(found.logp_without),
                "logit_with": _asked(found.logit_with),
                "logit_without": _asked(found.logit_without),
                "segment_ids": found.segment_ids.cpu() + captions,
            }
        )
        captions += len(batch.sample_ids)
    return Words(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def probe(model: nn.Module, probes: ProbeSet) -> dict[str, float]:
    """All measures of a model in stage 2, as a flat table of finite numbers.

    Per language ``a``, ``b``: ``visual_logp``, ``linguistic_logp`` (nats per token with the image), the same ``_blind``
    (text alone), ``opening_logp`` (mean over the captions' first tokens, with the image), and for cmo, cal, prior
    ``auc_NAME`` of the raw relevance and ``auc_NAME_weight`` of the weights (its source's bounds and width) against the
    truth. ``prior`` here reads the text-only pass of the same model.
    """
    table: dict[str, float] = {}
    for language, said in probes.said.items():
        words = read_words(model, said)
        known = ~words.logp_without.isnan()
        for name, mask in (("visual", said.visual), ("linguistic", ~said.visual), ("opening", said.opening)):
            table[f"{name}_logp_{language}"] = float(words.logp_with[mask].mean())
            table[f"{name}_logp_blind_{language}"] = float(words.logp_without[mask & known].mean())
        for kind, row in OBJECTIVES.items():
            if not row.needs_without:
                continue
            relevance_N = relevance(
                kind,
                words.logp_with,
                words.logp_without,
                logit_with=words.logit_with,
                logit_without=words.logit_without,
            )
            weights_N = token_weights(
                relevance_N, words.segment_ids, minimum=row.minimum, maximum=row.maximum, window=row.window
            )
            for what, score_N in (("", relevance_N), ("_weight", weights_N)):
                area = roc_auc(score_N[known], said.visual[known])
                assert area is not None, "captions have words of either kind"
                table[f"auc_{kind}{what}_{language}"] = area
    return table

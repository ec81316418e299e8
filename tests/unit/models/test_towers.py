"""A checkpoint with each tower, saved by us and loaded by transformers alone: same features, same logits, same ids."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dpa.models.checkpoint_io import load_checkpoint, save_checkpoint
from dpa.models.processor import make_image_processor
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm, head, hidden_states, image_features, tower_features
from dpa.testing.models import tiny_batch
from dpa.testing.parts import REGISTERS, TOWER_KINDS, TowerKind
from dpa.types import Batch

Make = Callable[..., ModelSettings]
TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
]


@pytest.mark.parametrize("kind", TOWER_KINDS)
def test_saved_checkpoint_is_transformers_own(settings: Make, tmp_path: Path, kind: TowerKind) -> None:
    vlm = build_vlm(settings("llama3", kind), seed=1)
    save_checkpoint(vlm, tmp_path / "checkpoint")
    native, loading = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "checkpoint", output_loading_info=True, attn_implementation="sdpa"
    )
    assert [value for value in loading.values() if value] == [], "missing or unexpected weights"
    assert not any("text_model" in name for name in native.state_dict()), "the tower's text half stays at home"
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = torch.stack(list(native.get_image_features(pixels).pooler_output))
        assert torch.equal(image_features(vlm.model, pixels), theirs)
    assert theirs.shape[1] == vlm.rules.image_tokens == native.config.image_seq_length

    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 33, 3), dtype=np.uint8))
    text = processor.apply_chat_template(TALK, add_generation_prompt=True)
    inputs = processor(text=text, images=[picture, picture], return_tensors="pt")
    assert int((inputs["input_ids"] == vlm.rules.image_token_id).sum()) == 2 * vlm.rules.image_tokens
    with torch.no_grad():
        expected = native(**inputs).logits
        ours = hidden_states(vlm.model, as_batch(inputs, vlm.rules.image_token_id)) @ head(vlm.model)[0].T
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # float32 sums in another order
    again = load_checkpoint(tmp_path / "checkpoint")
    assert again.rules == vlm.rules


def as_batch(inputs: dict[str, torch.Tensor], image_token_id: int) -> Batch:
    ids = inputs["input_ids"]
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        position_ids=torch.arange(ids.shape[1]).unsqueeze(0),
        supervised=torch.zeros_like(ids, dtype=torch.bool),
        is_image=ids == image_token_id,
        pixel_values=inputs["pixel_values"],
        image_counts=(len(inputs["pixel_values"]),),
        sample_ids=("s",),
        document_start_id=None,
    )


@pytest.mark.parametrize(
    ("kind", "first_patch"), [("clip", 1), ("siglip", 0), ("dinov2", 1), ("dinov2_registers", 1 + REGISTERS)]
)
def test_no_patch_is_cut_away(settings: Make, kind: str, first_patch: int) -> None:
    """TinyLLaVA_Factory#203: where there is no class token the first row is a patch. Seen before any attention, a patch
    of the picture changes one row alone: the one of that patch."""
    model = build_vlm(settings("llama3", kind, vision_feature_layer=0)).model
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[1, :, :4, :4] = 1
    features = tower_features(model, pixels)
    changed = (features[0] != features[1]).any(dim=-1).nonzero().flatten().tolist()
    assert changed == [first_patch - (first_patch > 0)]
    assert features.shape[1] - changed[0] == 16, "all patches are there"


@pytest.mark.parametrize(
    ("kind", "mean", "deviation"),
    [
        ("clip", (0.4, 0.5, 0.6), (0.26862954, 0.26130258, 0.27577711)),  # its file's mean, the row's rest
        ("siglip", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("dinov2", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("dinov2_registers", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_mean_and_deviation(settings: Make, kind: str, mean: tuple[float], deviation: tuple[float]) -> None:
    chosen = settings("llama3", kind)
    processor = make_image_processor(chosen, build_vlm(chosen).model.config.vision_config, "crop")
    assert tuple(processor.image_mean) == mean
    assert tuple(processor.image_std) == deviation


def test_registers_are_placeholders_like_patches(settings: Make) -> None:
    model = build_vlm(settings("llama3", "dinov2_registers")).model
    batch = tiny_batch(["text:2 image label:3"], image_tokens=16 + REGISTERS)
    assert int(batch.is_image.sum()) == image_features(model, torch.zeros(1, 3, 16, 16)).shape[1]

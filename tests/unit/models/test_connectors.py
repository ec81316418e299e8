"""Every connector trains, is saved, and is loaded by transformers alone with equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from dpa.errors import ModelError
from dpa.models.checkpoint_io import load_checkpoint, save_checkpoint
from dpa.models.connectors import ConnectorKind, kind_of, tokens_per_image
from dpa.models.contrast import contrast
from dpa.models.freeze import set_trainable
from dpa.models.legacy import read_connector, write_mm_projector
from dpa.models.parts import tower_config
from dpa.models.settings import ModelSettings
from dpa.models.vlm import Vlm, build_vlm, head, hidden_states, image_features, tower_features
from dpa.testing.models import tiny_batch
from dpa.types import Batch
from tests.unit.models.test_towers import TALK, as_batch

Make = Callable[..., ModelSettings]
KINDS: tuple[ConnectorKind, ...] = get_args(ConnectorKind)
CLASSES = {"pooled": "AyaVisionForConditionalGeneration"}


def train(vlm: Vlm, stage: str = "pretrain", steps: int = 2) -> list[float]:
    """A few steps over three samples, both passes; returns the losses."""
    set_trainable(vlm.model, stage)  # type: ignore[arg-type]
    batch = batch_for(vlm)
    optimizer = torch.optim.SGD([p for p in vlm.model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = -contrast(vlm.model, batch, packing=True).logp_with.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def batch_for(vlm: Vlm) -> Batch:
    structures = ["text:2 image label:5", "image text:1 image label:4", "text:3 label:4"]
    batch = tiny_batch(structures, image_tokens=vlm.rules.image_tokens)
    batch.input_ids[batch.is_image] = vlm.rules.image_token_id
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Batch(**{**{name: getattr(batch, name) for name in batch.__slots__}, "pixel_values": pixels})


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("kind", KINDS)
def test_trained_and_loaded_by_transformers_alone(
    settings: Make, tmp_path: Path, kind: ConnectorKind, tower: str
) -> None:
    vlm = build_vlm(settings("llama3", tower, connector=kind), seed=1)
    losses = train(vlm, "finetune", steps=3)
    assert losses[-1] < losses[0]
    save_checkpoint(vlm, tmp_path / "checkpoint")
    native, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint", output_loading_info=True)
    assert [value for value in loading.values() if value] == [], "missing or unexpected weights"
    assert type(native).__name__ == CLASSES.get(kind, "LlavaForConditionalGeneration")
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 33, 3), dtype=np.uint8))
    text = processor.apply_chat_template(TALK, add_generation_prompt=True)
    inputs = processor(text=text, images=[picture, picture], return_tensors="pt")
    assert int((inputs["input_ids"] == vlm.rules.image_token_id).sum()) == 2 * vlm.rules.image_tokens
    batch = as_batch(inputs, vlm.rules.image_token_id)
    with torch.no_grad():
        expected = native(**inputs).logits
        ours = hidden_states(vlm.model, batch) @ head(vlm.model)[0].T
        again = load_checkpoint(tmp_path / "checkpoint")
        assert torch.equal(hidden_states(again.model, batch) @ head(again.model)[0].T, ours)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # float32 sums in another order
    assert again.rules == vlm.rules
    answers = [model.generate(**inputs, max_new_tokens=4).tolist() for model in (native, vlm.model)]
    assert answers[0] == answers[1]


class TestLinear:
    def test_is_one_linear_layer_before_and_after_training(self, settings: Make) -> None:
        vlm = build_vlm(settings(connector="linear"), seed=1)
        projector = vlm.model.model.multi_modal_projector
        before = projector.linear_1.weight.detach().clone()
        manifest = set_trainable(vlm.model, "pretrain")
        assert [name.rpartition("projector.")[2] for name in manifest.names] == ["linear_1.bias", "linear_1.weight"]
        assert manifest.total == 32 * 16 + 32
        train(vlm)
        train(vlm, "finetune")
        assert not torch.equal(projector.linear_1.weight, before)
        assert torch.equal(projector.linear_2.weight, torch.eye(32))
        assert not projector.linear_2.bias.any()
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            plain = torch.nn.functional.linear(
                tower_features(vlm.model, pixels), projector.linear_1.weight, projector.linear_1.bias
            )
            # x * 1 + 0 + 0 ...: no rounding, whatever the order
            assert torch.equal(image_features(vlm.model, pixels), plain)

    def test_llavas_file(self, settings: Make, tmp_path: Path) -> None:
        vlm = build_vlm(settings(connector="linear"), seed=1)
        projector = vlm.model.model.multi_modal_projector
        write_mm_projector(projector, tmp_path / "mm_projector.bin")
        stored = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
        assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
            "model.mm_projector.weight": (32, 16),
            "model.mm_projector.bias": (32,),
        }
        again = build_vlm(settings(connector="linear"), connector=tmp_path / "mm_projector.bin", seed=2).model
        for name, tensor in projector.state_dict().items():
            assert torch.equal(again.model.multi_modal_projector.state_dict()[name], tensor)


class TestPooled:
    def test_a_quarter_of_the_tokens_each_of_four_neighbours(self, settings: Make) -> None:
        vlm = build_vlm(settings(connector="pooled", vision_feature_layer=0), seed=1)
        assert vlm.rules.image_tokens == 4
        pixels = torch.zeros(2, 3, 16, 16)
        pixels[1, :, 8:12, 4:8] = 1  # the third row's second patch: in the lower left square
        with torch.no_grad():
            features = image_features(vlm.model, pixels)
        assert features.shape == (2, 4, 32)
        assert (features[0] != features[1]).any(-1).nonzero().flatten().tolist() == [2]

    def test_odd_sides_and_registers_are_refused(self, settings: Make) -> None:
        with pytest.raises(ModelError, match=r"dinov2_with_registers\) has register tokens"):
            build_vlm(settings("llama3", "dinov2_registers", connector="pooled"))
        vision = tower_config(settings())
        vision.image_size = 20
        with pytest.raises(ModelError, match=r"has 5 x 5 patches.*mlp2x_gelu"):
            tokens_per_image("pooled", vision)
        assert tokens_per_image("linear", vision) == 25

    def test_file_comes_back(self, settings: Make, tmp_path: Path) -> None:
        vlm = build_vlm(settings(connector="pooled"), seed=1)
        train(vlm)
        projector = vlm.model.model.multi_modal_projector
        write_mm_projector(projector, tmp_path / "mm_projector.bin")
        state = read_connector(tmp_path / "mm_projector.bin")
        assert all(torch.equal(state[name], tensor) for name, tensor in projector.state_dict().items())
        again = build_vlm(settings(connector="pooled"), connector=tmp_path / "mm_projector.bin").model
        assert all(
            torch.equal(state[name], tensor) for name, tensor in again.model.multi_modal_projector.state_dict().items()
        )

    def test_of_a_saved_checkpoint(self, settings: Make, tmp_path: Path) -> None:
        vlm = build_vlm(settings(connector="pooled"), seed=1)
        save_checkpoint(vlm, tmp_path / "checkpoint")
        state = read_connector(tmp_path / "checkpoint")
        assert all(
            torch.equal(state[name], tensor)
            for name, tensor in vlm.model.model.multi_modal_projector.state_dict().items()
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_connector_of_another_kind(settings: Make, tmp_path: Path, kind: ConnectorKind, other: ConnectorKind) -> None:
    model = build_vlm(settings(connector=other)).model
    assert kind_of(model.config) == other
    write_mm_projector(model.model.multi_modal_projector, tmp_path / "mm_projector.bin")
    if kind == other:
        return
    with pytest.raises(ModelError, match=f"holds a connector {other}, model.connector says {kind}"):
        build_vlm(settings(connector=kind), connector=tmp_path / "mm_projector.bin")

"""The shipped tower: stock classes load it, its features have a sane scale and say what a cell holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoImageProcessor, CLIPVisionModel

from dpa.lab import lab_asset
from dpa.lab.pretrain_tower import make_processor, normalise, rescale
from dpa.lab.render import render
from dpa.lab.scenes import draw_scene
from dpa.lab.tower_eval import ATTRIBUTES, NO_LABEL, PROBE_SEEDS, labels_of, patch_count, patch_features, patch_labels

TARGETS = {"shape": 0.98, "colour": 0.99, "size": 0.98, "texture": 0.98, "occupied": 0.99}


@pytest.fixture(scope="module")
def tower() -> CLIPVisionModel:
    return CLIPVisionModel.from_pretrained(lab_asset("tower")).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoImageProcessor.from_pretrained(lab_asset("tower"), backend="pil")


def test_shipped_folder_is_small_and_measured(tower: CLIPVisionModel) -> None:
    folder = lab_asset("tower")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000_000
    facts = json.loads((folder / "measurements.json").read_text())
    assert facts["finished"] is True
    assert facts["parameters"] == sum(parameter.numel() for parameter in tower.parameters())
    for name, target in TARGETS.items():
        assert facts["probe_accuracy"][name] >= target, name


def test_unknown_asset() -> None:
    with pytest.raises(ValueError, match="'tover'"):
        lab_asset("tover")


def test_labels_of_a_scene_fall_on_the_patches_of_its_cells() -> None:
    scene = draw_scene(0, 0)
    rows = patch_labels(scene, 36)
    occupied = {index for index, row in enumerate(rows) if row[0] == 1}
    assert occupied == {
        (2 * thing.row + down) * 6 + 2 * thing.column + right
        for thing in scene.things
        for down in (0, 1)
        for right in (0, 1)
    }
    assert all((NO_LABEL in row) == (index not in occupied) for index, row in enumerate(rows))


def test_processor_passes_lab_pictures_through(processor: Any) -> None:
    picture = render(draw_scene(1, 1))
    pixels = processor(images=[picture], return_tensors="pt")["pixel_values"]
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(1, *picture.size, 3)
    torch.testing.assert_close(pixels, normalise(raw, make_processor()))


def test_rescale_changes_the_stream_and_nothing_else(tower: CLIPVisionModel) -> None:
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    copy = CLIPVisionModel(tower.config).eval()
    copy.load_state_dict(tower.state_dict())
    rescale(copy, 3.0)
    with torch.inference_mode():
        one, three = (model(pixels, output_hidden_states=True) for model in (tower, copy))
    # The tolerances leave room for the layer norms' epsilon of 1e-5, which does not scale.
    torch.testing.assert_close(three.hidden_states[-2], 3 * one.hidden_states[-2], rtol=1e-3, atol=5e-3)
    torch.testing.assert_close(three.pooler_output, one.pooler_output, rtol=1e-3, atol=5e-3)


def test_penultimate_features_hold_every_attribute_linearly(tower: CLIPVisionModel, processor: Any) -> None:
    """A ridge probe per attribute, fitted on 200 scenes and judged on 50 others."""
    worlds = zip(PROBE_SEEDS, (200, 50), strict=True)
    fit, judge = ([draw_scene(seed, index) for index in range(count)] for seed, count in worlds)
    known, new = patch_features(tower, processor, fit), patch_features(tower, processor, judge)
    assert known.shape == (200, patch_count(tower), tower.config.hidden_size)
    assert 0.7 < float(new.square().mean().sqrt()) < 1.4
    inputs, tested = (functional.pad(features.double(), (0, 1), value=1.0) for features in (known, new))
    for index, (name, classes) in enumerate(ATTRIBUTES.items()):
        labels, answers = labels_of(fit, 36)[..., index], labels_of(judge, 36)[..., index]
        chosen = inputs[labels != NO_LABEL]
        targets = functional.one_hot(labels[labels != NO_LABEL], classes).double()
        ridge = chosen.T @ chosen + 1.0 * torch.eye(chosen.shape[1], dtype=torch.float64)
        weights = torch.linalg.solve(ridge, chosen.T @ targets)
        right = (tested[answers != NO_LABEL] @ weights).argmax(-1) == answers[answers != NO_LABEL]
        assert float(right.double().mean()) > 0.9, name

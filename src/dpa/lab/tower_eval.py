"""What the lab's vision tower knows: labels per cell, features as a LLaVA connector gets them, linear probes on them.

Legend: S scenes, P patches of an image, H hidden size of the tower, A attributes, M labelled patches, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPVisionModel

from dpa.lab.render import IMAGE_SIDE, render
from dpa.lab.scenes import BACKGROUNDS, COLOURS, GRID, ROWS, SHAPES, SIZES, TEXTURES, Scene, draw_scene

ATTRIBUTES: Final = MappingProxyType(
    {
        "occupied": 2,
        "shape": len(SHAPES),
        "colour": len(COLOURS),
        "size": len(SIZES),
        "texture": len(TEXTURES),
        "row": GRID,
        "column": GRID,
        "background": len(BACKGROUNDS),
    }
)
"""What a patch is asked about its cell -> number of classes; the order of the last axis of labels."""

NO_LABEL: Final = -100
"""Label of an object's attribute where the cell is empty (torch's own ignored index)."""

PROBE_SEEDS: Final = (960_000, 960_001)
"""Worlds of the probes' training and test scenes; no training stream and no data set draws from them."""


def patch_count(tower: CLIPVisionModel) -> int:
    """P of ``tower``: rows that it hands to a connector per picture of the lab."""
    side = tower.config.patch_size
    assert isinstance(side, int)
    return (IMAGE_SIDE // side) ** 2


def patch_labels(scene: Scene, patches: int) -> list[list[int]]:
    """Labels of the patches in reading order, ``[P][A]``. ``patches`` is P, a square that cells divide evenly."""
    things = {(thing.row, thing.column): thing for thing in scene.things}
    background = BACKGROUNDS.index(scene.background)
    cells: list[list[list[int]]] = []
    for row in range(len(ROWS)):
        cells.append([])
        for column in range(GRID):
            thing = things.get((row, column))
            attributes = (
                [NO_LABEL] * 4
                if thing is None
                else [
                    SHAPES.index(thing.shape),
                    COLOURS.index(thing.colour),
                    SIZES.index(thing.size),
                    TEXTURES.index(thing.texture),
                ]
            )
            cells[-1].append([int(thing is not None), *attributes, row, column, background])
    side = round(patches**0.5)
    per_cell = side // GRID
    return [cells[index // side // per_cell][index % side // per_cell] for index in range(patches)]


def labels_of(scenes: Sequence[Scene], patches: int) -> Tensor:
    """int64 ``[S, P, A]``."""
    return torch.tensor([patch_labels(scene, patches) for scene in scenes])


@torch.inference_mode()
def patch_features(tower: CLIPVisionModel, processor: Any, scenes: Sequence[Scene], *, batch: int = 128) -> Tensor:
    """float32 ``[S, P, H]``: the penultimate hidden state without CLS, which is what LLaVA hands to its connector."""
    parts = []
    for start in range(0, len(scenes), batch):
        images = [render(scene) for scene in scenes[start : start + batch]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        parts.append(tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:].float())
    return torch.cat(parts).clone()


def fit_probe(features_MH: Tensor, labels_M: Tensor, classes: int, *, decay: float = 1e-4, steps: int = 60) -> Tensor:
    """Multinomial logistic regression by L-BFGS from zero; the result is ``[H + 1, K]``, the bias last."""
    inputs = functional.pad(features_MH, (0, 1), value=1.0)
    weights = torch.zeros(inputs.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(inputs @ weights, labels_M) + decay * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()


def probe_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], attributes: Sequence[str] = tuple(ATTRIBUTES)
) -> dict[str, float]:
    """Accuracy per patch of a fresh linear probe per attribute.

    Args:
        train: features ``[S, P, H]`` and labels ``[S, P, A]`` that the probes are fitted on.
        test: the same of other scenes, that they are judged on.
        attributes: names from :data:`ATTRIBUTES`.
    """
    # One scale for all dimensions keeps the probe's decay the same whatever the tower's scale is.
    mean, scale = train[0].mean((0, 1)), train[0].std()
    result = {}
    for name in attributes:
        index = list(ATTRIBUTES).index(name)
        known, judged = train[1][..., index] != NO_LABEL, test[1][..., index] != NO_LABEL
        weights = fit_probe((train[0][known] - mean) / scale, train[1][..., index][known], ATTRIBUTES[name])
        inputs = functional.pad((test[0][judged] - mean) / scale, (0, 1), value=1.0)
        right = (inputs @ weights).argmax(-1) == test[1][..., index][judged]
        result[name] = float(right.float().mean())
    return result


def measure(tower: CLIPVisionModel, processor: Any, *, scenes: tuple[int, int] = (3000, 1500)) -> dict[str, Any]:
    """Probe accuracies on held-out scenes, scale of the features, number of parameters."""
    tower.eval()  # type: ignore[no-untyped-call]
    patches = patch_count(tower)
    data = []
    for seed, number in zip(PROBE_SEEDS, scenes, strict=True):
        drawn = [draw_scene(seed, index) for index in range(number)]
        data.append((patch_features(tower, processor, drawn), labels_of(drawn, patches)))
    accuracy: Mapping[str, float] = probe_accuracy(data[0], data[1])
    features = data[1][0]
    return {
        "probe_accuracy": {name: round(value, 4) for name, value in accuracy.items()},
        "probe_scenes": {"train": scenes[0], "test": scenes[1]},
        "feature_rms": round(float(features.square().mean().sqrt()), 4),
        "feature_largest": round(float(features.abs().max()), 2),
        "parameters": sum(parameter.numel() for parameter in tower.parameters()),
    }

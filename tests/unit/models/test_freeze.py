from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dpa.errors import ModelError
from dpa.models.freeze import set_trainable
from dpa.models.lora import attach_lora
from dpa.models.parts import load_llm
from dpa.models.settings import LoraSettings, ModelSettings
from dpa.models.vlm import build_vlm

Make = Callable[..., ModelSettings]
CONNECTOR = 32 * 16 + 32 + 32 * 32 + 32


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["qwen2", "lab", "gemma2"])
class TestStages:
    def test_proxy(self, settings: Make, family: str) -> None:
        proxy = attach_lora(load_llm(settings(family), dtype=torch.float32), LoraSettings(rank=4), seed=0)
        proxy.requires_grad_(True)
        manifest = set_trainable(proxy, "proxy")
        assert trained_names(proxy) == set(manifest.names)
        assert all(".lora_A." in name or ".lora_B." in name for name in manifest.names)
        assert manifest.numel_by_part == {"lora": manifest.total}
        assert manifest.total == sum(p.numel() for p in proxy.parameters() if p.requires_grad)

    def test_pretrain(self, settings: Make, family: str) -> None:
        model = build_vlm(settings(family)).model
        manifest = set_trainable(model, "pretrain")
        prefix = "model.multi_modal_projector."
        layers = ("linear_1.bias", "linear_1.weight", "linear_2.bias", "linear_2.weight")
        assert manifest.names == tuple(prefix + name for name in layers)
        assert manifest.total == CONNECTOR
        assert trained_names(model) == set(manifest.names)

    def test_finetune(self, settings: Make, family: str) -> None:
        model = build_vlm(settings(family)).model
        set_trainable(model, "pretrain")  # the other direction must be undone
        manifest = set_trainable(model, "finetune")
        untouched = {name for name, _ in model.named_parameters()} - trained_names(model)
        assert untouched
        assert all(name.startswith("model.vision_tower.") for name in untouched)
        head = 0 if family in ("lab", "gemma2") else model.lm_head.weight.numel()
        assert manifest.numel_by_part["head"] == head
        assert manifest.numel_by_part["connector"] == CONNECTOR
        assert manifest.total + manifest.frozen == sum(p.numel() for p in model.parameters())


def test_tower_is_never_trained(settings: Make) -> None:
    model = build_vlm(settings()).model
    model.requires_grad_(True)
    set_trainable(model, "finetune")
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())


def test_trained_is_float32_and_frozen_stays(settings: Make) -> None:
    model = build_vlm(settings("lab"), dtype=torch.bfloat16).model
    set_trainable(model, "finetune")
    assert {p.dtype for p in model.model.language_model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.get_input_embeddings().weight, "still tied"
    pretrain = build_vlm(settings("lab"), dtype=torch.bfloat16).model
    set_trainable(pretrain, "pretrain")
    assert {p.dtype for p in pretrain.model.language_model.parameters()} == {torch.bfloat16}


def test_printed(settings: Make) -> None:
    text = str(set_trainable(build_vlm(settings()).model, "pretrain"))
    assert text.startswith(f"stage pretrain trains {CONNECTOR:,} of ")
    assert f"(connector {CONNECTOR:,})" in text


def test_proxy_without_adapter(settings: Make) -> None:
    with pytest.raises(ModelError, match="stage proxy trains lora, but this model has no lora"):
        set_trainable(load_llm(settings(), dtype=torch.float32), "proxy")


def test_llm_where_a_llava_is_needed(settings: Make) -> None:
    with pytest.raises(ModelError, match="is this a LLaVA model"):
        set_trainable(load_llm(settings(), dtype=torch.float32), "finetune")

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from dpa.errors import ModelError
from dpa.models.digest import digest_of_part
from dpa.models.lora import MANIFEST, attach_lora, merge_adapter, save_adapter
from dpa.models.parts import load_llm
from dpa.models.settings import LoraSettings, ModelSettings
from dpa.testing.parts import write_tiny_llm

Make = Callable[..., ModelSettings]
SMALL = LoraSettings(rank=4, alpha=8)
IDS = torch.tensor([[5, 9, 40, 77, 12, 300, 8]])
FAMILIES = ["qwen2", "lab", "qwen3", "llama3", "gemma2", "gemma3", "phi3", "phi4_mini", "mistral"]


def fresh(settings: ModelSettings, dtype: torch.dtype = torch.float32) -> Any:
    return load_llm(settings, dtype=dtype)


def trained(settings: ModelSettings, dtype: torch.dtype = torch.float32) -> PeftModel:
    """An adapter that changes something."""
    proxy = attach_lora(fresh(settings, dtype), SMALL, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in proxy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return proxy


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_layers_but_the_head(settings: Make, family: str) -> None:
    llm = fresh(settings(family))
    linear = {name for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    proxy = attach_lora(llm, SMALL, seed=0)
    wrapped = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]
        for name, _ in proxy.named_parameters()
        if "lora_A" in name
    }
    assert wrapped == linear - {"lm_head"}
    assert all(".lora_" in name for name, parameter in proxy.named_parameters() if parameter.requires_grad)


def test_phis_fused_layers_are_among_them(settings: Make) -> None:
    proxy = attach_lora(fresh(settings("phi3")), SMALL, seed=0)
    names = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in proxy.named_parameters() if "lora_A" in name}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_llm(settings: Make, family: str) -> None:
    expected = logits(fresh(settings(family)))
    assert torch.equal(logits(attach_lora(fresh(settings(family)), SMALL, seed=0)), expected)


def test_float32_on_a_low_precision_llm(settings: Make) -> None:
    proxy = attach_lora(fresh(settings(), torch.bfloat16), SMALL, seed=0)
    kinds = {("lora_" in name): parameter.dtype for name, parameter in proxy.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_seed_alone_decides(settings: Make) -> None:
    def matrices(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        proxy = attach_lora(fresh(settings()), SMALL, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: value for name, value in proxy.state_dict().items() if "lora_A" in name}

    first, second, other = matrices(3, 0), matrices(3, 1), matrices(4, 0)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({value.sum().item() for value in first.values()}) == len(first), "each layer has its own"


def test_scale_is_alpha_over_rank(settings: Make) -> None:
    layer = trained(settings()).base_model.model.model.layers[0].mlp.up_proj
    delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (8 / 4)
    inputs = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(inputs) - layer.base_layer(inputs), inputs @ delta.T)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_speaks_like_the_adapter(settings: Make, family: str, tmp_path: Path) -> None:
    proxy = trained(settings(family))
    expected = logits(proxy)
    save_adapter(proxy, tmp_path / "proxy", base="x", base_digest="d")
    llm = fresh(settings(family))
    assert not torch.allclose(logits(llm), expected, atol=1e-2)
    merge_adapter(llm, tmp_path / "proxy", base_digest="d")
    torch.testing.assert_close(logits(llm), expected, rtol=0, atol=1e-5)
    assert not any("lora" in name or "base_layer" in name for name, _ in llm.named_modules())
    assert [name for name, _ in llm.named_parameters()] == [
        name for name, _ in fresh(settings(family)).named_parameters()
    ]


def test_merging_rounds_once(settings: Make, tmp_path: Path) -> None:
    proxy = trained(settings())
    save_adapter(proxy, tmp_path / "proxy", base="x", base_digest="d")
    low = fresh(settings(), torch.bfloat16)
    name = "model.layers.1.self_attn.q_proj"
    before = low.get_submodule(name).weight.detach().float()
    layer = proxy.get_submodule(f"base_model.model.{name}")
    exact = before + layer.lora_B["default"].weight @ layer.lora_A["default"].weight * 2
    merge_adapter(low, tmp_path / "proxy")
    assert torch.equal(low.get_submodule(name).weight, exact.to(torch.bfloat16))


def test_files(settings: Make, tmp_path: Path) -> None:
    chosen = settings()
    folder = tmp_path / "proxy"
    save_adapter(trained(chosen), folder, base="my/llm", base_digest=digest_of_part(chosen.llm))
    names = sorted(item.name for item in folder.iterdir())
    assert names == sorted(["adapter_config.json", MANIFEST, "adapter_model.safetensors"])
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest == {"base": "my/llm", "base_digest": digest_of_part(chosen.llm)}
    save_adapter(trained(chosen), folder, base="other", base_digest="d")
    assert json.loads((folder / MANIFEST).read_text())["base"] == "other"
    assert [item.name for item in tmp_path.iterdir()] == ["proxy"], "nothing temporary is left"


class TestRefusals:
    def test_no_adapter(self, settings: Make, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
            merge_adapter(fresh(settings()), tmp_path)

    def test_another_llm(self, settings: Make, tmp_path: Path) -> None:
        save_adapter(trained(settings()), tmp_path / "p", base="lab:llm", base_digest="a" * 64)
        with pytest.raises(ModelError, match=r"trained on another LLM: lab:llm.*aaaaaaaaaaaa.*bbbbbbbbbbbb"):
            merge_adapter(fresh(settings()), tmp_path / "p", base_digest="b" * 64)

    def test_other_shapes(self, settings: Make, tmp_path: Path) -> None:
        save_adapter(trained(settings()), tmp_path / "p", base="x", base_digest="d")
        wide = settings().model_copy(update={"llm": str(write_tiny_llm(tmp_path / "w", "qwen2", hidden_size=48))})
        with pytest.raises(ModelError, match="does not fit the LLM"):
            merge_adapter(fresh(wide), tmp_path / "p")

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpa.errors import ModelError
from dpa.models.checkpoint_io import save_checkpoint
from dpa.models.digest import digest_of_llm, digest_of_model, digest_of_part
from dpa.models.parts import load_llm
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm

Make = Callable[..., ModelSettings]


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2])}


def test_order_does_not_matter(state: dict[str, torch.Tensor]) -> None:
    assert digest_of_model(state) == digest_of_model(dict(reversed(state.items())))


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.arange(6.0).reshape(3, 2)},
        {"b": torch.arange(6.0).reshape(2, 3).double()},
        {"b": torch.tensor([[0.0, 1, 2], [3, 4, 5.0000005]])},
        {"c": torch.zeros(0)},
    ],
    ids=["shape", "dtype", "last bit", "name"],
)
def test_everything_counts(state: dict[str, torch.Tensor], change: dict[str, torch.Tensor]) -> None:
    assert digest_of_model({**state, **change}) != digest_of_model(state)


def test_layout_does_not_count(state: dict[str, torch.Tensor]) -> None:
    transposed = torch.arange(6.0).reshape(2, 3).T.contiguous().T
    assert not transposed.is_contiguous()
    assert digest_of_model({**state, "b": transposed}) == digest_of_model(state)


def test_folder_is_its_tensors(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file({"a": state["a"]}, tmp_path / "model-2.safetensors")
    save_file({"b": state["b"]}, tmp_path / "model-1.safetensors")
    assert digest_of_model(tmp_path) == digest_of_model(state)


def test_pickled_folder_is_its_tensors(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert digest_of_part(str(tmp_path)) == digest_of_model(state)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights"):
        digest_of_model(tmp_path)


def test_cast(state: dict[str, torch.Tensor]) -> None:
    low = {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}
    assert digest_of_model(low, cast=torch.float32) == digest_of_model(state)  # 0 .. 5 are exact in bfloat16


@pytest.mark.parametrize("family", ["qwen2", "lab", "gemma2"])
def test_llm_is_the_same_wherever_it_is(parts: Path, settings: Make, tmp_path: Path, family: str) -> None:
    """Alone on disk, alone in memory, inside a LLaVA in memory, inside a saved LLaVA."""
    expected = digest_of_llm(parts / family)
    vlm = build_vlm(settings(family))
    save_checkpoint(vlm, tmp_path / "checkpoint")
    assert digest_of_llm(load_llm(settings(family), dtype=torch.float32)) == expected
    assert digest_of_llm(vlm.model) == expected
    assert digest_of_llm(tmp_path / "checkpoint") == expected
    with torch.no_grad():
        vlm.model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1e-6
    assert digest_of_llm(vlm.model) != expected


def test_llm_loaded_at_another_dtype(parts: Path, settings: Make) -> None:
    low = build_vlm(settings(), dtype=torch.bfloat16).model
    assert digest_of_llm(low) == digest_of_llm(parts / "qwen2", cast=torch.bfloat16) != digest_of_llm(parts / "qwen2")


def test_tied_head_in_the_file_does_not_count(parts: Path, tmp_path: Path) -> None:
    tensors = load_file(parts / "lab" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    assert digest_of_llm(tmp_path) == digest_of_llm(parts / "lab")

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, CLIPVisionModel, SiglipVisionModel

from dpa.errors import ModelError
from dpa.models.parts import (
    LAB_PARTS,
    frozen_features,
    grow_vocabulary,
    image_tokens_of,
    load_llm,
    load_tokenizer,
    load_tower,
    resolve_part,
    select_strategy,
)
from dpa.models.settings import ModelSettings
from dpa.testing.parts import REGISTERS, TinyFamily, tiny_tokenizer, write_tiny_llm

Make = Callable[..., ModelSettings]


class TestResolve:
    def test_folder(self, parts: Path) -> None:
        assert resolve_part(str(parts / "qwen2")) == str((parts / "qwen2").resolve())

    def test_hub_id_passes(self) -> None:
        assert resolve_part("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"

    @pytest.mark.parametrize(
        "name", ["./nowhere", "/no/such/model", "~/missing-model", "a/b/c", "../x", "model", "here/model"]
    )
    def test_path_that_does_not_exist(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelError, match="does not exist"):
            resolve_part(name)

    def test_file(self, parts: Path) -> None:
        with pytest.raises(ModelError, match="is a file"):
            resolve_part(str(parts / "qwen2" / "config.json"))

    def test_folder_without_config(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json"):
            resolve_part(str(tmp_path))

    def test_unknown_lab_part(self) -> None:
        with pytest.raises(ModelError, match="lab:llm, lab:tower"):
            resolve_part("lab:ears")

    @pytest.mark.parametrize("name", LAB_PARTS)
    def test_lab_part_is_shipped_or_said_to_be_missing(self, name: str) -> None:
        try:
            folder = Path(resolve_part(name))
        except ModelError as error:
            assert "missing from this installation" in str(error)  # noqa: PT017 (both outcomes are right)
        else:
            assert (folder / "config.json").is_file()
            assert folder.parts[-3:] == ("lab", "assets", LAB_PARTS[name])


class TestTokenizer:
    @pytest.mark.parametrize("family", ["lab", "llama3", "gemma2", "mistral"])
    def test_is_the_file(self, settings: Make, family: TinyFamily) -> None:
        text = "there are 3 red circles,\n\nit's é  <image> <|eot_id|>"
        assert load_tokenizer(settings(family))(text)["input_ids"] == tiny_tokenizer(family)(text)["input_ids"]

    def test_own_word_pattern_of_a_qwen2_is_kept(self, settings: Make) -> None:
        loaded = load_tokenizer(settings("lab")).backend_tokenizer
        assert loaded.to_str() == tiny_tokenizer("lab").backend_tokenizer.to_str()

    def test_missing(self, tmp_path: Path, settings: Make) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
        with pytest.raises(ModelError, match="tokenizer of LLM"):
            load_tokenizer(ModelSettings(llm=str(tmp_path)))


class TestLlm:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype_and_mode(self, settings: Make, dtype: torch.dtype) -> None:
        llm = load_llm(settings("qwen2"), dtype=dtype)
        assert {parameter.dtype for parameter in llm.parameters()} == {dtype}
        assert not llm.training

    @pytest.mark.parametrize(("family", "kernel"), [("qwen2", "sdpa"), ("gemma2", "eager")])
    def test_attention(self, settings: Make, family: str, kernel: str) -> None:
        assert load_llm(settings(family), dtype=torch.float32).config._attn_implementation == kernel
        assert load_llm(settings(family, attention="eager"), dtype=torch.float32).config._attn_implementation == "eager"

    def test_attention_that_the_family_cannot(self, settings: Make) -> None:
        with pytest.raises(ModelError, match="soft-cap of gemma2; use auto"):
            load_llm(settings("gemma2", attention="sdpa"), dtype=torch.float32)

    def test_no_llm(self, settings: Make) -> None:
        with pytest.raises(ModelError, match="clip"):
            load_llm(settings("clip"), dtype=torch.float32)


class TestTower:
    @pytest.mark.parametrize(
        ("kind", "strategy", "tokens"),
        [
            ("clip", "default", 16),
            ("clip_full", "default", 16),
            ("siglip", "full", 16),
            ("siglip_full", "full", 16),
            ("dinov2", "default", 16),
            ("dinov2_registers", "default", 16 + REGISTERS),
        ],
    )
    def test_facts(self, settings: Make, kind: str, strategy: str, tokens: int) -> None:
        tower = load_tower(settings(tower=kind), dtype=torch.float32)
        assert not any(parameter.requires_grad for parameter in tower.parameters())
        assert image_tokens_of(tower.config) == tokens
        assert select_strategy(tower.config) == strategy
        rows = tower(torch.zeros(1, 3, 16, 16)).last_hidden_state.shape[1]
        assert rows - (strategy == "default") == tokens

    def test_vision_half_of_a_clip(self, settings: Make) -> None:
        tower = load_tower(settings(tower="clip_full"), dtype=torch.float32)
        assert isinstance(tower, CLIPVisionModel)
        assert tower.embeddings.patch_embedding.weight.std() > 0.01

    @pytest.mark.parametrize("kind", ["siglip", "siglip_full"])
    def test_siglip(self, settings: Make, kind: str) -> None:
        tower = load_tower(settings(tower=kind), dtype=torch.float32)
        assert isinstance(tower, SiglipVisionModel)
        assert tower.embeddings.patch_embedding.weight.std() > 0.01
        assert not any("text" in name for name, _ in tower.named_parameters())

    @pytest.mark.parametrize("model_type", ["siglip2", "siglip2_vision_model"])
    def test_naflex(self, model_type: str, tmp_path: Path) -> None:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"NaFlex SigLIP 2.*siglip2-so400m-patch14-384"):
            load_tower(ModelSettings(vision_tower=str(tmp_path)), dtype=torch.float32)

    def test_unknown(self, settings: Make) -> None:
        with pytest.raises(ModelError, match="vision tower of model_type 'qwen2' is not known"):
            load_tower(settings(tower="qwen2"), dtype=torch.float32)

    @pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2_registers"])
    @pytest.mark.parametrize("layer", [-1, -2, 0, 1, 3])
    def test_features_are_transformers_hidden_states(self, settings: Make, kind: str, layer: int) -> None:
        tower = load_tower(settings(tower=kind), dtype=torch.float32)
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        expected = tower(pixels, output_hidden_states=True).hidden_states[layer]
        assert torch.equal(frozen_features(tower, pixels, layer), expected)

    def test_no_hook_stays(self, settings: Make) -> None:
        tower = load_tower(settings(), dtype=torch.float32)
        frozen_features(tower, torch.zeros(1, 3, 16, 16), -2)
        with pytest.raises(ValueError, match="Input image size"):
            frozen_features(tower, torch.zeros(1, 3, 20, 20), -2)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in tower.modules())

    @pytest.mark.parametrize("layer", [4, -5])
    def test_layer_that_is_not_there(self, settings: Make, layer: int) -> None:
        tower = load_tower(settings(), dtype=torch.float32)
        with pytest.raises(ModelError, match=r"3 layers, so it can be -4 to 3"):
            frozen_features(tower, torch.zeros(1, 3, 16, 16), layer)


class TestGrow:
    def test_nothing_to_do(self, settings: Make) -> None:
        llm = load_llm(settings("qwen2"), dtype=torch.float32)
        weight = llm.get_input_embeddings().weight
        assert grow_vocabulary(llm, weight.shape[0]) == 0
        assert llm.get_input_embeddings().weight is weight

    @pytest.mark.parametrize("family", ["smollm2", "llama2"])  # tied, untied
    def test_one_row(self, settings: Make, family: str, caplog: pytest.LogCaptureFixture) -> None:
        llm = load_llm(settings(family), dtype=torch.float32)
        embeddings, head = (weight.detach().clone() for weight in _weights(llm))
        state = torch.get_rng_state()
        with caplog.at_level(logging.WARNING, logger="dpa"):
            assert grow_vocabulary(llm, len(embeddings) + 1) == 1
        assert "full" in caplog.text
        assert torch.equal(torch.get_rng_state(), state), "growing draws nothing"
        for new, old in zip(_weights(llm), (embeddings, head), strict=True):
            assert torch.equal(new[:-1], old)
            torch.testing.assert_close(new[-1], old.mean(dim=0))
        assert llm.config.vocab_size == len(embeddings) + 1
        assert (_weights(llm)[0] is _weights(llm)[1]) == (family == "smollm2")


def _weights(llm: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    return llm.get_input_embeddings().weight, llm.get_output_embeddings().weight


def test_tiny_folders_are_reproducible(tmp_path: Path) -> None:
    first, second = (write_tiny_llm(tmp_path / name, "gemma2", seed=3) for name in "ab")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name

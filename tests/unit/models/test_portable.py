"""What transformers 4 reads. Compared with transformers 4.57.6 itself once, by hand: docs/serving.md, "Versions"."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, LlavaConfig

from dpa.models.checkpoint_io import save_checkpoint
from dpa.models.portable import make_portable, portable_config, portable_tokenizer
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm

Make = Callable[..., ModelSettings]
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_a_plain_base() -> None:
    old = portable_config({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    assert old["rope_theta"] == 1e6
    assert "rope_scaling" not in old


def test_a_scaled_base() -> None:
    old = portable_config({"rope_parameters": LLAMA3})
    assert old["rope_theta"] == 500000.0
    assert old["rope_scaling"] == {name: value for name, value in LLAMA3.items() if name != "rope_theta"}


def test_two_kinds_of_layers() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    old = portable_config({"rope_parameters": rope})
    assert (old["rope_theta"], old["rope_local_base_freq"]) == (1e6, 1e4)
    assert old["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_transformers_5_reads_the_same_from_both_spellings(model_type: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(model_type, rope_parameters=dict(LLAMA3), dtype="bfloat16")
    config.save_pretrained(tmp_path)
    make_portable(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == LLAMA3
    assert again.dtype == config.dtype


def test_tokenizer() -> None:
    saved = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<a>"],
        "is_local": True,
        "eos_token": "x",
    }
    portable = portable_tokenizer(saved)
    assert portable == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "x",
    }
    assert portable_tokenizer({"tokenizer_class": "Qwen2Tokenizer"}) == {"tokenizer_class": "Qwen2Tokenizer"}


@pytest.mark.parametrize("family", ["qwen2", "llama2", "gemma2"])
def test_a_saved_checkpoint(settings: Make, family: str, tmp_path: Path) -> None:
    vlm = build_vlm(settings(family))
    save_checkpoint(vlm, tmp_path / "c")
    text = (tmp_path / "c" / "config.json").read_text()
    config = json.loads(text)
    expected = vlm.model.config.text_config.rope_parameters["rope_theta"]
    assert config["text_config"]["rope_theta"] == expected
    assert {config["torch_dtype"], config["text_config"]["torch_dtype"]} == {"float32"}
    assert json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    assert str(tmp_path.parent.parent) not in text, "a path of this machine"
    again: Any = LlavaConfig.from_pretrained(tmp_path / "c")
    assert again.text_config.rope_parameters == vlm.model.config.text_config.rope_parameters
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    sentence = "a <image> b</s> red?"
    assert tokenizer(sentence)["input_ids"] == vlm.tokenizer(sentence)["input_ids"]

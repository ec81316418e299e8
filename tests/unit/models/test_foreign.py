from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from dpa.data.chat import encode_chat
from dpa.data.samples import Sample, Turn
from dpa.errors import ModelError
from dpa.models.checkpoint_io import load_checkpoint, save_checkpoint
from dpa.models.digest import digest_of_llm
from dpa.models.families import VICUNA_TEMPLATE
from dpa.models.foreign import checkpoint_folder, open_checkpoint
from dpa.models.template import MARK
from dpa.testing.llava_hf import TYPED_CHATML, Layout, write_tiny_llava_hf

PLAIN = [{"role": "user", "content": "<image>\nwhat is it?"}]
TYPED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava_hf(tmp_path_factory.mktemp("hf") / "llava-1.5-tiny-hf")


def changed(source: Path, folder: Path, **config: Any) -> Path:
    """A copy (of links) with other values in config.json."""
    folder.mkdir()
    for item in source.iterdir():
        (folder / item.name).symlink_to(item)
    (folder / "config.json").unlink()
    stated = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({name: value for name, value in stated.items() if value is not ...}))
    return folder


@pytest.mark.parametrize("layout", ["old", "new"])
def test_weights_are_those_that_transformers_reads(layout: Layout, tmp_path: Path) -> None:
    folder = write_tiny_llava_hf(tmp_path / "c", layout=layout)
    vlm = load_checkpoint(folder, dtype=torch.float32)
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    ours, theirs = vlm.model.state_dict(), stock.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert vlm.model.get_input_embeddings().weight.shape[0] % 64 == 0  # type: ignore[operator]
    assert digest_of_llm(folder, cast=torch.float32) == digest_of_llm(vlm.model), "the proof of stage 3 holds"


def test_image_tokens_come_from_the_tower(vicuna: Path, tmp_path: Path) -> None:
    """Not stated, or stated as transformers' default of 576: the tower has 16 patches."""
    assert open_checkpoint(vicuna).rules.image_tokens == 16
    assert open_checkpoint(changed(vicuna, tmp_path / "c", image_seq_length=576)).config.image_seq_length == 16


def test_vicunas_published_template_cannot_be_trained_with(vicuna: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened = open_checkpoint(vicuna)
    assert opened.rules.chat_template.endswith(VICUNA_TEMPLATE)
    assert "the format of family llama2 is used" in caplog.text
    turns = (Turn("user", "<image>\nwhat is it?"), Turn("assistant", "red."))
    encoded = encode_chat(Sample("s", turns, ("a",), "here"), opened.tokenizer, opened.rules, max_length=999)
    text = opened.tokenizer.decode([i for i in encoded.input_ids if i != opened.rules.image_token_id])
    assert text.startswith("<s> A chat between a curious user")
    learnt = [i for i, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on]
    assert opened.tokenizer.decode(learnt) == "red.</s>"


def test_a_template_for_typed_parts_takes_strings_too(tmp_path: Path) -> None:
    opened = open_checkpoint(write_tiny_llava_hf(tmp_path / "c", family="qwen2"))
    assert opened.rules.chat_template.startswith(MARK)
    assert opened.rules.chat_template.endswith(TYPED_CHATML)
    expected = "<|im_start|>user <image>\nwhat is it?<|im_end|><|im_start|>assistant"
    for turns in (PLAIN, TYPED):
        assert opened.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == expected
    turns = (Turn("user", "<image>\nwhat is it?"), Turn("assistant", "red."))
    encoded = encode_chat(Sample("s", turns, ("a",), "here"), opened.tokenizer, opened.rules, max_length=999)
    learnt = [i for i, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on]
    assert opened.tokenizer.decode(learnt) == " \nred.<|im_end|>", "what its prompt leaves to the answer"


def test_saved_anew_it_is_served_as_it_is_trained(vicuna: Path, tmp_path: Path) -> None:
    vlm = load_checkpoint(vicuna)
    save_checkpoint(vlm, tmp_path / "c")
    again = load_checkpoint(tmp_path / "c")
    assert again.rules == vlm.rules
    text = again.processor.apply_chat_template(TYPED, add_generation_prompt=True)
    served = again.processor(text=text, images=Image.new("RGB", (9, 5)), return_tensors="pt")
    assert served["input_ids"][0].tolist().count(vlm.tokenizer.bos_token_id) == 1
    assert served["input_ids"][0].tolist().count(vlm.rules.image_token_id) == 16
    assert torch.isfinite(again.model.float()(**served).logits).all()


def test_a_folder_or_nothing(tmp_path: Path, vicuna: Path) -> None:
    assert checkpoint_folder(str(vicuna)) == vicuna
    with pytest.raises(ModelError, match="does not exist"):
        checkpoint_folder(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"config\.json"):
        checkpoint_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava_next"}, "cuts an image into tiles"),
        ({"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"}, "LLaVA's own layout"),
        ({"model_type": "qwen2_vl"}, "model_type llava"),
        ({"vision_feature_select_strategy": "full"}, "only 'default' is supported"),
        ({"vision_feature_layer": [-2, -1]}, "one layer is supported"),
        ({"projector_hidden_act": "relu"}, "supported are gelu"),
        ({"multimodal_projector_bias": False}, "supported are gelu"),
        ({"image_token_index": 5}, "an ordinary piece of text"),
        ({"image_token_index": 99999}, "the embeddings have 512 rows"),
    ],
)
def test_refusals(vicuna: Path, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_checkpoint(changed(vicuna, tmp_path / "c", **config))


def test_a_template_without_image_is_refused(vicuna: Path, tmp_path: Path) -> None:
    folder = changed(vicuna, tmp_path / "c")
    (folder / "chat_template.json").unlink()
    broken = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": broken}))
    with pytest.raises(ModelError, match="cannot show an image"):
        open_checkpoint(folder)

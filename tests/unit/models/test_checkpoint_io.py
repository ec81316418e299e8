from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from dpa.errors import ModelError
from dpa.models.checkpoint_io import digest_of_model, load_checkpoint, save_checkpoint
from dpa.models.freeze import set_trainable
from dpa.models.settings import ModelSettings
from dpa.models.vlm import Vlm, build_vlm
from dpa.testing.parts import TINY_FAMILIES

Make = Callable[..., ModelSettings]
QUESTION = "what colour is it?  3 things\n\nor 4?"
TYPED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
PLAIN = [{"role": "user", "content": f"<image>\n{QUESTION}"}]

STOCK = """
import json, sys
sys.modules["dpa"] = None  # any import of it fails
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
picture, *folders = sys.argv[1:]
image = Image.open(picture)
question = json.loads(sys.stdin.read())
typed = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": question}]}]
plain = [{"role": "user", "content": "<image>\\n" + question}]
results = []
for folder in folders:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    rendered = processor.apply_chat_template(plain, add_generation_prompt=True)
    for inputs in (
        processor.apply_chat_template(
            typed, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ),
        processor(text=rendered, images=image, return_tensors="pt"),
    ):
        answer = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
        results.append(
            {
                "ids": inputs["input_ids"][0].tolist(),
                "pixels": inputs["pixel_values"].flatten().tolist(),
                "answer": answer.tolist(),
                "class": type(model).__name__,
                "wrong": [str(value) for value in info.values() if value],
            }
        )
print(json.dumps(results))
"""


def picture(folder: Path) -> Path:
    array = np.random.default_rng(0).integers(0, 255, (20, 33, 3), dtype=np.uint8)
    Image.fromarray(array).save(folder / "picture.png")
    return folder / "picture.png"


def encode_as_in_training(vlm: Vlm, turns: list[dict[str, Any]]) -> list[int]:
    """What ``data.chat`` does: the rules' template, placeholders spread, the whole text tokenised once."""
    text: str = vlm.tokenizer.apply_chat_template(
        turns, chat_template=vlm.rules.chat_template, tokenize=False, add_generation_prompt=True
    )
    spread = text.replace(vlm.rules.image_token, vlm.rules.image_token * vlm.rules.image_tokens)
    ids: list[int] = vlm.tokenizer(spread, add_special_tokens=False)["input_ids"]
    return ids


def test_process_that_cannot_import_dpa(settings: Make, tmp_path: Path) -> None:
    """Typed message through ``apply_chat_template``, plain string through ``processor``: training's ids, our answer."""
    built = {"lab": build_vlm(settings("lab", "clip"), seed=1), "gemma2": build_vlm(settings("gemma2", "siglip"))}
    for name, vlm in built.items():
        save_checkpoint(vlm, tmp_path / name)
    image = picture(tmp_path)
    process = subprocess.run(
        [sys.executable, "-c", STOCK, str(image), *(str(tmp_path / name) for name in built)],
        input=json.dumps(QUESTION),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    results = json.loads(process.stdout.splitlines()[-1])
    for vlm, typed, plain in zip(built.values(), results[::2], results[1::2], strict=True):
        assert typed == plain
        assert typed["class"] == "LlavaForConditionalGeneration"
        assert typed["wrong"] == [], "missing or unexpected weights"
        assert typed["ids"] == encode_as_in_training(vlm, PLAIN) == encode_as_in_training(vlm, TYPED)
        pixels = vlm.processor.image_processor(Image.open(image), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(torch.tensor(typed["pixels"]), pixels.flatten(), rtol=0, atol=1e-6)
        ids = torch.tensor([typed["ids"]])
        ours = vlm.model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=8)
        assert ours[0, ids.shape[1] :].tolist() == typed["answer"]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_round_trip(settings: Make, tmp_path: Path, family: str) -> None:
    tower = "clip" if family in ("qwen2", "llama3", "mistral") else "siglip"
    vlm = build_vlm(settings(family, tower), seed=2)
    save_checkpoint(vlm, tmp_path / "checkpoint")
    again = load_checkpoint(tmp_path / "checkpoint")
    assert digest_of_model(again.model.state_dict()) == digest_of_model(vlm.model.state_dict())
    assert again.rules == vlm.rules
    assert again.family == vlm.family
    assert encode_as_in_training(again, TYPED) == encode_as_in_training(vlm, PLAIN)
    attention = [
        again.model.config.get_text_config()._attn_implementation,
        vlm.model.config.get_text_config()._attn_implementation,
    ]
    assert attention[0] == attention[1] == vlm.family.attention
    save_checkpoint(again, tmp_path / "second")
    first, second = tmp_path / "checkpoint", tmp_path / "second"
    names = sorted(item.name for item in first.iterdir())
    assert names == sorted(item.name for item in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), f"{name}: saving twice changes it"


def test_names_are_those_of_published_checkpoints(settings: Make, tmp_path: Path) -> None:
    for tower in ("clip", "siglip"):
        save_checkpoint(build_vlm(settings("llama3", tower)), tmp_path / tower)
        with safe_open(tmp_path / tower / "model.safetensors", framework="pt") as file:
            names = set(file.keys())
        heads = {name.split("layers.")[0] for name in names}
        assert "language_model.model." in heads
        assert "vision_tower.vision_model.encoder." in heads
        assert {"language_model.lm_head.weight", "multi_modal_projector.linear_1.weight"} <= names
        assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names


@pytest.mark.parametrize("family", ["lab", "gemma2"])
def test_tied_head_is_stored_once(settings: Make, tmp_path: Path, family: str) -> None:
    save_checkpoint(build_vlm(settings(family)), tmp_path / "checkpoint")
    with safe_open(tmp_path / "checkpoint" / "model.safetensors", framework="pt") as file:
        assert not any("lm_head" in name for name in file.keys())  # noqa: SIM118
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_configuration(settings: Make, tmp_path: Path) -> None:
    vlm = build_vlm(settings("gemma2", "siglip", vision_feature_layer=-1))
    save_checkpoint(vlm, tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["image_token_index"] == vlm.rules.image_token_id
    assert config["image_seq_length"] == 16
    assert config["vision_feature_layer"] == -1
    assert config["vision_feature_select_strategy"] == "full"
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    generation = json.loads((tmp_path / "checkpoint" / "generation_config.json").read_text())
    ids = vlm.tokenizer.convert_tokens_to_ids
    assert generation["eos_token_id"] == [ids("<end_of_turn>"), ids("<eos>")]
    assert generation["pad_token_id"] == ids("<pad>")
    assert generation["do_sample"] is False
    for name in ("processor_config.json", "preprocessor_config.json"):
        text = (tmp_path / "checkpoint" / name).read_text()
        assert '"LlavaImageProcessor"' in text, "the name that both backends go by"


class TestDtypes:
    def stored(self, folder: Path) -> set[torch.dtype]:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118

    def test_float32_stays(self, settings: Make, tmp_path: Path) -> None:
        save_checkpoint(build_vlm(settings()), tmp_path / "c")
        assert self.stored(tmp_path / "c") == {torch.float32}

    def test_on_request(self, settings: Make, tmp_path: Path) -> None:
        vlm = build_vlm(settings("lab"))
        save_checkpoint(vlm, tmp_path / "c", dtype=torch.bfloat16)
        assert self.stored(tmp_path / "c") == {torch.bfloat16}
        assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == "bfloat16"
        assert vlm.model.dtype == torch.float32, "the model in memory stays as it is"
        assert load_checkpoint(tmp_path / "c").model.lm_head.weight.dtype == torch.bfloat16
        assert load_checkpoint(tmp_path / "c", dtype=torch.float32).model.lm_head.weight.dtype == torch.float32

    def test_trained_in_float32_beside_a_low_precision_tower(self, settings: Make, tmp_path: Path) -> None:
        vlm = build_vlm(settings(), dtype=torch.bfloat16)
        set_trainable(vlm.model, "finetune")
        save_checkpoint(vlm, tmp_path / "c")
        assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == "float32"
        loaded = load_checkpoint(tmp_path / "c").model
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, vlm.model.get_parameter(name).float()), name


class TestAtomic:
    def test_replaces(self, settings: Make, tmp_path: Path) -> None:
        save_checkpoint(build_vlm(settings(), seed=1), tmp_path / "c")
        vlm = build_vlm(settings(), seed=2)
        save_checkpoint(vlm, tmp_path / "c")
        assert digest_of_model(load_checkpoint(tmp_path / "c").model.state_dict()) == digest_of_model(
            vlm.model.state_dict()
        )
        assert [item.name for item in tmp_path.iterdir()] == ["c"]

    def test_failure_leaves_the_old_one(self, settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        vlm = build_vlm(settings(), seed=1)
        save_checkpoint(vlm, tmp_path / "c")
        before = (tmp_path / "c" / "model.safetensors").read_bytes()

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(type(vlm.processor), "save_pretrained", full)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(build_vlm(settings(), seed=2), tmp_path / "c")
        assert (tmp_path / "c" / "model.safetensors").read_bytes() == before
        assert [item.name for item in tmp_path.iterdir()] == ["c"]

    def test_state_of_sharded_ranks(self, settings: Make, tmp_path: Path) -> None:
        vlm = build_vlm(settings("lab"))
        gathered = {name: torch.full_like(tensor, 0.5) for name, tensor in vlm.model.state_dict().items()}
        gathered["lm_head.weight"] = gathered["model.language_model.embed_tokens.weight"]
        save_checkpoint(vlm, tmp_path / "c", state_dict=gathered)
        assert all(
            bool((tensor == 0.5).all()) for tensor in load_checkpoint(tmp_path / "c").model.state_dict().values()
        )


class TestRefusals:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"config\.json is missing"):
            load_checkpoint(tmp_path / "nothing")

    def test_llm_folder(self, parts: Path) -> None:
        with pytest.raises(ModelError, match="LLaVA checkpoint"):
            load_checkpoint(parts / "qwen2")

    def test_files_of_two_checkpoints(self, settings: Make, tmp_path: Path) -> None:
        save_checkpoint(build_vlm(settings("qwen2")), tmp_path / "c")
        config = json.loads((tmp_path / "c" / "config.json").read_text())
        (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "image_token_index": 5}))
        with pytest.raises(ModelError, match="image token 5"):
            load_checkpoint(tmp_path / "c")

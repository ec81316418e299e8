"""What servers expect of a folder, transcribed as facts (sources: docs/serving.md), held against folders of ours.

Their code is not run here. A test that fails means that a folder of ours no longer meets what was read there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, LlavaProcessor

from dpa.data.probe import encode_probes
from dpa.export.command import export_checkpoint
from dpa.models.checkpoint_io import load_checkpoint, save_checkpoint
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm
from dpa.testing.parts import write_tiny_llm, write_tiny_tower

PARTS = [("qwen2", "clip"), ("llama3", "siglip"), ("gemma2", "clip"), ("llama2", "siglip")]

VLLM_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0, "pixtral": 0}
"""``init_vision_tower_for_llava`` and ``get_vision_encoder_info``: known towers -> class tokens that they count."""
VLLM_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
"""``hf_to_vllm_mapper`` of ``LlavaForConditionalGeneration``."""
VLLM_DROPPED = {"default": 1, "full": 0}
"""``get_num_selected_vision_tokens``: strategy -> rows that are dropped."""


@pytest.fixture(scope="module", params=PARTS, ids="-".join)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``hf`` export."""
    root = tmp_path_factory.mktemp("serving")
    llm, tower = request.param
    write_tiny_llm(root / "llm", llm)
    write_tiny_tower(root / "tower", tower)
    vlm = build_vlm(ModelSettings(llm=str(root / "llm"), vision_tower=str(root / "tower")))
    save_checkpoint(vlm, root / "checkpoint")
    return export_checkpoint(str(root / "checkpoint"), to="hf", dtype="bf16", out=root / "out").out


def stated(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def picture() -> Image.Image:
    return Image.fromarray(np.zeros((20, 33, 3), dtype=np.uint8))


class TestVllm:
    """vllm-project/vllm, vllm/model_executor/models/llava.py."""

    def test_configuration(self, folder: Path) -> None:
        config: Any = AutoConfig.from_pretrained(folder)
        assert stated(folder)["architectures"] == ["LlavaForConditionalGeneration"]
        assert config.vision_config.model_type in VLLM_TOWERS
        assert stated(folder)["text_config"]["architectures"], "the LLM's class is chosen by it"
        assert isinstance(stated(folder)["image_token_index"], int)
        assert isinstance(stated(folder)["vision_feature_layer"], int)
        assert stated(folder)["vision_feature_select_strategy"] in VLLM_DROPPED
        assert stated(folder)["projector_hidden_act"] == "gelu"
        assert stated(folder)["multimodal_projector_bias"] is True

    def test_every_weight_finds_its_module(self, folder: Path) -> None:
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            names = list(file.keys())
        mapped = []
        for name in names:
            old = next((prefix for prefix in VLLM_PREFIXES if name.startswith(prefix)), None)
            mapped.append(name if old is None else VLLM_PREFIXES[old] + name.removeprefix(old))
        expected = ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.")
        connector = ("multi_modal_projector.linear_1.", "multi_modal_projector.linear_2.")
        assert all(name.startswith((*expected, *connector)) for name in mapped)

    def test_placeholders(self, folder: Path) -> None:
        """It counts an image's tokens by itself and puts so many in the place of each single image token."""
        config: Any = AutoConfig.from_pretrained(folder)
        tower = config.vision_config
        encoder = (tower.image_size // tower.patch_size) ** 2 + VLLM_TOWERS[tower.model_type]
        expected = encoder - VLLM_DROPPED[config.vision_feature_select_strategy]
        processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
        assert type(processor) is LlavaProcessor
        assert processor.patch_size == tower.patch_size
        assert processor.tokenizer(processor.image_token, add_special_tokens=False)["input_ids"] == [
            config.image_token_index
        ]
        inputs = processor(text=processor.image_token, images=picture(), return_tensors="pt")
        assert inputs["input_ids"][0].tolist().count(config.image_token_index) == expected
        assert inputs["pixel_values"].shape == (1, 3, tower.image_size, tower.image_size)

    def test_its_look_at_the_template_finds_typed_parts(self, folder: Path) -> None:
        """``_detect_content_format``: a loop over a message's content means ``openai``, else ``string``."""
        template = (folder / "chat_template.jinja").read_text()
        tree = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
        loops = [loop.iter for loop in tree.find_all(nodes.For)]
        over_content = [
            item
            for item in loops
            if isinstance(item, nodes.Getitem) and isinstance(item.arg, nodes.Const) and item.arg.value == "content"
        ]
        assert over_content


class TestLmmsEval:
    """EvolvingLMMs-Lab/lmms-eval, lmms_eval/models/simple/llava_hf.py and models/chat/llava_hf.py."""

    def test_simple(self, folder: Path) -> None:
        """Plain strings with ``<image>`` in front, rendered by the tokenizer, then given to the processor as text."""
        processor: Any = AutoProcessor.from_pretrained(folder)
        assert stated(folder)["model_type"] == "llava", "its model_map"
        assert processor.tokenizer.chat_template is not None, "or it would take Vicuna's"
        self.same_as_training(folder, processor, lambda message: processor.tokenizer, typed=False)

    def test_chat(self, folder: Path) -> None:
        """Typed parts, rendered by the processor."""
        processor: Any = AutoProcessor.from_pretrained(folder)
        self.same_as_training(folder, processor, lambda message: processor, typed=True)

    def same_as_training(self, folder: Path, processor: Any, renderer: Callable[[Any], Any], *, typed: bool) -> None:
        vlm = load_checkpoint(folder)
        sample, encoded = encode_probes(vlm.tokenizer, vlm.rules)[0]
        content: Any = sample.turns[0].text
        if typed:
            content = [{"type": "image"}, {"type": "text", "text": content.removeprefix("<image>\n")}]
        messages = [{"role": "user", "content": content}]
        text = renderer(messages).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = processor(images=[picture()], text=text, return_tensors="pt")["input_ids"][0].tolist()
        assert ids == encoded.input_ids[: encoded.supervised.index(True)]

    def test_it_stops_at_the_end_of_a_turn(self, folder: Path) -> None:
        """``eos_token_id=tokenizer.eos_token_id`` overrules the generation settings of the folder."""
        processor: Any = AutoProcessor.from_pretrained(folder)
        assert processor.tokenizer.eos_token == load_checkpoint(folder).rules.end_of_turn


class TestSglang:
    """sgl-project/sglang, python/sglang/srt/models/llava.py: LLaVA's own layout."""

    def test_what_it_reads_of_llavas_layout(self, finished: Callable[[Any], Path], tmp_path: Path) -> None:
        out = export_checkpoint(str(finished("qwen2")), to="llava", out=tmp_path / "llava-qwen").out
        config = stated(out)
        assert config["architectures"][0] in (
            "LlavaLlamaForCausalLM",
            "LlavaQwenForCausalLM",
            "LlavaMistralForCausalLM",
        )
        assert "clip" in config["mm_vision_tower"]
        assert config["mm_vision_select_feature"] in ("patch", "full", "cls_patch")
        assert config["mm_patch_merge_type"] == "flat"
        assert {"mm_hidden_size", "hidden_size", "mm_vision_select_layer", "image_aspect_ratio"} <= set(config)
        with safe_open(out / "model.safetensors", framework="pt") as file:
            names = list(file.keys())
        assert {name for name in names if "projector" in name} == {
            f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
        }

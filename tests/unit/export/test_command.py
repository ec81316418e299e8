"""Exports of real (tiny) runs, and what the gates refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from dpa.errors import CheckpointError, ModelError, UserError
from dpa.export import command
from dpa.export.command import export_checkpoint
from dpa.export.llava import TOWER_FOLDER
from dpa.models.checkpoint_io import load_checkpoint
from dpa.models.legacy import read_connector
from dpa.testing.llava_hf import write_tiny_llava_hf

Finished = Callable[[Any], Path]
NAMES = (
    "stage 3 started from the original LLM",
    "weights are the run's",
    "logits before = after",
    "template token ids train = serve",
)


def copied(run: Path, folder: Path) -> Path:
    """A checkpoint that a test may change, its papers beside it."""
    source = (run / "checkpoint").resolve()
    shutil.copytree(source, folder / "checkpoint")
    shutil.copyfile(source.parent / "manifest.json", folder / "manifest.json")
    return folder / "checkpoint"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


class TestHf:
    def test_every_gate_passes(self, finished: Finished, tmp_path: Path) -> None:
        result = export_checkpoint(str(finished("qwen2")), to="hf", out=tmp_path / "out")
        assert [(gate.name, gate.state) for gate in result.gates] == [(name, "passed") for name in NAMES]
        assert result.to_dict()["dtype"] == "float32"
        assert [item.name for item in tmp_path.iterdir()] == ["out"]
        card = (tmp_path / "out" / "README.md").read_text()
        for fact in ("method: dpa", "objective of stage 3: cmo", "transformers 5", "digest of stage 3's data: "):
            assert fact in card
        assert str(finished("qwen2").parent.parent) not in card, "a path of this machine"

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_lower_precision_in_shards(self, finished: Finished, tmp_path: Path, dtype: str) -> None:
        result = export_checkpoint(
            str(finished("lab") / "checkpoint"), to="hf", dtype=dtype, shard_size="40KB", out=tmp_path / "out"
        )
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
        assert len(shards) > 1
        assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {kind}
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
        assert model.dtype == kind
        assert result.facts["rounding"].startswith(f"rounding to {str(kind).removeprefix('torch.')} moves logits")

    def test_end_of_turn_is_the_tokenizers_end(self, finished: Finished, tmp_path: Path) -> None:
        """lmms-eval's llava_hf stops at ``tokenizer.eos_token`` alone; Gemma's is not the end of a turn."""
        run = finished("gemma2")
        assert load_checkpoint(run / "checkpoint").tokenizer.eos_token == "<eos>"
        export_checkpoint(str(run), to="hf", out=tmp_path / "out")
        processor: Any = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
        assert processor.tokenizer.eos_token == "<end_of_turn>"
        generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        ends = processor.tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
        assert generation["eos_token_id"] == ends
        assert "soft-cap" in (tmp_path / "out" / "README.md").read_text()

    def test_somebody_elses_checkpoint(self, tmp_path: Path) -> None:
        folder = write_tiny_llava_hf(tmp_path / "llava-hf")
        result = export_checkpoint(str(folder), to="hf")
        assert result.out == tmp_path / "llava-hf.hf"
        states = dict(zip(NAMES, (gate.state for gate in result.gates), strict=True))
        assert states == dict(zip(NAMES, ("unknown", "unknown", "passed", "passed"), strict=True))
        assert "Not known: no manifest" in (result.out / "README.md").read_text()


class TestGates:
    """What fails is removed, and what was there before stays."""

    def refused(self, checkpoint: Path, match: str, **more: Any) -> None:
        out = checkpoint.parent / "out"
        with pytest.raises(CheckpointError, match=match):
            export_checkpoint(str(checkpoint), to="hf", out=out, **more)
        assert not out.exists()
        assert not out.with_name("out.tmp").exists()

    def test_proxy_in_the_llm(self, finished: Finished, tmp_path: Path) -> None:
        checkpoint = copied(finished("qwen2"), tmp_path)
        edit(tmp_path / "manifest.json", llm_at_start="0" * 64)
        self.refused(checkpoint, "the proxy may be in it")

    def test_changed_weights(self, finished: Finished, tmp_path: Path) -> None:
        checkpoint = copied(finished("qwen2"), tmp_path)
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["multi_modal_projector.linear_1.bias"] += 1e-3
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        self.refused(checkpoint, "changed or damaged since")

    def test_another_template(self, finished: Finished, tmp_path: Path) -> None:
        """LlamaFactory#5489: what is served is not what was trained."""
        checkpoint = copied(finished("qwen2"), tmp_path)
        template = (checkpoint / "chat_template.jinja").read_text()
        (checkpoint / "chat_template.jinja").write_text(template.replace("careful helper", "brief helper"))
        self.refused(checkpoint, "other token ids than training had")

    def test_a_processor_that_serves_other_ids(
        self, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint, save = copied(finished("llama3"), tmp_path), command.save_checkpoint

        def second_bos(vlm: Any, folder: Path, **more: Any) -> None:
            save(vlm, folder, **more)
            text = (folder / "chat_template.jinja").read_text()
            (folder / "chat_template.jinja").write_text("{{- bos_token -}}" + text)

        monkeypatch.setattr(command, "save_checkpoint", second_bos)
        self.refused(checkpoint, r"'image' as plain strings has \d+ tokens, in training")

    def test_weights_that_are_written_wrong(
        self, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """LLaVA-NeXT#253: it loads, and talks garbage."""
        checkpoint, save = copied(finished("qwen2"), tmp_path), command.save_checkpoint

        def transposed(vlm: Any, folder: Path, **more: Any) -> None:
            save(vlm, folder, **more)
            tensors = load_file(folder / "model.safetensors")
            name = "language_model.model.layers.0.self_attn.q_proj.weight"
            tensors[name] = tensors[name].T.contiguous()
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr(command, "save_checkpoint", transposed)
        self.refused(checkpoint, "the exported model is not the checkpoint")

    def test_a_rotary_base_that_gets_lost(
        self, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What transformers 4 did with every folder of transformers 5."""
        checkpoint, save = copied(finished("qwen2"), tmp_path), command.save_checkpoint

        def forgetful(vlm: Any, folder: Path, **more: Any) -> None:
            save(vlm, folder, **more)
            config = json.loads((folder / "config.json").read_text())
            config["text_config"]["rope_theta"] = 5.0
            del config["text_config"]["rope_parameters"]
            (folder / "config.json").write_text(json.dumps(config))

        monkeypatch.setattr(command, "save_checkpoint", forgetful)
        self.refused(checkpoint, "the exported model is not the checkpoint")

    def test_float16_that_overflows(self, tmp_path: Path) -> None:
        folder = write_tiny_llava_hf(tmp_path / "c", layout="new")
        tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        tensors["model.multi_modal_projector.linear_1.bias"][0] = 1e6
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        edit(folder / "config.json", torch_dtype="float32")
        with pytest.raises(UserError, match=r"linear_1\.bias holds 1e\+06, and float16 ends"):
            export_checkpoint(str(folder), to="hf", dtype="fp16")


class TestLlava:
    def test_vicuna(self, finished: Finished, tmp_path: Path) -> None:
        result = export_checkpoint(str(finished("llama2")), to="llava", out=tmp_path / "llava-llama")
        assert [gate.state for gate in result.gates] == ["passed"] * 4
        assert result.facts["conv_mode"] == "vicuna_v1"
        config = json.loads((tmp_path / "llava-llama" / "config.json").read_text())
        assert config["architectures"] == ["LlavaLlamaForCausalLM"]
        assert config["mm_vision_tower"] == str(tmp_path / "llava-llama" / TOWER_FOLDER)
        names = set(load_file(tmp_path / "llava-llama" / "model.safetensors"))
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.mm_projector.0.weight"} <= names
        assert not any("vision" in name for name in names)
        expected = load_checkpoint(finished("llama2") / "checkpoint").model.model.multi_modal_projector.state_dict()
        for source in (tmp_path / "llava-llama", tmp_path / "llava-llama" / "model.safetensors"):
            assert all(torch.equal(value, expected[name]) for name, value in read_connector(source).items())
        merges = json.loads((tmp_path / "llava-llama" / "tokenizer.json").read_text())["model"]["merges"]
        assert all(isinstance(merge, str) for merge in merges), "tokenizers 0.15 knows no pairs"

    @pytest.mark.parametrize("family", ["qwen2", "lab"])
    def test_qwen_whose_system_text_no_conv_mode_writes(self, finished: Finished, tmp_path: Path, family: str) -> None:
        result = export_checkpoint(str(finished(family)), to="llava", out=tmp_path / "llava-qwen", dtype="bf16")
        assert [gate.state for gate in result.gates] == ["passed", "passed", "passed", "unknown"]
        assert result.facts["class"] == "LlavaQwenForCausalLM"
        assert "apply_chat_template" in (tmp_path / "llava-qwen" / "README.md").read_text()
        tensors = load_file(tmp_path / "llava-qwen" / "model.safetensors")
        assert ("lm_head.weight" in tensors) == (family == "qwen2"), "the lab's head is tied"

    def test_another_name_for_the_tower(self, finished: Finished, tmp_path: Path) -> None:
        name = "openai/clip-vit-large-patch14-336"
        export_checkpoint(str(finished("llama2")), to="llava", tower=name, out=tmp_path / "llava")
        assert json.loads((tmp_path / "llava" / "config.json").read_text())["mm_vision_tower"] == name

    def test_families_that_llavas_code_has_not(self, finished: Finished, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no class for an LLM of model_type 'gemma2'"):
            export_checkpoint(str(finished("gemma2")), to="llava", out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestPeft:
    @pytest.mark.parametrize("given", ["", "proxy", "checkpoint"])
    def test_the_proxys_adapter(self, finished: Finished, tmp_path: Path, given: str) -> None:
        run = finished("qwen2")
        result = export_checkpoint(str(run / given), to="peft", out=tmp_path / "out")
        assert [gate.state for gate in result.gates] == ["passed", "passed"]
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(run.parent.parent / "llm")
        assert config["r"] == 4

    def test_merged_is_not_adapted(self, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dpa.export.peft.merge_adapter", lambda llm, adapter: None)  # a merge that does nothing
        with pytest.raises(CheckpointError, match="merged and adapted model differ"):
            export_checkpoint(str(finished("qwen2")), to="peft", out=tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_another_base(self, finished: Finished, tmp_path: Path) -> None:
        shutil.copytree((finished("qwen2") / "proxy").resolve(), tmp_path / "proxy")
        edit(tmp_path / "proxy" / "adapter_manifest.json", base_digest="0" * 64)
        with pytest.raises(CheckpointError, match=r"trained on .* with weights 000000000000"):
            export_checkpoint(str(tmp_path / "proxy"), to="peft", out=tmp_path / "out")

    def test_a_fully_tuned_llm_has_none(self, finished: Finished, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="leaves no adapter"):
            export_checkpoint(str(copied(finished("qwen2"), tmp_path)), to="peft")


def test_refusals(finished: Finished, tmp_path: Path) -> None:
    run = str(finished("qwen2"))
    with pytest.raises(UserError, match="no such layout; choose hf, llava, peft"):
        export_checkpoint(run, to="gguf")
    with pytest.raises(UserError, match="no such dtype; choose bf16, fp16, fp32"):
        export_checkpoint(run, to="hf", dtype="int8", out=tmp_path / "out")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        export_checkpoint(run, to="hf", out=tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        export_checkpoint(str(tmp_path / "gone"), to="hf")

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dpa.errors import ModelError
from dpa.models.checkpoint_io import save_checkpoint
from dpa.models.legacy import CONNECTOR_NAMES, check_connector, read_connector, write_mm_projector
from dpa.models.settings import ModelSettings
from dpa.models.vlm import build_vlm

Make = Callable[..., ModelSettings]
LLAVA = {
    "linear_1.weight": "model.mm_projector.0.weight",
    "linear_1.bias": "model.mm_projector.0.bias",
    "linear_2.weight": "model.mm_projector.2.weight",
    "linear_2.bias": "model.mm_projector.2.bias",
}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear_1.weight": (6, 4), "linear_1.bias": (6,), "linear_2.weight": (6, 6), "linear_2.bias": (6,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def test_round_trip(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    write_mm_projector(state, tmp_path / "deep" / "mm_projector.bin")
    assert same(read_connector(tmp_path / "deep" / "mm_projector.bin"), state)
    assert same(read_connector(tmp_path / "deep"), state)
    assert [item.name for item in (tmp_path / "deep").iterdir()] == ["mm_projector.bin"]


def test_written_names_are_llavas(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mm_projector.bin"
    write_mm_projector(state, path)
    loaded = torch.load(path, weights_only=True)
    assert {name: loaded[LLAVA[name]].tolist() for name in state} == {
        name: value.tolist() for name, value in state.items()
    }
    assert len(loaded) == 4


def test_a_view_does_not_drag_its_storage_along(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    big = torch.zeros(1_000_000)
    write_mm_projector({**state, "linear_1.bias": big[:6]}, tmp_path / "mm_projector.bin")
    assert (tmp_path / "mm_projector.bin").stat().st_size < 10_000


@pytest.mark.parametrize(
    "prefix",
    [
        "model.mm_projector.",
        "mm_projector.",
        "base_model.model.model.mm_projector.",
        "module.model.mm_projector.",
        "_orig_mod.module.base_model.model.model.mm_projector.",
    ],
)
def test_llavas_spellings(state: dict[str, torch.Tensor], tmp_path: Path, prefix: str) -> None:
    renamed = {prefix + LLAVA[name].removeprefix("model.mm_projector."): value.half() for name, value in state.items()}
    torch.save(renamed, tmp_path / "mm_projector.bin")
    read = read_connector(tmp_path / "mm_projector.bin")
    assert same(read, {name: value.half().float() for name, value in state.items()})


@pytest.mark.parametrize("prefix", ["", "multi_modal_projector.", "model.multi_modal_projector."])
def test_safetensors(state: dict[str, torch.Tensor], tmp_path: Path, prefix: str) -> None:
    tensors = {prefix + name: value for name, value in state.items()} | {"language_model.x": torch.zeros(2)}
    save_file(tensors, tmp_path / "some.safetensors")
    assert same(read_connector(tmp_path / "some.safetensors"), state)


def test_sharded_checkpoint(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    names = {f"multi_modal_projector.{name}": value for name, value in state.items()}
    first = dict(list(names.items())[:1])
    second = dict(list(names.items())[1:])
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    where = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(second, "model-2.safetensors")
    where |= {"language_model.lm_head.weight": "model-3.safetensors"}  # a shard that need not be read, nor be there
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(read_connector(tmp_path), state)


def test_checkpoint_folder(settings: Make, tmp_path: Path) -> None:
    vlm = build_vlm(settings(), seed=8)
    save_checkpoint(vlm, tmp_path / "checkpoint")
    expected = vlm.model.model.multi_modal_projector.state_dict()
    assert same(read_connector(tmp_path / "checkpoint"), {name: expected[name] for name in CONNECTOR_NAMES})


LLM = {"model.embed_tokens.weight": torch.zeros(3, 6), "lm_head.weight": torch.zeros(3, 6)}


def llava(state: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {LLAVA[name]: value.to(dtype) for name, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(state: dict[str, torch.Tensor], tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(llava(state, dtype), tmp_path / "mm_projector.bin")
    expected = {name: value.to(dtype).float() for name, value in state.items()}
    assert same(read_connector(tmp_path / "mm_projector.bin"), expected)


class TestWholeLlavaCheckpoints:
    def expected(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.bfloat16().float() for name, value in state.items()}

    def test_torch_shards(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        """liuhaotian/llava-v1.5-7b: two ``.bin`` shards, the connector inside the second."""
        torch.save(LLM, tmp_path / "pytorch_model-00001-of-00002.bin")
        torch.save(llava(state), tmp_path / "pytorch_model-00002-of-00002.bin")
        where = dict.fromkeys(LLM, "pytorch_model-00001-of-00002.bin")
        where |= dict.fromkeys(llava(state), "pytorch_model-00002-of-00002.bin")
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
        (tmp_path / "pytorch_model-00001-of-00002.bin").unlink()  # the LLM's shard need not be there
        assert same(read_connector(tmp_path), self.expected(state))

    def test_safetensors_shards_with_a_newline(
        self, state: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """LLaVA-NeXT: ``model.image_newline`` lies beside the connector."""
        caplog.set_level("INFO", logger="dpa")
        save_file(
            {**llava(state), "model.image_newline": torch.zeros(6)}, tmp_path / "model-00001-of-00002.safetensors"
        )
        where = dict.fromkeys([*llava(state), "model.image_newline"], "model-00001-of-00002.safetensors")
        where |= dict.fromkeys(LLM, "model-00002-of-00002.safetensors")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        assert same(read_connector(tmp_path), self.expected(state))
        assert "image_newline is left out" in caplog.text

    def test_one_file_with_everything(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        torch.save({**LLM, **llava(state)}, tmp_path / "pytorch_model.bin")
        assert same(read_connector(tmp_path), self.expected(state))

    def test_lora_training_leaves_it_elsewhere(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        tensors = {f"base_model.model.{name}": value for name, value in llava(state).items()}
        torch.save(tensors, tmp_path / "non_lora_trainables.bin")
        assert same(read_connector(tmp_path), self.expected(state))

    def test_deepspeed_states_and_the_old_torch_format(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        tensors = {f"module.{name}": value for name, value in llava(state).items()}
        torch.save({"module": tensors}, tmp_path / "states.pt", _use_new_zipfile_serialization=False)
        assert same(read_connector(tmp_path / "states.pt"), self.expected(state))

    def test_parameters_are_tensors(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        tensors = {name: torch.nn.Parameter(value) for name, value in llava(state).items()}
        torch.save(tensors, tmp_path / "mm_projector.bin")
        read = read_connector(tmp_path / "mm_projector.bin")
        assert same({name: value.detach() for name, value in read.items()}, self.expected(state))
        assert not any(value.requires_grad for value in read.values())


def test_shapes_say_whose_connector_it_is(state: dict[str, torch.Tensor]) -> None:
    check_connector(state, Path("c"), tower=4, llm=6)
    with pytest.raises(ModelError, match=r"wrong vision tower .* of shape \[6, 4\], this .* need \[6, 5\]"):
        check_connector(state, Path("c"), tower=5, llm=6)
    with pytest.raises(ModelError, match=r"wrong LLM .* of shape \[6, 4\], this .* need \[7, 4\]"):
        check_connector(state, Path("c"), tower=4, llm=7)


class TestRefusals:
    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="does not exist"):
            read_connector(tmp_path / "mm_projector.bin")

    def test_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no connector to read"):
            read_connector(tmp_path)

    def test_one_layer_connector(self, tmp_path: Path) -> None:
        torch.save({"model.mm_projector.weight": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
        with pytest.raises(
            ModelError, match=r"no connector of a known kind: .*found model\.mm_projector\.weight.*a linear one"
        ):
            read_connector(tmp_path / "mm_projector.bin")

    def test_deeper_connector(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        deeper = {**llava(state), "model.mm_projector.4.weight": torch.zeros(6, 6)}
        torch.save(deeper, tmp_path / "mm_projector.bin")
        with pytest.raises(ModelError, match=r"mm_projector\.4\.weight belong to a deeper one"):
            read_connector(tmp_path / "mm_projector.bin")

    def test_resampler(self, tmp_path: Path) -> None:
        torch.save({"model.vision_resampler.query": torch.zeros(2, 2)}, tmp_path / "mm_projector.bin")
        with pytest.raises(ModelError, match="it has a vision_resampler"):
            read_connector(tmp_path / "mm_projector.bin")

    def test_zero_3_without_gathering(self, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
        """LLaVA-NeXT#177: every tensor is there, and none has a value."""
        torch.save({name: torch.zeros(0) for name in llava(state)}, tmp_path / "mm_projector.bin")
        with pytest.raises(ModelError, match=r"without values \(shape \[0\]\): .*ZeRO-3"):
            read_connector(tmp_path / "mm_projector.bin")

    def test_pickled_code_is_not_run(self, tmp_path: Path) -> None:
        witness = tmp_path / "ran"

        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (Path.touch, (Path(witness),))  # type: ignore[return-value]

        torch.save({"model.mm_projector.0.weight": Evil()}, tmp_path / "mm_projector.bin", pickle_module=pickle)
        with pytest.raises(ModelError, match="cannot be read"):
            read_connector(tmp_path / "mm_projector.bin")
        assert not witness.exists()

    def test_garbage(self, tmp_path: Path) -> None:
        for name in ("mm_projector.bin", "c.safetensors"):
            (tmp_path / name).write_bytes(b"not a model at all")
            with pytest.raises(ModelError, match="cannot be read"):
                read_connector(tmp_path / name)

    def test_something_else_in_the_file(self, tmp_path: Path) -> None:
        torch.save([torch.zeros(2)], tmp_path / "mm_projector.bin")
        with pytest.raises(ModelError, match="named tensors"):
            read_connector(tmp_path / "mm_projector.bin")

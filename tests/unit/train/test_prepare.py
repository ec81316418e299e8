"""Caches of a stage: the numbers of the passes that they replace, made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpa.errors import StorageError, UserError
from dpa.models.freeze import set_trainable
from dpa.models.text_pass import text_only_logprobs
from dpa.testing.models import tiny_batch, tiny_llava
from dpa.train import step as step_module
from dpa.train.settings import ObjectiveName, StageSettings
from dpa.train.step import Fidelity, TrainStep, step_settings, wants_text_cache
from tests.stages import IMAGES, MIXED, Options, Trained, run

PRETRAIN = Options(stage="pretrain", max_steps=4, micro_batch=3)
"""24 samples, 8 a step: the fourth step is the second epoch's first."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of each text-only pass that is made."""
    made: list[int] = []

    def counted(llm: Any, batch: Any, **more: Any) -> Any:
        made.append(len(batch.sample_ids))
        return text_only_logprobs(llm, batch, **more)

    monkeypatch.setattr(step_module, "text_only_logprobs", counted)
    monkeypatch.setattr("dpa.models.contrast.text_only_logprobs", counted)
    return made


def assert_close(found: Trained, expected: Trained, *, rel: float, atol: float) -> None:
    for name in ("loss", "grad_norm", "mean_weight"):
        assert [row[name] for row in found.rows] == pytest.approx([row[name] for row in expected.rows], rel=rel), name
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "options",
    [
        PRETRAIN,
        replace(PRETRAIN, objective="cal", bounds=None),
        replace(PRETRAIN, objective="prior", bounds=None),
        replace(PRETRAIN, family="gemma2", structures=IMAGES),
        replace(PRETRAIN, objective="prior", bounds=None, stage="finetune"),
    ],
    ids=["cmo", "cal", "prior", "gemma2", "prior, finetune"],
)
def test_cached_equals_uncached(tmp_path: Path, options: Options, passes: list[int]) -> None:
    without = run(tmp_path / "without", options)
    assert len(passes) > 4
    passes.clear()
    found = run(tmp_path / "with", replace(options, caches=str(tmp_path / "caches")))
    assert passes == [24], "one pass over all samples, none in any step of any epoch"
    # the same sums in other shapes (padding, rows); weights are differences of probabilities, and Adam divides by a
    # gradient's own size: 5e-3 of the learning rate
    assert_close(found, without, rel=1e-5, atol=5e-6)


def test_a_second_run_makes_no_pass(tmp_path: Path, passes: list[int]) -> None:
    options = replace(PRETRAIN, caches=str(tmp_path / "caches"))
    first = run(tmp_path / "first", options)
    passes.clear()
    again = run(tmp_path / "again", options)
    other = run(tmp_path / "other", replace(options, seed=1, max_steps=7))
    assert passes == []
    assert again.rows == first.rows
    assert all(torch.equal(again.weights[name], value) for name, value in first.weights.items())
    assert other.rows[0]["loss"] != first.rows[0]["loss"], "the seed must change the order"
    assert_close(other, run(tmp_path / "x", replace(PRETRAIN, seed=1, max_steps=7)), rel=1e-5, atol=5e-6)  # as above


def test_damage_is_found_and_mended(tmp_path: Path, passes: list[int], caplog: pytest.LogCaptureFixture) -> None:
    options = replace(PRETRAIN, caches=str(tmp_path / "caches"))
    first = run(tmp_path / "first", options)
    (values,) = (tmp_path / "caches").glob("text-*/values.bin")
    whole = values.read_bytes()
    values.write_bytes(whole[:40] + b"\0\0\0\0" + whole[44:])
    passes.clear()
    again = run(tmp_path / "again", options)
    assert "1 damaged chunks are thrown away and made again" in caplog.text
    assert passes == [24]
    assert values.read_bytes() == whole
    assert again.rows == first.rows


def test_other_inputs_are_another_cache(tmp_path: Path, passes: list[int]) -> None:
    caches = str(tmp_path / "caches")
    run(tmp_path / "cmo", replace(PRETRAIN, caches=caches))
    run(tmp_path / "cal", replace(PRETRAIN, caches=caches, objective="cal", bounds=None))
    run(tmp_path / "gemma2", replace(PRETRAIN, caches=caches, family="gemma2"))
    threads = torch.get_num_threads()
    run(tmp_path / "again", replace(PRETRAIN, caches=caches))
    assert torch.get_num_threads() == threads
    assert passes == [24, 24, 24]
    assert len(list((tmp_path / "caches").glob("text-*/about.json"))) == 3


def test_a_finished_stage_asks_for_no_cache(tmp_path: Path, passes: list[int]) -> None:
    options = replace(PRETRAIN, caches=str(tmp_path / "caches"))
    first = run(tmp_path / "run", options)
    passes.clear()
    again = run(tmp_path / "run", replace(options, caches=str(tmp_path / "gone")))
    assert passes == []
    assert again.rows == first.rows


def test_no_room_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpa.data.row_cache._SPARE", 10**18)
    with pytest.raises(StorageError, match="free space, name a store on another disk"):
        run(tmp_path / "run", replace(PRETRAIN, caches=str(tmp_path / "caches")))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("structures", [MIXED, IMAGES], ids=["mixed", "images"])
def test_features_for_images(tmp_path: Path, stage: str, structures: tuple[str, ...]) -> None:
    options = replace(PRETRAIN, stage=stage, structures=structures)
    both = replace(options, caches=str(tmp_path / "caches"), cached=("text", "vision")[stage == "finetune" :])
    expected, found = run(tmp_path / "without", options), run(tmp_path / "with", both)
    again = run(tmp_path / "again", both)
    assert again.rows == found.rows
    # float16 keeps 11 bits: 5e-4 of each feature, and Adam may turn tiny gradients: a fifth of three learning rates
    assert_close(found, expected, rel=2e-2, atol=6e-4)
    assert found.rows != expected.rows, "else nothing was rounded, and nothing cached"


def test_no_gradient_reaches_what_is_frozen() -> None:
    """Stage 2 keeps no weight gradient of the LLM, and the tower's output carries no graph."""
    model, batch = tiny_llava("qwen2"), tiny_batch(MIXED)
    set_trainable(model, "pretrain")
    settings = StageSettings(learning_rate=1e-3, minimum=1e-4, maximum=0.05)
    step = TrainStep(model, step_settings(settings, objective_name="cmo", fidelity="exact"))
    outputs: list[torch.Tensor] = []
    model.model.vision_tower.register_forward_hook(lambda *found: outputs.append(found[2].last_hidden_state))
    loss = step(batch, 0.01).loss_sum
    assert outputs
    assert not any(output.requires_grad for output in outputs)
    torch.autograd.backward(loss)
    with_gradient = {name for name, value in model.named_parameters() if value.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "multi_modal_projector" in name}


def settings(**more: Any) -> StageSettings:
    return StageSettings.model_validate({"learning_rate": 1e-3, **more})


@pytest.mark.parametrize(
    ("stage", "objective", "fidelity", "more", "wanted"),
    [
        ("pretrain", "cmo", "exact", {}, True),
        ("pretrain", "cal", "exact", {}, True),
        ("pretrain", "prior", "exact", {}, True),
        ("pretrain", "uniform", "exact", {"text_cache": True}, False),
        ("pretrain", "cmo", "exact", {"text_cache": False}, False),
        ("pretrain", "cmo", "exact", {"epochs": 0.5}, False),
        ("pretrain", "cmo", "exact", {"max_steps": 3}, False),
        ("pretrain", "cmo", "exact", {"max_steps": 3, "text_cache": True}, True),
        ("pretrain", "cmo", "official", {}, False),
        ("finetune", "cmo", "exact", {}, False),
        ("finetune", "prior", "exact", {}, True),
        ("proxy", "uniform", "exact", {}, False),
    ],
)
def test_who_wants_a_text_cache(
    stage: str, objective: ObjectiveName, fidelity: Fidelity, more: dict[str, Any], wanted: bool
) -> None:
    assert wants_text_cache(settings(**more), stage, objective_name=objective, fidelity=fidelity) is wanted


@pytest.mark.parametrize(
    ("stage", "objective", "fidelity", "message"),
    [
        ("proxy", "uniform", "exact", r"stages\.proxy\.text_cache is true, but stage 1 sees no image"),
        ("finetune", "cmo", "exact", "stage 3 trains its LLM"),
        ("pretrain", "cmo", "official", "which the connector changes; leave it out or set it to false"),
    ],
)
def test_where_it_cannot_be(stage: str, objective: ObjectiveName, fidelity: Fidelity, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wants_text_cache(settings(text_cache=True), stage, objective_name=objective, fidelity=fidelity)

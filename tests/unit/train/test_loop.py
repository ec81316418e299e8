from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dpa.errors import CheckpointError, DataError, NonFiniteError, UserError
from dpa.objectives import official_mean
from dpa.train.loop import train_stage
from dpa.train.metrics import read_metrics
from dpa.train.optim import make_optimizer, make_schedule
from dpa.train.settings import TrainSettings
from dpa.train.step import TrainStep
from tests.stages import IMAGES, TEXTS, MemoryData, Options, run, tiny_job


def by_hand(options: Options, work: Path) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The same stage without loop, loader or sums over steps: (losses, gradient norms, weights).

    ``exact``: one graph for the whole step, divided before backward. ``official``: the mean of their means.
    """
    job = tiny_job(work, options)
    job.model.train()
    job.model.model.vision_tower.eval()
    step, trained = TrainStep(job.model, job.step), list(job.trained().values())
    optimizer = make_optimizer(trained, job.settings)
    schedule = make_schedule(optimizer, job.settings, job.batches.steps)
    losses, norms, outputs = [], [], []
    images, tokens = 0.0, 0.0
    for loaded in job.batches.open(start=0, rank=0, ranks=1, pin_memory=False):
        mean = images / tokens if tokens else 1.0
        output = step(loaded.batch, mean)
        outputs.append(output)
        images += float(output.stats["image_weight"])
        tokens += float(output.stats["image_tokens"])
        if loaded.is_last_of_step:
            summed = torch.stack([output.loss_sum for output in outputs]).sum()
            loss = summed / torch.stack([output.weight_sum for output in outputs]).sum()
            losses.append(loss.item())
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, job.settings.max_grad_norm)))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            outputs, images, tokens = [], 0.0, 0.0
    return losses, norms, {name: value.detach() for name, value in job.trained().items()}


@pytest.mark.parametrize("fidelity", ["exact", "official"])
@pytest.mark.parametrize("objective", ["uniform", "cmo", "cal"])
def test_against_one_graph_per_step(tmp_path: Path, objective: str, fidelity: str) -> None:
    options = Options(
        objective=objective,
        fidelity=fidelity,
        micro_batch=3,
        bounds=(1e-4, 0.05) if objective == "cmo" else None,
    )
    losses, norms, weights = by_hand(options, tmp_path / "hand")
    trained = run(tmp_path / "loop", options)
    assert [row["loss"] for row in trained.rows] == pytest.approx(losses, rel=1e-6)
    assert [row["grad_norm"] for row in trained.rows] == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 2, "clipping must have had something to do"
    for name, value in weights.items():
        # Adam divides by a gradient's own size, so roundings of tiny gradients grow: 5e-3 of the learning rate
        torch.testing.assert_close(trained.weights[name], value, rtol=0, atol=5e-6)


def test_official_divides_each_micro_batch_by_its_own_weights(tmp_path: Path) -> None:
    """method.md, row "normalisation": the split of a batch changes the result, as in the reference."""
    options = Options(fidelity="official", structures=IMAGES, max_steps=1)
    job = tiny_job(tmp_path / "hand", replace(options, micro_batch=4))
    means = []
    for loaded in job.batches.open(start=0, rank=0, ranks=1, pin_memory=False):
        exact = TrainStep(job.model, replace(job.step, objective="uniform", fidelity="official"))
        output = exact(loaded.batch, None)
        nll, count = output.stats["nll"], output.stats["tokens"]
        torch.testing.assert_close(official_mean(nll, count), output.loss_sum.detach())
        means.append(float(TrainStep(job.model, job.step)(loaded.batch, None).loss_sum.detach()))
    assert len(means) == 2
    split = run(tmp_path / "4", replace(options, micro_batch=4))
    whole = run(tmp_path / "8", replace(options, micro_batch=8))
    assert split.rows[0]["loss"] == pytest.approx(sum(means) / 2, rel=1e-6)
    assert split.rows[0]["loss"] != pytest.approx(whole.rows[0]["loss"], rel=1e-4)


def test_mean_policy_keeps_the_share_of_text(tmp_path: Path) -> None:
    """Text-only tokens weigh what the step's image tokens weigh on average: their share of the loss is vanilla's."""
    seen: list[tuple[float, float]] = []
    forward = TrainStep.forward

    def watched(self: TrainStep, batch: Any, text_weight: float | None) -> Any:
        output = forward(self, batch, text_weight)
        seen.append((float(output.weight_sum), float(output.stats["tokens"])))
        return output

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainStep, "forward", watched)
        run(tmp_path, Options(max_steps=1))
    (images, image_tokens), (texts, text_tokens) = seen
    assert texts / text_tokens == pytest.approx(images / image_tokens, rel=1e-6)


class TestNonFinite:
    def test_loss(self, tmp_path: Path) -> None:
        bad = "s12"  # not read in the first steps
        options = Options(broken=bad, save_steps=1, max_steps=3, micro_batch=2)
        with pytest.raises(NonFiniteError) as raised:
            run(tmp_path, options)
        message = str(raised.value)
        done = len(read_metrics(tmp_path / "metrics.jsonl"))
        assert 0 < done < 3
        assert f"stage finetune, step {done + 1} of 3: the loss is nan; micro-batch of samples " in message
        assert bad in message
        assert "first non-finite output: model.vision_tower." in message
        assert f"the last good state is {tmp_path}/states/state-{done:08d}. Nothing was saved after it" in message
        newest = sorted(path.name for path in (tmp_path / "states").iterdir())[-1]
        assert newest == f"state-{done:08d}"

    def test_gradient(self, tmp_path: Path) -> None:
        job = tiny_job(tmp_path, Options(stage="pretrain"))
        weight = job.model.model.multi_modal_projector.linear_1.weight
        before = weight.detach().clone()
        weight.register_hook(lambda gradient: gradient * torch.inf)
        with pytest.raises(NonFiniteError, match=r"step 1 of 4: the gradient's norm is (nan|inf)") as raised:
            train_stage(job)
        assert "gradient: of parameter model.multi_modal_projector.linear_1.weight" in str(raised.value)
        assert "there is no saved state yet" in str(raised.value)
        assert torch.equal(weight, before), "the optimizer has not moved"
        assert not (tmp_path / "states").exists()


def test_a_step_without_weight_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = Options(structures=TEXTS, samples=8, max_steps=2, more={"text_only": "zero"})
    job = tiny_job(tmp_path, options)
    before = {name: value.detach().clone() for name, value in job.trained().items()}
    result = train_stage(job)
    assert (result.steps, result.skipped) == (2, 2)
    assert "step 1: no token has any weight; it is skipped" in caplog.text
    rows = read_metrics(job.metrics)
    assert [(row["loss"], row["grad_norm"], row["skipped"]) for row in rows] == [(None, None, True)] * 2
    assert [row["lr"] for row in rows] == [0.0, 1e-3], "the schedule goes on"
    assert all(torch.equal(value, before[name]) for name, value in job.trained().items())


def test_text_alone_under_cmo(tmp_path: Path) -> None:
    """No image in a whole step: text weighs 1, and the loss is the plain mean."""
    cmo = run(tmp_path / "cmo", Options(structures=TEXTS))
    uniform = run(tmp_path / "uniform", Options(structures=TEXTS, objective="uniform"))
    assert [row["loss"] for row in cmo.rows] == pytest.approx([row["loss"] for row in uniform.rows], rel=1e-6)


def test_bf16(tmp_path: Path) -> None:
    """Trained weights and optimizer states stay float32, whatever is computed in."""
    exact = run(tmp_path / "fp32", Options(max_steps=3))
    job = tiny_job(tmp_path / "bf16", Options(max_steps=3))
    train_stage(replace(job, train=TrainSettings(trackers=(), threads=1, precision="bf16")))
    state = load_file(tmp_path / "bf16" / "states" / "state-00000003" / "tensors.safetensors")
    kinds = {value.dtype for name, value in state.items() if not name.startswith("random.")}
    assert kinds == {torch.float32}
    losses = [row["loss"] for row in read_metrics(job.metrics)]
    assert losses != [row["loss"] for row in exact.rows]
    # two layers of bf16 products, 8 bits each
    assert losses == pytest.approx([row["loss"] for row in exact.rows], rel=2e-2)


class TestFrame:
    def test_the_caller_keeps_its_own(self, tmp_path: Path) -> None:
        job = tiny_job(
            tmp_path, Options(stage="proxy", dropout=0.5, max_steps=2, more={"gradient_checkpointing": True})
        )
        job.model.eval()
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        expected = (torch.rand(3).tolist(), random.random(), np.random.rand())
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        train_stage(job)
        assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == expected
        assert not any(module.training for module in job.model.modules())
        assert not job.model.get_base_model().is_activation_checkpointing
        assert not torch.are_deterministic_algorithms_enabled()

    def test_modes_while_it_trains(self, tmp_path: Path) -> None:
        modes: list[tuple[bool, bool, bool]] = []

        def look(_: Mapping[str, Any]) -> None:
            inner = job.model.model
            modes.append(
                (inner.language_model.training, inner.vision_tower.training, job.model.is_activation_checkpointing)
            )

        job = tiny_job(tmp_path, Options(max_steps=1, more={"gradient_checkpointing": True}), on_step=[look])
        train_stage(job)
        assert modes == [(True, False, True)]

    def test_only_trainable_parameters_move(self, tmp_path: Path) -> None:
        job = tiny_job(tmp_path, Options(stage="pretrain"))
        before = {name: value.detach().clone() for name, value in job.model.named_parameters()}
        train_stage(job)
        moved = {name for name, value in job.model.named_parameters() if not torch.equal(value, before[name])}
        assert moved == set(job.trained())


def test_result_and_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    job = tiny_job(tmp_path, Options(max_steps=3, global_batch=8), on_step=[lambda row: rows.append(dict(row))])
    result = train_stage(job)
    assert rows == read_metrics(job.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["lr"] == 0.0
    assert result.samples == 24 == sum(row["samples"] for row in rows)
    data = job.batches.data  # type: ignore[attr-defined]
    assert result.tokens == sum(sum(data[i].encoded.supervised) for i in range(24))
    assert result.sequence_tokens == sum(len(data[i].encoded.input_ids) for i in range(24))
    assert (result.loss_first, result.loss_last) == (rows[0]["loss"], rows[-1]["loss"])
    assert result.trainable_parameters == sum(value.numel() for value in job.trained().values())
    assert result.resumed_from == result.skipped == 0
    summary = result.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert {"steps", "loss_first", "loss_last", "trainable_parameters", "seconds"} <= set(summary)


def test_it_learns(tmp_path: Path) -> None:
    result = run(tmp_path, Options(samples=8, max_steps=30, learning_rate=5e-3, objective="uniform")).result
    assert result.loss_last < 0.2 * result.loss_first


def test_another_jobs_states(tmp_path: Path) -> None:
    run(tmp_path, Options(max_steps=1))
    job = replace(tiny_job(tmp_path, Options(max_steps=1)), fingerprint="0" * 64)
    with pytest.raises(CheckpointError, match="was saved by another job"):
        train_stage(job)


def test_prior_without_a_reference(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a frozen text-only LLM"):
        train_stage(replace(tiny_job(tmp_path, Options(objective="prior", bounds=None)), reference=None))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_reaches_the_user(tmp_path: Path, workers: int) -> None:
    job = tiny_job(tmp_path, Options(workers=workers))
    batches = replace(job.batches, data=Unreadable([IMAGES[0]] * 24))  # type: ignore[type-var]
    with pytest.raises(DataError, match="sample 5: broken file"):
        train_stage(replace(job, batches=batches))


class Unreadable(MemoryData):
    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise DataError("sample 5: broken file")
        return super().__getitem__(index)


def test_tensorboard(tmp_path: Path) -> None:
    """A continued run replaces what was logged after its state."""
    options = Options(max_steps=2, save_steps=1)
    job = replace(tiny_job(tmp_path, options), train=TrainSettings(threads=1), log_dir=tmp_path / "tb")
    train_stage(job)
    events = EventAccumulator(str(tmp_path / "tb" / "finetune"))
    events.Reload()
    scalars = {event.step: event.value for event in events.Scalars("loss")}
    assert scalars == pytest.approx({row["step"]: row["loss"] for row in read_metrics(job.metrics)}, rel=1e-6)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[Any] = []

    class Told:
        def start(self, stage: str, *, steps: int, done: int) -> None:
            told.append((stage, steps, done))

        def step(self, row: Mapping[str, Any]) -> None:
            told.append(row["step"])

        def finish(self) -> None:
            told.append("finish")

    train_stage(replace(tiny_job(tmp_path, Options(max_steps=2)), progress=Told()))
    assert told == [("finetune", 2, 0), 1, 2, "finish"]


def test_log_says_where_it_continues(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, Options(max_steps=2))
    with caplog.at_level(logging.INFO, logger="dpa"):
        result = run(tmp_path, Options(max_steps=2)).result
    assert "stage finetune: continues after step 2 of 2" in caplog.text
    assert result.resumed_from == 2

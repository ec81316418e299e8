"""Two ranks over gloo: the result of one, whatever each of them gets, and nobody waits for the other for ever."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dpa.errors import CheckpointError, NonFiniteError
from dpa.testing.processes import run_ranks
from dpa.train.loop import train_stage
from dpa.train.step import TrainStep
from tests.invariants.test_batch_split import assert_same
from tests.stages import IMAGES, MIXED, TEXTS, Interrupted, Options, Trained, digest, run, stop_after, tiny_job

CASES = {
    "cmo, mean policy": Options(micro_batch=4),
    "accumulated": Options(micro_batch=1),
    "pretrain": Options(stage="pretrain", micro_batch=2),
    "proxy": Options(stage="proxy", micro_batch=2),
    "cal": Options(objective="cal", bounds=None, micro_batch=3),
    "checkpointing": Options(micro_batch=2, more={"gradient_checkpointing": True}),
    # 19 samples: the last step has 3, so that a rank has fillers
    "ragged": Options(samples=19, max_steps=3, micro_batch=2),
    "one sample a step": Options(samples=5, global_batch=1, max_steps=5, micro_batch=1),
    "text alone": Options(structures=TEXTS, micro_batch=2),
    "images alone": Options(structures=IMAGES, micro_batch=2),
    "pretrain, text alone": Options(stage="pretrain", structures=TEXTS, micro_batch=2),
    "caches": Options(stage="pretrain", micro_batch=2, caches="caches", cached=("text", "vision")),
    "spans, ragged": Options(stage="pretrain", objective="spans", bounds=None, samples=19, max_steps=3, micro_batch=2),
    "mostly text": Options(structures=(*TEXTS, *TEXTS, *TEXTS, MIXED[0]), micro_batch=2, max_steps=3),
}


def all_cases(work: Path) -> dict[str, Trained]:
    """On every rank."""
    return {name: run(work / str(place), options) for place, (name, options) in enumerate(CASES.items())}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Trained]]:
    """Fourteen stages in one process group: a hang in any of them runs into the time limit."""
    return run_ranks(all_cases, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one(tmp_path: Path, two_ranks: list[dict[str, Trained]], case: str) -> None:
    assert_same(two_ranks[0][case], run(tmp_path, replace(CASES[case], micro_batch=8)))


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree(two_ranks: list[dict[str, Trained]], case: str) -> None:
    first, second = (ranks[case] for ranks in two_ranks)
    assert digest(first.weights) == digest(second.weights)
    assert first.rows == second.rows
    assert first.result == second.result


OFFICIAL = Options(fidelity="official", micro_batch=2, samples=11, max_steps=2)
"""The second step has 3 samples: one rank has a filler, which must not count."""


def official(work: Path) -> Trained:
    return run(work, OFFICIAL)


def test_official_averages_over_micro_batches_and_ranks(tmp_path: Path) -> None:
    """method.md, row "normalisation": equal shares for all micro-batches of all ranks."""
    found = run_ranks(official, tmp_path / "ranks")[0]
    job = tiny_job(tmp_path, OFFICIAL)
    step, means = TrainStep(job.model, job.step), []
    for rank in (0, 1):
        for loaded in job.batches.open(start=0, rank=rank, ranks=2, pin_memory=False):
            # the first step's learning rate is 0: both steps see the weights of the beginning
            if not loaded.info.micro.filler:
                means.append((loaded.step, step(loaded.batch, None).loss_sum))
    for number, row in enumerate(found.rows):
        mean = torch.stack([loss for of_step, loss in means if of_step == number]).mean()
        assert row["loss"] == pytest.approx(mean.item(), rel=1e-6)
        gradients = torch.autograd.grad(mean, list(job.trained().values()), retain_graph=True)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert sum(of_step for of_step, _ in means) == 3, "three micro-batches and a filler in the second step"


RESUMED = Options(stage="proxy", dropout=0.2, max_steps=6, save_steps=2, micro_batch=2)


def interrupted_and_continued(work: Path) -> tuple[Trained, Trained, float, float]:
    whole = run(work / "whole", RESUMED)
    torch.manual_seed(5)
    random.seed(5)
    before = random.random()
    random.seed(5)
    try:
        run(work / "again", RESUMED, on_step=[stop_after(5)])
    except Interrupted:
        torch.distributed.barrier()
    return whole, run(work / "again", RESUMED), before, random.random()


def test_continued(tmp_path: Path) -> None:
    """Each rank goes on with its own random numbers."""
    for whole, again, before, after in run_ranks(interrupted_and_continued, tmp_path):
        assert again.result.resumed_from == 4
        assert again.rows == whole.rows
        assert digest(again.weights) == digest(whole.weights)
        assert before == after, "the caller's generators are left alone"


def test_continued_by_fewer_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without dropout the result is the same but for the order of sums."""
    options = replace(RESUMED, dropout=0.0)
    run_ranks(interrupted, tmp_path / "again", options)
    again = run(tmp_path / "again", options)
    assert again.result.resumed_from == 4
    assert "was saved by 2 ranks, there are 1 now" in caplog.text
    assert_same(again, run(tmp_path / "whole", options))


def interrupted(work: Path, options: Options) -> None:
    try:
        run(work, options, on_step=[stop_after(5)])
    except Interrupted:
        torch.distributed.barrier()


def not_finite(work: Path) -> str:
    """The bad sample is on one rank only."""
    with pytest.raises(NonFiniteError) as raised:
        run(work, Options(broken="s12", micro_batch=1, max_steps=3, save_steps=1))
    return str(raised.value)


def test_non_finite_on_one_rank_stops_all(tmp_path: Path) -> None:
    first, second = run_ranks(not_finite, tmp_path)
    assert first == second
    assert "the loss is nan; rank " in first
    assert first.count("micro-batch of samples s12;") == 1
    assert "the last good state is" in first


def another_job(work: Path) -> str:
    run(work, Options(max_steps=1))
    job = replace(tiny_job(work, Options(max_steps=1)), fingerprint="0" * 64)
    with pytest.raises(CheckpointError) as raised:
        train_stage(job)
    return str(raised.value)


def test_an_error_of_rank_zero_reaches_all(tmp_path: Path) -> None:
    for message in run_ranks(another_job, tmp_path):
        assert "was saved by another job" in message

"""Shards over two gloo ranks (FSDP2 as ZeRO-3 and as ZeRO-2): the result of one process and of DDP; states that any
number of ranks continues."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpa.errors import NonFiniteError
from dpa.testing.processes import run_ranks
from dpa.train import sharding
from tests.invariants.test_batch_split import assert_same
from tests.stages import IMAGES, TEXTS, Interrupted, Options, Trained, digest, run, stop_after, tiny_job

FSDP = Options(parallel="fsdp", hollow=True)
ZERO2 = replace(FSDP, parallel="zero2")
CASES = {
    "cmo, mean policy": replace(FSDP, micro_batch=4),
    "accumulated": replace(FSDP, micro_batch=1),
    "checkpointing": replace(FSDP, micro_batch=2, more={"gradient_checkpointing": True}),
    "ragged": replace(FSDP, samples=19, max_steps=3, micro_batch=2),
    "text alone": replace(FSDP, structures=TEXTS, micro_batch=2),
    "gemma2": replace(FSDP, family="gemma2", micro_batch=2, max_steps=2),
    # labels that follow an image at once, in an LLM without document start: no text-only pass on some ranks
    "nothing to contrast": replace(
        FSDP, structures=("image label:1", *IMAGES), document_start=False, micro_batch=1, max_steps=3
    ),
    "official": replace(FSDP, fidelity="official", micro_batch=8, global_batch=16, max_steps=2),
    "stage 2": replace(FSDP, stage="pretrain", micro_batch=2),
    "zero2": replace(ZERO2, micro_batch=4),
    "zero2, accumulated": replace(ZERO2, micro_batch=1),
    "zero2, checkpointing": replace(ZERO2, micro_batch=2, more={"gradient_checkpointing": True}),
    "zero2, ragged": replace(ZERO2, samples=19, max_steps=3, micro_batch=2),
    "zero2, text alone": replace(ZERO2, structures=TEXTS, micro_batch=2),
    "zero3": replace(FSDP, parallel="zero3", micro_batch=2),
    "prior": replace(FSDP, objective="prior", bounds=None, micro_batch=4, max_steps=2),
}


def all_cases(work: Path) -> dict[str, Trained]:
    return {name: run(work / str(place), options) for place, (name, options) in enumerate(CASES.items())}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Rank 0's, which has the whole weights at the end."""
    return run_ranks(all_cases, tmp_path_factory.mktemp("ranks"))[0]


@pytest.mark.parametrize("case", [name for name in CASES if name != "official"])
def test_two_shards_are_one_process(tmp_path: Path, two_ranks: dict[str, Trained], case: str) -> None:
    assert_same(two_ranks[case], run(tmp_path, replace(CASES[case], micro_batch=8, hollow=False)))


def in_half(work: Path) -> list[Trained]:
    options = replace(FSDP, precision="bf16", micro_batch=2)
    return [run(work / name, replace(options, parallel=name)) for name in ("ddp", "fsdp", "zero2")]


def test_bf16_rounds_where_ddp_does(tmp_path: Path) -> None:
    """float32 weights, norms and residual stream; products in bfloat16, under each."""
    ddp, fsdp, zero2 = run_ranks(in_half, tmp_path)[0]
    assert zero2.rows == fsdp.rows, "the same sums in the same order"
    for row, wanted in zip(fsdp.rows, ddp.rows, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        # gradients are summed over ranks in another order, from the same bfloat16 products
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def shares(work: Path) -> tuple[int, int, set[str]]:
    job = tiny_job(work, FSDP)
    from dpa.train.loop import _Stage
    from dpa.train.parallel import Parallel
    from dpa.train.step import TrainStep

    stage = _Stage(job, Parallel(job.train, sharing="shards"), TrainStep(job.model, job.step))
    local = sum(value.to_local().numel() for value in stage.training.trained.values() if isinstance(value, DTensor))
    whole = sum(value.numel() for value in stage.training.trained.values())
    return local, whole, {name for name, value in job.model.named_parameters() if not isinstance(value, DTensor)}


def test_a_rank_holds_half_of_what_is_trained_and_all_that_is_frozen(tmp_path: Path) -> None:
    for local, whole, unsharded in run_ranks(shares, tmp_path):
        assert local == pytest.approx(whole / 2, rel=0.02)  # odd rows go to the first
        assert unsharded
        assert all("vision_tower" in name for name in unsharded)


class Gathers(TorchDispatchMode):
    """Counts all-gathers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "c10d::_allgather_base_"
        return func(*args, **(kwargs or {}))


def gatherings(work: Path) -> list[int]:
    """All-gathers of weights in stage 3: four steps of two micro-batches."""
    counts = []
    for parallel in ("zero3", "zero2"):
        with Gathers() as said:
            run(work / parallel, replace(FSDP, parallel=parallel, micro_batch=2, max_steps=4))
        counts.append(said.count)
    return counts


def test_zero2_gathers_weights_once_a_step(tmp_path: Path) -> None:
    for zero3, zero2 in run_ranks(gatherings, tmp_path):
        assert 0 < zero2 < zero3 / 3, (zero2, zero3)


RESUMED = replace(FSDP, max_steps=6, save_steps=2, micro_batch=2)


def interrupted(work: Path, options: Options) -> None:
    try:
        run(work, options, on_step=[stop_after(5)])
    except Interrupted:
        torch.distributed.barrier()


def whole_and_continued(work: Path) -> tuple[Trained, Trained, Trained, Trained]:
    whole = run(work / "whole", RESUMED)
    for name in ("again", "as copies", "by one"):
        interrupted(work / name, RESUMED)
    interrupted(work / "from copies", replace(RESUMED, parallel="ddp"))
    interrupted(work / "from zero2", replace(RESUMED, parallel="zero2"))
    as_copies = run(work / "as copies", replace(RESUMED, parallel="ddp"))
    from_copies = run(work / "from copies", RESUMED)
    assert as_copies.result.resumed_from == from_copies.result.resumed_from == 4
    from_zero2 = run(work / "from zero2", RESUMED)
    return whole, run(work / "again", RESUMED), from_copies, from_zero2


def test_continued(tmp_path: Path) -> None:
    """By as many ranks: the same bits. By one, as copies, from copies: but for the order of sums."""
    whole, again, from_copies, from_zero2 = run_ranks(whole_and_continued, tmp_path)[0]
    assert again.result.resumed_from == 4
    assert again.rows == whole.rows
    assert digest(again.weights) == digest(whole.weights)
    assert_same(from_copies, whole)
    assert (from_zero2.result.resumed_from, from_zero2.rows) == (4, whole.rows)
    assert digest(from_zero2.weights) == digest(whole.weights)
    states = tmp_path / "by one" / "states" / "state-00000004"
    assert len(list(states.glob("shard-*.safetensors"))) == 2
    by_one = run(tmp_path / "by one", replace(RESUMED, hollow=False))
    assert by_one.result.resumed_from == 4
    assert_same(by_one, whole)


def test_one_process_is_continued_by_two(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", replace(RESUMED, hollow=False))
    with pytest.raises(Interrupted):
        run(tmp_path / "again", replace(RESUMED, hollow=False), on_step=[stop_after(5)])
    again = run_ranks(run, tmp_path / "again", RESUMED)[0]
    assert again.result.resumed_from == 4
    assert_same(again, whole)


def not_finite(work: Path) -> str:
    with pytest.raises(NonFiniteError) as raised:
        run(work, replace(FSDP, broken="s12", micro_batch=1, max_steps=3, save_steps=1))
    return str(raised.value)


def test_non_finite_on_one_rank_stops_all(tmp_path: Path) -> None:
    first, second = run_ranks(not_finite, tmp_path)
    assert first == second
    assert first.count("micro-batch of samples s12;") == 1


def test_norms_are_units_of_their_own() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.GELU())
    assert sharding._kept_whole(layer) == [layer[1]]

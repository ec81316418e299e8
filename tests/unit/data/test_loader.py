"""The loader: same batches with any number of workers, errors as they were raised, no trace in global generators."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpa.data.dataset import StageData
from dpa.data.loader import Loaded, make_loader, read_ahead
from dpa.data.sampler import BatchPlan
from dpa.errors import DataError, DpaError
from tests.unit.data.helpers import chat_row, make_image, make_stage, open_file, write_json

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def make_data(tmp_path: Path, *, missing: bool = False) -> StageData:
    rows = []
    for number in range(22):
        question = f"Q{'?' * number}"
        if number % 3:
            make_image(tmp_path / f"{number}.png", (8 + number, 9), seed=number)
            rows.append(chat_row(f"s{number}", f"<image>\n{question}", f"A{number}", image=f"{number}.png"))
        else:
            rows.append(chat_row(f"s{number}", question, f"A{number}"))
    if missing:
        (tmp_path / "7.png").unlink()
    return make_stage([open_file(write_json(tmp_path / "a.json", rows), tmp_path / "cache")])


def make_plan(**changes: Any) -> BatchPlan:
    lengths = [60 + number for number in range(22)]
    has_image = [number % 3 > 0 for number in range(22)]
    values: dict[str, Any] = {"global_batch": 6, "micro_batch": 2, "ranks": 2, "seed": 1, "group_by_length": True}
    return BatchPlan(lengths, has_image, **(values | {"max_steps": 6} | changes))


def load(data: StageData, plan: BatchPlan, rank: int = 0, start: int = 0, workers: int = 0) -> list[Loaded]:
    return list(make_loader(data, plan, rank, start, data.rules, workers, False))


def assert_same(first: list[Loaded], second: list[Loaded]) -> None:
    assert len(first) == len(second)
    for left, right in zip(first, second, strict=True):
        assert (left.step, left.is_last_of_step) == (right.step, right.is_last_of_step)
        assert left.info.micro == right.info.micro
        assert left.batch.sample_ids == right.batch.sample_ids
        assert left.batch.image_counts == right.batch.image_counts
        assert torch.equal(left.batch.input_ids, right.batch.input_ids)
        assert torch.equal(left.batch.supervised, right.batch.supervised)
        assert (left.batch.pixel_values is None) == (right.batch.pixel_values is None)
        if left.batch.pixel_values is not None and right.batch.pixel_values is not None:
            assert torch.equal(left.batch.pixel_values, right.batch.pixel_values)


def test_two_workers_equal_none(tmp_path: Path) -> None:
    data, plan = make_data(tmp_path), make_plan()
    assert_same(load(data, plan, workers=2), load(data, plan))


def test_continuing_equals_the_tail(tmp_path: Path) -> None:
    data, plan = make_data(tmp_path), make_plan()
    whole = load(data, plan)
    assert_same(load(data, make_plan(), start=4), [loaded for loaded in whole if loaded.step >= 4])
    assert load(data, plan, start=plan.steps) == []


def test_order_ends_and_counts(tmp_path: Path) -> None:
    data, plan = make_data(tmp_path), make_plan(micro_batch=1)
    ranks = [load(data, plan, rank) for rank in range(2)]
    for loaded in ranks:
        assert [item.step for item in loaded] == sorted(item.step for item in loaded)
        for _, group in itertools.groupby(loaded, key=lambda item: item.step):
            items = list(group)
            assert [item.info.number for item in items] == list(range(len(items)))
            assert {item.info.count for item in items} == {len(items)}
            assert [item.is_last_of_step for item in items] == [False] * (len(items) - 1) + [True]
            assert [item.info.micro.has_image for item in items] == [
                item.info.number < item.info.image_count for item in items
            ]
            for item in items:
                assert bool(item.batch.has_image.all()) == item.info.micro.has_image
                assert bool(item.batch.has_image.any()) == item.info.micro.has_image
                assert bool(item.batch.supervised.any()) == (not item.info.micro.filler)
                assert item.info.seconds > 0
    counts = [[(item.step, item.info.count, item.info.image_count) for item in loaded] for loaded in ranks]
    assert counts[0] == counts[1]
    assert any(item.info.micro.filler for loaded in ranks for item in loaded)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_as_they_were_raised(tmp_path: Path, workers: int) -> None:
    data = make_data(tmp_path, missing=True)
    with pytest.raises(DataError) as caught:
        load(data, make_plan(), workers=workers)
    assert str(caught.value).startswith("sample 's7' (")
    assert "a.json, record 8): image missing: " in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_trace_in_global_generators(tmp_path: Path, workers: int) -> None:
    data, plan = make_data(tmp_path), make_plan()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    load(data, plan, workers=workers)
    assert torch.equal(torch.rand(3), expected)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[index]


def test_a_plan_for_other_data_is_refused(tmp_path: Path) -> None:
    data = make_data(tmp_path).select(np.arange(21))
    with pytest.raises(AssertionError):
        load(data, make_plan())


class _Dies:
    def __getitem__(self, key: int) -> int:
        if key == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return key


def test_a_dead_worker_is_named() -> None:
    with pytest.raises(DpaError, match=r"a data worker died: .*data\.workers"):
        list(read_ahead(_Dies(), range(5), 1))


class _Wrong:
    def __getitem__(self, key: int) -> int:
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_keep_their_traceback(workers: int) -> None:
    with pytest.raises(RuntimeError, match="a fault of ours") as caught:
        list(read_ahead(_Wrong(), range(5), workers))
    caught.value.with_traceback(None)
    del caught  # its frames hold the loader, and torch takes 5 s to end workers that the garbage collector finds


def test_closing_early_ends_the_workers(tmp_path: Path) -> None:
    data, plan = make_data(tmp_path), make_plan()
    loader = make_loader(data, plan, 0, 0, data.rules, 2, False)
    next(iter(loader))
    assert len(multiprocessing.active_children()) >= 2
    del loader
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]

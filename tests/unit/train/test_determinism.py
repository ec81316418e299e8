from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

from dpa.train.determinism import controlled, get_random_state, seed_everything, set_random_state
from dpa.train.settings import TrainSettings

CPU = torch.device("cpu")


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_the_callers_generators_go_on_as_if_nothing_had_been() -> None:
    seed_everything(5, stage="caller", rank=0)
    expected = [draw(), draw()]
    seed_everything(5, stage="caller", rank=0)
    found = [draw()]
    with controlled(TrainSettings(), CPU, low_precision=False):
        seed_everything(0, stage="pretrain", rank=0)
        draw()
    assert [*found, draw()] == expected


def test_everything_is_put_back_after_an_error() -> None:
    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    settings = TrainSettings(threads=threads + 1, deterministic=True)

    def fail() -> None:
        with controlled(settings, CPU, low_precision=True):
            assert torch.get_num_threads() == threads + 1
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_float32_matmul_precision() == "high"
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == products
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == before


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [(None, "cpu", True), (None, "cuda", False), (False, "cpu", False), (True, "cuda", True)],
)
def test_deterministic_is_the_default_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, asked: bool | None, device: str, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    with controlled(TrainSettings(deterministic=asked), torch.device(device), low_precision=False):
        assert torch.are_deterministic_algorithms_enabled() is expected
        assert torch.get_float32_matmul_precision() == "highest"


def test_stages_and_ranks_draw_different_numbers() -> None:
    drawn = set()
    with controlled(TrainSettings(), CPU, low_precision=False):
        for seed, stage, rank in [(0, "pretrain", 0), (0, "pretrain", 1), (0, "finetune", 0), (1, "pretrain", 0)]:
            seed_everything(seed, stage=stage, rank=rank)
            drawn.add(draw())
        seed_everything(0, stage="pretrain", rank=0)
        assert draw() in drawn
    assert len(drawn) == 4


def test_state_round_trip() -> None:
    with controlled(TrainSettings(), CPU, low_precision=False):
        random.gauss(0, 1)  # leaves a second number in store
        state = get_random_state(CPU)
        expected = (draw(), random.gauss(0, 1))
        seed_everything(9, stage="other", rank=3)
        set_random_state(state, CPU)
        assert (draw(), random.gauss(0, 1)) == expected

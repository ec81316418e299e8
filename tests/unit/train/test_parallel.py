from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpa.errors import UserError
from dpa.train import parallel as parallel_module
from dpa.train.parallel import Parallel, compute_dtype
from dpa.train.settings import TrainSettings


def settings(**more: Any) -> TrainSettings:
    return TrainSettings.model_validate({"trackers": (), **more})


def test_one_process_without_a_launcher() -> None:
    parallel = Parallel(settings())
    assert (parallel.rank, parallel.world, parallel.is_main) == (0, 1, True)
    values = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.equal(parallel.sum(values), values)
    assert parallel.ranks.gather({"a": 1}) == [{"a": 1}]
    assert parallel.ranks.from_main("x") == "x"
    parallel.ranks.barrier()


def test_wrap_and_clip() -> None:
    parallel, module = Parallel(settings()), nn.Linear(2, 2)
    wrapped = parallel.wrap(module)  # type: ignore[arg-type]
    with parallel.accumulate(wrapped, last=False):
        wrapped(torch.ones(1, 2)).sum().backward()
    norm = parallel.clip(module.parameters(), 1.0)
    assert norm == pytest.approx((4 + 2) ** 0.5)
    clipped = torch.cat([value.grad.flatten() for value in module.parameters() if value.grad is not None])
    assert float(clipped.norm()) == pytest.approx(1.0, abs=1e-5)


def test_precision_on_a_cpu() -> None:
    assert compute_dtype(settings(precision="auto")) == torch.float32
    assert compute_dtype(settings(precision="fp32")) == torch.float32
    assert compute_dtype(settings(precision="bf16")) == torch.bfloat16


class Device:
    def __init__(self, kind: str) -> None:
        self.device = torch.device(kind)


@pytest.mark.parametrize(
    ("kind", "has_bf16", "asked", "expected"),
    [
        ("cuda", True, "auto", torch.bfloat16),
        ("cuda", False, "auto", torch.float32),
        ("cuda", True, "fp32", torch.float32),
        ("mps", False, "auto", torch.float32),
        ("cuda", False, "bf16", None),
        ("mps", False, "bf16", None),
    ],
)
def test_precision_elsewhere(
    monkeypatch: pytest.MonkeyPatch, kind: str, has_bf16: bool, asked: str, expected: torch.dtype | None
) -> None:
    monkeypatch.setattr(parallel_module, "PartialState", lambda **_: Device(kind))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    if expected is None:
        with pytest.raises(UserError, match=f"precision is bf16, which {kind} does not have"):
            compute_dtype(settings(precision=asked))
    else:
        assert compute_dtype(settings(precision=asked)) == expected


def test_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"train\.trackers names wandb, which is not installed: pip install wandb"):
        Parallel(settings(trackers=("wandb",)), log_dir=tmp_path)


def test_no_folder_no_trackers() -> None:
    parallel = Parallel(settings(trackers=("wandb",)))
    parallel.start_trackers("s", {}, first_step=1)
    parallel.track({"loss": 1.0}, 1)
    parallel.finish_trackers()

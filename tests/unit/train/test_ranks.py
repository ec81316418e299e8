from __future__ import annotations

import os

import pytest

from dpa.errors import DataError, UserError
from dpa.testing.processes import run_ranks
from dpa.train.ranks import all_or_none, check_launcher, join_ranks
from dpa.train.settings import TrainSettings

SETTINGS = TrainSettings(trackers=())


def test_alone_everything_is_done_here() -> None:
    with all_or_none(SETTINGS) as ranks:
        assert ranks.main_alone(lambda: 1) == ranks.main_first(lambda: 1) == ranks.together(lambda: 1) == 1
        with pytest.raises(DataError, match="gone"):
            ranks.main_alone(fails)


def fails() -> None:
    raise DataError("gone")


def order_and_errors() -> tuple[list[int], int, str, bool]:
    ranks = join_ranks(SETTINGS)
    first = ranks.main_first(lambda: [ranks.rank])
    mine = ranks.main_alone(lambda: ranks.rank + 7)
    with pytest.raises(DataError) as raised:
        ranks.together(fails if ranks.rank == 1 else lambda: None)
    return first, mine, str(raised.value), raised.value.everywhere


def test_two_ranks() -> None:
    assert run_ranks(order_and_errors) == [([0], 7, "gone", True), ([1], 7, "gone", True)]


def test_the_launchers_flags_leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_launcher("fsdp")
    assert "ACCELERATE_USE_FSDP" not in os.environ
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(UserError, match="configured for zero3, the recipe says parallel ddp"):
        check_launcher("ddp")

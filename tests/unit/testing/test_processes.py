from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from dpa.testing.processes import ProcessError, run_killed, run_ranks


def add_up(value: int) -> tuple[int, int, float]:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    total = torch.tensor(float(value + rank))
    torch.distributed.all_reduce(total)
    return rank, torch.get_num_threads(), float(total)


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("on purpose")


def sleep(seconds: float) -> str:
    time.sleep(seconds)
    return "awake"


def end_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_talk() -> None:
    assert run_ranks(add_up, 10) == [(0, 1, 21.0), (1, 1, 21.0)]


def test_exceptions_come_back() -> None:
    with pytest.raises(ProcessError, match=r"(?s)^rank 1:.*fail_on_one.*KeyError: 'on purpose'"):
        run_ranks(fail_on_one)


def test_timeout() -> None:
    with pytest.raises(ProcessError, match="no answer in time"):
        run_ranks(sleep, 30.0, timeout=0.2)


def test_killed() -> None:
    assert run_killed(sleep, 30.0, after=0.1) == (False, None)
    assert run_killed(sleep, 0.0, after=30.0) == (True, "awake")
    assert run_killed(end_itself) == (False, None)
    with pytest.raises(ProcessError, match="KeyError: 'RANK'"):
        run_killed(fail_on_one)

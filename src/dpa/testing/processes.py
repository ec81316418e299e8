"""A function in several processes on the CPU, as ranks that talk over gloo. For tests only."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class RankError(AssertionError):
    """A rank raised, died or did not come back in time; the message holds the ranks' tracebacks."""


def run_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2, timeout: float = 60.0) -> list[Any]:
    """``function(*arguments)`` in ``ranks`` fresh processes, set up as ``torchrun`` would; their results by rank.

    Args:
        function: importable by name; it and its arguments and result travel by pickle.
        timeout: seconds for all of them together; whoever still runs then is killed.

    Raises:
        RankError: see there.
    """
    context = multiprocessing.get_context("spawn")
    port = _free_port()
    pipes, processes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(sender, function, arguments, rank, ranks, port), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    deadline = time.monotonic() + timeout
    try:
        outcomes = [_outcome(pipe, deadline, timeout) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(outcomes) if not fine]
    if failed:
        raise RankError("\n".join(failed))
    return [result for _, result in outcomes]


def _outcome(pipe: Connection, deadline: float, timeout: float) -> tuple[bool, Any]:
    """(True, result) or (False, what went wrong)."""
    if not pipe.poll(max(deadline - time.monotonic(), 0)):
        return False, f"no answer within {timeout:.0f} s"
    try:
        outcome: tuple[bool, Any] = pipe.recv()
    except EOFError:
        return False, "died without a word"
    return outcome


def _rank(
    pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, ranks: int, port: int
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

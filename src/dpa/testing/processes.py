"""A function in fresh processes on the CPU: as ranks that talk over gloo, or alone, to be killed. For tests only.

Processes are forked from a server that has done the slow imports and nothing else, so that each starts in no time.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_PRELOAD = ["dpa.train.loop", "dpa.testing.models", "peft", "transformers.models.auto.modeling_auto"]


_START_SECONDS = 300.0
"""The first one waits for the server's imports, on a busy machine."""


class ProcessError(AssertionError):
    """A process raised, died or did not come back in time; the message holds the tracebacks."""


def run_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2, timeout: float = 300.0) -> list[Any]:
    """``function(*arguments)`` in ``ranks`` processes, set up as ``torchrun`` would; their results by rank.

    Args:
        function: importable by name; it, its arguments and its result travel by pickle.
        timeout: seconds for all of them together; whoever still runs then is killed.

    Raises:
        ProcessError: see there.
    """
    port = free_port()
    started = [_start(_rank_environment(rank, ranks, port), function, arguments) for rank in range(ranks)]
    deadline = time.monotonic() + timeout
    try:
        outcomes = [_outcome(pipe, deadline) for _, pipe in started]
    finally:
        for process, _ in started:
            _end(process)
    failed = [f"rank {rank}:\n{outcome[1]}" for rank, outcome in enumerate(outcomes) if not outcome[0]]
    if failed:
        raise ProcessError("\n".join(failed))
    return [result for _, result in outcomes]


def run_killed(
    function: Callable[..., Any], *arguments: Any, after: float | None = None, timeout: float = 300.0
) -> tuple[bool, Any]:
    """``function(*arguments)`` in a process that is killed with SIGKILL, by us or by itself, unless it is faster.

    Args:
        after: seconds from when it begins; None: we do not kill it.
        timeout: seconds after which a process that is neither done nor killed is an error.

    Returns:
        (True, result), or (False, None) if it was killed.

    Raises:
        ProcessError: it raised, or ran out of time.
    """
    process, pipe = _start({"OMP_NUM_THREADS": "1"}, function, arguments)
    try:
        if after is not None and not pipe.poll(after):
            return False, None
        fine, result = _outcome(pipe, time.monotonic() + timeout)
    finally:
        _end(process)
    if fine:
        return True, result
    if result is _DIED:
        return False, None
    raise ProcessError(result)


_DIED = "died without a word"


def _start(
    environment: Mapping[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, dict(environment), function, arguments))
    process.start()
    sender.close()
    if not receiver.poll(_START_SECONDS):
        raise ProcessError(f"a process did not start within {_START_SECONDS:.0f} s")
    receiver.recv_bytes()  # it has begun
    return process, receiver


def _end(process: BaseProcess) -> None:
    """Kills and waits until it is gone. (``join`` would wait for a loader's workers, which live on for seconds.)"""
    process.kill()
    assert process.pid is not None
    for _ in range(1000):
        try:
            os.kill(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise ProcessError(f"process {process.pid} survives SIGKILL")


def _outcome(pipe: Connection, deadline: float) -> tuple[bool, Any]:
    """(True, result) or (False, what went wrong)."""
    if not pipe.poll(max(deadline - time.monotonic(), 0)):
        return False, "no answer in time"
    try:
        sent = pipe.recv_bytes()
    except EOFError:
        return False, _DIED
    outcome: tuple[bool, Any] = pickle.loads(sent)  # from our own process
    return outcome


def _run(
    pipe: Connection, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= environment
    import torch

    torch.set_num_threads(1)
    # Its own children (a loader's workers) start as in any program, not from a server of their own.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    pipe.send_bytes(b"begun")
    try:
        # By value: a pipe's own pickling shares tensors' memory, which is gone when this process ends.
        pipe.send_bytes(pickle.dumps((True, function(*arguments))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
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


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

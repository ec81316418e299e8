"""One model on one device, or copies of it in processes of their own, one per device: the same call for both.

With several devices this process keeps the questions, the files and the order of batches, and hands a batch to whoever
is idle. So batches, answers and files do not depend on the number of devices, and a killed evaluation continues with
any other. There is no collective operation and no process group: a copy that dies is seen at once, and ends all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel, ProcessorMixin

from dpa.errors import DpaError, UserError
from dpa.evaluate.load import load_model, open_processor
from dpa.log import get_logger, quiet_libraries
from dpa.models.digest import digest_of_model

log = get_logger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")
Work = Callable[[Any, ProcessorMixin, Job], Result]
"""(model, processor, job) -> result: a function of a module, its job and result picklable."""

CONTINUES = "what is answered lies in the predictions' files: the same command continues, with any number of devices"


def device_names(devices: int | Literal["auto"]) -> tuple[str, ...]:
    """The devices of an evaluation, as torch names them.

    Args:
        devices: ``auto``: all accelerators of this machine, or the CPU. A number: so many accelerators, or, on a
            machine without any, so many processes on the CPU.

    Raises:
        UserError: more devices than there are.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ("cpu",) * (1 if devices == "auto" else devices)
    there = torch.accelerator.device_count()
    count = there if devices == "auto" else devices
    if count > there:
        raise UserError(f"devices {count}: this machine shows {there} {accelerator.type} (CUDA_VISIBLE_DEVICES?)")
    return tuple(f"{accelerator.type}:{number}" for number in range(count))


@dataclass(slots=True)
class _Copy:
    """A process with a copy of the model."""

    device: str
    process: BaseProcess
    pipe: Connection


class Devices:
    """Copies of a checkpoint, one per device; use it as a context manager.

    Args:
        source: as ``load_model`` takes it.
        names: of the devices; a device may be named twice.

    Raises:
        ModelError: the checkpoint does not load.
        DpaError: a process died.
    """

    def __init__(self, source: str, names: tuple[str, ...]) -> None:
        threads = max(1, torch.get_num_threads() // len(names)) if names[0] == "cpu" else torch.get_num_threads()
        # A server that has done the slow imports, and nothing else, forks the processes; CUDA is not touched in it.
        methods = multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            context.set_forkserver_preload(["dpa.evaluate.devices"])
        log.info("evaluation on %d devices: %s", len(names), ", ".join(names))
        self._copies: list[_Copy] = []
        self.identity = ""
        """Digest of the weights, as ``digest_of_model`` of one copy."""
        try:
            for number, name in enumerate(names):
                here, there = context.Pipe()
                arguments = (there, source, name, threads, number == 0)
                process = context.Process(target=_serve, args=arguments, name=f"dpa-eval-{number}", daemon=True)
                process.start()
                there.close()
                self._copies.append(_Copy(name, process, here))
            for copy in self._copies:
                self.identity = self._receive(copy, "while it loaded the checkpoint") or self.identity
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Devices:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        for copy in self._copies:
            copy.pipe.close()
            copy.process.kill()  # they hold nothing that could be lost
        for copy in self._copies:
            copy.process.join()
        self._copies = []

    def spread(self, work: Work[Job, Result], jobs: Iterable[Job]) -> Iterator[Result]:
        """Results as they come.

        Raises:
            DpaError: as ``work`` raised it, or a process died.
        """
        waiting = iter(jobs)
        busy: dict[Connection, _Copy] = {}

        def send(copy: _Copy) -> None:
            job = next(waiting, None)
            if job is None:
                return
            with suppress(OSError):  # it has died; receiving says how
                copy.pipe.send((work, job))
            busy[copy.pipe] = copy

        for copy in self._copies:
            send(copy)
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                copy = busy.pop(pipe)
                result: Result = self._receive(copy, "while it answered")
                send(copy)
                yield result

    def _receive(self, copy: _Copy, doing: str) -> Any:
        try:
            kind, value = copy.pipe.recv()
        except (EOFError, ConnectionResetError):
            copy.process.join(5)
            raise DpaError(
                f"the process on {copy.device} ended {doing} ({_ending(copy.process.exitcode)}); {CONTINUES}"
            ) from None
        if kind == "error":
            assert isinstance(value, DpaError)
            raise value
        return value


Answerer = PreTrainedModel | Devices
"""Who answers: a model in this process, or copies in others."""


def spread(
    model: Answerer, processor: ProcessorMixin, work: Work[Job, Result], jobs: Iterable[Job]
) -> Iterator[Result]:
    """``work`` on each job, here or on the devices; results as they come."""
    if isinstance(model, Devices):
        yield from model.spread(work, jobs)
        return
    for job in jobs:
        yield work(model, processor, job)


def identity_of(model: Answerer) -> str:
    """Digest of the weights."""
    return model.identity if isinstance(model, Devices) else digest_of_model(model.state_dict())


def _ending(code: int | None) -> str:
    if code is None:
        return "it does not say how"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (": out of memory?" if name == "SIGKILL" else "")


def _serve(pipe: Connection, source: str, device: str, threads: int, identifies: bool) -> None:
    """A copy's process: loads, then answers until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to handle; it ends this one
    quiet_libraries()
    torch.set_num_threads(threads)
    model: Any = None
    processor: Any = None
    work: Any = None
    while True:
        try:
            if model is None:
                processor, model = open_processor(source), load_model(source, device)
                result = digest_of_model(model.state_dict()) if identifies else ""
            else:
                work, job = pipe.recv()
                result = work(model, processor, job)
            answer: tuple[str, Any] = ("done", result)
        except EOFError:
            return
        except DpaError as error:
            answer = ("error", error)
        except BaseException:
            answer = ("error", DpaError(f"on {device} (a bug, unless memory is full):\n{traceback.format_exc()}"))
        try:
            pipe.send(answer)
        except OSError:
            return  # the other process is gone
        if answer[0] == "error":
            sys.stderr.flush()
            os._exit(1)

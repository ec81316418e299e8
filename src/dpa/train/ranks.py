"""The ranks as one: they start together, do rank 0's work once, share errors, and end together.

Two ways to talk. Gradients and sums go through the process group of the device (NCCL, gloo), whose waits are bounded
(``train.timeout_minutes``). Objects and long waits (rank 0 reads the data, writes a checkpoint) go through a gloo group
of their own whose waits are not: that nobody waits for the dead is the lifeline's task.
"""

from __future__ import annotations

import atexit
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState

from dpa.errors import DpaError, UserError
from dpa.launch import Launch, launched
from dpa.train.lifeline import CONTINUES, Lifeline
from dpa.train.settings import ParallelName, TrainSettings

T = TypeVar("T")

_LONG = timedelta(days=7)
_CAUSE_SECONDS = 3.0


class Ranks:
    """All processes of a run; alone, everything here is free."""

    def __init__(self, launch: Launch, group: dist.ProcessGroup | None) -> None:
        """From :func:`join_ranks`."""
        self.rank = launch.rank
        self.world = launch.world
        self.group = group
        """For objects on the CPU; None: one process."""

    @property
    def is_main(self) -> bool:
        """Rank 0: writes files, prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """One picklable object per rank, in the order of ranks, on every rank."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_main(self, value: T) -> T:
        """Rank 0's object, on every rank."""
        if self.group is None:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return cast(T, box[0])

    def barrier(self) -> None:
        """Waits for all ranks, however long they take."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def together(self, action: Callable[[], T]) -> T:
        """Runs it on every rank and waits; an error of one is raised on all, so that none waits for ever."""
        failed: DpaError | None = None
        result: T | None = None
        try:
            result = action()
        except DpaError as error:
            failed = error
        errors = [error for error in self.gather(failed) if error is not None]
        if errors:
            raise_everywhere(failed if failed is errors[0] else errors[0])
        return cast(T, result)

    def main_alone(self, action: Callable[[], T]) -> T:
        """Rank 0 runs it, the others wait; all get its result (picklable) or its error."""
        result: T = self.from_main(self.together(action if self.is_main else _nothing))
        return result

    def main_first(self, action: Callable[[], T]) -> T:
        """Rank 0 runs it, then the others, who find what rank 0 has left on the disk."""
        first = self.together(action if self.is_main else _nothing)
        return self.together(lambda: first if self.is_main else action())


def raise_everywhere(error: DpaError) -> NoReturn:
    """Raises an error that every rank raises: one of them is enough to print it."""
    error.everywhere = True
    raise error


def cpu_only() -> bool:
    """Said explicitly to accelerate: without it, under torchrun on a machine without accelerator, no process group
    would be started, and every rank would believe to be alone."""
    return not torch.accelerator.is_available()


_JOINED: list[Ranks] = []


def join_ranks(settings: TrainSettings) -> Ranks:
    """The ranks of this run; the first call in a process, a collective one, opens the process groups.

    Raises:
        UserError: see ``launched``.
    """
    if _JOINED:
        return _JOINED[0]
    launch = launched()
    timeout = {"timeout": timedelta(minutes=settings.timeout_minutes)} if launch.world > 1 else {}
    PartialState(cpu=cpu_only(), **timeout)
    group = dist.new_group(backend="gloo", timeout=_LONG) if launch.world > 1 else None
    if launch.world > 1:
        atexit.register(_leave)
    _JOINED.append(Ranks(launch, group))
    return _JOINED[0]


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def all_or_none(settings: TrainSettings) -> Iterator[Ranks]:
    """Around a whole run: if one rank fails or dies, all end, and one message says why.

    On rank 0 an error leaves this context as in any program, after the other ranks have been told. On the others it
    ends the process, with the error's exit code.

    Raises:
        UserError: see ``launched``, or ranks cannot reach each other.
    """
    ranks = join_ranks(settings)
    if ranks.world == 1:
        yield ranks
        return
    line = Lifeline(ranks.rank, ranks.world, ranks.from_main)
    try:
        yield ranks
        ranks.barrier()
    except DpaError as error:
        line.fail(str(error), error.exit_code, everywhere=error.everywhere)
        raise
    except KeyboardInterrupt:
        line.fail(f"interrupted; {CONTINUES}", 130, everywhere=False)
        raise
    except BaseException:
        # Often a collective that broke because another rank died: then the lifeline ends this process with the reason.
        line.wait_for_cause(_CAUSE_SECONDS)
        line.fail(f"{CONTINUES}, unless this is a bug:\n{traceback.format_exc()}", 1, everywhere=False)
        raise
    line.close()


def _nothing() -> Any:
    return None


_FSDP, _DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"
_OFFLOADS = {
    "FSDP_OFFLOAD_PARAMS": ("true",),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("cpu", "nvme"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("cpu", "nvme"),
}


def check_launcher(parallel: ParallelName) -> None:
    """The recipe decides how ranks share the work; ``accelerate launch`` with a configuration may say it, too.

    Its flags are taken out of this process's environment: the sharing is done here, not by accelerate or DeepSpeed.

    Raises:
        UserError: the two disagree, or the configuration asks for something that there is not.
    """
    asked = [flag for flag in (_FSDP, _DEEPSPEED) if os.environ.pop(flag, "false").lower() in ("true", "1")]
    if not asked:
        return
    for name, values in _OFFLOADS.items():
        if os.environ.get(name, "").lower() in values:
            raise UserError(f"accelerate launch was configured to offload ({name}), which dpa does not: leave it out")
    meant = _meant_by_fsdp() if asked[0] == _FSDP else _meant_by_deepspeed()
    if parallel not in meant:
        raise UserError(
            f"accelerate launch was configured for {meant[0]}, the recipe says parallel {parallel}: add "
            f"parallel={meant[0]} to the command, or take configs/accelerate/{parallel}.yaml"
        )


def _meant_by_fsdp() -> tuple[ParallelName, ...]:
    gathered = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false"
    return ("zero2",) if gathered else ("fsdp", "zero3")


def _meant_by_deepspeed() -> tuple[ParallelName, ...]:
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""):
        raise UserError(
            f"accelerate launch was given DeepSpeed's {file}, which dpa does not read: take "
            "configs/accelerate/zero2.yaml or zero3.yaml; what else it holds is the recipe's (docs/scaling.md)"
        )
    stages: dict[str, tuple[ParallelName, ...]] = {"2": ("zero2",), "3": ("zero3", "fsdp")}
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in stages:
        raise UserError(f"accelerate launch was configured for ZeRO stage {stage}; there are 2 and 3, and ddp for none")
    return stages[stage]

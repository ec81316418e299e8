"""The door to accelerate: device, ranks, the wrapped step, sums over ranks, trackers. Thin on purpose.

One process on a CPU needs no launcher; under ``torchrun`` or ``accelerate launch`` the same code runs on every rank.
Data parallel (DDP) is what is wrapped today; sharding (FSDP2, DeepSpeed) belongs behind the same methods.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn import Parameter

from dpa.errors import UserError
from dpa.train.settings import TrainSettings


def _cpu_only() -> bool:
    # Said explicitly: under torchrun without an accelerator, accelerate would otherwise start no process group, and
    # every rank would believe to be alone.
    return not torch.accelerator.is_available()


def compute_dtype(settings: TrainSettings) -> torch.dtype:
    """The type that frozen parts are kept in and products are computed in (``TrainSettings.precision``).

    Raises:
        UserError: bf16 is asked for on an accelerator that lacks it.
    """
    device = PartialState(cpu=_cpu_only()).device
    on_cuda = device.type == "cuda"
    available = device.type == "cpu" or (on_cuda and torch.cuda.is_bf16_supported(including_emulation=False))
    if settings.precision == "bf16" and not available:
        raise UserError(f"train.precision is bf16, which {device} does not have; choose fp32 or auto")
    wanted = settings.precision == "bf16" or (settings.precision == "auto" and on_cuda and available)
    return torch.bfloat16 if wanted else torch.float32


class Parallel:
    """This process among the ranks of a stage."""

    def __init__(self, settings: TrainSettings, *, log_dir: Path | None = None) -> None:
        """
        Args:
            settings: ``trackers``.
            log_dir: folder of the trackers' files; None: no trackers.

        Raises:
            UserError: a tracker's package is not installed.
        """
        self._trackers = tuple(settings.trackers) if log_dir is not None else ()
        for name in self._trackers:
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"train.trackers names {name}, which is not installed: pip install {name}, or leave it out"
                )
        self._accelerator = Accelerator(
            cpu=_cpu_only(),
            mixed_precision="no",  # the step's own autocast decides, see step.py
            log_with=list(self._trackers) or None,
            project_dir=None if log_dir is None else str(log_dir),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return cast(torch.device, self._accelerator.device)

    @property
    def rank(self) -> int:
        """0 ... ``world`` - 1."""
        return int(self._accelerator.process_index)

    @property
    def world(self) -> int:
        """Number of ranks."""
        return int(self._accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Rank 0: writes files, shows progress."""
        return bool(self._accelerator.is_main_process)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this rank's device, in DDP where there are several ranks (which then start from rank 0's)."""
        return cast(nn.Module, self._accelerator.prepare_model(module))

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module that went into :meth:`wrap`; its forward talks to no other rank."""
        return cast(nn.Module, self._accelerator.unwrap_model(module))

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged in the step's last one only."""
        return nullcontext() if last else cast(AbstractContextManager[None], self._accelerator.no_sync(module))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, elementwise."""
        return cast(Tensor, self._accelerator.reduce(values, reduction="sum"))

    def clip(self, parameters: Iterable[Parameter], max_norm: float) -> Tensor:
        """Clips by the global norm; returns the norm before."""
        return cast(Tensor, self._accelerator.clip_grad_norm_(list(parameters), max_norm))

    def gather(self, value: Any) -> list[Any]:
        """One picklable object per rank, in the order of ranks, on every rank."""
        return list(gather_object([value]))

    def from_main(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        return broadcast_object_list([value])[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        self._accelerator.wait_for_everyone()

    def start_trackers(self, project: str, config: Mapping[str, Any], *, first_step: int) -> None:
        """Opens the trackers of the settings; steps from ``first_step`` on replace what an interrupted run logged."""
        if self._trackers:
            self._accelerator.init_trackers(
                project, config=dict(config), init_kwargs={"tensorboard": {"purge_step": first_step}}
            )

    def track(self, values: Mapping[str, Any], step: int) -> None:
        """Hands one step's figures to the trackers."""
        if self._trackers:
            self._accelerator.log(dict(values), step=step)

    def finish_trackers(self) -> None:
        """Closes the trackers. (accelerate's ``end_training`` would also end the process group, which stages share.)"""
        trackers: Sequence[Any] = self._accelerator.trackers
        for tracker in trackers:
            tracker.finish()
        self._accelerator.trackers = []

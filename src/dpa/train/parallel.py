"""The door to accelerate: device, the wrapped step, sums over ranks, trackers. Thin on purpose.

One process on a CPU needs no launcher; under ``torchrun``, ``accelerate launch`` or ``srun`` the same code runs on
every rank, whether ranks have whole copies (DDP) or shards (ZeRO-2 and ZeRO-3 by FSDP2, ``sharding.py``).
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from dpa.errors import UserError
from dpa.train.ranks import cpu_only, join_ranks
from dpa.train.settings import ParallelName, TrainSettings
from dpa.train.sharding import fill_from_main, gather_until, shard, unshard
from dpa.train.step import TrainStep

Sharing = Literal["copies", "states", "shards"]
"""What ranks hold of what is trained: everything; shards of optimizer states and gradients, weights gathered once in a
step (ZeRO-2); shards of everything, each layer gathered when it is needed (ZeRO-3)."""

_SHARED: dict[ParallelName, Sharing] = {"ddp": "copies", "zero2": "states", "zero3": "shards", "fsdp": "shards"}
_SHARDED_STAGES = ("finetune",)
"""Where most weights are trained. Stages 1 and 2 train a few beside a frozen LLM: whole copies of it, which need no
gathering in every pass, beat shards there."""


def sharing_of(parallel: ParallelName, stage: str, world: int) -> Sharing:
    """How the ranks of a stage share the trained weights."""
    return _SHARED[parallel] if world > 1 and stage in _SHARDED_STAGES else "copies"


def compute_dtype(settings: TrainSettings) -> torch.dtype:
    """The type that frozen parts are kept in and products are computed in (``TrainSettings.precision``).

    Raises:
        UserError: bf16 is asked for on an accelerator that lacks it.
    """
    join_ranks(settings)
    device = PartialState(cpu=cpu_only()).device
    on_cuda = device.type == "cuda"
    available = device.type == "cpu" or (on_cuda and torch.cuda.is_bf16_supported(including_emulation=False))
    if settings.precision == "bf16" and not available:
        raise UserError(f"train.precision is bf16, which {device} does not have; choose fp32 or auto")
    wanted = settings.precision == "bf16" or (settings.precision == "auto" and on_cuda and available)
    return torch.bfloat16 if wanted else torch.float32


class Parallel:
    """This process among the ranks of a stage."""

    def __init__(self, settings: TrainSettings, *, sharing: Sharing = "copies", log_dir: Path | None = None) -> None:
        """
        Args:
            settings: ``trackers``, ``timeout_minutes``.
            sharing: how the ranks share the trained weights (:func:`sharing_of`).
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
        self.ranks = join_ranks(settings)
        self.sharing: Sharing = sharing
        self._accelerator = Accelerator(
            cpu=cpu_only(),
            mixed_precision="no",  # the step's own autocast decides, see step.py
            log_with=list(self._trackers) or None,
            project_dir=None if log_dir is None else str(log_dir),
        )

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return cast(torch.device, self._accelerator.device)

    @property
    def rank(self) -> int:
        """0 ... ``world`` - 1."""
        return self.ranks.rank

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.ranks.world

    @property
    def is_main(self) -> bool:
        """Rank 0: writes files, shows progress."""
        return self.ranks.is_main

    def wrap(self, step: TrainStep) -> nn.Module:
        """The step on this rank's device, its gradients exchanged with the other ranks'.

        All ranks start from rank 0's weights; the others may come with tensors on the meta device (``build_vlm``).
        """
        if self.sharing != "copies":
            shard(step, self.device, gathered=self.sharing == "states")
            return step
        if self.world == 1:
            return cast(nn.Module, self._accelerator.prepare_model(step))
        fill_from_main(step, self.device)
        return _copies(step, self.device)

    def whole(self, model: nn.Module) -> None:
        """Puts a trained model together again on rank 0's CPU, if it was sharded; on the others it is of no use."""
        if self.sharing != "copies":
            unshard(model, keep=self.is_main)

    def accumulate(self, module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch.

        Copies exchange gradients in the step's last one only. Shards do in each: gradients of whole layers, kept until
        the last one, would take the memory that sharding is for. The sum is the same.
        """
        if self.sharing == "states":
            gather_until(module, last=last)
        if last or self.sharing != "copies":
            return nullcontext()
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, elementwise."""
        return cast(Tensor, self._accelerator.reduce(values, reduction="sum"))

    def clip(self, parameters: Iterable[Parameter], max_norm: float) -> Tensor:
        """Clips by the global norm; returns the norm before, the same on every rank."""
        given = list(parameters)
        norm = nn.utils.get_total_norm([value.grad for value in given if value.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(given, max_norm, norm)
        return norm

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


def _copies(step: TrainStep, device: torch.device) -> nn.Module:
    """DDP. All ranks hold rank 0's values already: buffers included, which DDP would leave alone."""
    with warnings.catch_warnings():
        # torch 2.13 has another name for it, which torch 2.11 does not know
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        return DistributedDataParallel(
            step,
            device_ids=None if device.type == "cpu" else [device],
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            init_sync=False,
        )

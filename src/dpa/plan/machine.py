"""What to plan for: GPUs, their memory, the share of their speed that training reaches."""

from __future__ import annotations

from dataclasses import dataclass

from dpa.errors import UserError
from dpa.plan.known import GPUS, Gpu
from dpa.recipe import STAGES, Recipe, StageName

STATED_MFU = 0.4
"""Share of the data sheet's FLOP/s that training reaches, where nobody has measured it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What to plan for."""

    gpu: Gpu
    memory: float
    """Bytes per device."""
    ranks: int
    mfu: dict[StageName, float]
    """Per stage."""
    measured: bool = False
    """``mfu`` was measured here (``--calibrate``)."""


def machine_of(recipe: Recipe, gpu: str, memory_gb: float | None, mfu: float | None) -> Machine:
    """From the command's options.

    Raises:
        UserError: an unknown GPU.
    """
    if gpu not in GPUS:
        raise UserError(
            f"--gpu {gpu}: not known; known: {', '.join(GPUS)}; another one: the nearest, --gpu-memory, --mfu"
        )
    share = STATED_MFU if mfu is None else mfu
    row = GPUS[gpu]
    memory = row.bytes if memory_gb is None else memory_gb * 1e9
    return Machine(row, memory, recipe.gpus or 1, dict.fromkeys(STAGES, share))

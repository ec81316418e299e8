"""Which of several processes this one is, by what its launcher left in the environment. A leaf without torch.

``torchrun`` and ``accelerate launch`` set torch's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
SLURM's ``srun`` sets its own, from which torch's are made here.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from dpa.errors import UserError

_FIRST_PORT, _PORTS = 20000, 20000
_OTHERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those of the run."""

    rank: int
    """0 ... ``world`` - 1."""
    world: int
    local_rank: int
    """On this machine: which accelerator it takes."""

    @property
    def speaks(self) -> bool:
        """One process prints: rank 0."""
        return self.rank == 0


def launched(environment: MutableMapping[str, str] = os.environ) -> Launch:
    """Reads the environment; under ``srun`` it also sets torch's variables there, for all libraries that read them.

    Raises:
        UserError: a launcher's variables are incomplete or contradict each other, or torch does not know it.
    """
    if "RANK" not in environment and _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        _from_slurm(environment)
    world = _number(environment, "WORLD_SIZE", 1)
    if world == 1:
        for name, launcher in _OTHERS.items():
            if _number(environment, name, 1) > 1:
                raise UserError(
                    f"started by {launcher} with {environment[name]} processes, each of which would train by itself: "
                    "use torchrun, accelerate launch or srun (docs/scaling.md)"
                )
        return Launch(rank=0, world=1, local_rank=0)
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start the command with torchrun, accelerate "
            "launch or srun (docs/scaling.md), or unset WORLD_SIZE for one process"
        )
    rank = _number(environment, "RANK", 0)
    if not 0 <= rank < world:
        raise UserError(f"RANK is {rank}, WORLD_SIZE {world}: ranks go from 0 to {world - 1}")
    return Launch(rank=rank, world=world, local_rank=_number(environment, "LOCAL_RANK", 0))


def _from_slurm(environment: MutableMapping[str, str]) -> None:
    # The step's variables: a batch script without srun has SLURM_NTASKS, too, and is one process.
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_WORLD_SIZE"] = environment["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0]
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    # The same on every node without talking, and another one for two jobs that share a node.
    job = _number(environment, "SLURM_JOB_ID", 0) + _number(environment, "SLURM_STEP_ID", 0)
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + job % _PORTS))


def first_host(nodes: str) -> str:
    """The first name of a SLURM list such as ``gpu[03-05,09],login``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}: no host name; set MASTER_ADDR to the first node's address")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + suffix


def _number(environment: MutableMapping[str, str], name: str, default: int) -> int:
    value = environment.get(name)
    if value is None or value == "":
        return default
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name} is {value!r} in the environment; a launcher sets a number there") from None

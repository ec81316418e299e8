from __future__ import annotations

import pytest

from dpa.errors import UserError
from dpa.launch import Launch, first_host, launched

TORCH = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}


def test_alone() -> None:
    assert launched({}) == Launch(rank=0, world=1, local_rank=0)


def test_torchrun() -> None:
    assert launched(dict(TORCH)) == Launch(rank=1, world=4, local_rank=1)
    assert not launched(dict(TORCH)).speaks


def test_srun_gets_torchs_variables() -> None:
    environment = dict(SRUN)
    assert launched(environment) == Launch(rank=9, world=16, local_rank=1)
    assert (environment["MASTER_ADDR"], environment["LOCAL_WORLD_SIZE"]) == ("gpu07", "8")
    assert environment["MASTER_PORT"] == str(20000 + 123456 % 20000)
    assert launched(environment) == launched(environment)


def test_torchrun_inside_of_srun_wins() -> None:
    assert launched(SRUN | TORCH).world == 4


def test_a_batch_script_without_srun_is_one_process() -> None:
    assert launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}).world == 1


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-05,09],x", "gpu03"), ("n[1,3]", "n1"), ("r1-n[2-3]-ib", "r1-n2-ib")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        (TORCH | {"RANK": "4"}, "RANK is 4, WORLD_SIZE 4"),
        (TORCH | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "started by mpirun with 2 processes"),
    ],
)
def test_what_cannot_be(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launched(environment)

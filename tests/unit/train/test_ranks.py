from __future__ import annotations

import os
from pathlib import Path

import pytest

from dpa.errors import DataError, UserError
from dpa.testing.processes import run_ranks
from dpa.train.ranks import all_or_none, check_launcher, join_ranks
from dpa.train.settings import ParallelName, TrainSettings

SETTINGS = TrainSettings(trackers=())


def test_alone_everything_is_done_here() -> None:
    with all_or_none(SETTINGS) as ranks:
        assert ranks.main_alone(lambda: 1) == ranks.main_first(lambda: 1) == ranks.together(lambda: 1) == 1
        with pytest.raises(DataError, match="gone"):
            ranks.main_alone(fails)


def fails() -> None:
    raise DataError("gone")


def order_and_errors() -> tuple[list[int], int, str, bool]:
    ranks = join_ranks(SETTINGS)
    first = ranks.main_first(lambda: [ranks.rank])
    mine = ranks.main_alone(lambda: ranks.rank + 7)
    with pytest.raises(DataError) as raised:
        ranks.together(fails if ranks.rank == 1 else lambda: None)
    return first, mine, str(raised.value), raised.value.everywhere


def test_two_ranks() -> None:
    assert run_ranks(order_and_errors) == [([0], 7, "gone", True), ([1], 7, "gone", True)]


def test_the_launchers_flags_leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_launcher("fsdp")
    assert "ACCELERATE_USE_FSDP" not in os.environ
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(UserError, match="configured for zero3, the recipe says parallel ddp"):
        check_launcher("ddp")


CONFIGS = Path(__file__).parents[3] / "configs" / "accelerate"


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_the_shipped_configurations_say_what_their_recipes_say(
    monkeypatch: pytest.MonkeyPatch, name: ParallelName
) -> None:
    """accelerate's own launcher makes the environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = CONFIGS / f"{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "dpa"])
    arguments, _, _ = _validate_launch_command(arguments)
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    check_launcher(name)
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    if name != "ddp":
        with pytest.raises(UserError, match="the recipe says parallel ddp"):
            check_launcher("ddp")
    assert f"configs/accelerate/{name}.yaml" in path.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "ZeRO stage 1; there are 2 and 3"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "zero2.json"}, r"DeepSpeed's zero2\.json, which dpa does not read"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "to offload .*OPTIMIZER_DEVICE"),
    ],
)
def test_what_deepspeed_has_and_dpa_has_not(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for key, value in {"ACCELERATE_USE_DEEPSPEED": "true", **variables}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        check_launcher("zero2")


def test_zero_of_deepspeeds_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("2", "3"):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
        check_launcher("zero2" if stage == "2" else "zero3")

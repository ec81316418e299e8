"""``dpa run`` with two processes, as its users start it: the result of one, and an end for all when one ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpa.store import digest_of
from dpa.testing.processes import free_port
from dpa.testing.project import write_project
from dpa.train.metrics import TIMING_FIELDS, read_metrics

SECONDS = 120.0
"""Nothing here takes a tenth of it on an idle machine."""
LONG = ["methods=vanilla", "stages.pretrain.max_steps=60", "stages.pretrain.save_steps=10", "--until", "2"]


def _hears_ctrl_c() -> None:
    """Also where the tests themselves run as a background job, whose children a shell lets ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def by_srun(project: Path, *arguments: str, ranks: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """``srun dpa run``: processes that know each other by SLURM's variables alone. Killed at the end."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANK", "WORLD"))}
    common = {
        "SLURM_JOB_ID": str(free_port()),  # decides the port
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_TASKS_PER_NODE": str(ranks),
        "SLURM_STEP_NODELIST": "localhost",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "dpa", "run", str(project / "recipe.yaml"), *arguments]
    started = [
        subprocess.Popen(
            command,
            env={**keep, **common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hears_ctrl_c,
        )
        for rank in range(ranks)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ended(processes: Sequence[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Exit codes by rank, and what all of them printed to stderr."""
    said = [process.communicate(timeout=SECONDS)[1] for process in processes]
    return [process.returncode for process in processes], "".join(said)


def wait_for_step(project: Path, step: int) -> Path:
    """The working folder of the stage, once it has made a step."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for metrics in (project / "runs" / ".store").glob("*.partial/metrics.jsonl"):
            if metrics.read_text().count("\n") > step:
                return metrics.parent
        time.sleep(0.02)
    raise AssertionError(f"no step {step}")


def weights(project: Path) -> dict[str, torch.Tensor]:
    return load_file(project / "runs" / "project" / "checkpoint" / "model.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_project(tmp_path_factory.mktemp("one") / "project")
    subprocess.run([sys.executable, "-m", "dpa", "run", str(path), "method=dpa"], check=True, capture_output=True)
    return path.parent


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "zero2"])
def test_torchrun_gives_the_checkpoint_of_one_process(tmp_path: Path, one: Path, parallel: str) -> None:
    path = write_project(tmp_path / "project")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "dpa"]
    command += ["run", str(path), "method=dpa", f"parallel={parallel}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)  # one rank prints
    assert summary["methods"]["dpa"]["stages"]["finetune"]["steps"] == 3
    found, expected = weights(path.parent), weights(one)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # AdamW moves a weight by at most the learning rate, 4e-5, a step; sums in another order move it by 1e-3 of that
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7, msg=name)
    manifest = json.loads((path.parent / "runs" / "project" / "manifest.json").read_text())["methods"]["dpa"]
    assert manifest["finetune"]["ranks"] == {"world": 2, "parallel": parallel}
    assert manifest["finetune"]["llm_at_start"] == manifest["finetune"]["llm_original"]


def test_the_users_mistake_ends_all_with_2_and_one_message(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project").parent
    with by_srun(project, "data.captions.path=gone.json") as processes:
        codes, said = ended(processes)
    assert codes == [2, 2]
    assert said.count("gone.json") == 1
    assert "Traceback" not in said


def test_a_killed_rank_ends_the_run_and_the_same_command_continues(tmp_path: Path) -> None:
    """SIGKILL, as the system does when memory is short."""
    project = write_project(tmp_path / "project").parent
    with by_srun(project, *LONG) as processes:
        wait_for_step(project, 25)
        processes[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        codes, said = ended(processes)
    assert time.monotonic() - began < 20, "the sockets of a dead process are closed at once"
    assert codes == [1, -signal.SIGKILL]
    assert said.count("dpa: rank 1 (") == 1
    assert "is gone" in said
    assert "the same command continues from the last saved state" in said
    with by_srun(project, *LONG) as processes:
        codes, said = ended(processes)
    assert codes == [0, 0], said
    assert "continues after step" in said
    whole = write_project(tmp_path / "whole").parent
    with by_srun(whole, *LONG) as processes:
        assert ended(processes)[0] == [0, 0]
    assert trained(project) == trained(whole)


def trained(project: Path) -> str:
    """Digest of the connector and of every line of metrics but its times."""
    folder = project / "runs" / "project"
    rows = [
        {name: value for name, value in row.items() if name not in TIMING_FIELDS}
        for row in read_metrics(folder / "metrics.jsonl")
    ]
    state = torch.load(folder / "connector" / "mm_projector.bin", weights_only=True)
    return digest_of([rows, {name: value.tolist() for name, value in state.items()}])


def test_rank_0_killed(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project").parent
    with by_srun(project, *LONG) as processes:
        wait_for_step(project, 5)
        processes[0].send_signal(signal.SIGKILL)
        codes, said = ended(processes)
    assert codes == [-signal.SIGKILL, 1]
    assert said.count("dpa: rank 0 (") == 1


def test_interrupted_on_one_rank(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project").parent
    with by_srun(project, *LONG) as processes:
        wait_for_step(project, 5)
        processes[1].send_signal(signal.SIGINT)
        codes, said = ended(processes)
    assert codes == [130, 130]
    assert said.count("interrupted; the same command") == 1


def test_a_sample_that_fails_on_one_rank(tmp_path: Path) -> None:
    """An image that was there when the data was checked."""
    project = write_project(tmp_path / "project").parent
    with by_srun(project, *LONG) as processes:
        wait_for_step(project, 5)
        for image in (project / "images" / "deep").glob("3*.jpg"):
            image.unlink()
        codes, said = ended(processes)
    assert codes == [2, 2]
    assert said.count("3 picture.jpg") == 1
    assert "Traceback" not in said


def test_the_launcher_and_the_recipe_disagree(tmp_path: Path) -> None:
    path = write_project(tmp_path / "project")
    environment = {**os.environ, "ACCELERATE_USE_FSDP": "true"}
    command = [sys.executable, "-m", "dpa", "run", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "configured for fsdp, the recipe says parallel ddp: add parallel=fsdp" in done.stderr


def test_the_evaluation_during_training_gives_the_lines_of_one_process(tmp_path: Path) -> None:
    """Rank 0 asks while the others wait; all go on with the same weights."""
    of: list[list[dict[str, object]]] = []
    for ranks in (1, 2):
        project = write_project(tmp_path / str(ranks)).parent
        question = {
            "scene": "s",
            "question": "what is it?",
            "answer": "red",
            "kind": "colour",
            "choices": ["red", "blue"],
        }
        asked = [{"id": f"q{n}", "image": f"images/deep/{n} picture.jpg", **question} for n in range(4)]
        (project / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        settings = ["benchmarks=[lab]", f"data={project}", "max_new_tokens=3", "every_steps=2", "every_limit=3"]
        with by_srun(project, "methods=vanilla", *(f"evaluate.{item}" for item in settings), ranks=ranks) as processes:
            codes, said = ended(processes)
        assert codes == [0] * ranks, said
        lines = (project / "runs" / "project" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "kind" in row]
        of.append([{name: value for name, value in row.items() if name not in TIMING_FIELDS} for row in rows])
    assert [row["step"] for row in of[0]] == [2]
    assert of[0] == of[1]

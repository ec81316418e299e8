"""Copies of a checkpoint in processes of their own, on the CPU."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpa.errors import DataError, DpaError, ModelError, UserError
from dpa.evaluate.checkpoint import evaluate_checkpoint
from dpa.evaluate.devices import Devices, device_names, identity_of
from dpa.evaluate.generate import Question, generate_answers
from dpa.evaluate.rank import Choices, rank_options
from dpa.evaluate.scores import read_results
from dpa.evaluate.settings import EvaluateSettings
from dpa.models.checkpoint_io import save_checkpoint
from dpa.models.vlm import Vlm
from dpa.testing.processes import run_killed
from tests.unit.evaluate.conftest import WORDS, write_pictures


@pytest.fixture(scope="module")
def checkpoint(vlm: Vlm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices") / "checkpoint"
    save_checkpoint(vlm, folder)
    return folder


@pytest.fixture(scope="module")
def two(checkpoint: Path) -> Iterator[Devices]:
    with Devices(str(checkpoint), ("cpu", "cpu")) as devices:
        yield devices


def questions(folder: Path, count: int = 7) -> list[Question]:
    pictures = write_pictures(folder / "images", count)
    texts = [" ".join((WORDS * 2)[n : n + 1 + n * 5 % 7]) for n in range(count)]
    return [Question(f"q{n}", text, (pictures[n],), f"line {n}") for n, text in enumerate(texts)]


def test_two_devices_answer_as_one(two: Devices, vlm: Vlm, tmp_path: Path) -> None:
    asked, settings = questions(tmp_path), {"batch_size": 2, "max_new_tokens": 4}
    alone = generate_answers(vlm.model, vlm.processor, asked, out=tmp_path / "one.jsonl", **settings)  # type: ignore[arg-type]
    counts: list[tuple[int, int]] = []
    shared = generate_answers(
        two,
        vlm.processor,
        asked,
        out=tmp_path / "two.jsonl",
        progress=lambda *count: counts.append(count),
        **settings,  # type: ignore[arg-type]
    )
    assert shared == alone
    assert len({answer.prediction for answer in alone}) > 3
    assert two.identity == identity_of(vlm.model)
    assert (counts[0], counts[-1]) == ((0, 7), (7, 7))
    lines = [set((tmp_path / name).read_text(encoding="utf-8").splitlines()) for name in ("one.jsonl", "two.jsonl")]
    assert lines[0] == lines[1]


def test_goes_on_with_another_number_of_devices(two: Devices, vlm: Vlm, tmp_path: Path) -> None:
    asked, out = questions(tmp_path), tmp_path / "answers.jsonl"
    generate_answers(vlm.model, vlm.processor, asked[:3], batch_size=2, max_new_tokens=4, out=out)
    counts: list[tuple[int, int]] = []
    generate_answers(
        two,
        vlm.processor,
        asked,
        batch_size=2,
        max_new_tokens=4,
        out=out,
        progress=lambda *count: counts.append(count),
    )
    assert counts[0] == (3, 7)


def test_options_on_two_devices(two: Devices, vlm: Vlm, tmp_path: Path) -> None:
    choices = [Choices(question, ("red", "blue", "two circle")) for question in questions(tmp_path, 4)]
    # batches of 4 out of 3 options each: a question's options lie on both devices
    alone = rank_options(vlm.model, vlm.processor, choices, batch_size=4)
    assert rank_options(two, vlm.processor, choices, batch_size=4) == alone


def test_errors_come_back_with_the_question(checkpoint: Path, vlm: Vlm, tmp_path: Path) -> None:
    asked = questions(tmp_path)
    asked[4].images[0].write_bytes(b"no picture")  # type: ignore[union-attr]
    with (
        Devices(str(checkpoint), ("cpu",)) as devices,
        pytest.raises(DataError, match=r"question 'q4' \(line 4\).*not an image"),
    ):
        generate_answers(devices, vlm.processor, asked, batch_size=2, max_new_tokens=4)
    with pytest.raises(ModelError, match=r"no config\.json"):
        Devices(str(tmp_path), ("cpu",))


def die(model: Any, processor: Any, job: int) -> int:
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return job


def test_a_process_that_dies_ends_all_with_its_message(checkpoint: Path) -> None:
    with Devices(str(checkpoint), ("cpu", "cpu")) as devices:
        processes = [copy.process for copy in devices._copies]
        with pytest.raises(DpaError, match=r"process on cpu ended while it answered \(killed by SIGKILL.*continues"):
            list(devices.spread(die, range(50)))
    assert not any(process.is_alive() for process in processes)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert (device_names("auto"), device_names(2)) == (("cpu",), ("cpu", "cpu"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    assert device_names("auto") == ("cuda:0", "cuda:1", "cuda:2")
    assert device_names(2) == ("cuda:0", "cuda:1")
    with pytest.raises(UserError, match="devices 4: this machine shows 3 cuda"):
        device_names(4)


def evaluate(checkpoint: str, data: str, out: str, devices: int, kill_at: int | None = None) -> dict[str, Any]:
    """Kills itself, with SIGKILL, when it hears of progress for the ``kill_at``-th time."""
    settings = EvaluateSettings(
        benchmarks=("lab",), data=Path(data), batch_size=1, max_new_tokens=3, devices=devices, rank_options=True
    )
    heard = iter(range(1, 1000))

    def told(done: int, total: int) -> None:
        if next(heard) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return evaluate_checkpoint(checkpoint, settings=settings, out=Path(out), progress=lambda name: told).results


def test_killed_and_continued_gives_the_same_table(checkpoint: Path, lab_folder: Path, tmp_path: Path) -> None:
    whole = evaluate(str(checkpoint), str(lab_folder), str(tmp_path / "whole"), 1)
    out = tmp_path / "killed"
    # six questions, six blind, six rankings; the first of each is told before anything is asked
    for kill_at, lines in ((3, {"lab.jsonl": 2}), (7, {"lab.jsonl": 6, "lab.blind.jsonl": 1})):
        fine, _ = run_killed(evaluate, str(checkpoint), str(lab_folder), str(out), 1, kill_at)
        assert not fine
        assert {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in out.iterdir()} == lines
    assert evaluate(str(checkpoint), str(lab_folder), str(out), 2) == whole
    assert read_results(out) == json.loads(json.dumps(whole))
    for name in ("lab.scores.jsonl", "lab.ranked.scores.jsonl"):
        assert (out / name).read_text() == (tmp_path / "whole" / name).read_text()

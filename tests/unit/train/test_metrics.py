from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dpa.errors import StorageError
from dpa.testing.models import tiny_batch
from dpa.train.metrics import (
    START,
    TIMING_FIELDS,
    MetricsFile,
    StepSums,
    first_and_last,
    read_metrics,
    step_row,
    totals,
)
from dpa.train.step import StepOutput

CPU = torch.device("cpu")


def output(loss: float, weights: list[float], *, images: int) -> StepOutput:
    weight = torch.tensor(weights)
    has_image = torch.arange(len(weights)) < images
    stats = {
        "tokens": torch.tensor(float(len(weights))),
        "weight": weight.sum(),
        "weight_squared": weight.square().sum(),
        "at_minimum": (weight == 0.5).float().sum(),
        "at_maximum": (weight == 1.0).float().sum(),
        "text_only": (~has_image).float().sum(),
        "nll": torch.tensor(2 * loss),
        "image_weight": (weight * has_image).sum(),
        "image_tokens": has_image.float().sum(),
    }
    return StepOutput(torch.tensor(loss, requires_grad=True), weight.sum(), stats)


def row(**more: Any) -> dict[str, Any]:
    sums = StepSums(CPU)
    sums.add(output(3.0, [0.5, 1.0, 0.75, 0.5], images=2), tiny_batch(["text:1 label:3", "text:4 label:1"]))
    values = {"stage": "pretrain", "step": 5, "lr": 1e-3, "grad_norm": 2.0, "seconds": 0.5, "waited": 0.125}
    return step_row(total=totals(sums.tensor()), **{**values, **more})


class TestRow:
    def test_fields(self) -> None:
        assert row() == {
            "step": 5,
            "stage": "pretrain",
            "loss": pytest.approx(3.0 / 2.75),
            "nll": pytest.approx(6.0 / 4),
            "lr": 1e-3,
            "grad_norm": 2.0,
            "skipped": False,
            "samples": 2,
            "tokens": 4,
            "sequence_tokens": 9,
            "mean_weight": pytest.approx(2.75 / 4),
            "share_at_minimum": 0.5,
            "share_at_maximum": 0.25,
            "effective_tokens": pytest.approx(2.75**2 / (0.25 + 1 + 0.5625 + 0.25)),
            "share_text_only": 0.5,
            "seconds": 0.5,
            "data_wait_share": 0.25,
            "tokens_per_second": 18.0,
        }

    def test_timings_are_named(self) -> None:
        changed = row(seconds=0.25, waited=0.0)
        assert {name for name in changed if changed[name] != row()[name]} == set(TIMING_FIELDS)

    def test_nothing_supervised(self) -> None:
        empty = step_row(
            stage="s", step=1, total=totals(StepSums(CPU).tensor()), lr=0.0, grad_norm=None, seconds=0.0, waited=0.0
        )
        assert (empty["loss"], empty["nll"], empty["grad_norm"], empty["skipped"]) == (None, None, None, True)
        json.dumps(empty, allow_nan=False)

    def test_fillers_are_no_samples(self) -> None:
        sums, batch = StepSums(CPU), tiny_batch(["text:1 label:3", "text:6"])
        sums.add(output(1.0, [1.0, 1.0, 1.0], images=0), batch)
        total = totals(sums.tensor())
        assert (total["samples"], total["sequence_tokens"]) == (1, 4)

    def test_sums_add_up(self) -> None:
        batch = tiny_batch(["text:1 label:3"])
        one, two = StepSums(CPU), StepSums(CPU)
        for sums, times in ((one, 1), (two, 3)):
            for _ in range(times):
                sums.add(output(1.5, [0.5, 1.0], images=1), batch)
        assert totals(two.tensor()) == {name: 3 * value for name, value in totals(one.tensor()).items()}
        assert two.image_share().tolist() == [1.5, 3.0]


def lines(path: Path) -> list[int]:
    return [found["n"] for found in read_metrics(path)]


class TestFile:
    def test_continues_where_a_state_was_saved(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        file = MetricsFile(path)
        file.cut(START)
        file.write({"n": 1})
        file.write({"n": 2})
        position = file.position()
        file.write({"n": 3})
        file.close()
        with open(path, "ab") as raw:
            raw.write(b'{"n": 4, "ha')  # killed while writing
        again = MetricsFile(path)
        assert again.holds(position)
        again.cut(position)
        again.write({"n": 3})
        again.write({"n": 4})
        again.close()
        assert lines(path) == [1, 2, 3, 4]

    def test_starts_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b'{"n":9}\n')
        file = MetricsFile(path)
        assert path.read_bytes() == b'{"n":9}\n', "opening changes nothing"
        file.cut(START)
        file.write({"n": 1})
        file.close()
        assert lines(path) == [1]

    @pytest.mark.parametrize("content", [b"", b'{"n":1}\n', b'{"n":1}\n{"n":7}\n'])
    def test_another_file_is_noticed(self, tmp_path: Path, content: bytes) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.write({"n": 1})
        file.write({"n": 2})
        position = file.position()
        file.close()
        (tmp_path / "metrics.jsonl").write_bytes(content)
        again = MetricsFile(tmp_path / "metrics.jsonl")
        assert not again.holds(position)
        again.close()

    def test_lines_are_there_at_once(self, tmp_path: Path) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.write({"n": 1})
        assert lines(tmp_path / "metrics.jsonl") == [1]
        file.close()

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """Half a line fits, then nothing: nothing half stays, and the lines come when there is room again."""
        path = tmp_path / "metrics.jsonl"
        file = MetricsFile(path)
        file.write({"n": 1})
        write = os.write
        calls = iter((True, False, False, False))

        def full(handle: int, data: bytes) -> int:
            if next(calls):
                return write(handle, data[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            file.write({"n": 2})
            file.write({"n": 3})
            assert path.read_bytes() == b'{"n":1}\n'
            with pytest.raises(OSError, match="No space left"):
                file.position()
        assert caplog.text.count("No space left on device; its lines wait in memory") == 1
        file.write({"n": 4})
        position = file.position()
        assert lines(path) == [1, 2, 3, 4]
        assert MetricsFile(path).holds(position)
        file.close()

    def test_disk_full_to_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        file = MetricsFile(tmp_path / "metrics.jsonl")
        monkeypatch.setattr(os, "write", full)
        file.write({"n": 1})
        with pytest.raises(StorageError, match="free space, then start the same command again"):
            file.close()

    def test_not_writable(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="cannot be written"):
            MetricsFile(tmp_path / "no such folder" / "metrics.jsonl")

    def test_no_number_that_json_does_not_know(self, tmp_path: Path) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl")
        with pytest.raises(ValueError, match="JSON"):
            file.write({"loss": float("nan")})
        file.close()


def test_first_and_last() -> None:
    rows = [{"loss": float(value)} for value in range(40)]
    assert first_and_last(rows) == (0.5, 38.5)
    assert first_and_last(rows[:3]) == (0.0, 2.0)
    assert first_and_last([{"loss": None}, {"loss": 2.0}]) == (2.0, 2.0)
    assert str(first_and_last([{"loss": None}])) == "(nan, nan)"

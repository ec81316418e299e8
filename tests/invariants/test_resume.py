"""An interrupted run that is started again ends with the bits of one that was not."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpa.errors import StorageError
from dpa.train import checkpoint
from tests.stages import Interrupted, Options, Trained, run, stop_after

OPTIONS = Options(stage="proxy", dropout=0.2, max_steps=7, save_steps=2, micro_batch=3)


def assert_same_bits(found: Trained, expected: Trained) -> None:
    assert found.rows == expected.rows
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


def interrupt(work: Path, options: Options, step: int) -> None:
    with pytest.raises(Interrupted):
        run(work, options, on_step=[stop_after(step)])


def states(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "states").iterdir())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_after_any_step(tmp_path: Path, step: int, workers: int) -> None:
    """Before the first save, right before one, between two; dropout's random numbers go on where they were."""
    whole = run(tmp_path / "whole", OPTIONS)
    interrupt(tmp_path / "again", replace(OPTIONS, workers=workers), step)
    again = run(tmp_path / "again", replace(OPTIONS, workers=workers))
    assert again.result.resumed_from == {1: 0, 2: 0, 5: 4}[step]
    assert_same_bits(again, whole)
    last = load_file(tmp_path / "again" / "states" / "state-00000007" / "tensors.safetensors")
    expected = load_file(tmp_path / "whole" / "states" / "state-00000007" / "tensors.safetensors")
    assert last.keys() == expected.keys()
    assert all(torch.equal(last[name], value) for name, value in expected.items()), "moments and generators, too"


@pytest.mark.parametrize(
    "options",
    [Options(stage="pretrain"), Options(), Options(objective="cal", bounds=None), Options(fidelity="official")],
    ids=["pretrain", "finetune", "cal", "official"],
)
def test_every_kind_of_stage(tmp_path: Path, options: Options) -> None:
    options = replace(options, max_steps=4, save_steps=2)
    whole = run(tmp_path / "whole", options)
    interrupt(tmp_path / "again", options, 3)
    assert_same_bits(run(tmp_path / "again", options), whole)


def test_again_and_again(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", OPTIONS)
    for step in (3, 5, 5, 6):
        interrupt(tmp_path / "again", OPTIONS, step)
    assert_same_bits(run(tmp_path / "again", OPTIONS), whole)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    whole = run(tmp_path, OPTIONS)
    again = run(tmp_path, OPTIONS, on_step=[stop_after(7)])
    assert again.result.resumed_from == 7
    assert_same_bits(again, whole)


def test_states_are_kept_by_number(tmp_path: Path) -> None:
    run(tmp_path, OPTIONS)
    assert states(tmp_path) == ["state-00000006", "state-00000007"]


class TestMishaps:
    def test_broken_last_save(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        whole = run(tmp_path / "whole", OPTIONS)
        interrupt(tmp_path / "again", OPTIONS, 5)
        broken = tmp_path / "again" / "states" / "state-00000004" / "tensors.safetensors"
        broken.write_bytes(broken.read_bytes()[:-100])
        again = run(tmp_path / "again", OPTIONS)
        assert again.result.resumed_from == 2
        assert "state-00000004 cannot be used" in caplog.text
        assert_same_bits(again, whole)

    def test_all_saves_broken(self, tmp_path: Path) -> None:
        whole = run(tmp_path / "whole", OPTIONS)
        interrupt(tmp_path / "again", OPTIONS, 5)
        for name in states(tmp_path / "again"):
            (tmp_path / "again" / "states" / name / "state.json").write_text("{}")
        again = run(tmp_path / "again", OPTIONS)
        assert again.result.resumed_from == 0
        assert_same_bits(again, whole)

    def test_metrics_are_gone(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """A state without the lines before it would leave a hole: the stage begins again."""
        whole = run(tmp_path / "whole", OPTIONS)
        interrupt(tmp_path / "again", OPTIONS, 5)
        (tmp_path / "again" / "metrics.jsonl").unlink()
        again = run(tmp_path / "again", OPTIONS)
        assert again.result.resumed_from == 0
        assert "the metrics file is not the one that it was saved with" in caplog.text
        assert_same_bits(again, whole)

    def test_half_a_line(self, tmp_path: Path) -> None:
        whole = run(tmp_path / "whole", OPTIONS)
        interrupt(tmp_path / "again", OPTIONS, 5)
        with open(tmp_path / "again" / "metrics.jsonl", "ab") as file:
            file.write(b'{"step":6,"sta')
        assert_same_bits(run(tmp_path / "again", OPTIONS), whole)

    def test_disk_full_while_saving(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The training goes on; what a restart finds is the save before."""
        whole = run(tmp_path / "whole", OPTIONS)
        save_file, calls = checkpoint.save_file, iter(range(100))

        def full(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
            if next(calls) == 1:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            save_file(dict(tensors), path)

        monkeypatch.setattr(checkpoint, "save_file", full)
        interrupt(tmp_path / "again", OPTIONS, 5)
        assert "step 4: the state could not be saved" in caplog.text
        assert "No space left on device" in caplog.text
        assert states(tmp_path / "again") == ["state-00000002"]
        again = run(tmp_path / "again", OPTIONS)
        assert again.result.resumed_from == 2
        assert_same_bits(again, whole)

    def test_disk_full_for_metrics(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Room comes back before the end: nothing is missing."""
        whole = run(tmp_path / "whole", OPTIONS)
        write, full = os.write, {2, 3, 4, 5}

        def refuse(handle: int, data: bytes) -> int:
            if full and b'"step"' in data:
                full.pop()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(handle, data)

        monkeypatch.setattr(os, "write", refuse)
        found = run(tmp_path / "found", OPTIONS)
        assert not full
        assert_same_bits(found, whole)

    def test_disk_full_to_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The stage cannot say that it is done; what was saved before the disk was full is continued from."""
        whole = run(tmp_path / "whole", OPTIONS)
        with monkeypatch.context() as patched:

            def on_step(row: Mapping[str, Any]) -> None:
                if row["step"] == 5:
                    patched.setattr(os, "write", refused)

            def refused(*_: Any) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            with pytest.raises(StorageError, match="free space, then start the same command again"):
                run(tmp_path / "again", OPTIONS, on_step=[on_step])
        again = run(tmp_path / "again", OPTIONS)
        assert again.result.resumed_from == 4
        assert_same_bits(again, whole)

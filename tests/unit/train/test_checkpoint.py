from __future__ import annotations

import errno
import json
import logging
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from dpa.errors import CheckpointError
from dpa.train import checkpoint
from dpa.train.checkpoint import StateStore

TENSORS = {"trained.a": torch.arange(6.0).view(2, 3), "random.0.torch": torch.arange(5, dtype=torch.uint8)}


def store(folder: Path, *, fingerprint: str = "f" * 64, keep: int = 2) -> StateStore:
    return StateStore(folder / "states", fingerprint=fingerprint, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "states").iterdir())


def saved(folder: Path, *steps: int) -> StateStore:
    states = store(folder)
    for step in steps:
        assert states.save(step, {**TENSORS, "step": torch.tensor(step)}, {"about": step, "exact": 0.1 + 0.2})
    return states


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert store(tmp_path).newest() is None
    assert store(tmp_path).load() is None


def test_round_trip(tmp_path: Path) -> None:
    state = saved(tmp_path, 7).load()
    assert state is not None
    assert (state.step, state.values) == (7, {"about": 7, "exact": 0.1 + 0.2})
    types = {"trained.a": torch.float32, "random.0.torch": torch.uint8, "step": torch.int64}
    with state.tensors() as saved_tensor:
        assert {name: saved_tensor(name).dtype for name in state.names} == types
        assert torch.equal(saved_tensor("trained.a"), TENSORS["trained.a"])
    again = store(tmp_path).read(7)
    assert again.values == state.values


def test_a_view_is_saved_as_it_looks(tmp_path: Path) -> None:
    store(tmp_path).save(1, {"t": TENSORS["trained.a"].t()}, {})
    state = store(tmp_path).load()
    assert state is not None
    with state.tensors() as saved_tensor:
        assert torch.equal(saved_tensor("t"), TENSORS["trained.a"].t())


def test_keeps_the_newest(tmp_path: Path) -> None:
    saved(tmp_path, 5, 90, 100, 1000)
    assert names(tmp_path) == ["state-00000100", "state-00001000"]


def test_no_pickle(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    found = sorted(path.name for path in (tmp_path / "states" / "state-00000001").iterdir())
    assert found == ["digests.json", "state.json", "tensors.safetensors"]


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip_bit, cut_short, remove, empty])
@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "digests.json"])
def test_broken_last_state(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, file: str) -> None:
    states = saved(tmp_path, 10, 20)
    damage(tmp_path / "states" / "state-00000020" / file)
    with caplog.at_level(logging.WARNING, logger="dpa"):
        state = states.load()
    assert state is not None
    assert state.step == 10
    assert names(tmp_path) == ["state-00000010", "state-00000020.broken"]
    assert "state-00000020 cannot be used" in caplog.text
    assert "continuing from state-00000010" in caplog.text


def test_all_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = saved(tmp_path, 10)
    flip_bit(tmp_path / "states" / "state-00000010" / "tensors.safetensors")
    assert states.load() is None
    assert "continuing from the beginning" in caplog.text


def test_unusable(tmp_path: Path) -> None:
    state = saved(tmp_path, 10, 20).load(usable=lambda found: found.step < 20)
    assert state is not None
    assert state.step == 10


def test_a_save_that_was_killed_is_ignored_and_swept_away(tmp_path: Path) -> None:
    states = saved(tmp_path, 10)
    half = tmp_path / "states" / "state-00000020.tmp"
    half.mkdir()
    (half / "tensors.safetensors").write_bytes(b"half")
    state = states.load()
    assert state is not None
    assert state.step == 10
    assert states.save(20, TENSORS, {})
    assert names(tmp_path) == ["state-00000010", "state-00000020"]


def test_another_jobs_state(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    with pytest.raises(CheckpointError, match=r"state-00000010 was saved by another job.*remove .*states"):
        store(tmp_path, fingerprint="e" * 64).load()
    assert names(tmp_path) == ["state-00000010"], "it is not ours to touch"


@pytest.mark.parametrize("where", ["tensors", "json", "rename"])
def test_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    states = saved(tmp_path, 10)

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        target = {"tensors": (checkpoint, "save_file"), "json": (checkpoint, "write_json"), "rename": (os, "replace")}
        patched.setattr(*target[where], refused)
        assert states.save(20, TENSORS, {}) is False
    assert names(tmp_path) == ["state-00000010"]
    assert "No space left on device" in caplog.text
    assert "a restart would continue from" in caplog.text
    assert "state-00000010" in caplog.text
    assert states.save(30, TENSORS, {})


def test_what_the_system_refuses_safetensors(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No simulation: files may not grow beyond 64 KiB. safetensors hides the system's error in its own."""
    states = saved(tmp_path, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        assert states.save(20, {"large": torch.zeros(100_000)}, {}) is False
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.strerror(errno.EFBIG) in caplog.text
    assert names(tmp_path) == ["state-00000010"]


def test_states_folder_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "states").write_text("a file")
    assert store(tmp_path).save(1, TENSORS, {}) is False
    assert "continue from the beginning" in caplog.text


def test_format_is_written_down(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    content = json.loads((tmp_path / "states" / "state-00000003" / "state.json").read_text())
    assert (content["format"], content["step"], content["fingerprint"]) == (2, 3, "f" * 64)

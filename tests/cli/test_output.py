"""Files that commands are told to write: where that cannot be, one message before the work, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from dpa.cli.output import check_output
from dpa.errors import UserError
from tests.cli.test_data import call

COMMANDS: dict[str, tuple[str, ...]] = {
    "data check": ("data", "check", "captions.json", "--html"),
    "data captions": ("data", "captions", "captions.json"),
    "conflict": ("conflict", "captions.json", "--out"),
    "explain": ("explain", "model", "picture.png", "a dog", "--out"),
    "explain, png": ("explain", "model", "picture.png", "a dog", "--png"),
    "compare": ("compare", "runs/one", "--out"),
}
"""None of their inputs is there: a command that asks for them first says something else."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a file/new/x.png", "a file is a file, not a folder"),
        ("folder.png", "it is a folder; name a file"),
        ("x" * 300 + ".png", "File name too long"),
        ("closed/x.png", "no permission to write in"),
    ],
)
def test_one_message_before_the_work(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
    reason: str,
) -> None:
    if name.startswith("closed"):  # root may write anywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    assert call(*COMMANDS[command], name) == 2
    said: Any = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith(f"dpa: {name} cannot be written: ")
    assert reason in said.err
    assert sorted(item.name for item in place.rglob("*")) == ["a file", "folder.png"]


def test_what_can_be_written(place: Path) -> None:
    (place / "link").symlink_to(place / "gone" / "x.html")
    for name in ("x.html", "new/folder/x.html", "a file", "link", "/dev/stdout", "/dev/null"):
        check_output(Path(name))
    check_output(None)
    (place / "loop").symlink_to(place / "loop")
    with pytest.raises(UserError, match="choose another place"):
        check_output(place / "loop")
    assert sorted(item.name for item in place.iterdir()) == ["a file", "folder.png", "link", "loop"]

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest

from dpa.train.progress import BarProgress, LineProgress, NoProgress, describe, duration, make_progress

ROW = {"step": 1, "loss": 1.23456, "tokens_per_second": 12345.6, "data_wait_share": 0.031}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_describe() -> None:
    assert describe(ROW) == "loss 1.2346  12,346 tokens/s  data wait 3%"
    assert describe({**ROW, "loss": None}).startswith("no label")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (62, "1:02"), (3723, "1:02:03"), (360000, "100:00:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_come_at_the_first_and_last_step_and_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    progress = LineProgress(stream, seconds=10)
    progress.start("pretrain", steps=8, done=2)
    for step in range(3, 9):
        now += 4
        progress.step({**ROW, "step": step})
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["pretrain 3/8", "pretrain 6/8", "pretrain 8/8"]
    assert lines[0] == "pretrain 3/8  loss 1.2346  12,346 tokens/s  data wait 3%  0:20 left"
    assert [line.split("  ")[-1] for line in lines] == ["0:20 left", "0:08 left", "0:00 left"]


def test_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = BarProgress(stream)
    progress.start("finetune", steps=4, done=1)
    progress.step({**ROW, "step": 3})
    progress.finish()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "finetune" in text
    assert "3/4" in text
    assert "loss 1.2346  12,346 tokens/s  data wait 3%" in text


def test_the_stream_decides() -> None:
    assert isinstance(make_progress(Terminal()), BarProgress)
    assert isinstance(make_progress(io.StringIO()), LineProgress)


def test_stdout_stays_free(capsys: Any) -> None:
    for progress in (LineProgress(), BarProgress(), NoProgress()):
        progress.start("proxy", steps=1, done=0)
        progress.step(ROW)
        progress.finish()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "proxy 1/1" in captured.err

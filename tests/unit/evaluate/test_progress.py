"""Lines and bars."""

from __future__ import annotations

import io
import re

import pytest

from dpa.evaluate import progress as module
from dpa.evaluate.progress import EvaluationProgress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_lines_with_the_time_left(clock: Clock) -> None:
    stream = io.StringIO()
    with EvaluationProgress(stream) as progress:
        told = progress.of("mmbench")
        told(40, 100)  # restored
        for done, seconds in ((50, 5.0), (60, 6.0), (100, 1.0)):
            clock.now += seconds
            told(done, 100)
        progress.of("lab")(0, 6)
    # speed counts what this start has done: 20 in 11 s, so 40 more take 22 s
    assert stream.getvalue().splitlines() == [
        "mmbench 40/100",
        "mmbench 60/100  1.8 questions/s  0:22 left",
        "mmbench 100/100  5.0 questions/s  0:00 left",
        "lab 0/6",
    ]


def test_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with EvaluationProgress(stream) as progress:
        told = progress.of("lab")
        told(0, 6)
        told(6, 6)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "lab" in shown
    assert "6/6" in shown

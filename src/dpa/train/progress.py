"""What a stage shows while it runs: a bar on a terminal, plain lines elsewhere. To stderr: stdout is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Plain lines: at most one in so many seconds (and the first and last step)."""


class ProgressSink(Protocol):
    """Who is told how a stage goes. Rank 0 only."""

    def start(self, stage: str, *, steps: int, done: int) -> None:
        """Before the first step of this start; ``done`` steps were restored."""

    def step(self, row: Mapping[str, Any]) -> None:
        """After each optimizer step, with its line of metrics.jsonl."""

    def finish(self) -> None:
        """After the last step, and when the stage stops with an error."""


class NoProgress:
    """Shows nothing."""

    def start(self, stage: str, *, steps: int, done: int) -> None: ...
    def step(self, row: Mapping[str, Any]) -> None: ...
    def finish(self) -> None: ...


def describe(row: Mapping[str, Any]) -> str:
    """Loss, speed and data wait of a step, for people."""
    loss = "no label" if row["loss"] is None else f"loss {row['loss']:.4f}"
    return f"{loss}  {row['tokens_per_second']:,.0f} tokens/s  data wait {row['data_wait_share']:.0%}"


class BarProgress:
    """A bar with loss, tokens per second, share of time waiting for data, time left."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._console = Console(file=stream, stderr=stream is None)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def start(self, stage: str, *, steps: int, done: int) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(stage, total=steps, completed=done, state="")
        self._bar.start()

    def step(self, row: Mapping[str, Any]) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=row["step"], state=describe(row))

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None


class LineProgress:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None, *, seconds: float = LINE_SECONDS) -> None:
        self._stream = stream
        self._seconds = seconds
        self._stage, self._steps, self._done = "", 0, 0
        self._began = self._last = 0.0

    def start(self, stage: str, *, steps: int, done: int) -> None:
        self._stage, self._steps, self._done = stage, steps, done
        self._began = time.monotonic()
        self._last = -float("inf")

    def step(self, row: Mapping[str, Any]) -> None:
        now, step = time.monotonic(), row["step"]
        if now - self._last < self._seconds and step != self._steps:
            return
        self._last = now
        per_step = (now - self._began) / max(step - self._done, 1)
        left = duration(per_step * (self._steps - step))
        line = f"{self._stage} {step}/{self._steps}  {describe(row)}  {left} left"
        print(line, file=sys.stderr if self._stream is None else self._stream, flush=True)

    def finish(self) -> None:
        pass


def make_progress(stream: TextIO | None = None) -> ProgressSink:
    """A bar where ``stream`` (default: stderr) is a terminal, else lines."""
    terminal = (sys.stderr if stream is None else stream).isatty()
    return BarProgress(stream) if terminal else LineProgress(stream)


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

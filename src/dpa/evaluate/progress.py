"""How an evaluation goes, on stderr: a bar on a terminal, plain lines elsewhere; both with the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0
"""Plain lines: at most one in so many seconds, and the first and the last."""


class EvaluationProgress:
    """One bar, or its lines, per benchmark; use it as a context manager, and :meth:`of` for each benchmark.

    Args:
        stream: None: stderr.
        seconds: between plain lines.
    """

    def __init__(self, stream: TextIO | None = None, *, seconds: float = LINE_SECONDS) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._seconds = seconds
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )

    def __enter__(self) -> EvaluationProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def of(self, name: str) -> Callable[[int, int], None]:
        """What ``generate_answers`` calls with (answers, all answers); the first call says what was there before."""
        return _Shown(name, self._bar, self._stream, self._seconds)


class _Shown:
    def __init__(self, name: str, bar: Progress | None, stream: TextIO, seconds: float) -> None:
        self._name = name
        self._bar = bar
        self._task: TaskID | None = None
        self._stream = stream
        self._seconds = seconds
        self._first: int | None = None
        self._began = self._last = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._began, self._last = done, now, -float("inf")
        rate = (done - self._first) / (now - self._began) if done > self._first and now > self._began else None
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(self._name, total=total, completed=done, speed="")
            self._bar.update(self._task, completed=done, speed="" if rate is None else f"{rate:.1f}/s")
            return
        if now - self._last < self._seconds and done != total:
            return
        self._last = now
        speed = "" if rate is None else f"  {rate:.1f} questions/s  {_duration((total - done) / rate)} left"
        print(f"{self._name} {done}/{total}{speed}", file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

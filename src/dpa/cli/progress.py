"""A progress bar on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_REFRESH = 0.2
"""Seconds between two drawings."""


class Show(Protocol):
    """Draws the bar; a total of 0 is unknown, another title starts it anew."""

    def __call__(self, done: int, total: int, title: str | None = None) -> None: ...


@contextmanager
def bar(title: str, *, quiet: bool) -> Iterator[Show]:
    """A bar while the context is open; nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        last, shown = 0.0, title

        def show(done: int, total: int, title: str | None = None) -> None:
            nonlocal last, shown
            now = time.monotonic()
            if title is not None and title != shown:
                shown = title
                progress.reset(task, description=title, total=total or None)
            if now - last >= _REFRESH or done == total:
                last = now
                progress.update(task, completed=done, total=total or None)

        yield show

"""Stop-watches: whole steps and their parts, in wall-clock and in CPU time."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

SectionClock = Callable[[str], AbstractContextManager[None]]
"""``with clock("head"): ...``."""

TEXT_ONLY_PASS = "text_only_pass"
"""Whatever runs inside this section is part of it: its head, too."""

Door = tuple[str, ModuleType, str]
"""Section, module, name of a function in it."""


def untimed(_: str) -> AbstractContextManager[None]:
    """The clock of runs in which parts do not matter: nothing is read, no device waited for."""
    return nullcontext()


def now(device: torch.device) -> tuple[float, float]:
    """(wall-clock, CPU time of all threads) in seconds, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


class Sections:
    """Exclusive times: what runs inside a nested section counts there and not outside (but ``TEXT_ONLY_PASS``)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: list[str] = []
        self._since = (0.0, 0.0)
        self.wall: dict[str, float] = defaultdict(float)
        self.cpu: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(TEXT_ONLY_PASS if TEXT_ONLY_PASS in self._open else name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        """Books the time since the last change on the innermost open section."""
        at = now(self._device)
        if self._open:
            self.wall[self._open[-1]] += at[0] - self._since[0]
            self.cpu[self._open[-1]] += at[1] - self._since[1]
        self._since = at


@contextmanager
def timed_doors(sections: Sections, doors: Sequence[Door]) -> Iterator[None]:
    """While open, calls of the named functions are sections; the functions are put back afterwards."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with sections(name):
                return function(*args, **kwargs)

        return call

    with ExitStack() as undo:
        for name, module, attribute in doors:
            function = getattr(module, attribute)
            setattr(module, attribute, timed(name, function))
            undo.callback(setattr, module, attribute, function)
        yield

"""A sample as every reader gives it: who says what, and which images belong to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGE_MARKER = "<image>"
"""Stands for an image in a turn's text (LLaVA's format)."""

Spans = tuple[tuple[int, int], ...]
"""First character and one past the last of each."""

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str
    """Keeps its ``<image>`` markers."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sample."""

    id: str
    """The file's own id, else the record number."""
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    """Paths relative to the source's image folder, in the order of the markers; empty: text alone."""
    where: str
    """File and record (or line), for messages."""
    visual_spans: Spans | None = None
    """Characters of the caption that say something about the picture, as the file marks them; None: not marked."""

    @property
    def markers(self) -> int:
        """``<image>`` markers in all turns."""
        return sum(turn.text.count(IMAGE_MARKER) for turn in self.turns)

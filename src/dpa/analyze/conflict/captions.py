"""Captions of a source: a sample of them, drawn while the file is read once, as a stream, without its images."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpa.data.formats import Row
from dpa.data.json_rows import Layout, json_rows
from dpa.data.settings import DataSource
from dpa.data.sources import Opened, open_source
from dpa.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is (0: not known)."""

SPANS = "visual_spans"
"""The lab's key: character spans ``[start, end]`` of the words that say what is in the picture."""
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption."""

    id: str
    text: str
    where: str = ""
    """File and record, for messages."""
    visual_spans: tuple[tuple[int, int], ...] | None = None
    """Where the truth is known (lab data): character spans of its visual words."""


@dataclass(frozen=True, slots=True)
class CaptionSample:
    """Captions in the file's order, and what they were drawn from."""

    captions: tuple[Caption, ...]
    source: str
    total: int
    """Records of the source."""
    left_out: dict[str, int]
    """Why records are no captions -> how many."""


def sample_of(captions: Iterable[Caption], source: str = "captions") -> CaptionSample:
    """All of some captions that lie in memory."""
    whole = tuple(captions)
    return CaptionSample(whole, source, len(whole), {})


def read_captions(source: DataSource, *, count: int, seed: int = 0, progress: Progress | None = None) -> CaptionSample:
    """At most ``count`` captions, drawn uniformly; the same seed draws the same.

    Every record gets a random number, and the smallest ones stay: nothing but the sample is held in memory, and a file
    of any size is read once. Images are not looked for. ``limit`` and ``weight`` of the source play no part.

    Raises:
        DataError: a file is missing or malformed; names record or line.
    """
    opened = open_source(source.model_copy(update={"images": None}))
    left_out: Counter[str] = Counter()
    drawn: list[tuple[int, int, Row]] = []
    total = 0
    for number, (row, word) in enumerate(zip(opened.rows(), _words(seed), strict=False)):
        total = number + 1
        if progress is not None and total % _CHUNK == 0:
            progress("reading", total, 0)
        reason = _not_a_caption(row)
        if reason is not None:
            left_out[reason] += 1
        elif len(drawn) < count:
            heapq.heappush(drawn, (-word, -number, row))
        else:
            heapq.heappushpop(drawn, (-word, -number, row))
    rows = [row for _, _, row in sorted(drawn, key=lambda item: -item[1])]
    spans = _spans(opened, rows)
    captions = tuple(
        Caption(
            id=row.id,
            text=next(turn.text for turn in row.turns if turn.role == "assistant"),
            where=f"{opened.files.paths[row.file]}, {opened.files.unit} {row.number}",
            visual_spans=spans.get((row.file, row.number)),
        )
        for row in rows
    )
    return CaptionSample(captions, str(source.path), total, dict(sorted(left_out.items())))


def _words(seed: int) -> Iterator[int]:
    """Random words without end: Philox, whose stream numpy guarantees (``data.shuffle``)."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/conflict sample".encode(), digest_size=16).digest(), "little")
    source = np.random.Philox(key=key)
    while True:
        yield from source.random_raw(_CHUNK).tolist()


def _not_a_caption(row: Row) -> str | None:
    """What stages 1 and 2 would refuse (``data.chat.encode_plain``), by kind."""
    answers = [turn.text for turn in row.turns if turn.role == "assistant"]
    if len(answers) != 1:
        return "not one answer: a caption is a single assistant turn"
    return None if answers[0].strip() else "empty caption"


def _spans(opened: Opened, rows: list[Row]) -> dict[tuple[int, int], tuple[tuple[int, int], ...]]:
    """Visual spans of the sampled records, by file and number; only JSON has them. Records are read a second time."""
    found: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
    if opened.files.table is not None:
        return found
    layout: Layout = "list" if opened.files.kind == "list" else "lines"
    wanted = {(row.file, row.number): row for row in rows}
    for file, path in enumerate(opened.files.paths):
        for place, (number, value) in enumerate(json_rows(path, layout)):
            if place == 0 and SPANS not in value:  # not the lab's
                break
            row = wanted.get((file, number))
            if row is not None and SPANS in value:
                text = next(turn.text for turn in row.turns if turn.role == "assistant")
                found[file, number] = _checked(value[SPANS], text, f"{path}, {opened.files.unit} {number}")
    return found


def _checked(value: Any, text: str, where: str) -> tuple[tuple[int, int], ...]:
    is_list = isinstance(value, list) and all(isinstance(span, list) and len(span) == 2 for span in value)
    spans = tuple((span[0], span[1]) for span in value) if is_list else ()
    fits = all(isinstance(a, int) and isinstance(b, int) and 0 <= a < b <= len(text) for a, b in spans)
    if not is_list or not fits:
        raise DataError(
            f"{where}: {SPANS!r} is {str(value)[:80]}, expected a list of [start, end] inside the caption's "
            f"{len(text)} characters; mend or remove the key"
        )
    return spans

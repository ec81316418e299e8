"""What is known about which words are visual.

The lab writes the truth into its caption files: ``visual_spans``, character ranges of the visual words of a caption.
Anybody's records may carry the same key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpa.data.json_rows import SUFFIXES, json_rows, layout_of
from dpa.data.samples import Spans
from dpa.errors import DataError

KEY = "visual_spans"


def spans_of(files: Iterable[Path], captions: Collection[str]) -> dict[str, Spans]:
    """The visual words of captions, as far as the files say; a file whose first record says nothing is not read on.

    Args:
        files: caption files; only JSON can carry the key.
        captions: texts to look for; the same text has the same visual words.

    Raises:
        DataError: a record's spans are no ranges of its caption; names file and record.
    """
    found: dict[str, Spans] = {}
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            continue
        for number, record in json_rows(path, layout_of(path)):
            if not isinstance(record, dict) or KEY not in record:
                break
            caption = _caption(record)
            if caption in captions:
                found[caption] = _spans(record[KEY], caption, f"{path}, record {number}")
            if len(found) == len(set(captions)):
                return found
    return found


def _caption(record: dict[str, Any]) -> str:
    turns = record.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        return str(turns[-1].get("value", ""))
    return str(record.get("caption", ""))


def _spans(value: Any, caption: str, where: str) -> Spans:
    try:
        spans = tuple((int(start), int(end)) for start, end in value)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {KEY} is {str(value)[:60]!r}, expected a list of [start, end]") from None
    for start, end in spans:
        if not 0 <= start < end <= len(caption):
            raise DataError(f"{where}: {KEY} has [{start}, {end}], but its caption has {len(caption)} characters")
    return spans


def visual_tokens(pieces: Sequence[str], text: str, spans: Spans) -> list[bool | None] | None:
    """Which tokens belong to a visual word: those of whose characters (spaces aside) any lies in a span.

    Args:
        pieces: the tokens' texts, which joined hold ``text``.
        text: what ``spans`` are ranges of.

    Returns:
        Per token; None for tokens outside ``text`` or of spaces alone, which are nobody's. None as a whole where
        ``text`` is not in the pieces (a tokenizer that changes it), so that nothing is known.
    """
    offset = "".join(pieces).find(text)
    if offset < 0:
        return None
    inside = np.zeros(len(text), dtype=bool)
    for start, end in spans:
        inside[start:end] = True
    flags: list[bool | None] = []
    at = -offset
    for piece in pieces:
        places = [at + k for k, character in enumerate(piece) if not character.isspace() and 0 <= at + k < len(text)]
        flags.append(bool(inside[places].any()) if places else None)
        at += len(piece)
    return flags

"""One JSON list, item by item, never the whole of it in memory.

The standard library's decoder does the work: a list then means exactly what the same rows mean line by line. (yajl, the
usual streaming parser, is a third faster, and turns half a surrogate pair into ``?`` or swallows the next character.)
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

_READ = 1 << 20
"""Bytes."""
_NEAR_END = 16
"""Characters: a decoder that stops so near the end of its text may only lack the rest (``tru``, ``\\ud83``)."""
_SPACE = " \t\n\r"


def list_items(file: BinaryIO) -> Iterator[Any]:
    """The items of the list in ``file``, which starts with ``[`` (white space before it allowed).

    Items are objects, lists or strings; a bare number that lies across two reads would be taken for two.

    Raises:
        ValueError: it is not JSON, not UTF-8, cut off, or goes on after the list. Every item before the fault has been
            given by then.
        RecursionError: an item is nested too deeply.
    """
    text = _Text(file)
    text.take("[")
    if text.peek() == "]":
        text.take("]")
    else:
        while True:
            yield text.value()
            if text.peek() != ",":
                text.take("]")
                break
            text.take(",")
    if text.peek():
        raise ValueError(f"more text after the end of the list: {text.near()!r}")


class _Text:
    """A window of the file's text that moves on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._ended = False
        self._fault: UnicodeDecodeError | None = None

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_READ):
                return ""

    def take(self, expected: str) -> None:
        """Goes past ``expected``."""
        found = self.peek()
        if found != expected:
            raise ValueError(f"expected {expected!r}, found {self.near()!r}" if found else "the file ends too early")
        self._at += 1

    def value(self) -> Any:
        """Goes past one JSON value and returns it."""
        self.peek()
        size = _READ
        while True:
            try:
                value, self._at = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or len(self._text[error.pos :].strip()) <= _NEAR_END
                if cut and self._more(size):
                    size *= 2  # a huge value is then decoded few times
                    continue
                raise ValueError(f"{error.msg}: {self._text[error.pos : error.pos + 40]!r}") from None
            return value

    def near(self) -> str:
        """What comes next, for messages."""
        return self._text[self._at : self._at + 40]

    def _more(self, size: int) -> bool:
        """Reads on; False at the end of the file."""
        if self._fault is not None:
            raise ValueError(f"not UTF-8: {self._fault.reason}") from None
        if self._ended:
            return False
        chunk = self._file.read(size)
        self._ended = not chunk
        try:
            new = self._utf8.decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:  # what comes before the fault is still good
            self._fault = error
            new = error.object[: error.start].decode("utf-8")
        self._text = self._text[self._at :] + new
        self._at = 0
        return True

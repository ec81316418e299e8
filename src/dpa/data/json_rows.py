"""Records of JSON files as a stream: ``.json`` (one list) and ``.jsonl`` (a sample a line)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dpa.data.json_list import list_items
from dpa.errors import DataError

Layout = Literal["list", "lines"]
SUFFIXES: dict[str, Layout] = {".json": "list", ".jsonl": "lines", ".ndjson": "lines"}
_BOM = b"\xef\xbb\xbf"


def layout_of(path: Path) -> Layout:
    """How the records lie in the file: by its name, but a ``.json`` whose first line is a whole object has lines.

    (Cambrian's lists are handed on under both names.)

    Raises:
        DataError: neither ``.json`` nor ``.jsonl``.
    """
    try:
        layout = SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise DataError(
            f"{path}: cannot tell its layout from its name; name it .json (one list of samples), .jsonl (a sample a "
            "line) or .parquet"
        ) from None
    if layout == "lines":
        return layout
    with open(path, "rb") as file:
        _skip_bom(file)
        if file.read(1) != b"{":
            return layout
        file.seek(file.tell() - 1)
        try:
            return "lines" if isinstance(json.loads(file.readline()), dict) else layout
        except (ValueError, RecursionError):
            return layout


def json_rows(path: Path, layout: Layout) -> Iterator[tuple[int, Any]]:
    """Number (of the record, or of the line) from 1, and the value; never the whole file in memory.

    Raises:
        DataError: not JSON; names file and record or line.
    """
    with open(path, "rb") as file:
        _skip_bom(file)
        yield from _list_items(file, path) if layout == "list" else _lines(file, path)


def _skip_bom(file: BinaryIO) -> None:
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)


def _list_items(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    start = file.tell()
    first = file.read(4096).lstrip()[:1]
    if first != b"[":
        found = {b"{": "an object", b"": "nothing"}.get(first, f"text that starts with {first!r}")
        raise DataError(
            f"{path}: holds {found}, expected a JSON list of samples; if it holds a sample a line, name it .jsonl"
        )
    file.seek(start)
    number = 0
    try:
        for number, value in enumerate(list_items(file), 1):
            yield number, value
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}, record {number + 1}: not JSON ({_short(error)}); is the file whole? Repair or download it again"
        ) from None


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({_short(error)}); a .jsonl file has one sample a line. "
                "Repair the line or download the file again"
            ) from None
        yield number, value


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]

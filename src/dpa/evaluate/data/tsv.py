"""VLMEvalKit's TSV: one row per question, the image as base64 in a cell. Files of gigabytes; only their index is kept.

The index holds every text and, for an image, where its row lies in the file. A cell of at most 64 characters in the
column ``image`` is another row's index: pictures that several questions share are stored once.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from dpa.errors import DataError

REFERENCE_LENGTH = 64
"""Longest image cell that is read as another row's index (VLMEvalKit, ``dataset/image_base.py``)."""
_LONGEST_CELL = 2**31 - 1
_KEPT_FILES = 16


@dataclass(frozen=True, slots=True)
class ImageCell:
    """Where base64 lies."""

    column: int
    digest: str
    count: int | None
    """Images of a list; None: the cell is one image."""


@dataclass(frozen=True, slots=True)
class TsvRow:
    """A row without its pixels."""

    line: int
    """Where it begins in the file, from 1."""
    start: int
    """The same in bytes."""
    length: int
    cells: dict[str, str]
    """Column -> text. Empty cells are left out; "None", "NA" and "nan" are texts like any other. Where ``image`` is
    here, it is a reference."""
    image: ImageCell | None


def read_tsv(path: Path) -> tuple[TsvRow, ...]:
    """Reads the whole file once, keeps the index; a file that has not changed is not read again in this process.

    Raises:
        DataError: it cannot be read, is not UTF-8, has no column ``index``, a row has another number of cells than the
            header (a download that was cut), or an index comes twice; names file and line.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    return _read(path, status.st_size, status.st_mtime_ns)


def read_cell(path: Path, start: int, length: int, column: int) -> str:
    """One cell of the row that begins at byte ``start``.

    Raises:
        DataError: the file cannot be read or has changed since its index was read.
    """
    try:
        with open(path, "rb") as file:
            file.seek(start)
            text = file.read(length).decode("utf-8-sig")
        # lines end at \n alone, as in the file itself: texts may hold U+2028
        return next(_parse(io.StringIO(text, newline="\n")))[column]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, csv.Error, IndexError, StopIteration):
        raise DataError(f"{path} has changed since its index was read: start again") from None


@lru_cache(maxsize=_KEPT_FILES)
def _read(path: Path, size: int, modified: int) -> tuple[TsvRow, ...]:
    del size, modified  # of the key: a file that was written anew is read anew
    rows: list[TsvRow] = []
    seen: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            lines = _Lines(file)
            records = _parse(lines)
            header = next(records, [])
            if "index" not in header:
                raise DataError(f"{path}: the header has no column index, but {', '.join(header)[:200] or 'nothing'}")
            line, start = lines.place()
            for record in records:
                after = lines.place()
                if record:  # an empty line has no cells
                    row = _row(path, header, record, line, start, after[1] - start)
                    name = row.cells.get("index", "")
                    if name in seen:
                        raise DataError(f"{path}, line {line}: index {name!r} is there already in line {seen[name]}")
                    seen[name] = line
                    rows.append(row)
                line, start = after
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {lines.line}: not UTF-8 ({error.reason})") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line}: {error}") from None
    return tuple(rows)


class _Lines:
    """Text lines of a binary file, with the place reached: csv.reader takes no line before it needs it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._bytes = 0
        self.line = 1
        """The next one's number."""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        data = self._file.readline()
        if not data:
            raise StopIteration
        text = data.decode("utf-8-sig" if self._bytes == 0 else "utf-8")
        self._bytes += len(data)
        self.line += 1
        return text

    def place(self) -> tuple[int, int]:
        """(number of the next line, its first byte)."""
        return self.line, self._bytes


def _parse(lines: Iterator[str]) -> Iterator[list[str]]:
    # the limit is the process's, and an image is longer than its default; raising it harms nobody
    if csv.field_size_limit() < _LONGEST_CELL:
        csv.field_size_limit(_LONGEST_CELL)
    return csv.reader(lines, delimiter="\t")


def _row(path: Path, header: list[str], record: list[str], line: int, start: int, length: int) -> TsvRow:
    if len(record) != len(header):
        raise DataError(
            f"{path}, line {line}: {len(record)} cells, the header has {len(header)}; was the download cut? "
            "Compare its md5 and download it again"
        )
    cells = {name: cell for name, cell in zip(header, record, strict=True) if cell}
    image = None
    content = cells.get("image", "")
    if len(content) > REFERENCE_LENGTH:
        del cells["image"]
        digest = hashlib.sha256(content.encode()).hexdigest()
        image = ImageCell(header.index("image"), digest, _count(content, f"{path}, line {line}"))
    return TsvRow(line=line, start=start, length=length, cells=cells, image=image)


def _count(content: str, where: str) -> int | None:
    if not (content.startswith("[") and content.endswith("]")):
        return None
    try:
        found = ast.literal_eval(content)
    except (ValueError, SyntaxError):
        raise DataError(f"{where}: the cell image begins with '[' but is no list of images") from None
    return len(found)

"""Samples of a source as a lazy sequence: read once into a memory-mapped index, then opened in an instant.

The index (Arrow IPC) lies in a cache folder under the digest of the files' content, so a changed file gets a new one
and a moved or touched file does not.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import pyarrow as pa
from filelock import FileLock

from dpa.data.formats import Row
from dpa.data.image_store import ImageStore
from dpa.data.samples import ROLES, Sample, Turn
from dpa.data.settings import DataSource
from dpa.data.shuffle import Indices, permutation
from dpa.data.sources import Files, Opened, open_source
from dpa.errors import DataError
from dpa.store import FileDigests, digest_of, disk_errors

__all__ = ["ROLES", "Records", "Sample", "Turn", "read_records"]

READER_VERSION: Final = 2
"""Raise it when the same file no longer gives the same samples."""
_INDEX_VERSION: Final = 3
"""Raise it when the index looks otherwise."""
_ROWS: Final = 4096
"""Records per Arrow batch: what is unpacked around one record, and what is in memory while an index is written."""
_SCHEMA: Final = pa.schema(
    [
        ("file", pa.int32()),  # place among the source's files
        ("number", pa.int64()),
        ("id", pa.large_string()),
        ("roles", pa.large_list(pa.int8())),  # places in ROLES
        ("texts", pa.large_list(pa.large_string())),
        ("images", pa.large_list(pa.large_string())),
        ("visual_spans", pa.large_list(pa.int64())),  # first, end, first, end ...; null: not marked
    ]
)


class Records(Sequence[Sample]):
    """The samples of one source, in the file's order. Opens its memory map at first use, in each process anew.

    ``source[i]`` reads one record; nothing else is held in memory but the chosen rows.
    """

    def __init__(
        self, index: Path, *, source: Path, files: Files, store: ImageStore, content: str, rows: Indices | None = None
    ) -> None:
        """
        Args:
            index: the Arrow file.
            source: the path that the recipe names, for messages.
            files: the files that it stands for.
            store: its images.
            content: digest of the files and of how they are read.
            rows: the chosen rows of the index in this order; None: all.
        """
        self.source = source
        self.files = files
        self.store = store
        self._index = index
        self._content = content
        self._rows = rows
        self._batches: list[Any] | None = None
        self._length = self._open()[1] if rows is None else len(rows)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Sample | Records:
        if isinstance(index, slice):
            return self.select(np.arange(self._length)[index])
        place = range(self._length)[index]  # negative places, IndexError
        batch, row = divmod(place if self._rows is None else int(self._rows[place]), _ROWS)
        columns = self._open()[0][batch]
        file, number, name, roles, texts, images, marks = (
            columns.column(at)[row].as_py() for at in range(len(_SCHEMA))
        )
        return Sample(
            id=name,
            turns=tuple(Turn(ROLES[role], text) for role, text in zip(roles, texts, strict=True)),
            images=tuple(images),
            where=f"{self.files.paths[file]}, {self.files.unit} {number}",
            visual_spans=None if marks is None else tuple(zip(marks[::2], marks[1::2], strict=True)),
        )

    def select(self, places: Indices) -> Records:
        """The samples at ``places``, in that order; a place may occur more than once."""
        rows = places if self._rows is None else self._rows[places]
        return Records(
            self._index, source=self.source, files=self.files, store=self.store, content=self._content, rows=rows
        )

    def images(self) -> Iterator[tuple[str, ...]]:
        """The image paths of every sample in order; much faster than reading the samples."""
        column = _SCHEMA.get_field_index("images")
        if self._rows is None:
            for batch in self._open()[0]:
                yield from map(tuple, batch.column(column).to_pylist())
            return
        for start in range(0, len(self._rows), _ROWS):
            rows = self._rows[start : start + _ROWS]
            listed: list[Any] = [None] * len(rows)
            for number in np.unique(rows // _ROWS):
                here = np.flatnonzero(rows // _ROWS == number)
                taken = self._open()[0][int(number)].column(column).take(pa.array(rows[here] % _ROWS))
                for place, names in zip(here, taken.to_pylist(), strict=True):
                    listed[place] = tuple(names)
            yield from listed

    @property
    def digest(self) -> str:
        """Of the content: the source files' bytes, how they are read, and which rows. Paths play no part."""
        rows = "all" if self._rows is None else hashlib.sha256(self._rows.astype("<i8").tobytes()).hexdigest()
        return hashlib.sha256(f"{READER_VERSION}/{self._content}/{rows}".encode()).hexdigest()

    def _open(self) -> tuple[list[Any], int]:
        if self._batches is None:
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(self._index)))
                self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(
                    f"{self._index}, the index of {self.source}, cannot be read ({error}); remove it, it is made anew"
                ) from None
        return self._batches, sum(batch.num_rows for batch in self._batches)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None}  # a map belongs to its process


def read_records(source: DataSource, cache_dir: Path, *, seed: int) -> Records:
    """Opens a source; the first time, reads it into its index.

    Args:
        source: files, image folders, format, limit, weight.
        cache_dir: where indices are kept; may be shared by processes and runs.
        seed: the run's; draws the samples of ``limit`` and ``weight``.

    Raises:
        DataError: a file is missing or not what its format says; names record or line.
        StorageError: the cache cannot be written.
    """
    opened = open_source(source)
    folder = cache_dir / "records"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "index.lock"):  # one process reads, the others wait for its index
            content = _content(opened, FileDigests(folder / "digests.json"))
            # .json and .jsonl: the same bytes may be a list for one and a broken line for the other
            index = folder / f"{content[:40]}-{opened.files.unit}-v{READER_VERSION}.{_INDEX_VERSION}.arrow"
            if not index.is_file():
                _write_index(opened.rows(), index)
    records = Records(index, source=source.path, files=opened.files, store=opened.store, content=content)
    chosen = _chosen(len(records), source, seed=seed, content=content)
    return records if chosen is None else records.select(chosen)


def _content(opened: Opened, digests: FileDigests) -> str:
    read = [*opened.files.paths, *([] if opened.urls is None else [opened.urls])]
    try:
        return digest_of([opened.format, [digests.file(path) for path in read]])
    except PermissionError as error:
        raise DataError(f"data file {error.filename} cannot be read: {error.strerror}") from None


def _chosen(count: int, source: DataSource, *, seed: int, content: str) -> Indices | None:
    """The rows of one epoch: ``limit`` draws, then ``weight`` repeats and draws. Ascending; None: each once."""
    rows = np.arange(count, dtype=np.int64)
    if source.limit is not None and source.limit < count:
        rows = np.sort(permutation(count, seed=seed, stream=f"limit {content}")[: source.limit])
    whole, part = divmod(source.weight, 1)
    drawn = int(part * len(rows) + 0.5)
    order = permutation(len(rows), seed=seed, stream=f"weight {content}")[:drawn] if drawn else rows[:0]
    chosen: Indices = np.sort(np.concatenate([np.repeat(rows, int(whole)), rows[order]]))
    if not len(chosen):
        raise DataError(f"{source.path}: weight {source.weight:g} of {len(rows)} samples leaves none; raise weight")
    return None if len(chosen) == count and whole == 1 and len(rows) == count else chosen


def _write_index(rows: Iterator[Row], index: Path) -> None:
    """Atomic: a reader sees a whole index or none."""
    temporary = index.with_name(f"{index.name}.{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
            while chunk := list(itertools.islice(rows, _ROWS)):
                writer.write_batch(_batch(chunk))
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, index)
    finally:
        temporary.unlink(missing_ok=True)


def _batch(rows: Sequence[Row]) -> Any:
    turns = [turn for row in rows for turn in row.turns]
    per_turn = _offsets([len(row.turns) for row in rows])
    arrays = [
        pa.array([row.file for row in rows], type=pa.int32()),
        pa.array([row.number for row in rows], type=pa.int64()),
        pa.array([row.id for row in rows], type=pa.large_string()),
        pa.LargeListArray.from_arrays(per_turn, pa.array([ROLES.index(turn.role) for turn in turns], type=pa.int8())),
        pa.LargeListArray.from_arrays(per_turn, pa.array([turn.text for turn in turns], type=pa.large_string())),
        pa.LargeListArray.from_arrays(
            _offsets([len(row.images) for row in rows]),
            pa.array([name for row in rows for name in row.images], type=pa.large_string()),
        ),
        pa.array(
            [None if row.visual_spans is None else list(chain.from_iterable(row.visual_spans)) for row in rows],
            type=pa.large_list(pa.int64()),
        ),
    ]
    return pa.record_batch(arrays, schema=_SCHEMA)


def _offsets(counts: Sequence[int]) -> Any:
    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

"""Rows and images of tables: parquet files and the Arrow files that ``datasets.save_to_disk`` writes.

Image bytes are never read while rows are: a row says only that there is an image. :class:`TableImages` reads one when
it is asked for, Arrow files through their memory map, parquet files by row group.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpa.data.formats import EMBEDDED
from dpa.errors import DataError

TableKind = Literal["parquet", "arrow"]

IMAGE_COLUMNS = ("image", "images")
_ROWS = 2048
_GROUPS = 2
"""Row groups whose images are kept in memory per process: neighbours are read together by the audit."""
_BROKEN = (OSError, pa.ArrowException)


def columns_of(kind: TableKind, path: Path) -> list[str]:
    """Names of a table's columns.

    Raises:
        DataError: it cannot be read.
    """
    return list(_schema(kind, path).names)


def image_columns(kind: TableKind, path: Path) -> tuple[str, ...]:
    """The columns that hold images themselves (bytes, or bytes and path), in the order in which rows are read."""
    schema = _schema(kind, path)
    return tuple(name for name in IMAGE_COLUMNS if name in schema.names and _holds_bytes(schema.field(name).type))


def table_rows(kind: TableKind, path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number from 1, and the row's ``columns`` as Python values; images that lie in the table are ``EMBEDDED``.

    Raises:
        DataError: the file cannot be read.
    """
    schema = _schema(kind, path)
    names = [name for name in schema.names if name in columns]
    inside = {name for name in names if name in IMAGE_COLUMNS and _holds_bytes(schema.field(name).type)}
    number = 0
    try:
        for batch in _arrow_batches(path) if kind == "arrow" else _parquet_batches(path, names, inside):
            # By slices: a batch of an Arrow file may have any size
            for start in range(0, batch.num_rows, _ROWS):
                part = batch.slice(start, _ROWS)
                values = [_presence(part[name]) if name in inside else part[name].to_pylist() for name in names]
                for row in zip(*values, strict=True):
                    number += 1
                    yield number, dict(zip(names, row, strict=True))
    except _BROKEN as error:
        raise _unreadable(path, error) from None


class TableImages:
    """The images of a source's tables. Picklable; each process opens the files anew. Threads may share it."""

    def __init__(self, kind: TableKind, paths: Sequence[Path], columns: Sequence[str]) -> None:
        """``columns``: of these the first that is not null holds a row's images, as ``formats`` reads the row."""
        self.kind: TableKind = kind
        self.paths = tuple(paths)
        self.columns = tuple(columns)
        self._files: dict[int, list[_ArrowFile | _ParquetFile]] = {}
        self._lock = threading.Lock()

    def read(self, file: int, row: int, place: int) -> tuple[bytes | None, str | None]:
        """Bytes and path (either may be None) of one image: of the ``file``-th file, ``row`` from 0.

        Raises:
            DataError: the file cannot be read, or holds no such image.
        """
        with self._lock:
            try:
                if file not in self._files:
                    opened = _ArrowFile if self.kind == "arrow" else _ParquetFile
                    there = _schema(self.kind, self.paths[file]).names
                    self._files[file] = [opened(self.paths[file], name) for name in self.columns if name in there]
                values = (column.value(row) for column in self._files[file])
                value = next((value for value in values if value.is_valid), pa.scalar(None))
                value = value[place] if isinstance(value, pa.ListScalar | pa.LargeListScalar) else value
                content = value.as_py()
            except (*_BROKEN, IndexError) as error:
                raise _unreadable(self.paths[file], error) from None
        if isinstance(content, dict):
            return content.get("bytes"), content.get("path")
        return content, None

    def __getstate__(self) -> dict[str, Any]:
        return {"kind": self.kind, "paths": self.paths, "columns": self.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _files={}, _lock=threading.Lock())


def row_group_megabytes(path: Path, columns: Sequence[str]) -> float:
    """Mean size of the images of a row group: what one random read of a parquet file costs."""
    meta = pq.ParquetFile(path).metadata
    total = 0.0
    for group in range(meta.num_row_groups):
        chunks = (meta.row_group(group).column(number) for number in range(meta.num_columns))
        total += sum(chunk.total_compressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    groups: int = meta.num_row_groups
    return total / max(1, groups) / 1e6


class _ArrowFile:
    """Random access through the memory map."""

    def __init__(self, path: Path, column: str) -> None:
        self._columns = [batch[column] for batch in _arrow_batches(path)]
        self._starts = [0, *accumulate(len(part) for part in self._columns)]

    def value(self, row: int) -> Any:
        part = bisect_right(self._starts, row) - 1
        return self._columns[part][row - self._starts[part]]


class _ParquetFile:
    """Random access by row group: a group's images are read together, and the last ones kept."""

    def __init__(self, path: Path, column: str) -> None:
        self._file = pq.ParquetFile(path, memory_map=True)
        self._column = column
        meta = self._file.metadata
        self._starts = [0, *accumulate(meta.row_group(group).num_rows for group in range(meta.num_row_groups))]
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def value(self, row: int) -> Any:
        group = bisect_right(self._starts, row) - 1
        if group not in self._kept:
            # no threads: the reader may be a forked loader process
            table = self._file.read_row_group(group, columns=[self._column], use_threads=False)
            self._kept[group] = table[self._column]
            if len(self._kept) > _GROUPS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group][row - self._starts[group]]


def _schema(kind: TableKind, path: Path) -> Any:
    try:
        if kind == "parquet":
            return pq.read_schema(path)
        return _arrow_reader(path).schema
    except _BROKEN as error:
        raise _unreadable(path, error) from None


def _arrow_reader(path: Path) -> Any:
    """``save_to_disk`` writes Arrow streams; files with random access are read, too."""
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.memory_map(str(path)))


def _arrow_batches(path: Path) -> Iterator[Any]:
    reader = _arrow_reader(path)
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        yield from reader


def _parquet_batches(path: Path, names: Sequence[str], inside: set[str]) -> Iterator[Any]:
    """Batches without the images' bytes where the path beside them says as well whether there is an image."""
    with pq.ParquetFile(path) as file:
        leaves = [file.schema.column(number).path for number in range(len(file.schema))]
        wanted = []
        for leaf in leaves:
            name, _, below = leaf.partition(".")
            sibling = f"{leaf.removesuffix('bytes')}path"
            if name in names and not (name in inside and below.endswith("bytes") and sibling in leaves):
                wanted.append(leaf)
        yield from file.iter_batches(_ROWS, columns=wanted, use_threads=False)


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return any(kind.field(place).name == "bytes" for place in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _presence(column: Any) -> list[Any]:
    """Per row: EMBEDDED, a list of so many, or None. Touches no bytes."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return [None if count is None else [EMBEDDED] * count for count in pc.list_value_length(column).to_pylist()]
    return [EMBEDDED if valid else None for valid in column.is_valid().to_pylist()]


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"{path} cannot be read ({reason}); is the file whole? Repair or download it again")

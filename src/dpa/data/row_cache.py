"""Numbers on disk that are dear to make and always the same: rows of a ragged array, memory-mapped, checked by digest.

A folder per key. ``values.bin`` has its final size from the beginning; ``digests.bin`` holds one keyed digest per chunk
of rows, zero while the chunk is not made. A chunk's digest is written after its values and compared with them at every
opening, so whatever stopped a writer, and whatever happened to the file since, what is read is what was made, or it is
made again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from dpa.data.shuffle import Indices
from dpa.errors import StorageError
from dpa.log import get_logger
from dpa.store import digest_of, disk_errors, write_json

log = get_logger(__name__)

FORMAT = 1
"""Raise it when the same key no longer gives the same numbers or the files look otherwise: all caches are made anew."""
_DIGEST = 16
"""Bytes per chunk."""
_SPARE = 64 * 2**20
"""Bytes that a cache leaves free on its disk."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which row lies where: a function of the data alone, never of what is there already."""

    counts: NDArray[np.int64]
    """[N] values per row."""
    order: Indices
    """[N] rows in the file's order."""
    bounds: Indices
    """[chunks + 1] places in ``order``: chunk c holds rows ``order[bounds[c] : bounds[c + 1]]``."""

    @property
    def chunks(self) -> int:
        """Number of chunks: what is made, checked and thrown away as one."""
        return len(self.bounds) - 1

    def rows(self, chunk: int) -> Indices:
        """The rows of a chunk, in the order of their values."""
        return self.order[self.bounds[chunk] : self.bounds[chunk + 1]]


class RowCache:
    """Rows under one key. Several processes may fill it and read it at once: whoever makes a chunk makes the same.

    Picklable; each process opens its own memory map at its first read.
    """

    def __init__(
        self, root: Path, kind: str, inputs: Mapping[str, Any], layout: Layout, dtype: type[np.floating[Any]]
    ) -> None:
        """
        Args:
            root: folder of all caches; may be shared by processes and runs.
            kind: first part of the folder's name.
            inputs: everything that the numbers depend on (JSON-able).
            layout: of the rows.
            dtype: of the values.
        """
        shape = hashlib.sha256()
        for array in (layout.counts, layout.order, layout.bounds):
            shape.update(array.astype("<i8").tobytes())
        self.key = digest_of(
            {"format": FORMAT, "kind": kind, "inputs": inputs, "layout": shape.hexdigest(), "dtype": dtype.__name__}
        )
        self.folder = root / f"{kind}-{self.key[:40]}"
        self.layout = layout
        self.dtype = np.dtype(dtype)
        self._about = {"key": self.key, "inputs": dict(inputs), "bytes": self.size, "chunks": layout.chunks}
        ends = np.cumsum(layout.counts[layout.order])
        self._chunk_starts = np.concatenate([[0], ends])[layout.bounds]
        self._starts = np.empty(len(ends), dtype=np.int64)
        self._starts[layout.order] = ends - layout.counts[layout.order]
        self._map: NDArray[Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of all values; known before anything is written."""
        return int(self.layout.counts.sum()) * self.dtype.itemsize

    def create(self) -> None:
        """Makes the files, at their full size, where there are none that can be used.

        Raises:
            StorageError: the disk has not enough room, or is not writable.
        """
        with disk_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.folder}.lock"):
                problem = self._problem()
                if problem is None:
                    return
                if self.folder.exists():
                    log.warning("%s: %s; it is made again", self.folder, problem)
                    shutil.rmtree(self.folder)
                self._allocate()

    def missing(self, chunks: Iterable[int]) -> list[int]:
        """Those of ``chunks`` that are not there. Reads and compares the others; what is damaged counts as missing."""
        absent, damaged = [], 0
        for chunk in chunks:
            known = self._known(chunk)
            if any(known) and known == self._digest(chunk, self._slice(chunk)):
                continue
            damaged += any(known)
            absent.append(chunk)
        if damaged:
            log.warning("%s: %d damaged chunks are thrown away and made again", self.folder, damaged)
        return absent

    def made(self, chunk: int) -> bool:
        """The chunk has a digest (:meth:`missing` compares it)."""
        return any(self._known(chunk))

    def write(self, chunk: int, values: NDArray[Any]) -> None:
        """Stores a chunk: all values of ``layout.rows(chunk)``, one row after the other.

        A chunk that is there and whole stays: another process was faster, and may be reading it.

        Raises:
            StorageError, UserError: the disk is full or not writable.
        """
        flat = np.ascontiguousarray(values, dtype=self.dtype).reshape(-1)
        start, end = (int(place) for place in self._chunk_starts[chunk : chunk + 2])
        assert len(flat) == end - start, (chunk, len(flat), end - start)
        with disk_errors(self.folder):
            if self.made(chunk):
                if not self.missing([chunk]):
                    return
                _write_at(self._digests, bytes(_DIGEST), chunk * _DIGEST)
            _write_at(self._values, flat.tobytes(), start * self.dtype.itemsize)
            _write_at(self._digests, self._digest(chunk, flat), chunk * _DIGEST)

    def read(self, row: int) -> NDArray[Any]:
        """A copy of one row's values, which must have been made."""
        start = int(self._starts[row])
        values: NDArray[Any] = self._values_map()[start : start + int(self.layout.counts[row])].copy()
        return values

    @property
    def _values(self) -> Path:
        return self.folder / "values.bin"

    @property
    def _digests(self) -> Path:
        return self.folder / "digests.bin"

    def _known(self, chunk: int) -> bytes:
        with open(self._digests, "rb", buffering=0) as file:
            file.seek(chunk * _DIGEST)
            return file.read(_DIGEST)

    def _problem(self) -> str | None:
        """Why the folder cannot be used; None where it can."""
        try:
            about = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
            sizes = self._values.stat().st_size, self._digests.stat().st_size
        except (OSError, ValueError) as error:
            return f"it is not complete ({error})"
        if not isinstance(about, dict) or about.get("key") != self.key:
            return "it belongs to another key"
        expected = self.size, self.layout.chunks * _DIGEST
        return None if sizes == expected else f"its files have {sizes} bytes, expected are {expected}"

    def _allocate(self) -> None:
        free = shutil.disk_usage(self.folder.parent).free
        if self.size + _SPARE > free:
            raise StorageError(
                f"{self.folder}: this cache needs {for_people(self.size)} and leaves {for_people(_SPARE)} free, but "
                f"its disk has {for_people(free)}; free space, name a store on another disk (DPA_STORE), or switch the "
                "cache off (stages.pretrain.text_cache=false, train.vision_cache=false)"
            )
        self.folder.mkdir()
        for path, size in ((self._values, self.size), (self._digests, self.layout.chunks * _DIGEST)):
            with open(path, "wb") as file:
                _reserve(file.fileno(), size)
                file.truncate(size)
        write_json(self.folder / "about.json", self._about)  # last: without it the folder does not count

    def _digest(self, chunk: int, values: NDArray[Any]) -> bytes:
        # the key and the place are part of it: no other cache's bytes, nor another chunk's, are ever taken for these
        found = hashlib.blake2b(digest_size=_DIGEST, key=bytes.fromhex(self.key), salt=chunk.to_bytes(16, "little"))
        found.update(np.ascontiguousarray(values).data)
        return found.digest()

    def _slice(self, chunk: int) -> NDArray[Any]:
        start, end = self._chunk_starts[chunk : chunk + 2]
        part: NDArray[Any] = self._values_map()[start:end]
        return part

    def _values_map(self) -> NDArray[Any]:
        if self._map is None:
            # an empty file cannot be mapped
            self._map = np.memmap(self._values, dtype=self.dtype, mode="r") if self.size else np.empty(0, self.dtype)
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}  # a map belongs to its process


def _reserve(handle: int, size: int) -> None:
    """Takes the room now: a write into a file with holes may find the disk full hours later."""
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot
            raise


def _write_at(path: Path, data: bytes, start: int) -> None:
    """Not through the map: a full disk is an error here and a signal there."""
    handle = os.open(path, os.O_WRONLY)
    try:
        while data:
            done = os.pwrite(handle, data, start)
            data, start = data[done:], start + done
    finally:
        os.close(handle)


def for_people(count: int) -> str:
    """Bytes as people say them: ``52.3 MB``."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"

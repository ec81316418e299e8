"""What image files hold, looked at once: digest, size, and whether they can be read.

A small database in the cache folder remembers each file by path, size and modification time, so captions and
instructions over the same images, other tokenizers and later runs ask the disk for nothing but these; a check that was
killed continues.
"""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from dpa.data.image_store import ImageStore, Place
from dpa.data.images import MENDING, decode_image, image_size
from dpa.data.loader import read_ahead, workers_for
from dpa.errors import DataError, StorageError

_CHUNK = 256
"""Images between two commits."""
_COLUMNS = "path, size, mtime, digest, width, height, decoded, max_pixels, problem"


@dataclass(frozen=True, slots=True)
class ImageFact:
    """One image file."""

    digest: bytes
    """blake2b (16 bytes) of the file's content; empty where there is no file."""
    width: int = 0
    height: int = 0
    """Pixels as stored; 0 where unknown."""
    problem: str | None = None
    """Why it cannot be used: the message of :func:`dpa.data.images.load_image`."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One file as the database remembers it."""

    path: str
    size: int
    mtime: int
    digest: bytes
    width: int
    height: int
    decoded: int
    max_pixels: int
    problem: str | None


def check_images(
    store: ImageStore, names: Sequence[str], *, cache_dir: Path, max_pixels: int, decode: bool
) -> Iterator[ImageFact]:
    """Looks at every image, on all cores where there are many.

    Args:
        store: of the images' source.
        names: as its samples have them.
        cache_dir: where the database lies.
        max_pixels: images above it are refused.
        decode: decode them completely, as training will; False: only the header (a truncated file then goes unseen).

    Yields:
        One fact per name, in order.

    Raises:
        StorageError: the database cannot be written.
    """
    if not names:
        return
    workers = workers_for(len(names))
    path = cache_dir / "images.sqlite"
    with _database(path) as database:
        chunks = _Chunks(store, names, path, max_pixels, decode, threads=2 if workers else _threads())
        for facts, rows in read_ahead(chunks, range(len(chunks)), workers):
            values = [tuple(getattr(row, name) for name in _COLUMNS.split(", ")) for row in rows]
            database.executemany(f"INSERT OR REPLACE INTO images ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)", values)
            database.commit()
            yield from facts


def _threads() -> int:
    return min(16, 2 * (os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Number of a chunk -> its facts, and the rows that the database lacks; run in the workers."""

    store: ImageStore
    names: Sequence[str]
    database: Path
    max_pixels: int
    decode: bool
    threads: int

    def __len__(self) -> int:
        return -(-len(self.names) // _CHUNK)

    def __getitem__(self, number: int) -> tuple[list[ImageFact], list[_Row]]:
        chunk = self.names[number * _CHUNK : (number + 1) * _CHUNK]
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(self._stat, chunk))
            files = {item[0].label: item for item in found if not isinstance(item, str)}
            known = self._known(list(files))
            new = [
                item
                for label, item in files.items()
                if not _still_good(known.get(label), item[1], max_pixels=self.max_pixels, decode=self.decode)
            ]
            rows = list(
                pool.map(lambda item: _inspect(self.store, item[0], item[1], self.max_pixels, self.decode), new)
            )
        known |= {row.path: row for row in rows}
        return [_fact(item if isinstance(item, str) else known[item[0].label]) for item in found], rows

    def _known(self, labels: list[str]) -> dict[str, _Row]:
        query = f"SELECT {_COLUMNS} FROM images WHERE path IN ({','.join('?' * len(labels))})"
        with closing(sqlite3.connect(self.database, timeout=60)) as database:  # a connection belongs to its process
            return {row[0]: _Row(*row) for row in database.execute(query, labels)}

    def _stat(self, name: str) -> tuple[Place, os.stat_result] | str:
        """Place and state of the file, or the problem with its path."""
        path = name
        try:
            place = self.store.place(name)
            path = str(place.path)
            stat = os.stat(path)
        except DataError as error:
            return str(error)
        except (FileNotFoundError, NotADirectoryError):
            return f"image missing: {path} does not exist; {MENDING}"
        except OSError as error:
            return f"image unreadable: {path}: {error.strerror}; {MENDING}"
        return (place, stat) if S_ISREG(stat.st_mode) else f"image unreadable: {path} is not a file; {MENDING}"


def _fact(found: _Row | str) -> ImageFact:
    if isinstance(found, str):
        return ImageFact(digest=b"", problem=found)
    return ImageFact(found.digest, found.width, found.height, found.problem)


def _still_good(row: _Row | None, stat: os.stat_result, *, max_pixels: int, decode: bool) -> bool:
    if row is None or (row.size, row.mtime, row.max_pixels) != (stat.st_size, stat.st_mtime_ns, max_pixels):
        return False
    return bool(row.decoded) or not decode


def _inspect(store: ImageStore, place: Place, stat: os.stat_result, max_pixels: int, decode: bool) -> _Row:
    digest, width, height, problem = b"", 0, 0, None
    name = place.label
    try:
        with open(name, "rb") if place.inside is None else io.BytesIO(store.content(place)) as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
            file.seek(0)
            width, height = image_size(file, name=name, max_pixels=max_pixels)
            if decode:
                file.seek(0)
                decode_image(file, name=name, max_pixels=max_pixels)
    except DataError as error:
        problem = str(error)
    except OSError as error:
        problem = f"image unreadable: {name}: {error.strerror or error}; {MENDING}"
    return _Row(name, stat.st_size, stat.st_mtime_ns, digest, width, height, int(decode), max_pixels, problem)


@contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(_open(path)) as database:
            yield database
    except sqlite3.Error as error:
        raise StorageError(
            f"{path}: {error}; the cache of image checks cannot be used: free space or remove the file, "
            "then start the same command again"
        ) from None


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connect(path)
    except sqlite3.OperationalError:  # full, locked, not writable
        raise
    except sqlite3.DatabaseError:  # damaged: only a cache
        path.unlink()
        return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=60)
    try:
        database.execute(
            "CREATE TABLE IF NOT EXISTS images (path TEXT PRIMARY KEY, size INTEGER, mtime INTEGER, digest BLOB, "
            "width INTEGER, height INTEGER, decoded INTEGER, max_pixels INTEGER, problem TEXT) WITHOUT ROWID"
        )
    except sqlite3.Error:
        database.close()
        raise
    return database

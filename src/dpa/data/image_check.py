"""What image files hold, looked at once: digest, size, and whether they can be read.

A small database in the cache folder remembers each file by path, size and modification time, so captions and
instructions over the same images, other tokenizers and later runs ask the disk for nothing but these; a check that was
killed continues.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sqlite3
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from dpa.data.images import MENDING, decode_image, image_size, safe_join
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
    root: Path, names: Sequence[str], *, cache_dir: Path, max_pixels: int, decode: bool
) -> Iterator[ImageFact]:
    """Looks at every image.

    Args:
        root: folder of the images.
        names: paths relative to it.
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
    workers = min(16, 2 * (os.cpu_count() or 1))
    folder = os.path.abspath(root)  # not resolved: that would ask the disk for every link
    with _database(cache_dir / "images.sqlite") as database, ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(names), _CHUNK):
            chunk = names[start : start + _CHUNK]
            found = pool.map(_stat, itertools.repeat(Path(folder)), chunk)
            yield from _check_chunk(list(found), database, pool, max_pixels, decode)


_Found = tuple[str, os.stat_result] | str
"""Path and state of a file, or the problem with its path."""


def _stat(root: Path, name: str) -> _Found:
    try:
        path = safe_join(root, name)
        stat = path.stat()
    except DataError as error:
        return str(error)
    except (FileNotFoundError, NotADirectoryError):
        return f"image missing: {path} does not exist; {MENDING}"
    except OSError as error:
        return f"image unreadable: {path}: {error.strerror}; {MENDING}"
    return (str(path), stat) if S_ISREG(stat.st_mode) else f"image unreadable: {path} is not a file; {MENDING}"


def _check_chunk(
    found: Sequence[_Found], database: sqlite3.Connection, pool: ThreadPoolExecutor, max_pixels: int, decode: bool
) -> Iterator[ImageFact]:
    files = [item for item in found if not isinstance(item, str)]
    marks = ",".join("?" * len(files))
    query = f"SELECT {_COLUMNS} FROM images WHERE path IN ({marks})"
    known = {row[0]: _Row(*row) for row in database.execute(query, [path for path, _ in files])}
    new = {
        path: stat
        for path, stat in files
        if not _still_good(known.get(path), stat, max_pixels=max_pixels, decode=decode)
    }
    rows = list(pool.map(lambda path: _inspect(path, new[path], max_pixels, decode), new))
    known |= {row.path: row for row in rows}
    values = [tuple(getattr(row, name) for name in _COLUMNS.split(", ")) for row in rows]
    database.executemany(f"INSERT OR REPLACE INTO images ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)", values)
    database.commit()
    for item in found:
        if isinstance(item, str):
            yield ImageFact(digest=b"", problem=item)
        else:
            row = known[item[0]]
            yield ImageFact(row.digest, row.width, row.height, row.problem)


def _still_good(row: _Row | None, stat: os.stat_result, *, max_pixels: int, decode: bool) -> bool:
    if row is None or (row.size, row.mtime, row.max_pixels) != (stat.st_size, stat.st_mtime_ns, max_pixels):
        return False
    return bool(row.decoded) or not decode


def _inspect(path: str, stat: os.stat_result, max_pixels: int, decode: bool) -> _Row:
    digest, width, height, problem = b"", 0, 0, None
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
            file.seek(0)
            width, height = image_size(file, name=path, max_pixels=max_pixels)
            if decode:
                file.seek(0)
                decode_image(file, name=path, max_pixels=max_pixels)
    except DataError as error:
        problem = str(error)
    except OSError as error:
        problem = f"image unreadable: {path}: {error.strerror or error}; {MENDING}"
    return _Row(path, stat.st_size, stat.st_mtime_ns, digest, width, height, int(decode), max_pixels, problem)


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

"""Finished stages by content: one folder per key, made whole or not at all.

``ROOT/<stage>-<key16>/`` holds ``manifest.json`` and the artefact; ``ROOT/<stage>-<key16>.partial/`` is work in
progress (saved states, metrics) that the next start continues. The key is a digest of everything that the result
depends on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpa.errors import CheckpointError, StorageError, UserError

FORMAT = 1
"""Raise it when the same settings no longer give the same artefact: every stage is then redone."""


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON-able value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """One stage's place in the store."""

    stage: str
    key: str
    inputs: dict[str, Any]
    folder: Path

    @property
    def partial(self) -> Path:
        """Work in progress."""
        return self.folder.with_name(self.folder.name + ".partial")

    def finished(self) -> bool:
        """The artefact is there, whole."""
        return (self.folder / "manifest.json").is_file()

    def manifest(self) -> dict[str, Any]:
        """What the finished stage wrote down.

        Raises:
            CheckpointError: the manifest is unreadable or belongs to another key.
        """
        path = self.folder / "manifest.json"
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); remove {self.folder} to redo the stage") from None
        if manifest.get("key") != self.key:
            raise CheckpointError(f"{path} belongs to another key; remove {self.folder} to redo the stage")
        return manifest


class Store:
    """The folder of all entries. Safe for several processes: each entry is locked while it is being made."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{root}: cannot make the store ({error.strerror}); choose another output or DPA_STORE"
            ) from None

    def cache(self) -> Path:
        """Folder of everything that can be made again; made if it is not there.

        Raises:
            StorageError, UserError: it cannot be made.
        """
        folder = self.root / ".cache"
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def entry(self, stage: str, inputs: dict[str, Any]) -> Entry:
        """The entry of a stage with these inputs (JSON-able: settings and digests)."""
        key = digest_of({"format": FORMAT, "stage": stage, "inputs": inputs})
        return Entry(stage=stage, key=key, inputs=inputs, folder=self.root / f"{stage}-{key[:16]}")

    @contextmanager
    def lock(self, entry: Entry) -> Iterator[None]:
        """Holds the entry; another process with the same stage gets a message instead of a second training."""
        lock = FileLock(str(entry.folder) + ".lock")
        try:
            with disk_errors(entry.folder):
                lock.acquire(timeout=1)
        except Timeout:
            raise UserError(
                f"stage {entry.stage} ({entry.folder.name}) is being trained by another process; wait or stop it"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, entry: Entry) -> Path:
        """The partial folder, made if it is not there yet."""
        with disk_errors(entry.partial):
            entry.partial.mkdir(parents=True, exist_ok=True)
        return entry.partial

    def finish(self, entry: Entry, artefact: Path, manifest: dict[str, Any]) -> None:
        """Publishes ``artefact`` (a folder inside ``entry.partial``) in one rename and drops the saved states.

        Raises:
            StorageError: the disk is full; the partial folder stays and the next start continues from it.
        """
        full = {"format": FORMAT, "stage": entry.stage, "key": entry.key, "inputs": entry.inputs, **manifest}
        with disk_errors(artefact):
            write_json(artefact / "manifest.json", full)
            if entry.folder.exists():  # a folder without a manifest: left by an interrupted removal
                shutil.rmtree(entry.folder)
            os.replace(artefact, entry.folder)
            fsync_folder(self.root)
        shutil.rmtree(entry.partial, ignore_errors=True)


_PLACE = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full disk into a message, and a place where nothing can be written.

    Raises:
        StorageError: the disk is full.
        UserError: no permission, a folder where a file shall be written or the other way round, too long a name.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _PLACE:
            raise UserError(
                f"{path} cannot be written: {error.filename or path}: {error.strerror}; choose another place"
            ) from None
        if error.errno in _PERMISSION:
            raise UserError(
                f"{path} cannot be written: {error.filename or path}: {error.strerror}; mend permissions or choose "
                "another place, then start the same command again: nothing finished is lost"
            ) from None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"{path}: {error.strerror}; nothing finished is lost: free space, then start the same command again"
            ) from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """See :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Atomic: temporary sibling, fsync, rename. Where that fails, nothing is left behind."""
    if path.is_dir():  # renaming would fail, too, but "." and "/" have no siblings
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # a name of its own: several processes may write one file (ranks, an ablation's shards on one store)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_output(path: Path, content: str | bytes) -> None:
    """Writes a file that a user has named: whole or not at all; its folder is made.

    What is no file (``/dev/stdout``, a pipe) is written to, never replaced; of a link, the file that it points to.

    Raises:
        UserError: it cannot be written there.
        StorageError: the disk is full.
    """
    # half a surrogate pair stands for a byte of a file's name that is no UTF-8
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with disk_errors(path):
        if path.exists() and not path.is_file() and not path.is_dir():
            path.write_bytes(data)
            return
        target = path.resolve() if path.is_symlink() else path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, data)


def fsync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(target: Path, place: Path) -> None:
    """``place`` becomes a relative link to ``target``; a copy where the file system has no links."""
    if place.is_symlink() or place.is_file():
        place.unlink()
    elif place.is_dir():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(os.path.relpath(target.resolve(), place.parent.resolve()), target_is_directory=target.is_dir())
    except OSError:
        (shutil.copytree if target.is_dir() else shutil.copy2)(target, place)


class FileDigests:
    """sha256 of files, remembered by (path, size, modification time) so that large weights are read once."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        try:
            self._known: dict[str, list[Any]] = json.loads(cache.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def folder(self, folder: Path, *, suffixes: tuple[str, ...]) -> str:
        """Digest over name and content of a folder's files with these suffixes (not recursive)."""
        files = sorted(item for item in folder.iterdir() if item.is_file() and item.name.endswith(suffixes))
        return digest_of([[item.name, self.file(item)] for item in files])

    def file(self, path: Path) -> str:
        """Digest of one file's content."""
        stat = path.stat()
        name = str(path.resolve())
        known = self._known.get(name)
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[name] = [stat.st_size, stat.st_mtime_ns, found]
        with disk_errors(self._cache):
            write_json(self._cache, self._known)
        return found

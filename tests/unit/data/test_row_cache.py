"""A wrong number is never read, a right one never made twice."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dpa.data.row_cache import Layout, RowCache, for_people
from dpa.errors import StorageError

LAYOUT = Layout(counts=np.array([2, 0, 3, 1, 4]), order=np.array([3, 0, 2, 1, 4]), bounds=np.array([0, 2, 4, 5]))
"""Chunks: rows 3 and 0; 2 and 1 (which has no values); 4."""


def cache(root: Path, layout: Layout = LAYOUT, **inputs: Any) -> RowCache:
    return RowCache(root, "text", inputs, layout, np.float32)


def row(number: int) -> NDArray[np.float32]:
    return np.arange(LAYOUT.counts[number], dtype=np.float32) + 10 * number + 0.25


def chunk(number: int) -> NDArray[np.float32]:
    return np.concatenate([row(place) for place in LAYOUT.rows(number)])


def fill(rows: RowCache) -> RowCache:
    rows.create()
    for number in rows.missing(range(LAYOUT.chunks)):
        rows.write(number, chunk(number))
    return rows


def test_rows_come_back(tmp_path: Path) -> None:
    rows = cache(tmp_path)
    rows.create()
    assert rows.size == 40 == (rows.folder / "values.bin").stat().st_size, "its size before anything is written"
    assert rows.missing(range(3)) == [0, 1, 2]
    rows.write(1, chunk(1))
    assert rows.missing(range(3)) == [0, 2]
    assert cache(tmp_path).missing([1]) == []
    fill(rows)
    for found in (rows, cache(tmp_path), pickle.loads(pickle.dumps(rows))):
        assert found.missing(range(3)) == []
        for number in range(5):
            np.testing.assert_array_equal(found.read(number), row(number))


def test_nothing_at_all(tmp_path: Path) -> None:
    none = np.zeros(0, dtype=np.int64)
    rows = cache(tmp_path, Layout(none, none, np.zeros(1, dtype=np.int64)))
    rows.create()
    assert rows.missing(range(0)) == []


def test_another_key_is_another_folder(tmp_path: Path) -> None:
    fill(cache(tmp_path, llm="a"))
    longer = Layout(LAYOUT.counts + 1, LAYOUT.order, LAYOUT.bounds)
    for other in (
        cache(tmp_path, llm="b"),
        cache(tmp_path, longer, llm="a"),
        RowCache(tmp_path, "text", {"llm": "a"}, LAYOUT, np.float16),
    ):
        other.create()
        assert other.missing(range(3)) == [0, 1, 2]
    assert cache(tmp_path, llm="a").missing(range(3)) == []


def test_another_keys_files_are_not_taken_for_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody moved a folder, or its files alone."""
    first, second = fill(cache(tmp_path, llm="a")), cache(tmp_path, llm="b")
    shutil.copytree(first.folder, second.folder)
    second.create()
    assert "it belongs to another key; it is made again" in caplog.text
    for name in ("values.bin", "digests.bin"):
        shutil.copyfile(first.folder / name, second.folder / name)
    assert second.missing(range(3)) == [0, 1, 2]


def test_a_chunk_is_not_taken_for_another(tmp_path: Path) -> None:
    layout = Layout(np.array([2, 2]), np.array([0, 1]), np.array([0, 1, 2]))
    rows = cache(tmp_path, layout)
    rows.create()
    rows.write(0, np.ones(2))
    digests = rows.folder / "digests.bin"
    digests.write_bytes(digests.read_bytes()[:16] * 2)
    (rows.folder / "values.bin").write_bytes((rows.folder / "values.bin").read_bytes()[:8] * 2)
    assert cache(tmp_path, layout).missing(range(2)) == [1]


@pytest.mark.parametrize("at", range(0, 40, 7))
def test_any_changed_byte_is_found(tmp_path: Path, at: int, caplog: pytest.LogCaptureFixture) -> None:
    rows = fill(cache(tmp_path))
    values = bytearray((rows.folder / "values.bin").read_bytes())
    values[at] ^= 1
    (rows.folder / "values.bin").write_bytes(values)
    again = cache(tmp_path)
    again.create()
    assert len(again.missing(range(3))) == 1
    assert "1 damaged chunks are thrown away and made again" in caplog.text
    fill(again)
    assert cache(tmp_path).missing(range(3)) == []
    np.testing.assert_array_equal(again.read(4), row(4))


@pytest.mark.parametrize("name", ["values.bin", "digests.bin", "about.json"])
def test_a_cut_or_lost_file_is_found(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = fill(cache(tmp_path))
    path = rows.folder / name
    path.write_bytes(path.read_bytes()[:-3])
    rows = cache(tmp_path)
    rows.create()
    assert "it is made again" in caplog.text
    assert rows.missing(range(3)) == [0, 1, 2]
    fill(rows)
    path.unlink()
    rows.create()
    assert rows.missing(range(3)) == [0, 1, 2]


@pytest.mark.parametrize("stop", range(4))
def test_a_write_that_stops_leaves_nothing_that_looks_made(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write of a few bytes at most, and the process is gone after one of them; also over a damaged chunk."""
    rows = fill(cache(tmp_path))
    values = rows.folder / "values.bin"
    values.write_bytes(values.read_bytes()[:-4] + b"abcd")
    write, left = os.pwrite, stop

    def short(handle: int, data: bytes, start: int) -> int:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return write(handle, data[:12], start)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", short)
        with pytest.raises(KeyboardInterrupt):
            rows.write(2, chunk(2))
    assert cache(tmp_path).missing(range(3)) == [2]
    rows.write(2, chunk(2))
    assert cache(tmp_path).missing(range(3)) == []


def test_who_comes_second_changes_nothing(tmp_path: Path) -> None:
    """Another process may be training with what is there."""
    rows = fill(cache(tmp_path))
    rows.write(2, chunk(2) + 1)
    np.testing.assert_array_equal(rows.read(4), row(4))


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 123_400_000))
    counts = np.array([50_000_000])
    rows = cache(tmp_path, Layout(counts, np.array([0]), np.array([0, 1])))
    with pytest.raises(
        StorageError, match=r"needs 200\.0 MB and leaves .* free, but its disk has 123\.4 MB; free space"
    ):
        rows.create()
    assert not rows.folder.exists()


def test_the_disk_is_full_while_it_is_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", refused)
        with pytest.raises(StorageError, match="No space left on device; nothing finished is lost"):
            cache(tmp_path).create()
    assert fill(cache(tmp_path)).missing(range(3)) == []


def test_bytes_for_people() -> None:
    assert [for_people(count) for count in (5, 5_250, 52_300_000, 660 * 10**9)] == [
        "5 bytes",
        "5.2 kB",
        "52.3 MB",
        "660.0 GB",
    ]

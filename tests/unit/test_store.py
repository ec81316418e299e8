"""The store: whole entries or none, one maker at a time, digests by content."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dpa.errors import CheckpointError, StorageError, UserError
from dpa.store import FileDigests, Store, disk_errors, link, write_json, write_output, write_text


def test_an_entry_is_published_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    entry = store.entry("proxy", {"rank": 8})
    assert not entry.finished()
    artefact = store.begin(entry) / "artefact"
    artefact.mkdir()
    (artefact / "weights").write_text("w")
    (entry.partial / "state-1").mkdir()
    store.finish(entry, artefact, {"steps": 3})
    assert entry.finished()
    assert not entry.partial.exists()
    assert (entry.folder / "weights").read_text() == "w"
    manifest = store.entry("proxy", {"rank": 8}).manifest()
    assert (manifest["steps"], manifest["inputs"], manifest["key"]) == (3, {"rank": 8}, entry.key)


def test_every_input_changes_the_key(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = {
        store.entry(*item).key for item in [("a", {}), ("b", {}), ("a", {"x": 1}), ("a", {"x": 2}), ("a", {"x": "1"})]
    }
    assert len(keys) == 5
    assert store.entry("a", {"x": 1, "y": 2}).key == store.entry("a", {"y": 2, "x": 1}).key


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    entry = Store(tmp_path).entry("proxy", {})
    entry.folder.mkdir()
    (entry.folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"remove .* to redo"):
        entry.manifest()
    (entry.folder / "manifest.json").write_text(json.dumps({"key": "other"}))
    with pytest.raises(CheckpointError, match="another key"):
        entry.manifest()


def test_one_process_makes_an_entry(tmp_path: Path) -> None:
    first, second = Store(tmp_path), Store(tmp_path)
    entry = first.entry("proxy", {})
    with first.lock(entry), pytest.raises(UserError, match="another process"), second.lock(entry):
        pass
    with second.lock(entry):
        pass


def test_a_place_where_nothing_can_be_written_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Not a directory; choose another place"), disk_errors(tmp_path / "file" / "a"):
        (tmp_path / "file" / "a").mkdir()
    with pytest.raises(UserError, match="Is a directory"), disk_errors(tmp_path):
        tmp_path.write_text("")
    for code in (errno.EACCES, errno.EPERM, errno.EROFS):
        with pytest.raises(UserError, match="mend permissions or choose another place"), disk_errors(tmp_path):
            raise OSError(code, os.strerror(code), "x")


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "folder", Path()):
        with pytest.raises(IsADirectoryError):
            write_text(path, "new")
    (tmp_path / "file").write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder"]


def test_two_writers_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of an ablation on one store write the same cache of digests; neither takes away what the other needs."""
    rename, path = os.replace, tmp_path / "digests.json"

    def late(*names: Path) -> None:
        monkeypatch.setattr(os, "replace", rename)
        write_json(path, {"writer": "faster"})
        rename(*names)

    monkeypatch.setattr(os, "replace", late)
    write_json(path, {"writer": "slower"})
    assert json.loads(path.read_text()) == {"writer": "slower"}
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_a_file_that_a_user_names(tmp_path: Path) -> None:
    write_output(tmp_path / "new" / "folder" / "page", "grün")
    assert (tmp_path / "new" / "folder" / "page").read_bytes() == "grün".encode()
    (tmp_path / "link").symlink_to(tmp_path / "other" / "target")
    write_output(tmp_path / "link", b"through")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "other" / "target").read_bytes() == b"through"
    write_output(tmp_path / "name", "caf\udce9")  # a file's name in Latin-1
    assert (tmp_path / "name").read_text() == "caf\\udce9"
    with pytest.raises(UserError, match="Is a directory; choose another place"):
        write_output(tmp_path, "x")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    write_output(tmp_path / "pipe", "flows")
    assert os.read(reader, 10) == b"flows"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert not list(tmp_path.rglob("*.tmp"))


def test_full_disk_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing finished is lost"), disk_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="Interrupted"), disk_errors(tmp_path):
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))


def test_a_store_below_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the store"):
        Store(tmp_path / "file" / "store")


def test_links_are_relative_and_replace_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "store" / "a").mkdir(parents=True)
    (tmp_path / "store" / "a" / "f").write_text("1")
    place = tmp_path / "run" / "checkpoint"
    place.mkdir(parents=True)
    link(tmp_path / "store" / "a", place)
    link(tmp_path / "store" / "a", place)
    assert not os.path.isabs(os.readlink(place))
    (tmp_path / "store").rename(tmp_path / "store2")
    (tmp_path / "store2").rename(tmp_path / "store")
    assert (place / "f").read_text() == "1"


def test_file_digests_follow_content(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "notes.md").write_text("ignored")
    digests = FileDigests(tmp_path / "digests.json")
    first = digests.folder(folder, suffixes=(".json",))
    (folder / "notes.md").write_text("still ignored")
    assert FileDigests(tmp_path / "digests.json").folder(folder, suffixes=(".json",)) == first
    write_json(folder / "config.json", {"a": 1})
    assert digests.folder(folder, suffixes=(".json",)) != first


def test_a_file_where_a_folder_must_be_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="choose another place"), disk_errors(folder):
            folder.mkdir(exist_ok=True)
    with pytest.raises(UserError, match="choose another place"), disk_errors(tmp_path):
        write_json(tmp_path, {})

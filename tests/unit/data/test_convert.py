"""Conversion keeps samples and pixels; the captions file is what the reference's stage 1 reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dpa.data.audit import audit
from dpa.data.convert import convert, write_captions
from dpa.data.settings import DataSource
from dpa.errors import DataError, UserError
from tests.unit.data.helpers import MAX_PIXELS, caption_row, chat_row, make_image, make_stage, open_file, write_json
from tests.unit.data.test_sources import as_kind


@pytest.mark.parametrize("kind", ["folder", "save_to_disk"])
def test_a_table_becomes_lines_and_files(tmp_path: Path, kind: str) -> None:
    path = as_kind(kind, tmp_path)
    done = convert(DataSource(path=path), tmp_path / "out")
    assert (done.samples, done.images_written, done.left_out) == (13, 9, 0)
    before = open_file(path, tmp_path / "cache")
    after = open_file(Path(done.file), tmp_path / "cache", images=done.images)
    assert [(sample.id, sample.turns) for sample in after] == [(sample.id, sample.turns) for sample in before]
    for old, new in zip(before, after, strict=True):
        assert len(old.images) == len(new.images)
        for one, other in zip(old.images, new.images, strict=True):
            assert other.startswith("images/")
            assert other.endswith(".png")
            pixels = [
                records.store.load(name, max_pixels=MAX_PIXELS) for records, name in ((before, one), (after, other))
            ]
            assert np.array_equal(*map(np.asarray, pixels))
    with pytest.raises(UserError, match=r"data\.jsonl exists"):
        convert(DataSource(path=path), tmp_path / "out")
    (tmp_path / "out" / "data.jsonl").unlink()
    assert convert(DataSource(path=path), tmp_path / "out").images_written == 0  # an interrupted call goes on


def test_files_stay_where_they_are_unless_copied(tmp_path: Path) -> None:
    make_image(tmp_path / "pictures" / "x" / "a.png")
    rows = [
        chat_row("one", "<image>\nQ ü", "A", image="x/a.png") | {"visual_spans": [[0, 1]]},
        chat_row("two", "<image> <image>\nQ", "A", image=["x/a.png", "x/a.png"]),
        chat_row("text", "Q", "A"),
        chat_row("gone", "<image>\nQ", "A", image="x/gone.png"),
    ]
    source = DataSource(path=write_json(tmp_path / "a.json", rows), images=tmp_path / "pictures")
    kept = convert(source, tmp_path / "kept")
    assert (kept.samples, kept.images_written, kept.images) == (4, 0, str(tmp_path / "pictures"))
    lines = [json.loads(line) for line in Path(kept.file).read_text(encoding="utf-8").splitlines()]
    assert lines == rows
    copied = convert(source, tmp_path / "copied", copy=True)
    assert (copied.samples, copied.images_written, copied.left_out) == (3, 1, 1)
    assert "'gone'" in copied.left_out_first[0]
    assert "in a recipe: {path: " in copied.text()
    data = make_stage([open_file(Path(copied.file), tmp_path / "cache", images=copied.images)])
    assert len(audit(data, max_bad_share=0.0, cache_dir=tmp_path / "cache").kept) == 3


def test_nothing_is_left_behind_by_a_bad_source(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat_row("s", "Q", "A")) + "\nnonsense\n")
    with pytest.raises(DataError, match="line 2: not JSON"):
        convert(DataSource(path=path), tmp_path / "out")
    with pytest.raises(DataError, match="line 2: not JSON"):
        write_captions(DataSource(path=path), tmp_path / "out" / "a.json")
    assert not any((tmp_path / "out").iterdir())


def test_captions_are_two_turns_without_image(tmp_path: Path) -> None:
    rows = [caption_row("a", "A cat.\n"), caption_row("b", " "), chat_row("c", "Q", "A")]
    rows[2]["conversations"] *= 2
    out = tmp_path / "blip_558k_text_only.json"
    done = write_captions(DataSource(path=write_json(tmp_path / "blip_558k.json", rows)), out)
    assert (done.samples, done.left_out) == (1, 2)
    written = json.loads(out.read_text(encoding="utf-8"))
    turns = [{"from": "human", "value": "Say."}, {"from": "gpt", "value": "A cat.\n"}]
    assert written == [{"id": "a", "conversations": turns}]
    with pytest.raises(UserError, match=r"name the file \.json"):
        write_captions(DataSource(path=tmp_path / "blip_558k.json"), tmp_path / "x.jsonl")


def test_captions_give_the_same_tokens_as_the_file_with_images(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [caption_row(f"s{n}", f"caption {n} ü") for n in range(5)])
    write_captions(DataSource(path=path), tmp_path / "a_text_only.json")

    def ids(path: Path) -> list[list[int]]:
        records = open_file(path, tmp_path / "cache")
        data = make_stage([records], format="plain", with_images=False, transform=None)
        return [data[place].encoded.input_ids for place in range(5)]

    assert ids(path) == ids(tmp_path / "a_text_only.json")


def test_captions_never_overwrite_what_they_come_from(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [caption_row("1", "a cat", image="a.png")])
    before = path.read_bytes()
    with pytest.raises(UserError, match="is the source itself"):
        write_captions(DataSource(path=path), tmp_path / "." / "a.json")
    assert path.read_bytes() == before
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        write_captions(DataSource(path=path), tmp_path / "folder.json")

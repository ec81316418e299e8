"""Files of every kind as records: parquet, save_to_disk folders, patterns; images inside tables, audited like files."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dpa.data.tables as tables_module
from dpa.data.audit import audit
from dpa.data.loader import make_loader
from dpa.data.sampler import BatchPlan
from dpa.data.settings import DataSource
from dpa.data.tables import row_group_megabytes
from dpa.errors import DataError
from tests.unit.data.helpers import MAX_PIXELS, caption_row, make_image, make_stage, open_file, write_json

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
MESSAGES = pa.list_(
    pa.struct([("role", pa.string()), ("content", pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())])))])
)


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def typed(question: str, answer: str, *, image: bool) -> list[dict[str, Any]]:
    first = [{"type": "image", "text": None}] if image else []
    return [
        {"role": "user", "content": [*first, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def messages_table(count: int = 9, start: int = 0) -> Any:
    """Every third row has no image."""
    numbers = range(start, start + count)
    images = [[] if n % 3 == 2 else [{"bytes": png(n), "path": None}] for n in numbers]
    return pa.table(
        {
            "id": pa.array([f"r{n}" for n in numbers]),
            "messages": pa.array([typed(f"Q{n}", f"A{n}", image=n % 3 != 2) for n in numbers], type=MESSAGES),
            "images": pa.array(images, type=pa.list_(IMAGE)),
        }
    )


def save_to_disk(folder: Path, tables: list[Any]) -> Path:
    """As ``datasets`` does: Arrow streams and a state."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(tables):05d}.arrow" for n in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def as_kind(kind: str, folder: Path) -> Path:
    """Two files of 9 and 4 rows."""
    first, second = messages_table(9), messages_table(4, 9)
    if kind == "save_to_disk":
        return save_to_disk(folder / "saved", [first, second])
    (folder / "shards").mkdir()
    pq.write_table(first, folder / "shards" / "a.parquet", row_group_size=2)
    pq.write_table(second, folder / "shards" / "b.parquet", row_group_size=2)
    return folder / "shards" / "*.parquet" if kind == "pattern" else folder / "shards"


@pytest.mark.parametrize("kind", ["folder", "pattern", "save_to_disk"])
def test_tables_with_images(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables_module, "_ROWS", 4)
    path = as_kind(kind, tmp_path)
    records = open_file(path, tmp_path / "cache")
    assert [sample.id for sample in records] == [f"r{n}" for n in range(13)]
    assert [turn.text for turn in records[0].turns] == ["<image>\nQ0", "A0"]
    assert [turn.text for turn in records[2].turns] == ["Q2", "A2"]
    assert records[2].images == ()
    assert records[10].where.endswith(("b.parquet, row 2", "data-00001-of-00002.arrow, row 2"))
    travelled = pickle.loads(pickle.dumps(records))
    for number in (12, 0, 7, 10):
        image = travelled.store.load(travelled[number].images[0], max_pixels=MAX_PIXELS)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(png(number)))))
    found = audit(make_stage([records]), max_bad_share=0.0, cache_dir=tmp_path / "cache")
    assert (len(found.kept), found.images) == (13, 9)


def test_reading_rows_reads_no_image_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: Any, *args: Any, columns: Any, **more: Any) -> Any:
        read.extend(columns)
        return original(self, *args, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    open_file(as_kind("folder", tmp_path), tmp_path / "cache")
    assert any(name.startswith("images.") for name in read)
    assert not any(name.endswith(".bytes") for name in read)


def test_workers_read_embedded_images(tmp_path: Path) -> None:
    data = make_stage([open_file(as_kind("folder", tmp_path), tmp_path / "cache")])
    flags = [bool(names) for names in data.images()]
    plan = BatchPlan([1] * 13, flags, global_batch=4, micro_batch=2, ranks=1, seed=0, group_by_length=False, epochs=1)

    def pixels(workers: int) -> list[Any]:
        loaded = make_loader(data, plan, 0, 0, data.rules, workers, False)
        return [item.batch.pixel_values.sum().item() for item in loaded if item.batch.pixel_values is not None]

    assert pixels(0) == pixels(2)  # the workers inherit open files


def test_single_image_column_bytes_or_path(tmp_path: Path) -> None:
    make_image(tmp_path / "images" / "a.png")
    conversation = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    images = [{"bytes": png(1), "path": "x"}, {"bytes": None, "path": "a.png"}, None, {"bytes": None, "path": "no.png"}]
    images.append({"bytes": b"nonsense", "path": None})
    images.append({"bytes": None, "path": "../a.png"})
    table = pa.table({"conversations": [conversation] * 6, "image": pa.array(images, type=IMAGE)})
    pq.write_table(table, tmp_path / "a.parquet")
    records = open_file(tmp_path / "a.parquet", tmp_path / "cache", images=tmp_path / "images")
    assert [len(sample.images) for sample in records] == [1, 1, 0, 1, 1, 1]
    found = audit(make_stage([records]), max_bad_share=1.0, cache_dir=tmp_path / "cache")
    assert found.kept.tolist() == [0, 1, 2]
    assert [item.kind for item in found.quarantined] == ["image missing", "image unreadable", "image path refused"]
    assert "a.parquet, row 4" in found.quarantined[0].reason
    assert "a.parquet, row 5, image 1 is not an image" in found.quarantined[1].reason


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_images(tmp_path: Path, kind: Any) -> None:
    conversation = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    table = pa.table({"conversations": [conversation] * 2, "image": pa.array([png(1), None], type=kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    records = open_file(tmp_path / "a.parquet", tmp_path / "cache")
    assert [len(sample.images) for sample in records] == [1, 0]
    assert records.store.load(records[0].images[0], max_pixels=MAX_PIXELS).size == (10, 7)


def test_a_changed_image_in_a_table_changes_the_digest(tmp_path: Path) -> None:
    digests = []
    for seed in (0, 1):
        images = pa.array([[{"bytes": png(seed), "path": None}]], type=pa.list_(IMAGE))
        table = pa.table({"messages": pa.array([typed("Q", "A", image=True)], type=MESSAGES), "images": images})
        pq.write_table(table, tmp_path / "a.parquet")
        digests.append(open_file(tmp_path / "a.parquet", tmp_path / "cache").digest)
    assert digests[0] != digests[1]


def test_pixmo_from_parquet_with_missing_images(tmp_path: Path) -> None:
    urls = [f"https://example.com/{n}.jpg" for n in range(3)]
    table = pa.table({"image_url": urls, "caption": ["A", "B", "C"], "transcripts": [["x"], [], None]})
    pq.write_table(table, tmp_path / "cap.parquet")
    folder = tmp_path / "pixmo_images"
    make_image(tmp_path / "a.png").rename(make_parent(folder / hashlib.sha256(urls[1].encode()).hexdigest()))
    (folder / hashlib.sha256(urls[2].encode()).hexdigest()).write_text(
        "404 Not Found"
    )  # Molmo's downloader leaves this
    records = open_file(tmp_path / "cap.parquet", tmp_path / "cache", images=folder)
    found = audit(make_stage([records], format="plain"), max_bad_share=1.0, cache_dir=tmp_path / "cache")
    assert found.kept.tolist() == [1]
    assert [item.kind for item in found.quarantined] == ["image missing", "image unreadable"]
    (folder / "urls.jsonl").write_text(json.dumps({"url": urls[0], "file": "named/0.png"}))
    make_image(folder / "named" / "0.png")
    mapped = open_file(tmp_path / "cap.parquet", tmp_path / "cache", images=folder)
    assert mapped[0].images == ("named/0.png",)
    assert mapped.digest != records.digest


def make_parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_several_image_roots(tmp_path: Path) -> None:
    for place in ("disk1/train2017/1.jpg", "disk2/images/sa_1.jpg", "disk3/pretrain/x.jpg", "rest/other/y.jpg"):
        make_image(tmp_path / place)
    names = ["coco/train2017/1.jpg", "sam/images/sa_1.jpg", "llava/llava_pretrain/pretrain/x.jpg", "other/y.jpg"]
    roots = {"coco": "disk1", "sam/": "disk2", "llava/llava_pretrain": "disk3", "llava": "nothing", "": "rest"}
    (tmp_path / "nothing").mkdir()
    path = write_json(tmp_path / "a.json", [caption_row(name, "A", image=name) for name in names])
    records = open_file(path, tmp_path / "cache", images={key: tmp_path / value for key, value in roots.items()})
    found = audit(make_stage([records], format="plain"), max_bad_share=0.0, cache_dir=tmp_path / "cache")
    assert len(found.kept) == 4
    few = open_file(path, tmp_path / "cache", images={"coco": tmp_path / "disk1"})
    reasons = [item.reason for item in audit(make_stage([few]), max_bad_share=1, cache_dir=tmp_path).quarantined]
    assert reasons[0] == (
        "image path refused: 'sam/images/sa_1.jpg' begins with none of coco; add its first part to `images`"
    )
    escape = open_file(
        write_json(tmp_path / "b.json", [caption_row("s", "A", image="coco/../x")]),
        tmp_path / "cache",
        images={"coco": tmp_path / "disk1"},
    )
    with pytest.raises(DataError, match="leaves the image folder"):
        escape.store.place("coco/../x")


def test_cambrian_lines_under_either_name_with_rows_without_image(tmp_path: Path) -> None:
    rows = [caption_row("a", "A", image="coco/1.jpg"), caption_row("b", "B", image=None)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    found = []
    for name in ("Cambrian737k.json", "Cambrian737k.jsonl"):
        (tmp_path / name).write_text(text)
        found.append(open_file(tmp_path / name, tmp_path / "cache"))
    assert [sample.images for sample in found[0]] == [("coco/1.jpg",), ()]
    assert found[0].digest == found[1].digest
    assert found[0][1].where == f"{tmp_path / 'Cambrian737k.json'}, line 2"


def test_a_recipe_may_force_the_format(tmp_path: Path) -> None:
    row = caption_row("a", "A") | {"messages": [{"role": "user", "content": "other"}]}
    path = write_json(tmp_path / "a.json", [row])
    assert open_file(path, tmp_path / "cache")[0].turns[1].text == "A"
    assert open_file(path, tmp_path / "cache", format="messages")[0].turns[0].text.endswith("other")


def test_what_is_not_a_source_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_json(tmp_path / "lists" / "a.json", [caption_row("a", "A")])
    with pytest.raises(DataError, match=r"lists: a folder without parquet files .* it holds a\.json: name the file"):
        open_file(tmp_path / "lists", cache)
    with pytest.raises(DataError, match=r"\*\.parquet: the pattern fits no file"):
        open_file(tmp_path / "*.parquet", cache)
    saved = save_to_disk(tmp_path / "dict" / "train", [messages_table(1)])
    (tmp_path / "dict" / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"holds several splits \(train\); name one of them, e\.g\. .*/train"):
        open_file(tmp_path / "dict", cache)
    (saved / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"state\.json names 1 files, missing: data-00000"):
        open_file(saved, cache)
    pq.write_table(pa.table({"question": ["x"], "answer": ["y"]}), tmp_path / "qa.parquet")
    with pytest.raises(
        DataError, match=r"qa\.parquet: no 'conversations', only answer, question; cannot tell the format"
    ):
        open_file(tmp_path / "qa.parquet", cache)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "qa.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read .* is the file whole"):
        open_file(tmp_path / "cut.parquet", cache)
    write_json(tmp_path / "mixed" / "a.json", [caption_row("a", "A")])
    pq.write_table(messages_table(1), tmp_path / "mixed" / "b.parquet")
    with pytest.raises(DataError, match=r"a\.json holds records, .*b\.parquet holds rows; make them two sources"):
        open_file(tmp_path / "mixed" / "*", cache)


def test_splits_of_a_folder_are_not_mixed(tmp_path: Path) -> None:
    for name in ("test-00000-of-00001.parquet", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        pq.write_table(messages_table(2), make_parent(tmp_path / "data" / name))
    with pytest.raises(DataError, match=r"several splits \(test, train\).* e\.g\. '.*/data/train-\*\.parquet'"):
        open_file(tmp_path, tmp_path / "cache")
    assert len(open_file(tmp_path / "data" / "train-*.parquet", tmp_path / "cache")) == 4
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    assert len(open_file(tmp_path, tmp_path / "cache")) == 4


def test_large_row_groups_are_seen(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(100_000)
    table = pa.table({"image": pa.array([{"bytes": noise[n:], "path": None} for n in range(9)], type=IMAGE)})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    pq.write_table(table, tmp_path / "b.parquet", use_dictionary=False, row_group_size=3)
    whole, parts = (row_group_megabytes(tmp_path / name, ("image",)) for name in ("a.parquet", "b.parquet"))
    assert whole == pytest.approx(0.9, rel=0.01)  # and the headers of pages
    assert parts == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "an empty mapping"),
        ({"/abs": "x"}, "not the beginning of a relative path"),
        ({"a/../b": "x"}, "not the beginning of a relative path"),
        ({"a": "x", "a/": "y"}, "names the prefix 'a' twice"),
    ],
)
def test_bad_prefixes(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSource(path=Path("a.json"), images=images)


def test_a_first_file_whose_images_are_all_null_hides_nothing(tmp_path: Path) -> None:
    """pyarrow gives such a column no type, so the file alone does not show that its source holds images."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    for name, images in (("0", pa.array([None])), ("1", pa.array([[{"bytes": png(1), "path": None}]]))):
        pq.write_table(pa.table({"id": [name], "messages": [turns], "images": images}), tmp_path / f"{name}.parquet")
    text, shown = open_file(tmp_path, tmp_path / "cache")
    assert (text.images, len(shown.images)) == ((), 1)
    records = open_file(tmp_path, tmp_path / "cache")
    assert records.store.load(shown.images[0], max_pixels=MAX_PIXELS).size == (10, 7)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_images_in_two_columns(tmp_path: Path, kind: str) -> None:
    """As in JSON: `image`, and where that is null `images`; whichever file has which column."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    one = pa.array([None, {"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}], type=IMAGE)
    several = [[{"bytes": png(n), "path": None} for n in row] for row in ([3, 4], [], [5])]
    both = pa.table({"messages": [turns] * 3, "image": one, "images": pa.array(several, type=pa.list_(IMAGE))})
    tables = [both, both.drop_columns(["image"]), both.drop_columns(["images"])]
    if kind == "arrow":
        path = save_to_disk(tmp_path / "saved", tables)
    else:
        path = tmp_path / "shards"
        for number, table in enumerate(tables):
            pq.write_table(table, make_parent(path / f"{number}.parquet"))
    records = open_file(path, tmp_path / "cache")
    shown = [[3, 4], [1], [2], [3, 4], [], [5], [], [1], [2]]
    assert [len(sample.images) for sample in records] == list(map(len, shown))
    for sample, seeds in zip(records, shown, strict=True):
        for name, seed in zip(sample.images, seeds, strict=True):
            image = records.store.load(name, max_pixels=MAX_PIXELS)
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(png(seed)))))


def test_marks_of_a_table(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a red dog"}]
    given = [[[2, 5], [6, 9]], [], None]
    for kind in (pa.list_(pa.list_(pa.int32())), pa.list_(pa.list_(pa.int64(), 2))):
        table = pa.table({"messages": [turns] * 3, "visual_spans": pa.array(given, type=kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        records = open_file(tmp_path / "a.parquet", tmp_path / "cache")
        assert [sample.visual_spans for sample in records] == [((2, 5), (6, 9)), (), None]
    pairs = pa.array([[{"start": 0, "end": 1}]])
    pq.write_table(pa.table({"messages": [turns], "visual_spans": pairs}), tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"a\.parquet, row 1: 'visual_spans' has \{'start': 0, 'end': 1\}, expected \[first"
    ):
        open_file(tmp_path / "a.parquet", tmp_path / "cache")


def test_a_list_of_urls_in_another_encoding_is_refused_with_its_line(tmp_path: Path) -> None:
    row = {"image_url": "https://x/1", "caption": "a cat"}
    path = write_json(tmp_path / "pixmo.json", [row])
    (tmp_path / "urls.jsonl").write_bytes(b'{"url": "https://x/1", "file": "\xe9.jpg"}\n')
    with pytest.raises(DataError, match=r"urls\.jsonl, line 1: expected an object .* in UTF-8"):
        open_file(path, tmp_path / "cache")

"""A stage's data: items, numbering over sources, errors that name the sample, travelling to workers."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpa.data.dataset import StageData
from dpa.errors import DataError, ModelError
from tests.unit.data.helpers import (
    IMAGE_TOKENS,
    SIDE,
    caption_row,
    chat_row,
    make_image,
    make_stage,
    make_tokenizer,
    marked,
    open_file,
    write_json,
)


@pytest.fixture
def stage(tmp_path: Path) -> StageData:
    """Two sources with image folders of their own; one sample has two images, one has none."""
    for name, seed in (("a/x.png", 1), ("a/y.png", 2), ("b/images/x.png", 3)):
        make_image(tmp_path / name, seed=seed)
    first = [
        chat_row("a0", "<image>\nQ", "A", image="x.png"),
        chat_row("a1", "<image> and <image>?", "B", image=["y.png", "x.png"]),
        chat_row("a2", "Q", "no image"),
    ]
    second = [chat_row("b0", "<image>\nQ", "C", image="x.png")]
    sources = [
        open_file(write_json(tmp_path / "a" / "a.json", first), tmp_path / "cache"),
        open_file(write_json(tmp_path / "b.json", second), tmp_path / "cache", images=tmp_path / "b" / "images"),
    ]
    return make_stage(sources)


def test_items(stage: StageData, tmp_path: Path) -> None:
    assert len(stage) == 4
    items = [stage[index] for index in range(4)]
    assert [item.sample_id for item in items] == ["a0", "a1", "a2", "b0"]
    assert items[3].where == f"{tmp_path / 'b.json'}, record 1"
    assert [len(item.encoded.image_spans) for item in items] == [1, 2, 0, 1]
    assert "assistant\n[B<|im_end|>]\n" in marked(items[1].encoded, stage.tokenizer, stage.rules)
    shapes = [None if item.pixel_values is None else tuple(item.pixel_values.shape) for item in items]
    assert shapes == [(1, 3, SIDE, SIDE), (2, 3, SIDE, SIDE), None, (1, 3, SIDE, SIDE)]


def test_pixels_are_in_reading_order_and_from_the_sources_folder(stage: StageData, tmp_path: Path) -> None:
    def pixels(path: str) -> torch.Tensor:
        assert stage.transform is not None
        return stage.transform(Image.open(tmp_path / path))

    two, other = stage[1].pixel_values, stage[3].pixel_values
    assert two is not None
    assert other is not None
    assert torch.equal(two, torch.stack([pixels("a/y.png"), pixels("a/x.png")]))
    assert torch.equal(other[0], pixels("b/images/x.png"))


def test_image_paths_per_sample(stage: StageData) -> None:
    assert list(stage.images()) == [("x.png",), ("y.png", "x.png"), (), ("x.png",)]


def test_text_only_stage_reads_no_image(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", [caption_row("s", "A dog.", image="missing.png")])
    stage = make_stage(
        [open_file(path, tmp_path / "cache")], format="plain", with_images=False, transform=None, max_length=5
    )
    item = stage[0]
    assert item.pixel_values is None
    assert len(item.encoded.input_ids) == 5
    assert item.encoded.cut == 2
    assert list(stage.images()) == [()]


@pytest.mark.parametrize(
    ("places", "ids"), [([0, 3], ["a0", "b0"]), ([2], ["a2"]), ([3], ["b0"]), ([0, 1, 2, 3], ["a0", "a1", "a2", "b0"])]
)
def test_select(stage: StageData, places: Sequence[int], ids: Sequence[str]) -> None:
    chosen = stage.select(np.array(places, dtype=np.int64))
    assert [chosen[index].sample_id for index in range(len(chosen))] == ids
    again = chosen.select(np.array([len(ids) - 1], dtype=np.int64))
    assert [again[0].sample_id, len(again)] == [ids[-1], 1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat_row("bad", "<image>\nQ", "A", image="nothing.png"), "image missing: .*nothing.png does not exist"),
        (chat_row("bad", "<image>\nQ", "A", image="../a.png"), "image path refused: '../a.png' leaves"),
        (chat_row("bad", "<image><image>Q", "A", image="x.png"), "images and markers differ"),
        (chat_row("bad", "<image>\nQ", "", image="x.png"), "nothing to learn"),
    ],
)
def test_errors_name_sample_file_and_record(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    make_image(tmp_path / "x.png")
    path = write_json(tmp_path / "a.json", [chat_row("good", "Q", "A"), row])
    stage = make_stage([open_file(path, tmp_path / "cache")])
    with pytest.raises(DataError, match=rf"sample 'bad' \(.*a\.json, record 2\): {reason}"):
        stage[1]


def test_slow_tokenizers_are_refused(stage: StageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(stage.tokenizer), "is_fast", False)
    with pytest.raises(ModelError, match=r"not a fast tokenizer.*tokenizer\.json"):
        make_stage(stage.sources)


def _encode(stage: StageData, index: int) -> tuple[list[int], bytes]:
    item = stage[index]
    assert item.pixel_values is not None
    return item.encoded.input_ids, item.pixel_values.numpy().tobytes()


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_travels_to_processes(stage: StageData, start: str) -> None:
    stage[0]  # the memory map is open here
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(_encode, (stage, 1)) == _encode(stage, 1)
    assert len(pickle.loads(pickle.dumps(stage))) == 4


def test_placeholders_per_image(stage: StageData) -> None:
    encoded = stage[1].encoded
    token = make_tokenizer().convert_tokens_to_ids("<image>")
    assert encoded.input_ids.count(token) == 2 * IMAGE_TOKENS

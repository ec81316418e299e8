"""Caches between the files and the batch: what a chunk is, and what an item gets from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpa.data import images
from dpa.data.cached import CachedData, TextCache, VisionCache, _bounds
from dpa.data.collate import collate
from dpa.data.dataset import StageData
from dpa.errors import DataError, UserError
from tests.unit.data.helpers import IMAGE_TOKENS, SIDE, chat_row, make_image, make_stage, open_file, write_json


def make_data(folder: Path) -> StageData:
    """Two sources; one image is used twice, one sample has two, one has none."""
    for number in range(3):
        make_image(folder / f"{number}.png", seed=number)
    rows = [
        chat_row("a", "<image>\nQ?", "long answer", image="0.png"),
        chat_row("b", "Q?", "A"),
        chat_row("c", "<image><image>\nQ?", "An", image=["1.png", "0.png"]),
    ]
    other = [chat_row("d", "<image>\nQ?", "Ans", image="2.png"), chat_row("e", "<image>\nQ?", "A", image="0.png")]
    return make_stage(
        [
            open_file(write_json(folder / f"{place}.json", these), folder / "cache")
            for place, these in enumerate((rows, other))
        ]
    )


def text_cache(data: StageData, root: Path, *, logits: bool = False, **inputs: Any) -> TextCache:
    items = [data.text_item(index) for index in range(len(data))]
    return TextCache(
        data,
        data.rules,
        root=root,
        inputs=inputs,
        lengths=np.array([len(item.encoded.input_ids) for item in items], dtype=np.int32),
        has_image=np.array([bool(item.encoded.image_spans) for item in items]),
        labels=np.array([sum(item.encoded.supervised) for item in items], dtype=np.int32),
        logits=logits,
    )


def test_chunks_keep_rows_times_longest_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpa.data.cached._CHUNK_TOKENS", 12)
    assert _bounds(np.array([1, 2, 3, 3, 4, 6, 6, 40, 50])).tolist() == [0, 4, 6, 7, 8, 9]
    assert _bounds(np.array([], dtype=np.int64)).tolist() == [0, 0]


def test_a_batch_of_the_pass_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path)
    monkeypatch.setattr(images, "load_image", None)
    cache = text_cache(data, tmp_path)
    (batch,) = cache.batches(range(1), 0, pin_memory=False)
    assert batch.pixel_values is None
    assert sorted(batch.sample_ids) == ["a", "b", "c", "d", "e"]
    lengths = batch.attention_mask.sum(dim=1) - batch.is_image.sum(dim=1)
    assert int(batch.is_image.sum()) == 5 * IMAGE_TOKENS
    # all but the sample with two images, whose second one counts as text: it need not be exact
    assert lengths.diff().ge(0).sum() >= 3


@pytest.mark.parametrize("logits", [False, True])
def test_numbers_come_back_in_the_order_of_the_labels(tmp_path: Path, logits: bool) -> None:
    data = make_data(tmp_path)
    cache = text_cache(data, tmp_path, logits=logits)
    cache.rows.create()
    (batch,) = cache.batches([0], 0, pin_memory=False)
    # each label's number says which token it is
    logp = batch.input_ids[batch.supervised].float() / 1000
    cache.write(0, logp, -logp if logits else None)
    cached = CachedData(data, text=cache)
    again = collate([cached[index] for index in (4, 1, 0)], data.rules)
    assert again.logp_without is not None
    assert again.pixel_values is not None
    torch.testing.assert_close(again.logp_without, again.input_ids[again.supervised].float() / 1000, rtol=0, atol=0)
    assert (again.logit_without is not None) == logits
    filler = collate([cached[0]], data.rules, filler=True)
    assert filler.logp_without is not None
    assert len(filler.logp_without) == 0


def test_features_take_the_images_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path)
    table = data.image_table()
    assert table.names == ((0, "0.png"), (0, "1.png"), (1, "2.png"), (1, "0.png"))
    assert [table.of(index) for index in range(5)] == [[0], [], [1, 0], [2], [3]]
    cache = VisionCache(data, root=tmp_path, inputs={}, rows=IMAGE_TOKENS, channels=3)
    cache.rows.create()
    (pixels,) = cache.pixels([0], 0, pin_memory=False)
    assert pixels.shape == (4, 3, SIDE, SIDE)
    assert torch.equal(pixels[1], data.pixels(0, "1.png"))
    features = torch.arange(4.0).view(4, 1, 1).expand(4, IMAGE_TOKENS, 3)
    cache.write(0, features)
    monkeypatch.setattr(images, "load_image", None)
    cached = CachedData(data, vision=cache)
    batch = collate([cached[index] for index in (3, 2, 1)], data.rules)
    assert batch.pixel_values is None
    assert batch.features is not None
    assert batch.features.dtype == torch.float16
    assert batch.features[:, 0, 0].tolist() == [2, 1, 0]
    assert batch.to("cpu").features is not None
    assert collate([cached[1]], data.rules).features is None


def test_features_beyond_float16_are_refused(tmp_path: Path) -> None:
    cache = VisionCache(make_data(tmp_path), root=tmp_path, inputs={}, rows=IMAGE_TOKENS, channels=3)
    cache.rows.create()
    with pytest.raises(UserError, match=r"features reach 7e\+04, float16 ends at 65504; set train.vision_cache=false"):
        cache.write(0, torch.full((4, IMAGE_TOKENS, 3), 7e4))
    assert cache.rows.missing([0]) == [0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_errors_arrive_as_they_were_raised(tmp_path: Path, workers: int) -> None:
    data = make_data(tmp_path)
    cache = VisionCache(data, root=tmp_path, inputs={}, rows=IMAGE_TOKENS, channels=3)
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=re.escape(f"image missing: {tmp_path / '1.png'}")):
        list(cache.pixels([0], workers, pin_memory=False))

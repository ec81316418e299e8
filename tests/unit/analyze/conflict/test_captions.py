"""Drawing captions from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpa.analyze.conflict import read_captions
from dpa.data.settings import DataSource
from dpa.errors import DataError
from tests.unit.analyze.conflict.conftest import write


def record(number: int, text: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nSay it."}, {"from": "gpt", "value": text}]
    return {"id": f"r{number}", "image": f"{number}.png", "conversations": turns, **more}


def source(folder: Path, records: list[Any]) -> DataSource:
    return DataSource(path=write(folder / "captions.json", records))


def test_the_sample_is_drawn_by_the_seed_and_keeps_the_files_order(tmp_path: Path) -> None:
    data = source(tmp_path, [record(number, f"caption {number}") for number in range(300)])
    first, again, other = (read_captions(data, count=40, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    numbers = [int(caption.id[1:]) for caption in first.captions]
    assert len(numbers) == 40
    assert numbers == sorted(numbers)
    assert numbers[-1] > 200, "the sample is not the file's beginning"
    assert first.captions[0].where == f"{data.path}, record {numbers[0] + 1}"


def test_a_smaller_sample_of_a_seed_is_part_of_a_larger_one(tmp_path: Path) -> None:
    data = source(tmp_path, [record(number, f"caption {number}") for number in range(50)])
    small, large = (set(read_captions(data, count=count).captions) for count in (10, 30))
    assert small < large


def test_what_is_no_caption_is_counted_and_more_than_there_is_may_be_asked_for(tmp_path: Path) -> None:
    talk = record(3, "one")
    talk["conversations"] += talk["conversations"]
    found = read_captions(source(tmp_path, [record(1, "a cat"), record(2, " \n"), talk]), count=2000)
    assert [caption.text for caption in found.captions] == ["a cat"]
    assert found.total == 3
    assert sorted(found.left_out.values()) == [1, 1]


def test_visual_spans_of_sampled_records_are_read(tmp_path: Path) -> None:
    records = [record(number, f"number {number}", visual_spans=[[7, 8 + len(str(number)) - 1]]) for number in range(99)]
    for caption in read_captions(source(tmp_path, records), count=9).captions:
        assert caption.visual_spans is not None
        ((start, end),) = caption.visual_spans
        assert f"r{caption.text[start:end]}" == caption.id


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ("all", "is str 'all', expected a list"),
        ([[0, 99]], r"is \[\[0, 99\]\].* 5 characters"),
        ([[3, 2]], r"has \[3, 2\], expected"),
        ([[0]], r"has \[0\], expected"),
        ([[0, "1"]], r"has \[0, '1'\], expected"),
    ],
)
def test_spans_outside_the_caption_are_named(tmp_path: Path, spans: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"captions.json, record 1: 'visual_spans' {message}"):
        read_captions(source(tmp_path, [record(1, "a cat", visual_spans=spans)]), count=5)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.json does not exist"):
        read_captions(DataSource(path=tmp_path / "gone.json"), count=5)

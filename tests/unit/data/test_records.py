"""LLaVA files as lazy sequences: what is read, what is refused and how the message names it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpa.data.records as module
from dpa.data.formats import normalise
from dpa.data.samples import Sample, Turn
from dpa.errors import DataError
from tests.unit.data.helpers import caption_row, open_file, write_json


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in pairs]


def test_a_row_becomes_a_sample(tmp_path: Path) -> None:
    conversation = turns(("system", "Be kind."), ("human", "Q <image> ü🙂"), ("gpt", "A"), ("user", "B"))
    conversation.append({"from": "assistant", "value": "C", "weight": 1})
    rows = [{"id": 7, "image": "x/ä.png", "conversations": conversation, "width": 3, "visual_spans": [[0, 1]]}]
    records = open_file(write_json(tmp_path / "a.json", rows), tmp_path / "cache")
    assert list(records) == [
        Sample(
            id="7",
            turns=(
                Turn("system", "Be kind."),
                Turn("user", "<image>\nQ  ü🙂"),
                Turn("assistant", "A"),
                Turn("user", "B"),
                Turn("assistant", "C"),
            ),
            images=("x/ä.png",),
            where=f"{tmp_path / 'a.json'}, record 1",
            visual_spans=((0, 1),),
        )
    ]


def test_marks_are_kept_as_they_are(tmp_path: Path) -> None:
    row: dict[str, Any] = {"conversations": turns(("human", "Q"), ("gpt", "A"))}
    given = [None, [], [[0, 1]], [[0, 2], [5, 9]]]
    rows = [row, *({**row, "visual_spans": spans} for spans in given)]
    records = open_file(write_json(tmp_path / "a.json", rows), tmp_path / "cache")
    assert [sample.visual_spans for sample in records] == [None, None, (), ((0, 1),), ((0, 2), (5, 9))]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("a.png", ("a.png",)),
        (["a.png"], ("a.png",)),
        (["a.png", "b.png"], ("a.png", "b.png")),
        (None, ()),
        ("", ()),
        ([], ()),
    ],
)
def test_image_is_a_string_or_a_list_or_nothing(tmp_path: Path, image: Any, expected: tuple[str, ...]) -> None:
    row = {"image": image, "conversations": turns(("human", "<image>" * len(expected)), ("gpt", "A"))}
    assert open_file(write_json(tmp_path / "a.json", [row]), tmp_path / "cache")[0].images == expected


def test_lines_count_by_line_and_ids_fall_back_to_numbers(tmp_path: Path) -> None:
    row = json.dumps({"conversations": turns(("human", "Q"), ("gpt", "A"))})
    path = tmp_path / "a.jsonl"
    path.write_text(f"\ufeff{row}\n\n  \n{row}", encoding="utf-8")
    first, second = open_file(path, tmp_path / "cache")
    assert (first.id, first.where) == ("1", f"{path}, line 1")
    assert (second.id, second.where) == ("4", f"{path}, line 4")


def test_a_list_and_lines_give_the_same_samples(tmp_path: Path) -> None:
    rows = [caption_row(f"s{n}", f"caption {n} 🙂\u2028\x00 1.5") for n in range(20)]
    listed = open_file(write_json(tmp_path / "a.json", rows), tmp_path / "cache")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = open_file(tmp_path / "a.jsonl", tmp_path / "cache")
    assert [(s.id, s.turns, s.images) for s in listed] == [(s.id, s.turns, s.images) for s in lines]


def text_of(turns: tuple[Turn, ...]) -> list[str]:
    return [turn.text for turn in turns]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("<image>\nQ", "<image>\nQ"),
        ("<image>Q", "<image>\nQ"),
        ("Q\n<image>", "<image>\nQ"),
        ("Q <image> R", "<image>\nQ  R"),
        ("<image>", "<image>"),
        ("  <image> \n", "<image>"),
        (" Q ", " Q "),
    ],
)
def test_one_marker_goes_first(given: str, expected: str) -> None:
    assert text_of(normalise((Turn("user", given),), given.count("<image>"))) == [expected]


def test_several_markers_stay_and_answers_are_left_alone() -> None:
    several = Turn("user", "<image> or <image>?")
    answer = Turn("assistant", "this <image>")
    assert normalise((several, answer), 3) == (several, answer)


@pytest.mark.parametrize("images", [1, 2])
def test_forgotten_markers_go_before_the_first_user_turn(images: int) -> None:
    given = (Turn("system", "S"), Turn("user", "Q"), Turn("assistant", "A"), Turn("user", "R"))
    assert text_of(normalise(given, images)) == ["S", "<image>\n" * images + "Q", "A", "R"]
    assert normalise(given, 0) == given


BAD: list[tuple[str, bytes, str]] = [
    ("a.json", b"", "holds nothing, expected a JSON list"),
    ("a.json", b"[]", "holds no sample"),
    ("a.jsonl", b"\n", "holds no sample"),
    ("a.json", b'{\n"id": 1}', "holds an object, expected a JSON list.*name it .jsonl"),
    ("a.json", b'{"id": 1}', "line 1: no 'conversations', only id; cannot tell the format"),
    ("a.json", b"hello", "text that starts with b'h'"),
    ("a.json", b'[{"conversations": []}, nonsense]', "record 2: not JSON"),
    ("a.json", b'[{"conversations": [{"from": "human", "value": "x"}]}, {"conv', "record 2: not JSON.*file whole"),
    ("a.json", b'[{"id": "\xff\xfe"}]', "record 1: not JSON"),
    ("a.jsonl", b'{"conversations": []}\nnonsense\n', "line 2: not JSON"),
    ("a.jsonl", b'{"id": "\xff"}\n', "line 1: not JSON"),
    ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: not JSON"),
    ("a.json", b"[3]", "record 1: int '3', expected an object"),
    ("a.json", b"[[1, 2]]", "record 1: a list of 2, expected an object"),
    ("a.json", b'[{"text": [], "id": 1}]', "record 1: no 'conversations', only id, text; cannot tell the format"),
    (
        "a.json",
        b'[{"conversations": []}, {"messages": [], "id": 1}]',
        "record 2: no 'conversations', only id, mess",
    ),
    ("a.json", b'[{"conversations": "x"}]', "record 1: 'conversations' is str 'x', expected a list"),
    ("a.json", b'[{"conversations": ["x"]}]', "record 1, turn 1: str 'x', expected an object with 'from' and 'value'"),
    ("a.json", b'[{"conversations": [{"role": "user"}]}]', r"turn 1: keys \['role'\], expected"),
    (
        "a.json",
        b'[{"conversations": [{"from": "tool", "value": ""}]}]',
        "'from' is 'tool', expected one of human, user",
    ),
    (
        "a.json",
        b'[{"conversations": [{"from": "human", "value": null}]}]',
        "turn 1: 'value' is null, expected a string",
    ),
    ("a.json", b'[{"conversations": [], "image": 3}]', "'image' is int '3', expected a path or a list of paths"),
    ("a.json", b'[{"conversations": [], "image": ["a", null]}]', "'image' is a list of 2, expected a path"),
    ("a.json", b'[{"conversations": [], "visual_spans": "x"}]', "'visual_spans' is str 'x', expected a list of"),
    ("a.json", b'[{"conversations": [], "visual_spans": [[0, 1], null]}]', "'visual_spans' has None, expected"),
    (
        "a.json",
        b'[{"conversations": [], "visual_spans": [[0, 1], [3, 3]]}]',
        r"has \[3, 3\], expected \[first character,",
    ),
    (
        "a.json",
        b'[{"conversations": [], "visual_spans": [[0, 9999999999999999999]]}]',
        r"has \[0, 9999999999999999999\]",
    ),
    ("a.json", b'[{"conversations": [], "visual_spans": [[0, true]]}]', r"has \[0, True\], expected"),
    ("a.jsonl", b'{"conversations": [{"from": "gpt", "value": "\\ud83d"}]}', "line 1: text with half a character"),
    ("a.json", b'[{"conversations": [{"from": "gpt", "value": "a\\ud83dA"}]}]', "record 1: text with half a character"),
    ("a.json", b"[" * 100_000, "record 1: not JSON"),
    ("a.json", b'[{"conversations": []}] {}', "record 2: not JSON .*more text after the end"),
    ("a.json", b'[{"conversations": []} {}]', "record 2: not JSON .*expected ']', found '{}]'"),
    ("a.txt", b"[]", "cannot tell its layout"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_files_are_refused_by_name_and_number(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        open_file(tmp_path / name, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/records/*.arrow*"))


def test_missing_file_and_missing_image_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data file .*no\.json does not exist"):
        open_file(tmp_path / "no.json", tmp_path / "cache")
    path = write_json(tmp_path / "a.json", [caption_row("s", "A")])
    with pytest.raises(DataError, match=r"image folder .*nowhere of .* does not exist"):
        open_file(path, tmp_path / "cache", images=tmp_path / "nowhere")


def many(tmp_path: Path, count: int, name: str = "a.json") -> Path:
    return write_json(tmp_path / name, [caption_row(f"s{n}", f"caption {n}", image=f"{n}.png") for n in range(count)])


def test_sequence_over_several_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 7)
    records = open_file(many(tmp_path, 30), tmp_path / "cache")
    assert len(records) == 30
    assert [records[n].id for n in range(30)] == [f"s{n}" for n in range(30)]
    assert records[-1].id == "s29"
    assert [sample.id for sample in records[3:9:2]] == ["s3", "s5", "s7"]
    with pytest.raises(IndexError):
        records[30]
    chosen = records.select(np.array([29, 0, 8, 8, 15]))
    assert [sample.id for sample in chosen] == ["s29", "s0", "s8", "s8", "s15"]
    assert [sample.id for sample in chosen.select(np.array([1, 4]))] == ["s0", "s15"]
    assert list(chosen.images()) == [(f"{n}.png",) for n in (29, 0, 8, 8, 15)]
    assert list(records.images()) == [(f"{n}.png",) for n in range(30)]


def test_the_second_opening_reads_the_index_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many(tmp_path, 5)
    first = open_file(path, tmp_path / "cache")

    def fail(rows: Any, index: Path) -> Any:
        raise AssertionError(f"{index} was written again")

    monkeypatch.setattr(module, "_write_index", fail)
    moved = path.rename(tmp_path / "moved.json")
    second = open_file(moved, tmp_path / "cache")
    assert [sample.turns for sample in second] == [sample.turns for sample in first]
    assert second[0].where == f"{moved}, record 1"
    assert second.digest == first.digest


def test_changed_content_is_read_anew(tmp_path: Path) -> None:
    before = open_file(many(tmp_path, 5), tmp_path / "cache")
    after = open_file(write_json(tmp_path / "a.json", [caption_row("other", "x")]), tmp_path / "cache")
    assert [sample.id for sample in after] == ["other"]
    assert len(before) == 5  # the old index is still there for who has it open
    assert before.digest != after.digest


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    path = many(tmp_path, 5)
    open_file(path, tmp_path / "cache")
    (index,) = tmp_path.glob("cache/records/*.arrow")
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(DataError, match=r"\.arrow, the index of .*a\.json, cannot be read .* remove it"):
        open_file(path, tmp_path / "cache")


def test_limit_draws_with_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    path = many(tmp_path, 50)

    def numbers(seed: int, limit: int) -> list[int]:
        return [int(sample.id[1:]) for sample in open_file(path, tmp_path / "cache", seed=seed, limit=limit)]

    drawn = numbers(0, 10)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 10
    assert drawn == numbers(0, 10)
    assert drawn != numbers(1, 10)
    assert set(drawn) < set(numbers(0, 20))  # more of the same draw: a larger limit adds samples
    assert numbers(0, 50) == numbers(0, 99) == list(range(50))


def numbers_of(path: Path, cache: Path, **source: Any) -> list[int]:
    return [int(sample.id[1:]) for sample in open_file(path, cache, **source)]


@pytest.mark.parametrize(
    ("weight", "least", "total"), [(2, 2, 100), (0.5, 0, 25), (1.5, 1, 75), (0.25, 0, 13), (1, 1, 50)]
)
def test_weight_says_how_often_an_epoch_reads_a_sample(tmp_path: Path, weight: float, least: int, total: int) -> None:
    path = many(tmp_path, 50)
    found = numbers_of(path, tmp_path / "cache", weight=weight)
    assert found == sorted(found)
    assert len(found) == total
    assert {found.count(number) - least for number in range(50)} <= {0, 1}
    assert found == numbers_of(path, tmp_path / "cache", weight=weight)
    if weight != int(weight):
        assert found != numbers_of(path, tmp_path / "cache", weight=weight, seed=1)


def test_weight_counts_what_limit_leaves(tmp_path: Path) -> None:
    path = many(tmp_path, 50)
    few = numbers_of(path, tmp_path / "cache", limit=10)
    assert numbers_of(path, tmp_path / "cache", limit=10, weight=2) == sorted(few * 2)
    half = numbers_of(path, tmp_path / "cache", limit=10, weight=0.5)
    assert len(half) == 5
    assert set(half) < set(few)
    with pytest.raises(DataError, match=r"weight 0\.01 of 10 samples leaves none"):
        open_file(path, tmp_path / "cache", limit=10, weight=0.01)


def test_weight_is_part_of_the_digest(tmp_path: Path) -> None:
    path = many(tmp_path, 20)
    digests = [open_file(path, tmp_path / "cache", **item).digest for item in ({}, {"weight": 2}, {"weight": 0.5})]
    digests.append(open_file(path, tmp_path / "cache", weight=0.5, seed=1).digest)
    assert len(set(digests)) == 4
    assert open_file(path, tmp_path / "cache", weight=1.0).digest == digests[0]


def test_digest_is_of_content_and_choice(tmp_path: Path) -> None:
    path = many(tmp_path, 20)
    whole = open_file(path, tmp_path / "cache").digest
    assert open_file(many(tmp_path, 20, "b.json"), tmp_path / "other").digest == whole
    assert open_file(path, tmp_path / "cache", limit=20).digest == whole
    few = open_file(path, tmp_path / "cache", limit=5).digest
    assert few != whole
    assert open_file(path, tmp_path / "cache", limit=5, seed=1).digest != few


def test_records_travel_to_other_processes_without_their_map(tmp_path: Path) -> None:
    records = open_file(many(tmp_path, 2000), tmp_path / "cache", limit=10)
    ids = [sample.id for sample in records]
    packed = pickle.dumps(records)
    assert len(packed) < 2000
    assert [sample.id for sample in pickle.loads(packed)] == ids

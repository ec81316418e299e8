"""Downloads to tasks: every format, every benchmark, and what is said where a file is not as it should be."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from dpa.data.tables import TableImages
from dpa.errors import DataError
from dpa.evaluate.data.files import LAYOUTS, Tsv
from dpa.evaluate.data.images import CellImage
from dpa.evaluate.data.read import read_benchmark, source_of
from dpa.evaluate.data.rows import ROWS, Task
from dpa.testing.benchmarks import odd_pictures, text64, write_tsv

ALL = 100


def tasks_of(name: str, folder: Path, limit: int | None = ALL) -> list[Task]:
    return list(read_benchmark(name, folder, limit=limit))


@pytest.mark.parametrize("name", ROWS)
def test_every_benchmark_is_read_and_every_picture_opens(name: str, files: Path) -> None:
    tasks = tasks_of(name, files)
    assert len(tasks) == 12
    assert all(task.record["id"] == task.id for task in tasks)
    for task in tasks:
        (image,) = task.images
        assert image.open().mode == "RGB"
        assert image.digest() == image.digest()
    assert len({task.where for task in tasks}) == 12


def test_mmbench_rolls_share_a_picture_and_none_is_an_option(files: Path) -> None:
    tasks = {task.id: task for task in tasks_of("mmbench", files)}
    first, rolled = tasks["3"], tasks["1000003"]
    assert first.record["choices"] == {"A": "red", "B": "blue", "C": "None", "D": "NA"}
    assert (first.record["answer"], rolled.record["answer"]) == ("A", "D")
    assert rolled.record["index"] == 1_000_003
    assert first.text.startswith("Hint: Look at the middle.\nNot at the edge.\nQuestion: Which colour")
    assert first.images[0].digest() == rolled.images[0].digest() != tasks["10"].images[0].digest()
    assert tasks["24"].record["choices"] == {"A": "yes", "B": "no"}, "empty cells are no options"
    assert "\tAnd tabbed?" in tasks["17"].text
    assert first.record["l2_category"] == "finegrained_perception"


def test_docvqa_answers_and_pages(files: Path) -> None:
    tasks = tasks_of("docvqa", files)
    answers = [task.record["answer"] for task in tasks[:6]]
    assert answers == [["4,500", "4500"], ["None"], ["O'Neill"], ["May 3, 1999"], ["[2]"], ["naïve café"]]
    assert [len({task.record["document"] for task in part}) for part in (tasks, tasks[:5])] == [3, 1]
    assert tasks[0].images[0].open().size == (1700, 2200)


def test_cvbench_has_two_files(files: Path, tmp_path: Path) -> None:
    tasks = tasks_of("cvbench", files)
    assert [task.id for task in tasks[5:7]] == ["2D-5", "3D-0"]
    assert tasks[6].record["source"] == "Omni3D"
    assert tasks[6].record["type"] == "3D"
    assert tasks[0].record["choices"] == {"A": "two", "B": "three", "C": "zero"}
    shutil.copy(files / "CV-Bench-2D.tsv", tmp_path)
    with pytest.raises(DataError, match=r"there is CV-Bench-2D\.tsv, and a part is missing.*\n.*\n.*CV-Bench-2D"):
        tasks_of("cvbench", tmp_path)


def test_mmvp_pairs_follow_the_table(files: Path) -> None:
    tasks = tasks_of("mmvp", files)
    assert [task.record["index"] for task in tasks] == list(range(1, 13))
    assert [task.record["answer"] for task in tasks[:2]] == ["A", "B"]
    assert tasks[4].record["choices"] == {"A": "left, then right", "B": "None"}
    assert 'Where does the "arrow" point? Options:\nA. left, then right\nB. None\n' in tasks[4].text


def test_copies_of_the_hub_say_the_same(files: Path) -> None:
    for name in ("mmbench", "naturalbench"):
        ours, theirs = tasks_of(name, files), tasks_of(name, files / "hub")
        assert [(task.text, task.record) for task in ours] == [(task.text, task.record) for task in theirs]
        for task, other in zip(ours, theirs, strict=True):
            assert task.images[0].open().tobytes() == other.images[0].open().tobytes()
    ours, theirs = tasks_of("ocrbench", files), tasks_of("ocrbench", files / "hub")
    assert [task.record["question_type"] for task in ours] == [task.record["question_type"] for task in theirs]
    assert [task.record["answer"] for task in ours] == [task.record["answer"] for task in theirs]
    assert source_of("ocrbench", files / "hub") == "ocrbench/test/data-00000-of-00001.arrow"


def test_ai2d_of_the_hub_gives_the_place_of_the_answer(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": odd_pictures()[0], "path": None}
    row = {"question": "What?", "options": ["a", "b", "None"], "answer": "2", "image": image}
    (tmp_path / "ai2d").mkdir()
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "ai2d" / "test-00000-of-00001.parquet")
    (task,) = tasks_of("ai2d", tmp_path)
    assert task.record == {"id": "0", "answer": "C", "choices": {"A": "a", "B": "b", "C": "None"}}
    pq.write_table(pa.Table.from_pylist([{**row, "answer": "3"}]), tmp_path / "ai2d" / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"row 1: answer 3 is none of the 3 options"):
        tasks_of("ai2d", tmp_path)


def test_a_limit_keeps_groups_whole(files: Path) -> None:
    assert [task.record["index"] % 1_000_000 for task in tasks_of("mmbench", files, 5)] == [3, 3, 3, 3]
    assert len(tasks_of("mmbench", files, 1)) == 4
    assert [task.id for task in tasks_of("naturalbench", files, 9)] == [str(number) for number in range(8)]
    assert len(tasks_of("mmvp", files, 3)) == 2
    assert len(tasks_of("ai2d", files, 5)) == 5


def test_rows_that_are_missing_are_counted(files: Path) -> None:
    with pytest.raises(DataError, match=r"300: 288 are missing.*--limit"):
        read_benchmark("mmvp", files)


def test_the_full_number_of_rows_is_enough(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Tsv(parts=(("AI2D_TEST.tsv", "", ""),), questions=12)
    monkeypatch.setitem(LAYOUTS, "ai2d", (full,))
    assert len(read_benchmark("ai2d", files)) == 12


def test_missing_files_say_where_they_are(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_benchmark("mmbench", tmp_path)
    text = str(caught.value)
    assert "MMBench_DEV_EN.tsv: https://opencompass" in text
    assert "md5 b6caf1133a01c6bb705cf753bb527ed8" in text
    assert "lmms-lab/MMBench" in text
    with pytest.raises(DataError, match="is no folder"):
        read_benchmark("mmbench", tmp_path / "none")


def ai2d_row(**changes: str | None) -> dict[str, str | None]:
    row = {"index": "0", "question": "q", "A": "x", "B": "y", "answer": "A", "image": text64(odd_pictures()[0])}
    return {**row, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "C"}, r"line 2: the answer 'C' is none of the options A, B"),
        ({"answer": None}, r"line 2: answer is missing or empty"),
        ({"question": None}, r"line 2: question is missing"),
        ({"image": None}, r"line 2: the row has no image"),
        ({"image": "77"}, r"line 2: image refers to row '77'"),
        ({"index": None}, r"line 2: index is empty"),
        ({"image": None, "image_path": "../x.png"}, r"line 2: image path refused"),
        ({"image": None, "image_path": "x.png"}, r"line 2: the image .*x\.png is missing"),
    ],
)
def test_a_wrong_row_is_named(changes: dict[str, str | None], message: str, tmp_path: Path) -> None:
    write_tsv(tmp_path / "AI2D_TEST.tsv", [ai2d_row(**changes)])
    with pytest.raises(DataError, match=message):
        tasks_of("ai2d", tmp_path)


def test_pictures_beside_the_tsv_and_lists(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number, data in enumerate(odd_pictures()[:2]):
        (tmp_path / "deep" / f"{number}.png").write_bytes(data)
    cells = [text64(data) for data in odd_pictures()[:2]]
    rows = [
        {**ai2d_row(image=None), "image_path": "['deep/0.png', 'deep/1.png']"},
        {**ai2d_row(index="1", image=repr(cells)), "image_path": None},
    ]
    write_tsv(tmp_path / "AI2D_TEST.tsv", rows)
    for task in tasks_of("ai2d", tmp_path):
        first, second = task.images
        assert first.open().tobytes() != second.open().tobytes()
        assert first.digest() != second.digest()


def test_a_broken_picture_names_its_row(tmp_path: Path) -> None:
    broken = text64(odd_pictures()[0][:60] + b"\0" * 60)
    write_tsv(tmp_path / "AI2D_TEST.tsv", [ai2d_row(), ai2d_row(index="1", image=broken)])
    tasks = tasks_of("ai2d", tmp_path)
    tasks[0].images[0].open()
    with pytest.raises(DataError, match=r"the image of .*AI2D_TEST\.tsv, line 3"):
        tasks[1].images[0].open()


def test_reading_touches_no_picture(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a picture was read")

    monkeypatch.setattr(CellImage, "open", never)
    monkeypatch.setattr(TableImages, "read", never)
    assert len(tasks_of("mmbench", files)) == len(tasks_of("mmbench", files / "hub")) == 12


def test_options_of_mmvp_must_be_two(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "mmvp", tmp_path / "mmvp")
    path = tmp_path / "mmvp" / "Questions.csv"
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    rows[2][2] = "Open or closed"
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.raises(DataError, match=r"line 3: Options must read '\(a\) ... \(b\) ...'"):
        tasks_of("mmvp", tmp_path)

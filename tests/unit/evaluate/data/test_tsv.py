"""The index of a TSV, and cells read again by their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpa.errors import DataError
from dpa.evaluate.data.tsv import read_cell, read_tsv

LONG = "QUJD" * 40


def written(folder: Path, text: str, name: str = "x.tsv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_cells_lines_and_places(tmp_path: Path) -> None:
    text = (
        "\ufeffindex\tquestion\tA\timage\n"
        f'0\t"two\nlines, a\ttab and ""quotes"""\tNone\t{LONG}\n'
        "\n"
        "1\tline\u2028separator\t\t0\n"
        f"2\tlast\tNA\t\"['{LONG}', 'b']\""
    )
    path = written(tmp_path, text)
    rows = read_tsv(path)
    assert [row.line for row in rows] == [2, 5, 6]
    assert rows[0].cells == {"index": "0", "question": 'two\nlines, a\ttab and "quotes"', "A": "None"}
    assert rows[1].cells == {"index": "1", "question": "line\u2028separator", "image": "0"}
    assert rows[2].cells["A"] == "NA"
    assert rows[0].image is not None
    assert rows[0].image.count is None
    assert rows[2].image is not None
    assert rows[2].image.count == 2
    for row in rows:
        for column, name in enumerate(("index", "question")):
            assert read_cell(path, row.start, row.length, column) == row.cells[name]
    assert read_cell(path, rows[0].start, rows[0].length, 3) == LONG


def test_a_cell_may_be_as_long_as_it_likes(tmp_path: Path) -> None:
    cell = "A" * 3_000_000
    path = written(tmp_path, f"index\timage\n7\t{cell}\n")
    (row,) = read_tsv(path)
    assert row.image is not None
    assert len(repr(row)) < 400, "the index holds no pixels"
    assert read_cell(path, row.start, row.length, 1) == cell


def test_a_file_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = written(tmp_path, "index\tA\n0\tx\n")
    first = read_tsv(path)
    assert read_tsv(path) is first
    written(tmp_path, "index\tA\n0\tlonger\n")
    assert read_tsv(path)[0].cells["A"] == "longer"
    with pytest.raises(DataError, match="changed since its index was read"):
        read_cell(path, 1000, 10, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"no column index, but nothing"),
        (b"id\tA\n0\tx\n", r"no column index, but id, A"),
        (b"index\tA\tB\n0\tx\ty\n1\tx\n", r"line 3: 2 cells, the header has 3; was the download cut"),
        (b'index\tA\n0\t"x\n1\ty\n', r"line 2: .*|line 2"),
        (b"index\tA\n0\t\xff\xfe\n", r"not UTF-8"),
        (b"index\tA\n0\tx\n0\ty\n", r"line 3: index '0' is there already in line 2"),
        (b"index\timage\n0\t[" + b"x" * 80 + b"]\n", r"line 2: the cell image begins with '\['"),
    ],
)
def test_what_is_wrong_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(content)
    if content.startswith(b'index\tA\n0\t"x'):
        assert read_tsv(path)[0].cells["A"] == "x\n1\ty\n", "an open quote runs to the end, as in pandas"
        return
    with pytest.raises(DataError, match=message):
        read_tsv(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_tsv(tmp_path / "none.tsv")

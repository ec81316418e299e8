"""A folder of downloads to tasks. Texts are read, pixels are not."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dpa.data.images import safe_join
from dpa.data.tables import TableImages, columns_of, table_rows
from dpa.errors import DataError
from dpa.evaluate.data.files import Found, Pictures, Table, Tsv, find_files
from dpa.evaluate.data.images import CellImage, FileImage, TableImage
from dpa.evaluate.data.rows import ROWS, Row, Task, group_of, listed
from dpa.evaluate.data.tsv import TsvRow, read_tsv
from dpa.evaluate.images import LazyImage
from dpa.log import get_logger

log = get_logger(__name__)

_INDEX = ("index", "Index", "lndex", "idx", "questionId")
"""Columns that order a benchmark's rows; the letter l is a spelling of MMVP's own table."""
_QUARTERS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""NaturalBench: (question, image) of a group's four rows."""


def read_benchmark(name: str, folder: Path, *, limit: int | None = None) -> Sequence[Task]:
    """The questions of one of the seven benchmarks.

    Args:
        name: a key of ``ROWS``.
        folder: holds the downloads of all benchmarks (``files.LAYOUTS``).
        limit: at most so many, but at least one whole group: rolls, pairs and fours of rows are not torn apart.

    Returns:
        Tasks in the order of the file; ids are unique.

    Raises:
        DataError: files are missing, unreadable or hold a row that cannot be used; without ``limit`` also where the
            number of questions is not the benchmark's. Names file and line, and both numbers.
    """
    found = find_files(name, folder)
    tasks = [ROWS[name](row) for row in _ordered(list(_rows(found)))]
    if not tasks:
        raise DataError(f"{name}: {found.paths[0]} holds no question")
    _check_ids(name, tasks)
    if limit is not None:
        return _first(name, tasks, limit)
    _check_count(name, found, len(tasks))
    return tasks


def source_of(name: str, folder: Path) -> str:
    """The files that :func:`read_benchmark` reads, for a table's footnote.

    Raises:
        DataError: see :func:`find_files`.
    """
    found = find_files(name, folder)
    names = [str(path.relative_to(folder)) for path in found.paths]
    return names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"


def _rows(found: Found) -> Iterator[Row]:
    if isinstance(found.layout, Tsv):
        for path in found.paths:
            part = path.stem.rpartition("-")[2] if len(found.paths) > 1 else ""
            yield from _tsv_rows(path, part)
    elif isinstance(found.layout, Pictures):
        yield from _csv_rows(found.paths[0], found.layout)
    else:
        assert found.kind in ("parquet", "arrow")
        yield from _table_rows(found, found.layout, "arrow" if found.kind == "arrow" else "parquet")


def _tsv_rows(path: Path, part: str) -> Iterator[Row]:
    rows = read_tsv(path)
    known = {row.cells["index"]: row for row in rows if "index" in row.cells}
    for row in rows:
        where = f"{path}, line {row.line}"
        if "index" not in row.cells:
            raise DataError(f"{where}: index is empty")
        yield Row(cells=row.cells, images=_cell_images(path, row, known, where), position=0, where=where, part=part)


def _cell_images(path: Path, row: TsvRow, known: dict[str, TsvRow], where: str) -> tuple[LazyImage, ...]:
    """Of the row itself, of the row that its cell names, or the files that ``image_path`` names."""
    holder = row
    reference = row.cells.get("image")
    if reference is not None:
        if reference not in known or known[reference].image is None:
            raise DataError(f"{where}: image refers to row {reference!r}, which is not there or has no image itself")
        holder = known[reference]
    elif row.image is None:
        return tuple(FileImage(_picture(path.parent, name, where)) for name in listed(row.cells.get("image_path", "")))
    assert holder.image is not None
    places: Sequence[int | None] = [None] if holder.image.count is None else range(holder.image.count)
    return tuple(
        CellImage(path, holder.start, holder.length, holder.image.column, place, holder.image.digest, where)
        for place in places
    )


def _picture(folder: Path, name: str, where: str) -> Path:
    if not name:
        raise DataError(f"{where}: the row has no image")
    try:
        path = safe_join(folder, name)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if not path.is_file():
        raise DataError(f"{where}: the image {path} is missing")
    return path


def _csv_rows(path: Path, layout: Pictures) -> Iterator[Row]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            line = reader.line_num
            for record in reader:
                where = f"{path}, line {line + 1}"
                line = reader.line_num
                if not record:
                    continue
                if len(record) != len(header):
                    raise DataError(f"{where}: {len(record)} cells, the header has {len(header)}")
                cells = {name.strip(): cell for name, cell in zip(header, record, strict=True) if cell}
                number = next((cells[name] for name in _INDEX if name in cells), "")
                image = FileImage(_picture(path.parent, f"{layout.pictures}/{number}.jpg", where))
                yield Row(cells=cells, images=(image,), position=0, where=where)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _table_rows(found: Found, layout: Table, kind: Literal["parquet", "arrow"]) -> Iterator[Row]:
    for number, path in enumerate(found.paths):
        columns = columns_of(kind, path)
        images = [TableImages(kind, found.paths, (name,)) for name in layout.images if name in columns]
        if not images:
            raise DataError(f"{path}: no column {' or '.join(layout.images)}, but {', '.join(columns)}")
        others = [name for name in columns if name not in layout.images]
        for place, cells in table_rows(kind, path, others):
            where = f"{path}, row {place}"
            pictures = [TableImage(source, number, place - 1, where) for source in images]
            row = Row(cells=_filled(cells), images=(), position=0, where=where)
            if len(pictures) == 1:
                yield replace(row, images=(pictures[0],))
            else:
                yield from _quarters(row, pictures)


def _filled(cells: dict[str, Any]) -> dict[str, Any]:
    """Without missing cells. Copies on the hub were written by way of pandas, whose mark of a missing cell became the
    text "nan" (MMBench: hints and options)."""
    return {name: value for name, value in cells.items() if value is not None and value not in ("", "nan")}


def _quarters(row: Row, pictures: Sequence[LazyImage]) -> Iterator[Row]:
    """The authors' NaturalBench: one row is two questions about two images."""
    index = row.integer("Index")
    for place, (question, image) in enumerate(_QUARTERS):
        cells = {
            "index": index * len(_QUARTERS) + place,
            "question": row.text(f"Question_{question}"),
            "answer": row.text(f"Image_{image}_Question_{question}"),
            "type": row.text("Question_Type", "Question Type"),
        }
        yield replace(row, cells=cells, images=(pictures[image],))


def _ordered(rows: list[Row]) -> list[Row]:
    """By index where all rows of a part have a number for one, as toolkits do before they count pairs and fours."""
    keys = []
    for row in rows:
        index = next((row.cells[name] for name in _INDEX if name in row.cells), None)
        if index is None or not str(index).isdecimal():
            return [replace(row, position=place) for place, row in enumerate(rows)]
        keys.append((row.part, int(index)))
    order = sorted(range(len(rows)), key=lambda place: keys[place])
    return [replace(rows[place], position=position) for position, place in enumerate(order)]


def _check_ids(name: str, tasks: Sequence[Task]) -> None:
    seen: dict[str, str] = {}
    for task in tasks:
        if task.id in seen:
            raise DataError(f"{name}: two questions have the id {task.id!r}: {seen[task.id]} and {task.where}")
        seen[task.id] = task.where


def _first(name: str, tasks: Sequence[Task], limit: int) -> list[Task]:
    groups: dict[int, list[Task]] = {}
    for place, task in enumerate(tasks):
        group = group_of(name, task.record)
        groups.setdefault(place if group is None else group, []).append(task)
    first: list[Task] = []
    for group_tasks in groups.values():
        if first and len(first) + len(group_tasks) > limit:
            break
        first += group_tasks
    return first


def _check_count(name: str, found: Found, count: int) -> None:
    official = found.layout.questions
    if official is None:
        log.info("%s: %d questions in %s; their official number is not known here", name, count, found.paths[0].name)
    elif count != official:
        missing = f"{official - count} are missing" if count < official else f"{count - official} are too many"
        names = ", ".join(path.name for path in found.paths)
        raise DataError(
            f"{name}: {count} questions in {names}, the benchmark has {official}: {missing}. Download the files again, "
            "or pass --limit (evaluate.limit) for a result marked as partial"
        )

"""Our benchmarks as lmms-eval's tasks, and YAML that points such a task at files on this disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpa.data.tables import TableKind, columns_of, table_rows
from dpa.errors import DataError, UserError
from dpa.evaluate.data.files import LAYOUTS, Table
from dpa.evaluate.harness.door import TaskRequest


@dataclass(frozen=True, slots=True)
class LmmsTask:
    """One row."""

    task: str
    yaml: str
    """Of that task, below lmms-eval's folder of tasks."""
    columns: tuple[str, ...]
    """Read by lmms-eval's prompt and scorer; other formats of the same benchmark lack some of them."""
    rows: int | None = None
    """The scorer works with exactly so many."""


LMMS_TASKS: Mapping[str, LmmsTask] = {
    # the static task: mmbench_en_dev would send answers to a hosted judge
    "mmbench": LmmsTask(
        task="mmbench_en_dev_static",
        yaml="mmbench/mmbench_en_dev_static.yaml",
        columns=("index", "question", "hint", "answer", "category", "L2-category", "source", "split", "image"),
    ),
    "ai2d": LmmsTask(
        task="ai2d",
        yaml="ai2d/ai2d.yaml",
        columns=("question", "options", "answer", "image"),
    ),
    "docvqa": LmmsTask(
        task="docvqa_val",
        yaml="docvqa/docvqa_val.yaml",
        columns=("question", "answers", "image"),
    ),
    "ocrbench": LmmsTask(
        task="ocrbench",
        yaml="ocrbench/ocrbench.yaml",
        columns=("question", "answer", "dataset", "question_type", "image"),
    ),
    "cvbench": LmmsTask(
        task="cv_bench",
        yaml="cv_bench/cv_bench.yaml",
        columns=("idx", "type", "task", "source", "prompt", "choices", "answer", "image"),
    ),
    "mmvp": LmmsTask(
        task="mmvp",
        yaml="mmvp/mmvp.yaml",
        columns=("Index", "Question", "Options", "Correct Answer", "image"),
    ),
    "naturalbench": LmmsTask(
        task="naturalbench",
        yaml="naturalbench/naturalbench.yaml",
        columns=("Index", "Image", "Question", "Answer", "Question_Type"),
        rows=7600,
    ),
}
"""Columns are those of the data sets that the tasks name."""

PAPER = tuple(LMMS_TASKS)


def task_requests(
    benchmarks: Sequence[str], data: Path | None, out: Path, tasks_folder: Path, *, limit: int | None
) -> tuple[TaskRequest, ...]:
    """What to ask of lmms-eval, with YAML for local files written into ``out``.

    A name is one of :data:`LMMS_TASKS`, a task of your own (``DATA/NAME/*.yaml``), or, without ``data``, any task that
    lmms-eval has.

    Args:
        data: folder of the files; None: lmms-eval loads them from the hub.
        out: gets one folder per benchmark.
        tasks_folder: lmms-eval's own tasks.
        limit: first so many questions.

    Raises:
        UserError: a benchmark has no files in ``data``, or cannot be cut to ``limit``.
        DataError: the files lack columns or rows.
    """
    requests = []
    for name in benchmarks:
        known = LMMS_TASKS.get(name)
        if known is not None and known.rows is not None and limit is not None and limit < known.rows:
            raise UserError(
                f"{name}: lmms-eval scores all of its {known.rows} rows or none: no --limit, or --harness dpa"
            )
        own = None if data is None else _own_task(data / name)
        if own is not None:
            requests.append(TaskRequest(benchmark=name, task=name, folder=str(own.absolute())))
        elif data is None:
            requests.append(TaskRequest(benchmark=name, task=name if known is None else known.task, folder=None))
        elif known is None:
            raise UserError(
                f"{name}: {data / name} has no YAML of a task of your own; with --data there are "
                f"{', '.join(LMMS_TASKS)}, without it all tasks of lmms-eval, with data from the hub"
            )
        else:
            folder = out / name
            _write_override(name, known, data, folder, tasks_folder)
            requests.append(TaskRequest(benchmark=name, task=known.task, folder=str(folder.absolute())))
    return tuple(requests)


def _own_task(folder: Path) -> Path | None:
    return folder if any(folder.glob("*.yaml")) else None


def _write_override(name: str, known: LmmsTask, data: Path, folder: Path, tasks_folder: Path) -> None:
    kind, files = _files(name, known, data)
    override: dict[str, Any] = {
        "include": str(tasks_folder / known.yaml),
        "task": known.task,
        "dataset_path": kind,
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": [str(file.absolute()) for file in files]}},
        "test_split": "test",
        "tag": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{known.task}.yaml").write_text(yaml.safe_dump(override, sort_keys=False), encoding="utf-8")


def _files(name: str, known: LmmsTask, data: Path) -> tuple[TableKind, list[Path]]:
    """The hub's tables where ``dpa eval`` itself would look for them."""
    layouts = [layout for layout in LAYOUTS[name] if isinstance(layout, Table)]
    places = list(dict.fromkeys(data / folder for layout in layouts for folder in layout.folders))
    seen: list[str] = []
    for layout in layouts:
        for place in (data / folder for folder in layout.folders):
            for pattern in layout.patterns:
                files = sorted(path for path in place.glob(pattern) if path.is_file())
                if not files:
                    continue
                kind: TableKind = "arrow" if files[0].suffix == ".arrow" else "parquet"
                missing = [column for column in known.columns if column not in columns_of(kind, files[0])]
                if not missing:
                    _check_rows(known, kind, files)
                    return kind, files
                seen.append(f"{files[0]} lacks {', '.join(missing)}")
                break
    if seen:
        raise DataError(f"{name}: lmms-eval's {known.task} reads other columns: {'; '.join(seen)}")
    raise UserError(
        f"{name}: lmms-eval reads the hub's parquet files ({layouts[0].hub}), and there are none in "
        f"{' or '.join(map(str, places))}; for other formats (TSV, csv and pictures) take --harness dpa"
    )


def _check_rows(known: LmmsTask, kind: TableKind, files: Sequence[Path]) -> None:
    if known.rows is None:
        return
    rows = sum(1 for file in files for _ in table_rows(kind, file, known.columns[:1]))
    if rows != known.rows:
        raise DataError(
            f"{files[0].parent}: lmms-eval's {known.task} scores exactly {known.rows} rows, there are {rows}"
        )

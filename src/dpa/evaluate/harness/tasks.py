"""Our benchmarks as lmms-eval's tasks, and YAML that points such a task at files on this disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from dpa.errors import DataError, UserError
from dpa.evaluate.harness.door import TaskRequest


@dataclass(frozen=True, slots=True)
class LmmsTask:
    """One row."""

    task: str
    yaml: str
    """Of that task, below lmms-eval's folder of tasks."""
    files: tuple[str, ...]
    """Patterns below ``DATA/BENCHMARK``, as the Hugging Face repositories are laid out; the first that finds files."""
    columns: tuple[str, ...]
    """Read by lmms-eval's prompt and scorer; other formats of the same benchmark lack some of them."""
    rows: int | None = None
    """The scorer works with exactly so many."""


LMMS_TASKS: Mapping[str, LmmsTask] = {
    # the static task: mmbench_en_dev would send answers to a hosted judge
    "mmbench": LmmsTask(
        task="mmbench_en_dev_static",
        yaml="mmbench/mmbench_en_dev_static.yaml",
        files=("en/dev*.parquet", "**/dev*.parquet", "*.parquet"),
        columns=("index", "question", "hint", "answer", "category", "L2-category", "source", "split", "image"),
    ),
    "ai2d": LmmsTask(
        task="ai2d",
        yaml="ai2d/ai2d.yaml",
        files=("**/test*.parquet", "*.parquet"),
        columns=("question", "options", "answer", "image"),
    ),
    "docvqa": LmmsTask(
        task="docvqa_val",
        yaml="docvqa/docvqa_val.yaml",
        files=("DocVQA/validation*.parquet", "**/validation*.parquet", "*.parquet"),
        columns=("question", "answers", "image"),
    ),
    "ocrbench": LmmsTask(
        task="ocrbench",
        yaml="ocrbench/ocrbench.yaml",
        files=("**/test*.parquet", "*.parquet"),
        columns=("question", "answer", "dataset", "question_type", "image"),
    ),
    "cvbench": LmmsTask(
        task="cv_bench",
        yaml="cv_bench/cv_bench.yaml",
        files=("**/test*.parquet", "*.parquet"),
        columns=("idx", "type", "task", "source", "prompt", "choices", "answer", "image"),
    ),
    "mmvp": LmmsTask(
        task="mmvp",
        yaml="mmvp/mmvp.yaml",
        files=("**/train*.parquet", "*.parquet"),
        columns=("Index", "Question", "Options", "Correct Answer", "image"),
    ),
    "naturalbench": LmmsTask(
        task="naturalbench",
        yaml="naturalbench/naturalbench.yaml",
        files=("**/test*.parquet", "*.parquet"),
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
            _write_override(name, known, data / name, folder, tasks_folder)
            requests.append(TaskRequest(benchmark=name, task=known.task, folder=str(folder.absolute())))
    return tuple(requests)


def _own_task(folder: Path) -> Path | None:
    return folder if any(folder.glob("*.yaml")) else None


def _write_override(name: str, known: LmmsTask, data: Path, folder: Path, tasks_folder: Path) -> None:
    files = _files(name, known, data)
    override: dict[str, Any] = {
        "include": str(tasks_folder / known.yaml),
        "task": known.task,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": [str(file.absolute()) for file in files]}},
        "test_split": "test",
        "tag": [],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{known.task}.yaml").write_text(yaml.safe_dump(override, sort_keys=False), encoding="utf-8")


def _files(name: str, known: LmmsTask, data: Path) -> list[Path]:
    files = next((found for pattern in known.files if (found := sorted(data.glob(pattern)))), None)
    if files is None:
        raise UserError(
            f"{name}: lmms-eval reads the Hugging Face parquet files, and {data} has none (looked for "
            f"{', '.join(known.files)}); for other formats (TSV, csv and pictures) take --harness dpa"
        )
    rows = 0
    for file in files:
        try:
            table = pq.ParquetFile(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is no parquet file ({error}); download it again") from None
        missing = [column for column in known.columns if column not in table.schema_arrow.names]
        if missing:
            raise DataError(
                f"{file}: lmms-eval's {known.task} reads the columns {', '.join(missing)}, the file has "
                f"{', '.join(table.schema_arrow.names)}"
            )
        rows += table.metadata.num_rows
    if known.rows is not None and rows != known.rows:
        raise DataError(f"{data}: lmms-eval's {known.task} scores exactly {known.rows} rows, these files have {rows}")
    return files

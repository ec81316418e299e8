"""YAML for local files, and what cannot be pointed at."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dpa.errors import DataError, UserError
from dpa.evaluate.harness.door import TaskRequest
from dpa.evaluate.harness.tasks import LMMS_TASKS, task_requests
from tests.unit.evaluate.harness.conftest import picture, write_table

OWN = Path("/lmms_eval/tasks")


def rows(name: str, count: int = 1) -> list[dict[str, object]]:
    def cell(column: str, number: int) -> object:
        return picture(number) if column.lower() == "image" else str(number)

    return [{column: cell(column, number) for column in LMMS_TASKS[name].columns} for number in range(count)]


def test_local_files_replace_the_hub_and_nothing_else(tmp_path: Path) -> None:
    for split in ("test", "validation"):
        for part in range(2):
            write_table(tmp_path / "docvqa" / "DocVQA" / f"{split}-0000{part}-of-00002.parquet", rows("docvqa"))
    write_table(tmp_path / "docvqa" / "InfographicVQA" / "validation-00000-of-00001.parquet", rows("docvqa"))
    (request,) = task_requests(["docvqa"], tmp_path, tmp_path / "out", OWN, limit=None)
    assert request == TaskRequest("docvqa", "docvqa_val", str(tmp_path / "out" / "docvqa"))
    written = yaml.safe_load((tmp_path / "out" / "docvqa" / "docvqa_val.yaml").read_text())
    assert written == {
        "include": "/lmms_eval/tasks/docvqa/docvqa_val.yaml",
        "task": "docvqa_val",
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {
                "test": [
                    str(tmp_path / "docvqa" / "DocVQA" / f"validation-0000{part}-of-00002.parquet") for part in range(2)
                ]
            }
        },
        "test_split": "test",
        "tag": [],
    }


def test_a_task_of_ones_own_and_the_hub(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "any.yaml").touch()
    assert task_requests(["mine"], tmp_path, tmp_path, OWN, limit=3) == (
        TaskRequest("mine", "mine", str(tmp_path / "mine")),
    )
    assert task_requests(["mmbench", "pope"], None, tmp_path, OWN, limit=None) == (
        TaskRequest("mmbench", "mmbench_en_dev_static", None),
        TaskRequest("pope", "pope", None),
    )


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    def ask(name: str, limit: int | None = None) -> None:
        task_requests([name], tmp_path, tmp_path / "out", OWN, limit=limit)

    (tmp_path / "AI2D_TEST.tsv").touch()
    with pytest.raises(UserError, match=r"none in .*/ai2d or .*/AI2D; for other formats \(TSV.*--harness dpa"):
        ask("ai2d")
    (tmp_path / "ai2d").mkdir()
    (tmp_path / "ai2d" / "test.parquet").write_text("PAR")
    with pytest.raises(DataError, match=r"test\.parquet"):
        ask("ai2d")
    write_table(tmp_path / "ai2d" / "test.parquet", [{"question": "?", "image": picture(0)}])
    with pytest.raises(DataError, match=r"ai2d reads other columns: .*test\.parquet lacks options, answer"):
        ask("ai2d")
    write_table(tmp_path / "naturalbench" / "test.parquet", rows("naturalbench", 8), image="Image")
    with pytest.raises(DataError, match="exactly 7600 rows, there are 8"):
        ask("naturalbench")
    with pytest.raises(UserError, match="all of its 7600 rows or none: no --limit"):
        ask("naturalbench", limit=8)
    with pytest.raises(UserError, match=r"pope has no YAML .* with --data there are mmbench, ai2d"):
        ask("pope")

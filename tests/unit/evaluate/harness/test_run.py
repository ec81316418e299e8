"""Two processes that talk; a package of that name stands in for lmms-eval, so that it also runs without the extra."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpa.errors import DpaError, UserError
from dpa.evaluate.harness import run
from dpa.evaluate.harness.door import Metric, Request, TaskRequest, metrics_of


def stand_in(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed lmms_eval whose import executes ``source``."""
    for path, text in {
        "lmms_eval/__init__.py": source,
        "lmms_eval-0.7.3.dist-info/METADATA": "Metadata-Version: 2.1\nName: lmms-eval\nVersion: 0.7.3\n",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    source_folder = Path(run.__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{source_folder}")


def evaluate(out: Path) -> None:
    run.evaluate_with_lmms_eval("no/such", benchmarks=["ai2d"], data=None, out=out)


def test_the_extra_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs an extra that is not installed: pip install .*lmms-eval==0\.7\.3"):
        evaluate(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            "raise RuntimeError('operator torchvision::nms')",
            UserError,
            r"does not import .*torchvision does not fit torch",
        ),
        (
            "print('noise'); import os; os.kill(os.getpid(), 9)",
            DpaError,
            r"(?s)SIGKILL \(out of memory.*ends with.*noise",
        ),
        ("import os; os._exit(3)", DpaError, r"exit code 3; the same command continues"),
    ],
)
def test_an_end_of_the_other_process(
    source: str, error: type[DpaError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path / "site", source, monkeypatch)
    with pytest.raises(error, match=message) as caught:
        evaluate(tmp_path / "out")
    assert type(caught.value) is error


def test_environment_of_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    local = run._environment(datasets_offline=True, hub_offline=True)
    assert (local["HF_DATASETS_OFFLINE"], local["HF_HUB_OFFLINE"]) == ("1", "1")
    hub = run._environment(datasets_offline=False, hub_offline=False)
    assert not {"WORLD_SIZE", "HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"} & set(hub)


def test_a_request_survives_the_disk(tmp_path: Path) -> None:
    request = Request("a b", (TaskRequest("ai2d", "ai2d", None), TaskRequest("x", "y", "/z")), "/out", 4, None)
    request.write(tmp_path / "request.json")
    assert Request.read(tmp_path / "request.json") == request


def test_only_numbers_are_metrics() -> None:
    results = {
        "mmbench_en_dev_static": {
            "alias": "mmbench",
            "gpt_eval_score,none": 62.5,
            "gpt_eval_score_stderr,none": "N/A",
            "gpt_eval_score_stderr_clt,none": 0.1,
            "submission,none": None,
        },
        "other": {"anls,strict": 0.5, "anls_stderr,strict": 0.25},
    }
    counts = {"mmbench_en_dev_static": {"original": 9, "effective": 8}}
    assert metrics_of("b", results, counts) == [
        Metric("b", "mmbench_en_dev_static", "gpt_eval_score", "none", 62.5, None, 8),
        Metric("b", "other", "anls", "strict", 0.5, 0.25, 0),
    ]


def test_a_table_for_people(tmp_path: Path) -> None:
    metrics = (Metric("docvqa", "docvqa_val", "anls", "none", 0.5, 0.25, 12),)
    result = run.HarnessResult("lmms-eval 0.7.3", "a/b", tmp_path, metrics)
    assert "docvqa_val  anls    12  0.5000 ± 0.2500" in result.text()
    assert result.text().splitlines()[0].endswith("lmms-eval 0.7.3")
    assert result.markdown().splitlines()[2] == "| docvqa | docvqa_val | anls | 12 | 0.5000 ± 0.2500 |"
    assert result.to_dict()["benchmarks"]["docvqa"][0]["value"] == 0.5

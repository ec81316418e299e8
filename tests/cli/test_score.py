"""``dpa eval score`` as a process, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpa.evaluate.scoring import SCORED_NAMES, ScoringRules, read_records, score
from tests.cli.test_cli import call

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "predictions"
PAGE = ROOT / "docs" / "evaluation.md"


def test_json_and_nothing_else() -> None:
    done = call("eval", "score", "--benchmark", "ai2d", "--predictions", EXAMPLES / "ai2d.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == score("ai2d", read_records(EXAMPLES / "ai2d.jsonl")).to_dict(per_sample=True)
    assert (result["profile"], result["vlmevalkit"], result["judge"]) == ("paper", "2025-05", "none")
    assert len(result["per_sample"]) == result["n"] == 15


def test_rules_and_text() -> None:
    arguments = ("--benchmark", "mmbench", "--predictions", EXAMPLES / "mmbench.jsonl")
    done = call("eval", "score", *arguments, "--profile", "strict", "--vlmevalkit", "2026-08")
    rules = ScoringRules(profile="strict", vlmevalkit="2026-08")
    assert done.stdout == score("mmbench", read_records(EXAMPLES / "mmbench.jsonl"), rules).text() + "\n"


def test_a_malformed_line_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 1, "prediction": "A", "answer": "A", "choices": {"A": "x"}}\n')
    done = call("eval", "score", "--benchmark", "ai2d", "--predictions", path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{path}, line 1, field choices" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_of_eval_shows_both() -> None:
    shown = call("eval", "--help").stdout
    assert "--data" in shown
    assert "Commands:\n  score" in shown
    assert "--predictions" not in shown
    assert "Missing argument" in call("eval").stderr


@pytest.mark.parametrize("benchmark", SCORED_NAMES)
def test_the_page_has_every_benchmark_and_metric(benchmark: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"| `{benchmark}` |" in page
    for name in score(benchmark, read_records(EXAMPLES / f"{benchmark}.jsonl")).metrics:
        prefix, slash, _ = name.partition("/")
        assert f"`{prefix}/NAME`" in page if slash else f"`{name}`" in page, name


def test_the_pages_output_is_real() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert score("mmbench", read_records(EXAMPLES / "mmbench.jsonl")).text() in page

"""The door: every benchmark by its example file, what a score holds, what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpa.errors import DataError, UserError
from dpa.evaluate.scoring import BENCHMARK_NAMES, SCORED_NAMES, ScoringRules, read_records, score

EXAMPLES = Path(__file__).parents[4] / "examples" / "predictions"
HEADLINES = {
    # benchmark: (paper 2025-05, paper 2026-08, strict); counted by hand from the files
    "mmbench": (40.0, 40.0, 20.0),
    "ai2d": (100 * 10 / 15, 100 * 9 / 15, 100 * 6 / 15),
    "docvqa": (100 * (6.5 + 6 / 7 + 5 / 6 + 2 / 3 - 1) / 12,) * 3,
    "ocrbench": (100 * 8 / 12, 100 * 8 / 12, 100 * 5 / 12),
    "cvbench": (62.5, 62.5, 50.0),
    "mmvp": (50.0, 50.0, 100 / 6),
    "naturalbench": (75.0, 75.0, 100 * 5 / 12),
    "lab": (50.0, 50.0, 25.0),
}
RULES = (ScoringRules(), ScoringRules(vlmevalkit="2026-08"), ScoringRules(profile="strict"))


def test_the_papers_benchmarks() -> None:
    assert BENCHMARK_NAMES == ("mmbench", "ai2d", "docvqa", "ocrbench", "cvbench", "mmvp", "naturalbench")
    assert (*BENCHMARK_NAMES, "lab") == SCORED_NAMES
    assert sorted(path.stem for path in EXAMPLES.glob("*.jsonl")) == sorted(SCORED_NAMES)


@pytest.mark.parametrize("benchmark", SCORED_NAMES)
def test_examples(benchmark: str) -> None:
    records = read_records(EXAMPLES / f"{benchmark}.jsonl")
    for rules, expected in zip(RULES, HEADLINES[benchmark], strict=True):
        found = score(benchmark, records, rules)
        headline = found.metrics[found.headline]
        assert headline == pytest.approx(expected, abs=1e-9)  # sums of a dozen fractions
        weight = sum(unit.weight for unit in found.units)
        by_units = 100 * sum(unit.weight * unit.score for unit in found.units) / weight
        assert headline == pytest.approx(by_units, abs=1e-9)
        assert found.n == len(found.records) == len(records)
        assert next(iter(found.metrics)) == found.headline
        assert {unit.group for unit in found.units} == {record.group for record in found.records}
        assert all(0 <= item.score <= 1 for item in (*found.records, *found.units))
        assert not any(record.empty and record.parsed for record in found.records)


def test_to_dict_and_text() -> None:
    found = score("mmvp", read_records(EXAMPLES / "mmvp.jsonl"), ScoringRules(profile="strict"))
    result = json.loads(json.dumps(found.to_dict(per_sample=True)))
    assert list(result) == [
        "benchmark", "profile", "vlmevalkit", "judge", "n", "metrics", "headline", "unparsed_share", "empty_share",
        "per_sample",
    ]  # fmt: skip
    assert (result["judge"], result["profile"], result["n"]) == ("none", "strict", 12)
    assert result["per_sample"]["1"] == 1.0
    assert "per_sample" not in found.to_dict(per_sample=False)
    assert "pair_accuracy" in found.text()
    assert "MMVP has 300 rows, these are 12" in found.text()


def test_wrong_names() -> None:
    with pytest.raises(UserError, match="no benchmark 'mme'; known: mmbench"):
        score("mme", [{}])
    with pytest.raises(UserError, match="profile is 'loose'; choose paper or strict"):
        ScoringRules(profile="loose")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="vlmevalkit is '2024'; choose 2025-05 or 2026-08"):
        ScoringRules(vlmevalkit="2024")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="lab: there is no record to score"):
        score("lab", [])


def test_scoring_imports_nothing_heavy() -> None:
    code = "import sys, dpa.evaluate.scoring; sys.exit(any(n in sys.modules for n in ('torch', 'numpy', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The paper's table for one checkpoint."""

from __future__ import annotations

from typing import Any

import pytest

from dpa.errors import UserError
from dpa.evaluate.overview import TITLES, average, overview
from dpa.evaluate.paper import PAPER_ROWS, paper_row
from dpa.evaluate.settings import PAPER


def result(share: float, **changes: Any) -> dict[str, Any]:
    shown = {
        "accuracy": share,
        "accuracy_interval": [share - 0.01, share + 0.01],
        "n": 4329,
        "unparsed_share": 0.021,
        "empty_share": 0.0,
        "profile": "paper",
        "vlmevalkit": "2025-05",
        "judge": "none",
        "partial": False,
    }
    return {**shown, **changes}


SEVEN = {name: result(number / 10) for number, name in enumerate(PAPER, 1)}


def test_average_is_the_plain_mean_of_all_seven() -> None:
    assert average(SEVEN) == pytest.approx(40)
    assert average({**SEVEN, "lab": result(1)}) == pytest.approx(40)
    assert average({name: SEVEN[name] for name in PAPER[1:]}) is None


def test_every_line_and_the_rules_in_the_title() -> None:
    lines = overview(SEVEN).split("\n")
    assert lines[0] == "% right; profile paper, VLMEvalKit 2025-05, judge none"
    assert [line.split()[0] for line in lines[4:11]] == list(TITLES.values())
    assert lines[5].split() == ["AI2D", "20.0", "19.0–21.0", "4329", "2.1", "0.0"]
    assert lines[11].split() == ["average", "40.0"]


def test_the_paper_beside_it() -> None:
    text = overview(SEVEN, paper_row("qwen2.5-7b/sharegpt4v"))
    assert "paper vanilla" in text
    assert text.split("\n")[11].split() == ["average", "40.0", "49.0", "51.0", "51.7"]
    assert "Qwen2.5-7B-Instruct, ShareGPT4V-PT; only its averages" in text
    with pytest.raises(UserError, match=r"no row 'x' .* known: qwen2\.5-7b/sharegpt4v"):
        paper_row("x")
    assert all(set(row.averages) == {"vanilla", "cal", "dpa"} for row in PAPER_ROWS.values())


def test_some_or_part() -> None:
    some = overview({"mmvp": SEVEN["mmvp"]}, paper_row("gemma2-9b/sharegpt4v"))
    assert "no average: it needs all seven" in some
    assert "\naverage" not in some
    part = overview({**SEVEN, "docvqa": result(0.5, partial=True)}, paper_row("gemma2-9b/sharegpt4v"))
    assert "partial: first questions only" in part
    assert "DocVQA (partial)" in part
    assert "average (partial)" in part
    assert "not comparable with the paper's" in part

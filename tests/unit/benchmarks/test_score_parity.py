"""Ours and lmms-eval's scorers on the same answers: runs where the extra is installed (make test-lmms)."""

from __future__ import annotations

import pytest
import score_parity
from parity.answers import GENERATORS, records
from parity.differences import Case, classify
from parity.totals import TOTALS


def test_answers_are_the_same_for_a_seed_and_hard() -> None:
    for benchmark in GENERATORS:
        rows = records(benchmark, count=200, seed=3)
        assert rows == records(benchmark, count=200, seed=3)
        assert rows != records(benchmark, count=200, seed=4)
        assert len({row["prediction"] for row in rows}) > 60
        assert any(not row["prediction"].strip() for row in rows)


def test_a_difference_of_no_class_is_told() -> None:
    row = {"prediction": "B", "choices": {"A": "x", "B": "y"}, "answer": "B"}
    classes, unexplained = classify("mmvp", [Case(row=row, ours=1.0, theirs=0.0, parsed=True)])
    assert not classes
    assert [case.row for case in unexplained] == [row]


@pytest.mark.parametrize("name", GENERATORS)
def test_every_difference_to_lmms_eval_has_a_class(name: str) -> None:
    pytest.importorskip("lmms_eval", reason="the extra dpa[lmms] is not installed")
    for seed in (1, 2):
        result = score_parity.against_lmms(name, 300, seed)
        assert result["n"] == 300
        assert result["unexplained"] == {"n": 0, "examples": []}
        assert (result["agreement"] == 1.0) == (not result["classes"])


@pytest.mark.parametrize("name", TOTALS)
def test_the_same_right_rows_give_the_same_numbers(name: str) -> None:
    pytest.importorskip("lmms_eval", reason="the extra dpa[lmms] is not installed")
    for ours, theirs in score_parity.totals(name, 1)["numbers"].values():
        assert 0 < ours < 100
        assert ours == pytest.approx(theirs, abs=1e-9)  # float64 sums of up to 7600 terms, in another order

"""Free answers: edit distance, ANLS, OCRBench, the lab."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpa.evaluate.scoring.texts import anls, edit_distance, normalise, ocrbench_exact, ocrbench_hit

WORDS = st.text(alphabet="ab ß中", max_size=7)


def naive_distance(first: str, second: str) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        same = first[i - 1] == second[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (not same))

    return distance(len(first), len(second))


@given(WORDS, WORDS)
def test_edit_distance(first: str, second: str) -> None:
    assert edit_distance(first, second) == naive_distance(first, second)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_anls_is_its_formula(answer: str, golds: list[str]) -> None:
    best = 0.0
    for gold in golds:
        first, second = " ".join(answer.lower().split()), " ".join(gold.lower().split())
        length = max(len(answer.upper()), len(gold.upper()))
        similarity = 1 - naive_distance(first, second) / length if length else 1.0
        best = max(best, similarity if similarity >= 0.5 else 0.0)
    assert anls(answer, golds) == best


@pytest.mark.parametrize(
    ("answer", "golds", "value"),
    [
        ("Coffee", ["coffee"], 1.0),
        ("cof", ["coffee"], 0.5),  # exactly the threshold: it stays
        ("co", ["coffee"], 0.0),
        ("x", ["coffee", "x"], 1.0),
        ("first\n second", ["first second"], 1.0),
        ("", ["a"], 0.0),
        ("", [""], 1.0),
        ("a" * 5000, ["b"], 0.0),
        ("co   ", ["coffe"], 0.0),
        ("北京", ["北京市"], 1 - 1 / 3),
    ],
)
def test_anls(answer: str, golds: list[str], value: float) -> None:
    assert anls(answer, golds) == pytest.approx(value, abs=1e-12)  # 1 - 1/3: one rounding


def test_anls_white_space_counts_in_the_toolkits_length_alone() -> None:
    assert anls("coffex    ", ["coffee"]) == pytest.approx(0.9, abs=1e-12)  # 1 - 1/10: one rounding
    assert anls("coffex    ", ["coffee"], strict=True) == pytest.approx(5 / 6, abs=1e-12)


def test_ocrbench() -> None:
    assert ocrbench_hit("The word is\nCENTRE.", ["x", "is Centre"], mathematics=False)
    assert not ocrbench_hit("10 42", ["1042"], mathematics=False)
    assert not ocrbench_hit("", ["1042"], mathematics=False)
    assert ocrbench_hit("Straße", ["STRAßE"], mathematics=False)


def test_ocrbench_mathematics_keeps_case_and_drops_spaces() -> None:
    assert ocrbench_hit("so \\frac {a}{b}\n+ c!", ["\\frac { a } { b } + c"], mathematics=True)
    assert not ocrbench_hit("\\FRAC{a}{b}", ["\\frac{a}{b}"], mathematics=True)
    assert not ocrbench_hit("\\frac{a}\t{b}", ["\\frac{a}{b}"], mathematics=True)  # spaces and line breaks only
    assert ocrbench_exact("\\frac{a}\t{b}", ["\\frac{a} {b}"], mathematics=True)
    assert not ocrbench_exact("\\frac{a}{b}.", ["\\frac{a}{b}"], mathematics=True)


def test_ocrbench_strict() -> None:
    assert ocrbench_exact(" Centre. ", ["x", "CENTRE"], mathematics=False)
    assert not ocrbench_exact("the Centre", ["CENTRE"], mathematics=False)


def test_lab() -> None:
    assert normalise(' "Top  Left"!\nbecause') == "top left"

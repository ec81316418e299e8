"""Which option an answer names: the toolkits' rules case by case, and the strict ones."""

from __future__ import annotations

import pytest

from dpa.evaluate.scoring.options import (
    cambrian_answer,
    cambrian_cvbench_options,
    cambrian_mmvp_options,
    first_word,
    folded,
    strict_option,
    strict_word,
    vlmevalkit_option,
)

ANIMALS = {"A": "a cat", "B": "a dog on the grass", "C": "a bird in a tree"}


@pytest.mark.parametrize(
    ("answer", "may_2025", "august_2026"),
    [
        ("A", "A", "A"),
        ("A.", "A", "A"),
        ("(A)", "A", "A"),
        ("**A**", "A", "A"),
        ("Answer: A", "A", "A"),
        ("The answer is B", "B", "B"),
        ("B\n\nIt lies there.", "B", "B"),
        ("a", None, None),  # a letter is a capital
        ("Answer", None, None),  # no letter inside a word
        ("A or B", None, None),
        ("A A", "A", "A"),
        ("A，因为", None, None),  # the Chinese comma does not part words
        ("选 A 。", "A", "A"),
        ("A\u3000", "A", "A"),
        ("", None, None),
        ("...", None, None),
        # the article: a letter anywhere in 2025-05; among the last four words in 2026-08, else the one text in it
        ("A cat sits", "A", "A"),
        ("A dog on the grass sleeps", "A", "B"),
        ("B because the grass there is green", "B", None),
        ("Because the grass there is green B", "B", "B"),
        # 2026-08 reads what begins after "answer is"
        ("The answer is **B**. The dog lies on the grass, asleep.", "B", "B"),
        ("The answer is A or C", None, "A"),
        ("The answer is black", None, "B"),
        ("THE ANSWER IS c", None, "C"),
        ("The answer is D", None, None),
        ("It is a cat", "A", "A"),
        ("A CAT!", "A", "A"),
        ("a cat and a bird in a tree", None, None),
        (
            "I would say that what we can see in this picture is certainly a cat, and nothing else",
            "A",
            None,
        ),  # too long
        ("Z", None, None),
        ("Z: a cat", None, None),  # Z says "none of them": texts are not looked at
        ("Sorry, I can't help with images of people yet. A", None, None),
        ("Cannot determine the answer: a cat", None, None),
        ("Failed to obtain answer via API: a cat", "A", "A"),
    ],
)
def test_vlmevalkit(answer: str, may_2025: str | None, august_2026: str | None) -> None:
    assert vlmevalkit_option(answer, ANIMALS, "2025-05") == may_2025
    assert vlmevalkit_option(answer, ANIMALS, "2026-08") == august_2026


def test_vlmevalkit_texts_inside_texts_none_and_na() -> None:
    colours = {"A": "red", "B": "dark red", "C": "None", "D": "NA"}
    assert vlmevalkit_option("red", colours, "2025-05") == "A"
    assert vlmevalkit_option("dark red", colours, "2025-05") is None  # red is in it, too
    assert vlmevalkit_option("None", colours, "2025-05") == "C"
    assert vlmevalkit_option("none of these", colours, "2025-05") == "C"
    assert vlmevalkit_option("NA", colours, "2025-05") == "D"
    assert vlmevalkit_option("final", colours, "2025-05") == "D"  # na is in it
    assert vlmevalkit_option("ROT", {"A": "Zürich", "B": "Köln"}, "2025-05") is None
    assert vlmevalkit_option("ZÜRICH", {"A": "Zürich", "B": "Köln"}, "2025-05") == "A"


def test_vlmevalkit_knows_only_the_choices_letters() -> None:
    assert vlmevalkit_option("C", {"A": "x y", "B": "z"}, "2025-05") is None
    assert vlmevalkit_option("A C", {"A": "x y", "B": "z"}, "2025-05") == "A"


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("(A)", "a"),
        (" B. ", "b"),
        ("A)", "a"),
        ("(a).", "a"),
        ("The answer is (C).", "c"),
        ("Answer: D", "d"),
        ("Answer is: A", ": a"),  # the colon stays
        ("The answer is B. No, the answer is C", "c"),
        ("Open:,.", "open"),
        ("", ""),
    ],
)
def test_cambrian_clean_up(answer: str, left: str) -> None:
    assert cambrian_answer(answer) == left


@pytest.mark.parametrize(
    ("answer", "options"),
    [
        ("A", {"A"}),
        ("(b)", {"B"}),
        ("Open.", {"A"}),
        ("The answer is closed", {"B"}),
        ("A. Open", set()),
        ("The door is open", set()),
        ("Answer is: A", set()),
        ("A cat", set()),
        ("", set()),
    ],
)
def test_mmvp(answer: str, options: set[str]) -> None:
    assert cambrian_mmvp_options(answer, {"A": "Open", "B": "Closed"}) == options


def test_mmvp_a_letter_that_is_another_options_text() -> None:
    assert cambrian_mmvp_options("b", {"A": "B", "B": "C"}) == {"A", "B"}


@pytest.mark.parametrize(
    ("answer", "in_2d", "in_3d"),
    [
        ("(A)", {"A"}, {"A"}),
        ("B. 3", {"B"}, {"B"}),
        ("The answer is (B)", {"B"}, {"B"}),
        ("A cat is closer", {"A"}, {"A"}),
        ("above", {"A"}, {"A"}),  # its first character
        ("answer is: A", set(), set()),
        ("( A)", set(), set()),
        ("chair", set(), set()),
        ("3", set(), {"B"}),
        ("33", set(), {"B"}),
        ("", set(), set()),
    ],
)
def test_cvbench(answer: str, in_2d: set[str], in_3d: set[str]) -> None:
    choices = {"A": "chair", "B": "3"}
    assert cambrian_cvbench_options(answer, choices, with_texts=False) == in_2d
    assert cambrian_cvbench_options(answer, choices, with_texts=True) == in_3d


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("Yes", "Yes"),
        ("no.", "No"),
        ("Yesterday", None),
        ("Nothing, none, not", None),
        ("Yesterday it rained; no", "No"),
        ("No, yes", "No"),
        ("well,\nYES", "Yes"),
        ("是yes", None),  # a Chinese character is part of the word
        ("", None),
    ],
)
def test_naturalbench_yes_no(answer: str, word: str | None) -> None:
    assert first_word(answer, ("Yes", "No")) == word


def test_naturalbench_letters() -> None:
    assert first_word("A cat is in B", ("A", "B")) == "A"
    assert first_word("it is b, not a", ("A", "B")) == "B"
    assert first_word("Above", ("A", "B")) is None


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("A", "A"),
        (" a ", "A"),
        ("A.", "A"),
        ("(A)", "A"),
        ("[A].", "A"),
        ("( A )", "A"),
        ("A..", None),
        ("A)", None),
        ("(A]", None),
        ("()", None),
        ("Answer: A", None),
        ("The answer is A", None),
        ("A. a cat", None),
        ("A or B", None),
        ("A cat", "A"),
        ("a  CAT.", "A"),
        ("a cat!", None),
        ("cat", None),
        ("a dog on\nthe grass", "B"),
        ("D", None),
        ("", None),
    ],
)
def test_strict(answer: str, option: str | None) -> None:
    assert strict_option(answer, ANIMALS) == option


def test_strict_the_letter_goes_first_and_texts_must_differ() -> None:
    assert strict_option("A", {"A": "B", "B": "A"}) == "A"
    assert strict_option("x", {"A": "x", "B": "X."}) is None
    assert strict_option("None", {"A": "None", "B": "NA"}) == "A"
    assert strict_option("5.", {"A": "5", "B": "5 m."}) == "A"


def test_strict_word() -> None:
    assert strict_word(" YES. ", ("Yes", "No")) == "Yes"
    assert strict_word("No, there is none", ("Yes", "No")) is None
    assert folded(" A  b\n. ") == "a b"

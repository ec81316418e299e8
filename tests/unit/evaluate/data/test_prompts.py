"""Prompts, character by character."""

from __future__ import annotations

from dpa.evaluate.data.prompts import (
    cvbench_prompt,
    mmvp_prompt,
    naturalbench_prompt,
    options_prompt,
    short_answer_prompt,
)

TWO = {"A": "a cat", "B": "None"}


def test_options() -> None:
    assert options_prompt("What?", TWO, "Look.\nWell.") == (
        "Hint: Look.\nWell.\nQuestion: What?\nOptions:\nA. a cat\nB. None\n"
        "Please select the correct answer from the options above. \n"
    )
    assert options_prompt("What?", TWO).startswith("Question: What?\n")


def test_free_text() -> None:
    assert short_answer_prompt("Who?") == "Who?\nAnswer the question using a single word or phrase."


def test_letters() -> None:
    letter = "Answer with the option's letter from the given choices directly."
    assert cvbench_prompt("How many?\n(A) 1\n(B) 2") == f"How many?\n(A) 1\n(B) 2\n{letter}"
    assert mmvp_prompt("Open?", {"A": "Yes", "B": "No"}) == f"Open? Options:\nA. Yes\nB. No\n{letter}"


def test_naturalbench() -> None:
    assert naturalbench_prompt("Is it?", "yes_no") == "Is it? Please answer Yes or No."
    assert naturalbench_prompt("Which?", "multiple_choice") == (
        "Which? Please output the letter corresponding to the correct option."
    )

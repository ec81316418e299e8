"""Classes of words."""

from __future__ import annotations

import pytest

from dpa.analyze.conflict.words import CLASSES, WORDS, words_of


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("Crimson", "colour"),
        ("three", "number"),
        ("3", "number"),
        ("1,200", "number"),
        ("left", "place"),
        ("on", "function"),
        ("isn’t", "function"),
        ("serene", "other"),
        ("猫", "other"),
    ],
)
def test_a_word_behind_the_opening_has_the_class_of_its_list(word: str, kind: str) -> None:
    *_, found = words_of(f"here we go {word}")
    assert found.kind == kind


def test_the_first_three_words_are_the_opening_whatever_they_are() -> None:
    assert [word.kind for word in words_of("The red 3 red")] == ["opening", "opening", "opening", "colour"]


def test_words_are_found_where_they_stand_and_joined_by_spaces_and_hyphens_alone() -> None:
    text = "A close-up  of it; (don't ask)\nyes"
    found = words_of(text)
    assert [text[word.start : word.end].lower() for word in found] == [word.text for word in found]
    assert [(word.text, word.joined) for word in found] == [
        ("a", False),
        ("close", True),
        ("up", True),
        ("of", True),
        ("it", True),
        ("don't", False),
        ("ask", True),
        ("yes", False),
    ]


def test_lists_hold_lower_case_words_of_known_classes() -> None:
    assert all(word == word.lower() and kind in CLASSES for word, kind in WORDS.items())

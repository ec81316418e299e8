"""Phrases, from gaps that are set by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dpa.analyze.conflict import Caption
from dpa.analyze.conflict.phrases import least_count, opening_share, repeated_openings, surprising_phrases
from dpa.analyze.conflict.tokens import TokenCaption, tokens_of
from dpa.models.families import FAMILIES, text_rules
from dpa.testing.parts import tiny_tokenizer

TEXTS = [f"there is a ring number {number}, behold the wonder of it." for number in range(6)] + [
    "behold the end of all"
]
PRIOR = 5.0


def measured(loud: dict[str, float]) -> tuple[list[TokenCaption], list[np.ndarray], list[np.ndarray]]:
    """Captions, the surprise of each token, and a gap that each loud word has in its tokens together."""
    tokenizer = tiny_tokenizer("qwen2")
    rules = text_rules(FAMILIES["qwen2"], tokenizer, 1)
    found, _ = tokens_of([Caption(str(n), text) for n, text in enumerate(TEXTS)], tokenizer, rules, max_length=200)
    gaps = []
    for caption in found:
        gap = np.zeros(caption.count)
        for place, word in enumerate(caption.words):
            tokens = [at for at, of in enumerate(caption.word_of) if of == place]
            gap[tokens] = loud.get(word.text, 0.0) / len(tokens)
        gaps.append(gap)
    return found, [np.full(caption.count, PRIOR) for caption in found], gaps


def test_the_loudest_phrase_comes_first_once_with_its_count_and_example() -> None:
    found, prior, gap = measured({"behold": 4.0, "wonder": 2.0, "number": 1.0})
    first, *others = surprising_phrases(found, prior, gap, least=5)
    assert first.text == "behold the wonder", "words that add nothing are left away"
    assert first.captions == 6
    assert first.gap == pytest.approx(6.0)
    assert "number 0, behold the wonder of it." in first.example
    assert first.example_id == "0"
    words = {pair for phrase in others for pair in zip(phrase.text.split(), phrase.text.split()[1:], strict=False)}
    assert not words & {("behold", "the"), ("the", "wonder")}
    assert any("number" in phrase.text for phrase in others)


def test_a_phrase_needs_enough_captions_and_no_comma_inside() -> None:
    found, prior, gap = measured({"end": 50.0, "0": 50.0, "behold": 1.0})
    phrases = surprising_phrases(found, prior, gap, least=5)
    assert all("end" not in phrase.text and phrase.captions >= 5 for phrase in phrases)
    assert all("behold" not in phrase.text or phrase.text.startswith("behold") for phrase in phrases)
    assert "behold the end of" not in {phrase.text for phrase in phrases}
    assert any(phrase.captions == 1 for phrase in surprising_phrases(found, prior, gap, least=1))


def test_a_gap_that_may_be_chance_is_no_phrase() -> None:
    found, prior, gap = measured({"behold": 1.0})
    for number, values in enumerate(gap):
        values *= 8.0 if number % 2 else -7.0
    assert not surprising_phrases(found, prior, gap, least=5)


def test_openings_that_repeat_are_counted() -> None:
    found, prior, gap = measured({"there": 1.5})
    (opening,) = repeated_openings(found, prior, gap)
    assert (opening.text, opening.captions, opening.gap) == ("there is a", 6, pytest.approx(1.5))
    assert opening_share(found) == 1.0
    assert opening_share(found, most=1) == pytest.approx(6 / 7)


def test_how_often_is_often_enough() -> None:
    assert (least_count(100, None), least_count(3000, None), least_count(3000, 2)) == (5, 30, 2)

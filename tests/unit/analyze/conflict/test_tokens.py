"""Tokens, their words and classes, in tokenizers that cut words and spaces in different ways."""

from __future__ import annotations

from typing import Any

import pytest

from dpa.analyze.conflict import Caption
from dpa.analyze.conflict.tokens import TokenCaption, tokens_of
from dpa.models.families import FAMILIES, text_rules
from dpa.testing.parts import tiny_tokenizer
from dpa.testing.tiny_families import TinyFamily

TEXT = "There is a  small crimson ring at the left; naïve 日本 it isn't!\nTwo stars."
SPANS = tuple((TEXT.index(word), TEXT.index(word) + len(word)) for word in ("crimson", "ring", "left"))


def encode(family: TinyFamily, caption: Caption, **more: Any) -> tuple[TokenCaption, Any]:
    tokenizer = tiny_tokenizer(family)
    rules = text_rules(FAMILIES[family], tokenizer, 4)
    (found,), refused = tokens_of([caption], tokenizer, rules, **({"max_length": 512} | more))
    assert not refused
    return found, tokenizer


@pytest.mark.parametrize("family", ["qwen2", "llama3", "gemma2", "mistral"])
def test_every_token_belongs_to_the_word_that_it_spells(family: TinyFamily) -> None:
    found, tokenizer = encode(family, Caption("x", TEXT, visual_spans=SPANS))
    ids = [token for token, here in zip(found.blind.input_ids, found.blind.supervised, strict=True) if here]
    assert len(ids) == found.count == len(found.kinds)
    assert found.visual is not None
    for place, word in enumerate(found.words):
        tokens = [token for token, at in zip(ids, found.word_of, strict=True) if at == place]
        assert tokens, word
        if word.text.isascii():
            assert word.text in tokenizer.decode(tokens).lower().replace("’", "'")
    seen = [place for place, visual in enumerate(found.visual) if visual]
    assert {found.words[found.word_of[place]].text for place in seen} == {"crimson", "ring", "left"}
    for token, word, visual in zip(ids, found.word_of, found.visual, strict=True):
        if tokenizer.decode([token]).strip():  # a space alone goes with its word, and is no part of what is visual
            assert visual == (word >= 0 and found.words[word].text in ("crimson", "ring", "left"))


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_classes_follow_the_words_and_the_last_token_is_the_end(family: TinyFamily) -> None:
    found, _ = encode(family, Caption("x", TEXT))
    for word, kind in zip(found.word_of[:-1], found.kinds[:-1], strict=True):
        assert kind == (found.words[word].kind if word >= 0 else "punctuation")
    assert found.kinds[-1] == "end"
    assert "end" not in found.kinds[:-1]
    assert {"opening", "colour", "place", "number", "function", "other"} < set(found.kinds)
    assert found.visual is None


def test_a_long_caption_is_cut_in_both_forms_alike() -> None:
    found, _ = encode("qwen2", Caption("x", TEXT), max_length=9)
    assert found.count == 9
    assert found.alone.input_ids == found.blind.input_ids[1:]
    assert found.alone.cut == found.blind.cut > 0
    assert "end" not in found.kinds


def test_captions_without_tokens_to_learn_are_counted_by_reason() -> None:
    tokenizer = tiny_tokenizer("qwen2")
    rules = text_rules(FAMILIES["qwen2"], tokenizer, 4)
    found, refused = tokens_of([Caption("a", " "), Caption("b", "fine")], tokenizer, rules, max_length=512)
    assert [item.caption.id for item in found] == ["b"]
    assert refused == {"nothing to learn": 1}

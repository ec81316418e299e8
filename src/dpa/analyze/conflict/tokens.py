"""Captions as tokens, as stages 1 and 2 see them, and each token's word and class by character offsets.

Legend: T tokens of one caption, its closing newline included.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpa.analyze.conflict.captions import Caption
from dpa.analyze.conflict.words import Word, WordClass, words_of
from dpa.data.chat import Encoded, encode_plain
from dpa.data.dataset import Item
from dpa.data.samples import IMAGE_MARKER, Sample, Turn
from dpa.errors import DataError
from dpa.types import TextRules


@dataclass(frozen=True, slots=True)
class TokenCaption:
    """A caption's tokens."""

    caption: Caption
    blind: Encoded
    """What stage 2 reads, with one placeholder for the image, which the pass without image leaves out."""
    alone: Encoded
    """What stage 1 reads: text alone."""
    words: tuple[Word, ...]
    word_of: tuple[int, ...]
    """[T]: place in ``words``; -1: in none."""
    kinds: tuple[WordClass, ...]
    """[T]."""
    visual: tuple[bool, ...] | None
    """[T]: the token is part of a visual word; None where the truth is not known."""

    @property
    def count(self) -> int:
        """T."""
        return len(self.word_of)

    def item(self, *, blind: bool) -> Item:
        """For ``collate``."""
        return Item(self.blind if blind else self.alone, None, self.caption.id, self.caption.where)


def one_placeholder(rules: TextRules) -> TextRules:
    """The rules of a tower that gives a single row: the pass without image drops it again, so one is enough."""
    return replace(rules, image_tokens=1)


def tokens_of(
    captions: Iterable[Caption], tokenizer: Any, rules: TextRules, *, max_length: int
) -> tuple[list[TokenCaption], Counter[str]]:
    """Tokens of the captions that can be used, and why others cannot (the reason's kind -> how many).

    Args:
        rules: from ``text_rules`` with any tower; see :func:`one_placeholder`.
        max_length: tokens of a caption; one position more is given to the placeholder.
    """
    found, refused = [], Counter[str]()
    blind_rules = one_placeholder(rules)
    for caption in captions:
        try:
            found.append(_tokens(caption, tokenizer, blind_rules, max_length))
        except DataError as error:
            refused[str(error).split(":")[0]] += 1
    return found, refused


def _tokens(caption: Caption, tokenizer: Any, rules: TextRules, max_length: int) -> TokenCaption:
    turns = (Turn("user", IMAGE_MARKER), Turn("assistant", caption.text))
    sample = Sample(caption.id, turns, ("image",), caption.where)
    blind = encode_plain(sample, tokenizer, rules, max_length=max_length + 1, with_image=True)
    alone = encode_plain(sample, tokenizer, rules, max_length=max_length, with_image=False)
    offsets: list[tuple[int, int]] = tokenizer(
        f"{caption.text}\n",
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )["offset_mapping"]
    offsets = offsets[: sum(blind.supervised)]
    words = words_of(caption.text)
    firsts = [_first_character(caption.text, *span) for span in offsets]
    word_of = tuple(_word_at(words, place) for place in firsts)
    return TokenCaption(
        caption=caption,
        blind=blind,
        alone=alone,
        words=words,
        word_of=word_of,
        kinds=tuple(_kind(caption.text, words, word, end) for word, (_, end) in zip(word_of, offsets, strict=True)),
        visual=_visual(caption, firsts, offsets),
    )


def _first_character(text: str, start: int, end: int) -> int:
    """The token's first character that is no white space; many tokens begin with the space before their word."""
    while start < min(end, len(text)) and text[start].isspace():
        start += 1
    return start


def _word_at(words: Sequence[Word], place: int) -> int:
    index = bisect_right(words, place, key=lambda word: word.start) - 1
    return index if index >= 0 and place < words[index].end else -1


def _kind(text: str, words: Sequence[Word], word: int, end: int) -> WordClass:
    if end > len(text):
        return "end"
    return "punctuation" if word < 0 else words[word].kind


def _visual(caption: Caption, firsts: Sequence[int], offsets: Sequence[tuple[int, int]]) -> tuple[bool, ...] | None:
    if caption.visual_spans is None:
        return None
    spans = caption.visual_spans
    return tuple(
        any(first < stop and start < end for start, stop in spans)
        for first, (_, end) in zip(firsts, offsets, strict=True)
    )

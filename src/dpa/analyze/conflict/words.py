"""Words of a caption and their classes: closed English lists, no language tools.

Each list answers one question about where a conflict lies. Whatever is in none is ``other``, which in captions is
mostly nouns, verbs and adjectives. For captions in other languages only openings, digits, punctuation and the end mean
anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

WordClass = Literal["opening", "colour", "number", "place", "function", "punctuation", "end", "other"]

OPENING_WORDS: Final = 3
"""So many first words of a caption are its opening ("the image shows")."""

CLASSES: Final[Mapping[WordClass, str]] = MappingProxyType(
    {
        "opening": "the first three words: how captions of this set begin is the plainest part of their style",
        "colour": "colour words: what only the picture can tell; a gap here is vocabulary, not information",
        "number": "digits and number words: likewise",
        "place": "words of place (left, above, corner): likewise",
        "function": "articles, pronouns, prepositions, auxiliaries, conjunctions: grammar and register",
        "punctuation": "punctuation, symbols and line breaks inside the caption: layout",
        "end": "the token with the closing newline: how long captions of this set are",
        "other": "everything else: mostly nouns, verbs and adjectives",
    }
)
"""Every token is in one class, the first that fits in the order opening, end, punctuation, then the lists."""

_COLOURS: Final = """
red orange yellow green blue purple pink brown black white grey gray beige tan gold golden silver violet indigo cyan
magenta turquoise teal maroon navy crimson scarlet olive cream ivory lavender bronze khaki amber azure emerald jade
cobalt tangerine lemon fuchsia plum rosy burgundy coral mauve peach
"""
_NUMBERS: Final = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million dozen dozens pair couple trio
quartet quintet solo first second third fourth fifth half double triple single
"""
_PLACES: Final = """
left right top bottom centre center central middle corner corners side sides edge edges above below beneath under
underneath over behind beside between near nearby front back foreground background upper lower inside outside around
across along against next adjacent opposite far north south east west northeast northwest southeast southwest away
leftmost rightmost topmost distance
"""
_FUNCTIONS: Final = """
a an the this that these those some any each every all both no not none another other such
i me my we us our you your he him his she her hers it its they them their theirs who whom whose which what where when
why how one's itself himself herself themselves someone something there here
of in on at to from by with without for as into onto upon about through during within among amongst towards toward per
and or but nor so yet if because while although though since until unless than then also too very just only even still
am is are was were be been being has have had having do does did doing can could may might must shall should will would
isn't aren't wasn't weren't doesn't don't didn't can't it's there's
many much several few more most less least
"""
# "in", "on" and "at" say where something is, too, but far more often they are grammar.


def _table() -> dict[str, WordClass]:
    lists: tuple[tuple[WordClass, str], ...] = (
        ("colour", _COLOURS),
        ("number", _NUMBERS),
        ("place", _PLACES),
        ("function", _FUNCTIONS),
    )
    return {word: name for name, words in reversed(lists) for word in words.split()}


WORDS: Final[Mapping[str, WordClass]] = MappingProxyType(_table())
"""Lower-case word -> class."""

_WORD: Final = re.compile(r"\w+(?:['’]\w+)*")
_GLUE: Final = re.compile(r"[ \t]+|-")
"""What may stand between the words of a phrase."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a caption."""

    text: str
    """Lower case."""
    start: int
    """Character, as ``end``."""
    end: int
    kind: WordClass
    joined: bool
    """Nothing but a space or a hyphen stands between it and the word before."""


def words_of(text: str) -> tuple[Word, ...]:
    """Words in order; what lies between them is punctuation or white space."""
    found: list[Word] = []
    for place, match in enumerate(_WORD.finditer(text)):
        word = match.group().lower().replace("’", "'")
        between = text[found[-1].end : match.start()] if found else ""
        kind = "opening" if place < OPENING_WORDS else _kind(word)
        found.append(Word(word, *match.span(), kind, bool(found) and _GLUE.fullmatch(between) is not None))
    return tuple(found)


def _kind(word: str) -> WordClass:
    return "number" if word[0].isdigit() else WORDS.get(word, "other")

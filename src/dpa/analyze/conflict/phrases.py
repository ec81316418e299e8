"""Which words the conflict is in: phrases that the LLM finds far more surprising than the proxy, and openings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dpa.analyze.conflict.passes import Surprise
from dpa.analyze.conflict.tokens import TokenCaption
from dpa.analyze.conflict.words import OPENING_WORDS

SIZES = (2, 3, 4)
"""Words of a phrase."""
SHOWN = 20
_AROUND = 40
"""Characters of an example on either side."""
_LEAST_COUNT, _LEAST_SHARE = 5, 0.01
_ERRORS = 2.0
"""A phrase's mean gap is so many standard errors above 0, or it may be chance."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words that stand together in several captions."""

    text: str
    captions: int
    """Different captions (of those that are measured) in which it occurs."""
    gap: float
    """Nats per occurrence: how much more surprising the LLM finds all of its tokens than the proxy, on average."""
    prior: float
    """Nats per occurrence under the LLM."""
    example: str
    """Where it occurs first, with what stands around it."""
    example_id: str


@dataclass(frozen=True, slots=True)
class _Occurrence:
    caption: int
    start: int
    end: int
    """Characters."""
    gap: float
    prior: float


def least_count(captions: int, wanted: int | None) -> int:
    """From how many captions on a phrase counts."""
    return max(_LEAST_COUNT, round(_LEAST_SHARE * captions)) if wanted is None else wanted


def surprising_phrases(
    captions: Sequence[TokenCaption], prior: Sequence[Surprise], gap: Sequence[Surprise], *, least: int
) -> list[Phrase]:
    """The phrases of 2 to 4 words with the largest mean gap per occurrence, largest first, ``SHOWN`` at most.

    Words of a phrase are parted by spaces or hyphens alone. A phrase that shares two neighbouring words with one
    further up is left out: it would say the same again.

    Args:
        captions, prior, gap: as measured; nats per token.
        least: different captions that a phrase must occur in.
    """
    sums = [
        (_word_sums(caption, values), _word_sums(caption, base))
        for caption, values, base in zip(captions, gap, prior, strict=True)
    ]
    found: defaultdict[tuple[str, ...], list[_Occurrence]] = defaultdict(list)
    for number, (caption, (gaps, priors)) in enumerate(zip(captions, sums, strict=True)):
        for size in SIZES:
            for start in range(len(caption.words) - size + 1):
                words = caption.words[start : start + size]
                if all(word.joined for word in words[1:]):
                    whole = slice(start, start + size)
                    found[tuple(word.text for word in words)].append(
                        _Occurrence(number, words[0].start, words[-1].end, gaps[whole].sum(), priors[whole].sum())
                    )
    counted = {words: cases for words, cases in found.items() if len({case.caption for case in cases}) >= least}
    return _chosen(captions, counted)


def repeated_openings(
    captions: Sequence[TokenCaption], prior: Sequence[Surprise], gap: Sequence[Surprise], *, shown: int = 10
) -> list[Phrase]:
    """The first words of captions that begin alike, most frequent first."""
    found: defaultdict[tuple[str, ...], list[_Occurrence]] = defaultdict(list)
    for number, caption in enumerate(captions):
        words = caption.words[:OPENING_WORDS]
        if len(words) == OPENING_WORDS:
            parts = (_word_sums(caption, values)[:OPENING_WORDS].sum() for values in (gap[number], prior[number]))
            found[tuple(word.text for word in words)].append(_Occurrence(number, 0, words[-1].end, *parts))
    repeated = {words: cases for words, cases in found.items() if len(cases) > 1}
    ordered = sorted(repeated.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_phrase(captions, words, cases) for words, cases in ordered[:shown]]


def opening_share(captions: Sequence[TokenCaption], most: int = 3) -> float:
    """Share of the captions that begin with one of the ``most`` commonest openings."""
    counted = Counter(tuple(word.text for word in caption.words[:OPENING_WORDS]) for caption in captions)
    return sum(count for _, count in counted.most_common(most)) / len(captions)


def _word_sums(caption: TokenCaption, values: Surprise) -> Surprise:
    """[words]: nats of each word's tokens; a token that has no prediction counts nothing."""
    inside = [(word, value) for word, value in zip(caption.word_of, values, strict=True) if word >= 0]
    places = np.array([word for word, _ in inside], dtype=np.int64)
    weights = np.nan_to_num(np.array([value for _, value in inside], dtype=np.float64))
    sums: Surprise = np.bincount(places, weights=weights, minlength=len(caption.words)).astype(np.float64)
    return sums


def _chosen(captions: Sequence[TokenCaption], found: dict[tuple[str, ...], list[_Occurrence]]) -> list[Phrase]:
    means = {words: float(np.mean([case.gap for case in cases])) for words, cases in found.items()}
    means = {words: mean for words, mean in means.items() if mean > _ERRORS * _standard_error(found[words])}
    taken: list[Phrase] = []
    said: set[tuple[str, str]] = set()
    for words in sorted(means, key=lambda words: (-means[words], words)):
        pairs = set(pairwise(words))
        if len(taken) == SHOWN:
            break
        if not pairs & said:
            said |= pairs
            taken.append(_phrase(captions, words, found[words]))
    return taken


def _standard_error(cases: Sequence[_Occurrence]) -> float:
    if len(cases) < 2:
        return 0.0
    return float(np.std([case.gap for case in cases], ddof=1) / np.sqrt(len(cases)))


def _phrase(captions: Sequence[TokenCaption], words: tuple[str, ...], cases: Sequence[_Occurrence]) -> Phrase:
    first = cases[0]
    caption = captions[first.caption].caption
    start, end = max(0, first.start - _AROUND), min(len(caption.text), first.end + _AROUND)
    around = " ".join(caption.text[start:end].split())
    return Phrase(
        text=" ".join(words),
        captions=len({case.caption for case in cases}),
        gap=float(np.mean([case.gap for case in cases])),
        prior=float(np.mean([case.prior for case in cases])),
        example=f"{'… ' if start else ''}{around}{' …' if end < len(caption.text) else ''}",
        example_id=caption.id,
    )

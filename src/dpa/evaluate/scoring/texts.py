"""How free answers are compared: ANLS, OCRBench's inclusion, the lab's exact match."""

from __future__ import annotations

import string
from collections.abc import Sequence

from dpa.evaluate.scoring.options import folded

_ANLS_THRESHOLD = 0.5
_STRIPPED = string.punctuation + string.whitespace


def edit_distance(first: str, second: str) -> int:
    """Levenshtein: fewest insertions, deletions and replacements of characters."""
    shorter, longer = sorted((first, second), key=len)
    before = list(range(len(shorter) + 1))
    for place, character in enumerate(longer, 1):
        row = [place]
        for column, other in enumerate(shorter):
            row.append(before[column] if character == other else 1 + min(before[column], before[column + 1], row[-1]))
        before = row
    return before[-1]


def anls(answer: str, golds: Sequence[str], *, strict: bool = False) -> float:
    """Average normalised Levenshtein similarity of one answer: the best over the golds, 0 below 0.5 (0.5 stays).

    Texts are compared in lower case with white space folded. As in VLMEvalKit (and in the benchmark's own script) the
    distance is divided by the longer length before folding, so that white space around an answer makes it better.

    Args:
        strict: divide by the longer length after folding.
    """
    return max(_similarity(answer, gold, strict) for gold in golds)


def _similarity(answer: str, gold: str, strict: bool) -> float:
    first, second = (" ".join(text.lower().split()) for text in (answer, gold))
    # upper: it may be longer than the text (a sharp s), and the toolkits measure it so
    length = max(map(len, (first, second) if strict else (answer.upper(), gold.upper())))
    if length == 0:
        return 1.0
    if 1 - abs(len(first) - len(second)) / length < _ANLS_THRESHOLD:
        return 0.0  # the distance is at least the difference of the lengths: long answers need no table
    similarity = 1 - edit_distance(first, second) / length
    return 0.0 if similarity < _ANLS_THRESHOLD else similarity


def ocrbench_hit(answer: str, golds: Sequence[str], *, mathematics: bool) -> bool:
    """OCRBench (VLMEvalKit's ``OCRBench``): a gold text is contained in the answer.

    In lower case with line breaks as spaces; handwritten mathematics without spaces and line breaks, case kept.
    """

    def prepared(text: str) -> str:
        return text.strip().replace("\n", "").replace(" ", "") if mathematics else _one_line(text.lower())

    return any(prepared(gold) in prepared(answer) for gold in golds)


def ocrbench_exact(answer: str, golds: Sequence[str], *, mathematics: bool) -> bool:
    """Strict: the whole answer is a gold text; see :func:`~dpa.evaluate.scoring.options.folded`.

    Mathematics: without any white space, case and period kept.
    """

    def prepared(text: str) -> str:
        return "".join(text.split()) if mathematics else folded(text)

    return any(prepared(gold) == prepared(answer) for gold in golds)


def normalise(answer: str) -> str:
    """The lab's rule: the first line, in lower case, white space folded, without punctuation and space around it."""
    first = answer.strip().partition("\n")[0]
    return " ".join(first.lower().split()).strip(_STRIPPED)


def _one_line(text: str) -> str:
    return text.strip().replace("\n", " ")

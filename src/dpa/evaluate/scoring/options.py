"""Which option an answer names, as each toolkit reads it, and strictly.

A deviation from what one would expect is the toolkit's own and kept on purpose: a score is compared with scores that
the toolkit gave. Each is listed in docs/evaluation.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dpa.evaluate.scoring.types import VlmEvalKit

_SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_LAST_WORDS = 4
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
_BRACKETS = {"(": ")", "[": "]"}


def vlmevalkit_option(answer: str, choices: Mapping[str, str], version: VlmEvalKit) -> str | None:
    """VLMEvalKit's exact matching (``matching_util.can_infer``), the letter first, then the options' texts.

    2025-05: the one letter that stands alone among the words, wherever; "A cat sits there" is A. 2026-08 (changed in
    2025-08 and 2026-06): its first occurrence must be among the last four words; otherwise what begins after the first
    "answer is", in any case and without a word's end ("the answer is black" is B); and texts are looked for only in
    answers of at most twice the length of all texts together.

    Returns:
        The letter, or None: nothing found, several found, or a refusal.
    """
    found = _standing_letter(answer, choices, version)
    if found is None:
        return _contained_text(answer, choices, version)
    return found if found in choices else None  # Z, "none of them": the texts are not looked at


def _standing_letter(answer: str, choices: Mapping[str, str], version: VlmEvalKit) -> str | None:
    """A letter of the choices, Z, or None."""
    if _FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_SPACED).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and (version == "2025-05" or words.index(letters[0]) >= len(words) - _LAST_WORDS):
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    said = _ANSWER_IS.search(answer) if version == "2026-08" else None
    return said[1].upper() if said is not None and said[1].upper() in choices else None


def _contained_text(answer: str, choices: Mapping[str, str], version: VlmEvalKit) -> str | None:
    lower = answer.lower()
    if version == "2026-08" and len(lower) > 2 * sum(map(len, choices.values())):
        return None
    found = [letter for letter, text in choices.items() if text.lower() in lower]
    return found[0] if len(found) == 1 else None


def cambrian_answer(answer: str) -> str:
    """Cambrian's clean-up (``extract_mcq_answer``): lower case, what follows the last "answer is" or "answer:".

    "Answer is: A" leaves ": a": the colon belongs to neither mark and stays.
    """
    text = answer.lower().strip()
    for mark in ("answer is", "answer:"):
        text = text.rsplit(mark, 1)[-1]
    return text.strip().rstrip(".:,").lstrip("(").rstrip(")")


def cambrian_mmvp_options(answer: str, choices: Mapping[str, str]) -> set[str]:
    """Cambrian's MMVP (``mmvp_test.py``): what is left is a letter or an option's text, whole.

    Returns:
        All options that the answer may stand for (a letter may also be another option's text); right if the right one
        is among them.
    """
    text = cambrian_answer(answer)
    return {letter for letter, option in choices.items() if text in (letter.lower(), option.lower())}


def cambrian_cvbench_options(answer: str, choices: Mapping[str, str], *, with_texts: bool) -> set[str]:
    """Cambrian's CV-Bench (``ade_test.py``, ``coco_test.py``, ``omni_test.py``): the first character of what is left.

    Args:
        with_texts: Omni3D also compares with the options' texts, but only after the cut to one character, and with
            their case: it matters for texts of one character alone.
    """
    first = cambrian_answer(answer)[:1]
    return {letter for letter, option in choices.items() if first == letter.lower() or (with_texts and first == option)}


def first_word(answer: str, words: Sequence[str]) -> str | None:
    """NaturalBench (``naturalbench.extract_answer``): which word comes first, in any case, between word boundaries."""
    places = {word: re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in words}
    found = {word: place.start() for word, place in places.items() if place is not None}
    return min(found, key=found.__getitem__) if found else None


def folded(text: str) -> str:
    """Lower case, white space folded, without one final period."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def strict_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """Strict: the whole answer is the letter, bare or in brackets, or one option's text; see :func:`folded`.

    The letter goes first: where option B has the text "A", the answer "A" is A.
    """
    text = folded(answer)
    bare = text[1:-1].strip() if len(text) > 2 and _BRACKETS.get(text[0]) == text[-1] else text
    named = [letter for letter in choices if letter.lower() == bare]
    if named:
        return named[0]
    found = [letter for letter, option in choices.items() if folded(option) == text]
    return found[0] if len(found) == 1 else None


def strict_word(answer: str, words: Sequence[str]) -> str | None:
    """Strict: the whole answer is one of the words; see :func:`folded`."""
    return next((word for word in words if word.lower() == folded(answer)), None)

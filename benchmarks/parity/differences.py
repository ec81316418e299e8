"""Why lmms-eval and the paper's profile disagree about an answer: every known class of difference, and nothing else.

``ours`` and ``theirs`` are 0 to 1. A disagreement that no class claims is a fault in one of the two: the script fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from parity.answers import Record


@dataclass(frozen=True, slots=True)
class Case:
    """One disagreement."""

    row: Record
    ours: float
    theirs: float
    parsed: bool
    """Our rules found an option in the answer."""

    @property
    def text(self) -> str:
        """The answer, without white space around it."""
        return str(self.row["prediction"]).strip()


@dataclass(frozen=True, slots=True)
class Difference:
    """One class; the first that claims a case has it."""

    name: str
    claims: Callable[[Case], bool]


def _says_answer(case: Case) -> bool:
    return re.search(r"answer is|answer:", case.text.lower()) is not None


def _is_option_text(case: Case) -> bool:
    said = case.text.lower().rstrip(".:,")
    return said in [choice.lower() for choice in case.row["choices"].values()]


def _lone_article(case: Case) -> bool:
    return "A" in re.sub(r"[.()\[\],:;!*#{}]", " ", case.text).split()


DIFFERENCES: Mapping[str, Sequence[Difference]] = {
    "mmbench": (
        Difference(
            "no option by VLMEvalKit's rules (two letters, a letter inside a word, no space): ours is wrong, "
            "lmms-eval's static task takes some letter",
            lambda case: not case.parsed and case.theirs > case.ours,
        ),
        Difference(
            'an article "A" beside the letter or the option text: VLMEvalKit and lmms-eval weigh it differently',
            _lone_article,
        ),
    ),
    "ai2d": (
        Difference(
            "letter or option text in other words: VLMEvalKit finds it, lmms-eval wants the letter alone or `X.` first",
            lambda case: case.ours > case.theirs,
        ),
        Difference(
            "a small letter: lmms-eval ignores case, VLMEvalKit does not",
            lambda case: re.sub(r"\W", "", case.text) in list("abcd"),
        ),
        Difference(
            "`X. text` where the text holds a letter too: lmms-eval takes the first letter, VLMEvalKit none of two",
            lambda case: case.theirs > case.ours and re.match(r"[A-Z]\.", case.text) is not None,
        ),
    ),
    "docvqa": (
        Difference(
            "white space at the ends counts in VLMEvalKit's length, lmms-eval cuts it (as generation does)",
            lambda case: case.row["prediction"] != case.text,
        ),
    ),
    "ocrbench": (
        Difference(
            "full-width letters and digits: lmms-eval folds them, VLMEvalKit does not",
            lambda case: any(
                "\uff01" <= c <= "\uff5e" or c == "\u3000" for c in case.text + "".join(case.row["answer"])
            ),
        ),
    ),
    "cvbench": (
        Difference(
            "after `answer is` or `answer:` Cambrian reads on, lmms-eval takes the answer's first letter", _says_answer
        ),
    ),
    "mmvp": (
        Difference(
            "after `answer is` or `answer:` Cambrian wants the letter or text alone, lmms-eval takes a letter anywhere",
            _says_answer,
        ),
        Difference(
            "the option's text: Cambrian takes it, lmms-eval looks for letters only",
            lambda case: case.ours > case.theirs and _is_option_text(case),
        ),
        Difference(
            "a letter with other words or signs: lmms-eval takes it (even the first letter of a word), Cambrian wants "
            "the whole answer to be the letter or the text",
            lambda case: case.theirs > case.ours,
        ),
    ),
    "naturalbench": (),
}


def classify(benchmark: str, cases: Sequence[Case]) -> tuple[dict[str, list[Case]], list[Case]]:
    """Class -> its cases, and the cases of no class."""
    classes: dict[str, list[Case]] = {}
    unexplained = []
    for case in cases:
        found = next((item.name for item in DIFFERENCES[benchmark] if item.claims(case)), None)
        if found is None:
            unexplained.append(case)
        else:
            classes.setdefault(found, []).append(case)
    return classes, unexplained

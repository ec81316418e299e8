"""What a question is asked as, in the words of the toolkits that the paper used, character by character.

VLMEvalKit (``vlmeval/dataset``: ``ImageMCQDataset``, ``ImageVQADataset``, ``ImageBaseDataset``,
``NaturalBenchDataset``) for MMBench, AI2D, DocVQA, OCRBench and NaturalBench; Cambrian
(``eval/eval/{mmvp,ade,coco,omni}``) for MMVP and CV-Bench.
"""

from __future__ import annotations

from collections.abc import Mapping

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
NATURALBENCH = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}


def options_prompt(question: str, choices: Mapping[str, str], hint: str | None = None) -> str:
    """MMBench and AI2D. The blank and the newline at the end are VLMEvalKit's."""
    head = "" if hint is None else f"Hint: {hint}\n"
    listed = "".join(f"{letter}. {text}\n" for letter, text in choices.items())
    return f"{head}Question: {question}\nOptions:\n{listed}Please select the correct answer from the options above. \n"


def short_answer_prompt(question: str) -> str:
    """DocVQA."""
    return f"{question}\n{SHORT}"


def cvbench_prompt(prompt: str) -> str:
    """CV-Bench; the data's own prompt lists the options already, as "(A) ..." lines."""
    return f"{prompt}\n{LETTER}"


def mmvp_prompt(question: str, choices: Mapping[str, str]) -> str:
    """MMVP."""
    listed = "".join(f"\n{letter}. {text}" for letter, text in choices.items())
    return f"{question} Options:{listed}\n{LETTER}"


def naturalbench_prompt(question: str, question_type: str) -> str:
    """NaturalBench; the type is a key of :data:`NATURALBENCH`; a multiple-choice question names its options itself."""
    return f"{question} {NATURALBENCH[question_type]}"

"""Score records with made-up answers: letters in many spellings, sentences, option texts, near-misses, nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

Record = dict[str, Any]

_WORDS = ("red", "blue", "green", "a cat", "the left door", "an apple", "two", "Three", "A dog", "none", "été", "日本")
_LETTERS = "ABCDE"

_SPELLINGS = (
    "{L}", "{l}", "{L}.", "{l}.", "({L})", "({l})", "{L})", "{L}:", " {L} ", "{L},", "[{L}]", "**{L}**", "{L}。",
    "\n{L}\n", "{L}. {t}", "({L}) {t}", "{L} {t}", "{L}: {t}", "{l}) {t}", "{L}\n{t}",
    "The answer is {L}", "The answer is {L}.", "The answer is ({L}).", "the answer is: {l}", "Answer: {L}",
    "answer: ({l})", "ANSWER IS {L}", "Option {L}", "The correct option is {L}, because it shows {t}.", "I choose {L}",
    "{L} is correct",
    "{L} and {M}", "{L} or {M}", "Not {M}, but {L}.", "({M}) is wrong; the answer is ({L})", "Between {M} and {L}: {L}",
    "The answer is {L}. The answer is {M}", "A person can see that it is {L}", "I see a {t}, so {L}",
    "{t}", "{T}", "{t}.", "It is {t}.", "It is {t}, not {u}", "It is {u}", "the answer is {t}", "{t} {t}",
    "", " ", "\n", "I do not know.", "None of the above", "E", "F", "Z", "?", "42",
    "As an AI model I cannot see images.", "答案是{L}", "答案：{L}", "Ответ: {L}", "\u0410", "\uff21", "\u00c0",
    "{L}\u200b",
    "\u201c{L}\u201d", "«{L}»", "{L}!", "#{L}", "A picture of {t}", "Answer", "Because", "Cats are nice",
    "Dunno", "banana", "b-side", "A-frame",
)  # fmt: skip
"""L the chosen letter, M another one; t, T the chosen option's text, u another option's."""

_YES_NO = (
    "{Y}", "{y}", "{Y}.", "{y}, it is.", "{Y}!", "{Y}, {N}", "{Y} and {N}", "The answer is {y}.", "Answer: {Y}",
    "({Y})", "**{Y}**", "I think {y}", "{Y}\n{N}", "{N}... wait, {y}", "{Y}es", "No, yes", "nope", "Yesterday", "yeah",
    "Nothing", "There is no cat. {Y}", "not {y}", "No.1 is {y}", "", " ", "A", "B", "maybe", "是", "\uff39es", "YES",
    "NO", "Yes/No",
)  # fmt: skip


def _fill(form: str, record: Record, letter: str, rng: random.Random) -> str:
    choices: dict[str, str] = record["choices"]
    other = rng.choice([name for name in choices if name != letter])
    text = choices[letter]
    return form.format(L=letter, l=letter.lower(), M=other, t=text, T=text.upper(), u=choices[other])


def _choices(rng: random.Random, count: int) -> dict[str, str]:
    return dict(zip(_LETTERS, rng.sample(_WORDS, count), strict=False))


def _letter(record: Record, rng: random.Random) -> str:
    """The right one as often as not: agreement on wrong answers alone would say little."""
    right = record["answer"].strip("()").upper()
    return right if rng.random() < 0.5 else rng.choice(list(record["choices"]))


def _lettered(record: Record, rng: random.Random, number: int) -> str:
    return _fill(_SPELLINGS[number % len(_SPELLINGS)], record, _letter(record, rng), rng)


def mmbench(rng: random.Random, count: int) -> Iterator[Record]:
    """One roll per question, so that each answer counts by itself."""
    for number in range(count):
        choices = _choices(rng, rng.choice((2, 3, 4)))
        record: Record = {"id": str(number), "index": number, "choices": choices, "answer": rng.choice(list(choices))}
        record |= {"category": "drawn", "l2_category": "drawn"}
        yield record | {"prediction": _lettered(record, rng, number)}


def ai2d(rng: random.Random, count: int) -> Iterator[Record]:
    for number in range(count):
        choices = _choices(rng, 4)
        record: Record = {"id": str(number), "choices": choices, "answer": rng.choice(list(choices))}
        yield record | {"prediction": _lettered(record, rng, number)}


def cvbench(rng: random.Random, count: int) -> Iterator[Record]:
    for number in range(count):
        source = ("ADE20K", "COCO", "Omni3D")[number % 3]
        choices = _choices(rng, 2 if source == "Omni3D" else 4)
        record: Record = {
            "id": str(number),
            "choices": choices,
            "source": source,
            "answer": f"({rng.choice(list(choices))})",
        }
        record |= {"type": "3D" if source == "Omni3D" else "2D", "task": "drawn"}
        yield record | {"prediction": _lettered(record, rng, number // 3)}


def mmvp(rng: random.Random, count: int) -> Iterator[Record]:
    for number in range(count):
        record: Record = {"id": str(number + 1), "index": number + 1, "choices": _choices(rng, 2)}
        record["answer"] = "(a)" if number % 2 == 0 else "(b)"
        yield record | {"prediction": _lettered(record, rng, number)}


def naturalbench(rng: random.Random, count: int) -> Iterator[Record]:
    """Fours of rows; gold answers alternate as in the data."""
    for number in range(count // 4 * 4):
        right = number % 4 in (0, 3)
        record: Record = {"id": str(number), "index": number}
        if (number // 4) % 2 == 0:
            said = right if rng.random() < 0.6 else not right
            words = {"Y": "Yes", "y": "yes", "N": "No"} if said else {"Y": "No", "y": "no", "N": "Yes"}
            form = _YES_NO[rng.randrange(len(_YES_NO))]
            record |= {
                "question_type": "yes_no",
                "answer": "Yes" if right else "No",
                "prediction": form.format(**words),
            }
        else:
            choices = _choices(rng, 2)
            record |= {"question_type": "multiple_choice", "answer": "A" if right else "B", "choices": choices}
            record["prediction"] = _lettered(record, rng, rng.randrange(len(_SPELLINGS)))
        yield record


def _edited(text: str, edits: int, rng: random.Random) -> str:
    letters = list(text)
    for _ in range(edits):
        place = rng.randrange(len(letters) + 1)
        kind = rng.choice(("replace", "insert", "delete"))
        if kind == "insert" or place == len(letters):
            letters.insert(place, rng.choice("abcxyz019"))
        elif kind == "replace":
            letters[place] = rng.choice("abcxyz019")
        else:
            del letters[place]
    return "".join(letters)


_TEXTS = (
    "4,500", "May 3, 1999", "John  Smith", "ITC Limited", "$1,234.56", "No", "Yes", "q", "naïve café", "Übermaß 12",
    "日本語", "the quick brown fox", "10-12-2020", "A. B. Cee", "ABCDEFGH", "0.5", "line one\nline two",
    "University of California",
)  # fmt: skip


def docvqa(rng: random.Random, count: int) -> Iterator[Record]:
    """Equal but for case and space, edited by 1 ... n letters, around half of the length above all."""
    for number in range(count):
        answers = rng.sample(_TEXTS, rng.choice((1, 1, 2, 3)))
        text = rng.choice(answers)
        kinds: tuple[Callable[[], str], ...] = (
            lambda text=text: text,
            lambda text=text: text.upper(),
            lambda text=text: f"  {text.lower()} ",
            lambda text=text: text.replace(" ", "   "),
            lambda text=text: text.replace(" ", "\n"),
            lambda text=text: text + ".",
            lambda text=text: f"The answer is {text}",
            lambda: rng.choice(_TEXTS),
            lambda: rng.choice(("", " ", "\n", "unanswerable", "None")),
            lambda text=text: text[: len(text) // 2],
            lambda text=text: text[: (len(text) + 1) // 2],
            lambda text=text: text + "x" * len(text),
        )
        edited = _edited(text, rng.randrange(1, len(text) + 2), rng)
        prediction = edited if number % 2 else kinds[(number // 2) % len(kinds)]()
        yield {"id": str(number), "answer": answers, "document": str(number // 3), "prediction": prediction}


_OCR_KINDS = (
    "Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition", "Handwriting Recognition",
    "Digit String Recognition", "Non-Semantic Text Recognition", "Scene Text-centric VQA", "Doc-oriented VQA",
    "Key Information Extraction", "Handwritten Mathematical Expression Recognition",
)  # fmt: skip
_OCR_TEXTS = (
    "CAFÉ",
    "Word 12",
    "x y z",
    "STRASSE",
    "1,000 kg",
    "hello\nworld",
    "ABC DEF",
    "naïve",
    "日本",
    "O'Neill",
    "５００",
)
_FORMULAS = (r"\frac { x } { 2 }", r"a ^ { 2 } + b ^ { 2 }", r"X _ { n } = Y", r"\sqrt { \alpha }")


def ocrbench(rng: random.Random, count: int) -> Iterator[Record]:
    for number in range(count):
        kind = _OCR_KINDS[number % len(_OCR_KINDS)]
        maths = kind.startswith("Handwritten M")
        answers = rng.sample(_FORMULAS if maths else _OCR_TEXTS, rng.choice((1, 1, 2)))
        text = rng.choice(answers)
        forms = (
            text, text.lower(), text.upper(), f"The text is: {text}.", text.replace(" ", ""), text.replace(" ", "  "),
            text.replace(" ", "\n"), text.replace("\n", " "), f"${text}$", text[:-1], text[1:], f"\n{text} ", "", " ",
            rng.choice(_OCR_TEXTS), "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text),
            text.replace("O", "0"), text.replace("\\", ""), text.replace(" ", "\t"), "I cannot read it",
        )  # fmt: skip
        yield {
            "id": str(number),
            "answer": answers,
            "question_type": kind,
            "prediction": forms[(number // 10) % len(forms)],
        }


GENERATORS: dict[str, Callable[[random.Random, int], Iterator[Record]]] = {
    "mmbench": mmbench,
    "ai2d": ai2d,
    "docvqa": docvqa,
    "ocrbench": ocrbench,
    "cvbench": cvbench,
    "mmvp": mmvp,
    "naturalbench": naturalbench,
}


def records(benchmark: str, *, count: int, seed: int) -> list[Record]:
    """``count`` records of a benchmark (NaturalBench: whole fours), the same ones for the same seed."""
    return list(GENERATORS[benchmark](random.Random(f"{benchmark}:{seed}"), count))

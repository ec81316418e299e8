"""Rows of any file format as one (texts, lists, images, and where they stand), and each benchmark's own reading."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dpa.errors import DataError
from dpa.evaluate.data import prompts
from dpa.evaluate.data.images import ImageSource

_MMVP_OPTIONS = re.compile(r"\s*\(a\)(.*)\(b\)(.*)", re.DOTALL)
_SOURCES = ("ADE20K", "COCO", "Omni3D")


@dataclass(frozen=True, slots=True)
class Task:
    """One question: what is asked, about which images, and what a scorer must know about it."""

    id: str
    text: str
    """The prompt."""
    images: tuple[ImageSource, ...]
    record: Mapping[str, Any]
    """The score record (docs/evaluation.md, "Scores") without ``prediction``."""
    where: str
    """File and line or row, for messages."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file."""

    cells: Mapping[str, Any]
    """Column -> text, number or list; missing cells are left out."""
    images: tuple[ImageSource, ...]
    position: int
    """Among the benchmark's rows in the order of their index, from 0."""
    where: str
    part: str = ""
    """Which of a benchmark's files, where it has several with indices of their own."""

    def text(self, *names: str) -> str:
        """The first of the columns that is there.

        Raises:
            DataError: none is, or it is no text.
        """
        for name in names:
            if name in self.cells:
                return _text(self.cells[name], name, self.where)
        raise DataError(f"{self.where}: {' or '.join(names)} is missing or empty")

    def maybe(self, *names: str) -> str | None:
        """The same, or None."""
        return self.text(*names) if any(name in self.cells for name in names) else None

    def texts(self, *names: str) -> list[str]:
        """A list, a list written as a Python literal, or one text as a list of one.

        Raises:
            DataError: as :meth:`text`.
        """
        for name in names:
            value = self.cells.get(name)
            if isinstance(value, list | tuple):
                return [_text(item, name, self.where) for item in value]
        return listed(self.text(*names))

    def integer(self, *names: str) -> int:
        """Raises DataError where the column is missing or no whole number."""
        text = self.text(*names)
        try:
            return int(text)
        except ValueError:
            raise DataError(f"{self.where}: {names[0]} must be a whole number, this is {text[:40]!r}") from None


def listed(text: str) -> list[str]:
    """``"['a', 'b']"`` is a list of two, anything else one text (VLMEvalKit evaluates such cells; this only parses)."""
    if text.startswith("[") and text.endswith("]"):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return [text]
        return [str(item) for item in found]
    return [text]


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {name} must be text, this is {type(value).__name__}")
    return str(value)


def mmbench(row: Row) -> Task:
    """Rolls of a question share index modulo 1,000,000."""
    index, choices = row.integer("index"), _columns(row)
    record = {
        "answer": _letter(row.text("answer"), choices, row.where),
        "choices": choices,
        "index": index,
        "category": row.maybe("category"),
        "l2_category": row.maybe("l2-category", "L2-category", "l2_category"),
    }
    return _task(row, str(index), prompts.options_prompt(row.text("question"), choices, row.maybe("hint")), record)


def ai2d(row: Row) -> Task:
    """The TSV says the letter and has a column per option; the Hugging Face copy has a list and the place in it."""
    if "options" in row.cells:
        choices = _lettered(row.texts("options"))
        place = row.integer("answer")
        if not 0 <= place < len(choices):
            raise DataError(f"{row.where}: answer {place} is none of the {len(choices)} options")
        answer = string.ascii_uppercase[place]
    else:
        choices = _columns(row)
        answer = _letter(row.text("answer"), choices, row.where)
    name = row.maybe("index") or str(row.position)
    text = prompts.options_prompt(row.text("question"), choices)
    return _task(row, name, text, {"answer": answer, "choices": choices})


def docvqa(row: Row) -> Task:
    """Questions about one page belong together; the TSV does not name pages, so the picture itself does."""
    document = row.maybe("docId", "ucsf_document_id") or "".join(image.digest() for image in row.images)
    record = {"answer": row.texts("answers", "answer"), "document": document}
    return _task(row, row.text("questionId", "index"), prompts.short_answer_prompt(row.text("question")), record)


def ocrbench(row: Row) -> Task:
    """The TSV calls the type of question ``category``."""
    record = {"answer": row.texts("answer"), "question_type": row.text("question_type", "category")}
    return _task(row, row.maybe("index") or str(row.position), row.text("question"), record)


def cvbench(row: Row) -> Task:
    """``source`` decides what counts: 2D is ADE20K and COCO, 3D is Omni3D."""
    choices = _lettered(row.texts("choices")) if "choices" in row.cells else _columns(row)
    source = row.text("source")
    if source not in _SOURCES:
        raise DataError(f"{row.where}: source {source[:40]!r} is none of {', '.join(_SOURCES)}")
    dimension = "3D" if source == "Omni3D" else "2D"
    record = {
        "answer": _letter(row.text("answer"), choices, row.where),
        "choices": choices,
        "source": source,
        "task": row.maybe("task", "category"),
        "type": dimension,
    }
    name = row.text("idx", "index")
    return _task(row, f"{row.part}-{name}" if row.part else name, prompts.cvbench_prompt(row.text("prompt")), record)


def mmvp(row: Row) -> Task:
    """Rows 1 and 2, 3 and 4, ... are pairs, in the order of their index."""
    if options := row.maybe("Options"):
        found = _MMVP_OPTIONS.fullmatch(options)
        if found is None:
            raise DataError(f"{row.where}: Options must read '(a) ... (b) ...', this is {options[:60]!r}")
        choices = {"A": found[1].strip(), "B": found[2].strip()}
    else:
        choices = _columns(row)
    answer = _letter(row.text("Correct Answer", "answer"), choices, row.where)
    text = prompts.mmvp_prompt(row.text("Question", "question"), choices)
    index = row.position + 1
    return _task(row, str(index), text, {"answer": answer, "choices": choices, "index": index})


def naturalbench(row: Row) -> Task:
    """Four rows in the order of their index are one group: question 0 on image 0 and 1, question 1 on image 0 and 1."""
    kind = row.text("Question_Type", "Question Type", "question_type", "type")
    if kind not in prompts.NATURALBENCH:
        raise DataError(f"{row.where}: type {kind[:40]!r} is none of {', '.join(prompts.NATURALBENCH)}")
    answer = row.text("Answer", "answer").strip().capitalize()
    known = ("Yes", "No") if kind == "yes_no" else ("A", "B")
    if answer not in known:
        raise DataError(f"{row.where}: the answer {answer[:40]!r} of a {kind} question is none of {known}")
    text = prompts.naturalbench_prompt(row.text("Question", "question"), kind)
    record = {"answer": answer, "question_type": kind, "index": row.position}
    return _task(row, str(row.position), text, record)


ROWS: dict[str, Callable[[Row], Task]] = {
    "mmbench": mmbench,
    "ai2d": ai2d,
    "docvqa": docvqa,
    "ocrbench": ocrbench,
    "cvbench": cvbench,
    "mmvp": mmvp,
    "naturalbench": naturalbench,
}
"""Benchmark -> reading of one row."""


def group_of(benchmark: str, record: Mapping[str, Any]) -> int | None:
    """Number of the group of rows that is counted as one; None: every row counts alone."""
    if benchmark == "mmbench":
        return int(record["index"]) % 1_000_000
    if benchmark == "mmvp":
        return (int(record["index"]) - 1) // 2
    if benchmark == "naturalbench":
        return int(record["index"]) // 4
    return None


def _task(row: Row, name: str, text: str, record: dict[str, Any]) -> Task:
    if not row.images:
        raise DataError(f"{row.where}: the row has no image")
    known = {key: value for key, value in record.items() if value is not None}
    return Task(id=name, text=text, images=row.images, record={"id": name, **known}, where=row.where)


def _columns(row: Row) -> dict[str, str]:
    """Options in columns of their own: A, B, ... as far as they are filled; a gap is left out as VLMEvalKit does."""
    return {letter: row.text(letter) for letter in string.ascii_uppercase if letter in row.cells}


def _lettered(options: list[str]) -> dict[str, str]:
    return dict(zip(string.ascii_uppercase, options, strict=False))


def _letter(answer: str, choices: Mapping[str, str], where: str) -> str:
    """The letter of "A", "(A)", "(a)"."""
    letter = answer.strip().removeprefix("(").removesuffix(")").upper()
    if letter not in choices:
        raise DataError(f"{where}: the answer {answer[:40]!r} is none of the options {', '.join(choices) or '(none)'}")
    return letter

"""Records from a file, and their fields with errors that name file, line and field."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpa.errors import DataError

WHERE = "where"
"""Key under which :func:`read_records` notes file and line."""
_SHOWN = 5
"""Examples in an error that counts."""
_LETTER = re.compile(r"\(?([A-Za-z])\)?")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, each with its place under ``where``. Blank lines are left out.

    Raises:
        DataError: missing, not UTF-8, a line is no JSON object, or there is none; names file and line.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")  # answers may hold U+2028
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give a .jsonl file, one record a line") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 ({error})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where}: not JSON ({error}); each line is one object, lists over lines are not read"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: a record is an object, this is {_kind(record)}")
        records.append({**record, WHERE: where})
    if not records:
        raise DataError(f"{path} holds no record")
    return records


@dataclass(frozen=True, slots=True)
class Row:
    """A record whose common fields are checked.

    Every method raises DataError with place and field.
    """

    id: str
    prediction: str
    where: str
    record: Mapping[str, Any]

    def text(self, name: str, default: str | None = None) -> str:
        """A text; ``default`` where the field is absent or null."""
        value = self.record.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(name, f"must be text, is {_kind(value)}")
        return value

    def name(self, name: str, known: Collection[str]) -> str:
        """One of the known texts."""
        value = self.text(name)
        if value not in known:
            raise self.wrong(name, f"is {value!r}; known: {', '.join(known)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts; a text alone is a list of one."""
        value = self.record.get(name)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not values or not all(isinstance(item, str) for item in values):
            raise self.wrong(name, f"must be a text or a list of texts, is {_kind(value)}")
        return tuple(values)

    def index(self) -> int:
        """``index``, or the id as a number."""
        value = self.record.get("index")
        if value is None:
            if not re.fullmatch(r"[0-9]{1,18}", self.id):
                raise self.wrong("index", f"is missing, and the id {self.id!r} is no number")
            return int(self.id)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong("index", f"must be a whole number from 0, is {value!r}")
        return value

    def count(self, name: str) -> int | None:
        """A whole number from 1, or None where the field is absent."""
        value = self.record.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, f"must be a whole number from 1, is {value!r}")
        return value

    def choices(self) -> dict[str, str]:
        """Letter -> text, at least two; a list is lettered from A."""
        value = self.record.get("choices")
        if isinstance(value, list | tuple):
            value = dict(zip(string.ascii_uppercase, value, strict=False))
        if not isinstance(value, Mapping) or len(value) < 2:
            raise self.wrong("choices", f"must map letters to texts, at least two, is {_kind(value)}")
        for letter, text in value.items():
            if not isinstance(letter, str) or len(letter) != 1 or letter not in string.ascii_uppercase:
                raise self.wrong("choices", f"has the key {letter!r}; keys are capital letters")
            if not isinstance(text, str) or not text.strip():
                raise self.wrong("choices", f"{letter} must be text, is {text!r}; leave out options that are not there")
        return dict(value)

    def letter(self, choices: Mapping[str, str]) -> str:
        """The right answer's letter, given as ``A``, ``(A)`` or ``(a)``."""
        value = self.text("answer")
        found = _LETTER.fullmatch(value.strip())
        if found is None or found[1].upper() not in choices:
            raise self.wrong("answer", f"is {value!r}, must be a letter of the choices ({', '.join(choices)})")
        return found[1].upper()

    def wrong(self, name: str, what: str) -> DataError:
        """The error about a field."""
        return DataError(f"{self.where}, field {name}: {what}")


def rows_of(benchmark: str, records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Records with id and prediction checked.

    Raises:
        DataError: no record, a field is missing or of the wrong type, or ids are there twice.
    """
    if not records:
        raise DataError(f"{benchmark}: there is no record to score")
    rows = []
    for number, record in enumerate(records, 1):
        place = record.get(WHERE)
        where = place if isinstance(place, str) else f"record {number}"
        value, prediction = record.get("id"), record.get("prediction")
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise DataError(f"{where}, field id: must be a text or a whole number, is {_kind(value)}")
        if not isinstance(prediction, str):
            raise DataError(
                f"{where}, field prediction: must be text, is {_kind(prediction)}; an answer that failed is to be "
                "generated again, not scored"
            )
        rows.append(Row(id=str(value), prediction=prediction, where=where, record=record))
    refuse_twice(benchmark, "id", [(row.id, row) for row in rows])
    return rows


def refuse_twice(benchmark: str, name: str, keyed: Iterable[tuple[str | int, Row]]) -> None:
    """
    Raises:
        DataError: two rows have the same key; counts them and names the first few.
    """
    first: dict[str | int, Row] = {}
    twice = [(key, row) for key, row in keyed if first.setdefault(key, row) is not row]
    if twice:
        shown = [f"{key} ({first[key].where}; {row.where})" for key, row in twice[:_SHOWN]]
        raise DataError(
            f"{benchmark}: {len(twice)} records repeat an {name}: {_listed(shown, len(twice))}; keep one of each"
        )


def refuse_incomplete(benchmark: str, what: str, missing: Mapping[str, Collection[object]], advice: str) -> None:
    """
    Args:
        what: e.g. ``questions lack rolls``.
        missing: unit -> what it lacks.
        advice: what to do.

    Raises:
        DataError: ``missing`` is not empty; counts and names the first few.
    """
    if missing:
        shown = [f"{key} lacks {', '.join(map(str, lacks))}" for key, lacks in list(missing.items())[:_SHOWN]]
        total = sum(len(lacks) for lacks in missing.values())
        raise DataError(
            f"{benchmark}: {len(missing)} {what}, {total} records are missing: {_listed(shown, len(missing))}. {advice}"
        )


def _listed(shown: Sequence[str], total: int) -> str:
    return "; ".join(shown) + (f"; and {total - len(shown)} more" if total > len(shown) else "")


def _kind(value: object) -> str:
    if value is None:
        return "missing or null"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return f"{names.get(type(value), type(value).__name__)} ({str(value)[:40]!r})"

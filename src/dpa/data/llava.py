"""Rows of LLaVA's format: ``.json`` (one list) and ``.jsonl`` (a sample a line), read as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from dpa.data.json_list import list_items
from dpa.data.samples import IMAGE_MARKER, Role, Turn
from dpa.errors import DataError

Layout = Literal["list", "lines"]

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file."""

    number: int
    """From 1; the line number in ``.jsonl``."""
    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]


def layout_of(path: Path) -> Layout:
    """How the records lie in the file.

    Raises:
        DataError: neither ``.json`` nor ``.jsonl``.
    """
    layouts: dict[str, Layout] = {".json": "list", ".jsonl": "lines", ".ndjson": "lines"}
    try:
        return layouts[path.suffix.lower()]
    except KeyError:
        raise DataError(
            f"{path}: cannot tell its layout from its name; name it .json (one list of samples) or .jsonl "
            "(a sample a line)"
        ) from None


def read_rows(path: Path) -> Iterator[Row]:
    """The records of a LLaVA file in order; never the whole file in memory.

    A row is ``{"id": any, "image": "a.jpg" or ["a.jpg", ...], "conversations": [{"from": "human", "value": "..."}]}``;
    ``id`` and ``image`` may be missing, other keys are ignored. Texts are normalised as LLaVA-NeXT does (see
    :func:`normalise`).

    Raises:
        DataError: names file and record or line, what was found, and what to do.
    """
    layout = layout_of(path)
    unit = unit_of(layout)
    number = 0
    with open(path, "rb") as file:
        for number, value in _values(file, path, layout):
            yield _row(value, number, f"{path}, {unit} {number}")
    if number == 0:
        raise DataError(f"{path}: holds no sample; an empty file or list cannot be trained on")


def unit_of(layout: Layout) -> str:
    """What a number counts, for messages."""
    return "record" if layout == "list" else "line"


def _values(file: BinaryIO, path: Path, layout: Layout) -> Iterator[tuple[int, Any]]:
    if file.read(len(_BOM)) != _BOM:
        file.seek(0)
    return _list_items(file, path) if layout == "list" else _lines(file, path)


def _list_items(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    start = file.tell()
    first = file.read(4096).lstrip()[:1]
    if first != b"[":
        found = {b"{": "an object", b"": "nothing"}.get(first, f"text that starts with {first!r}")
        raise DataError(
            f"{path}: holds {found}, expected a JSON list of samples; if it holds a sample a line, name it .jsonl"
        )
    file.seek(start)
    number = 0
    try:
        for number, value in enumerate(list_items(file), 1):
            yield number, value
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}, record {number + 1}: not JSON ({_short(error)}); is the file whole? Repair or download it again"
        ) from None


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({_short(error)}); a .jsonl file has one sample a line. "
                "Repair the line or download the file again"
            ) from None
        yield number, value


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _row(value: Any, number: int, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: {_kind(value)}, expected an object with 'conversations'")
    images = _images(value.get("image"), where)
    row = Row(
        number=number,
        id=str(number) if value.get("id") is None else str(value["id"]),
        turns=normalise(_turns(value, where), len(images)),
        images=images,
    )
    try:
        "\0".join([row.id, *images, *(turn.text for turn in row.turns)]).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: text with half a character ({error.object[error.start]!r}: a surrogate without its partner, "
            "left by a tool that cut an emoji in two); remove it"
        ) from None
    return row


def _turns(value: dict[str, Any], where: str) -> tuple[Turn, ...]:
    if "conversations" not in value:
        raise DataError(
            f"{where}: no 'conversations', only {', '.join(sorted(value)[:8]) or 'an empty object'}; "
            "is this LLaVA's format?"
        )
    conversations = value["conversations"]
    if not isinstance(conversations, list):
        raise DataError(f"{where}: 'conversations' is {_kind(conversations)}, expected a list of turns")
    return tuple(_turn(turn, f"{where}, turn {place}") for place, turn in enumerate(conversations, 1))


def _turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        found = f"keys {sorted(turn)[:8]}" if isinstance(turn, dict) else _kind(turn)
        raise DataError(f"{where}: {found}, expected an object with 'from' and 'value'")
    role, text = turn["from"], turn["value"]
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{where}: 'from' is {role!r}, expected one of {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise DataError(f"{where}: 'value' is {_kind(text)}, expected a string")
    return Turn(role=_ROLES[role], text=text)


def _images(value: Any, where: str) -> tuple[str, ...]:
    """A string, a list of strings, or nothing (null, empty)."""
    if value is None or value == "":
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: 'image' is {_kind(value)}, expected a path or a list of paths")
    return tuple(names)


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return "null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def normalise(turns: tuple[Turn, ...], images: int) -> tuple[Turn, ...]:
    """Puts markers where training expects them.

    A user turn with one ``<image>`` becomes ``"<image>\\n" + the rest, stripped`` (LLaVA-NeXT, preprocess_multimodal);
    with several, they stay where they are. If there are images and no turn has a marker (LLaVA's own files have such
    rows), one per image goes before the first user turn.
    """
    if images and not any(IMAGE_MARKER in turn.text for turn in turns):
        first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
        if first is not None:
            marked = Turn("user", f"{IMAGE_MARKER}\n" * images + turns[first].text)
            turns = (*turns[:first], marked, *turns[first + 1 :])
    return tuple(_one_marker_first(turn) for turn in turns)


def _one_marker_first(turn: Turn) -> Turn:
    if turn.role != "user" or turn.text.count(IMAGE_MARKER) != 1:
        return turn
    rest = turn.text.replace(IMAGE_MARKER, "").strip()
    return Turn("user", f"{IMAGE_MARKER}\n{rest}".strip())

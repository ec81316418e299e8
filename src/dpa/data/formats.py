"""What a row says, whatever file it came from: LLaVA's conversations, messages, PixMo-Cap.

A row is a dictionary. In a table (parquet, Arrow) an image that lies in the table itself is :data:`EMBEDDED` here.
Explicit errors name file, record and key; formats are chosen by the columns that a source has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from dpa.data.samples import IMAGE_MARKER, Role, Spans, Turn
from dpa.errors import DataError

RowFormat = Literal["llava", "messages", "pixmo"]

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_TURN_KEYS = (("from", "value"), ("role", "content"))
"""ShareGPT's names and OpenAI's."""
PIXMO_PROMPT: Final = "Describe the image in detail."
"""User's turn of a PixMo-Cap sample, which has none; the plain format (stages 1 and 2) drops it."""
_SPAN: Final = "[first character, one past the last]"
_LONGEST: Final = 2**63 - 1
"""Characters: what the index can hold."""
EMBEDDED: Final = object()
"""Stands for an image whose bytes lie in the table."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file."""

    number: int
    """From 1; the line number in ``.jsonl``."""
    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    visual_spans: Spans | None = None
    file: int = 0
    """Place of its file among the source's files."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a row's parser knows beside the row."""

    where: str
    """File and record, for messages."""
    embedded: Callable[[int], str] | None = None
    """Place of an image within the row -> the name by which it is opened; None: the file holds no images."""
    urls: Mapping[str, str] = field(default_factory=dict)
    """PixMo: url -> file, where the image folder has a list of them."""


COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "llava": ("id", "conversations", "image", "images", "visual_spans"),
    "messages": ("id", "messages", "texts", "image", "images", "visual_spans"),
    "pixmo": ("id", "image_url", "caption", "visual_spans"),
}
"""What is read of a row; other keys are ignored."""


def format_of(columns: Collection[str], where: str) -> RowFormat:
    """The format that has these columns.

    Raises:
        DataError: none has; names the columns.
    """
    if "conversations" in columns:
        return "llava"
    if "messages" in columns or "texts" in columns:
        return "messages"
    if "image_url" in columns and "caption" in columns:
        return "pixmo"
    raise DataError(
        f"{where}: no 'conversations', only {', '.join(sorted(columns)[:12]) or 'an empty object'}; cannot tell the "
        "format. Known are llava (conversations, image), messages (messages or texts, images) and pixmo (image_url, "
        "caption); rename the columns or set `format` (docs/data.md)"
    )


def parse_row(format: RowFormat, value: Any, number: int, context: Context) -> Row:
    """One row as a sample's parts. Texts are normalised as LLaVA-NeXT does (see :func:`normalise`).

    Raises:
        DataError: names file and record, what was found, and what to do.
    """
    where = context.where
    if not isinstance(value, dict):
        raise DataError(f"{where}: {kind_of(value)}, expected an object with {_NEEDED[format]}")
    turns, images = _PARSERS[format](value, context)
    row = Row(
        number=number,
        id=str(number) if value.get("id") is None else str(value["id"]),
        turns=normalise(turns, len(images)),
        images=images,
        visual_spans=_spans(value.get("visual_spans"), where),
    )
    try:
        "\0".join([row.id, *images, *(turn.text for turn in row.turns)]).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: text with half a character ({error.object[error.start]!r}: a surrogate without its partner, "
            "left by a tool that cut an emoji in two); remove it"
        ) from None
    return row


def _spans(given: Any, where: str) -> Spans | None:
    """``[[first, one past the last], ...]`` in characters of the caption."""
    if given is None:
        return None
    if not isinstance(given, list):
        raise DataError(f"{where}: 'visual_spans' is {kind_of(given)}, expected a list of {_SPAN}")
    for span in given:
        if not _is_span(span):
            raise DataError(f"{where}: 'visual_spans' has {str(span)[:60]}, expected {_SPAN}")
    return tuple((span[0], span[1]) for span in given)


def _is_span(span: Any) -> bool:
    if not (isinstance(span, list) and len(span) == 2 and all(type(at) is int for at in span)):
        return False
    first, end = span
    return bool(0 <= first < end <= _LONGEST)


_Parts = tuple[tuple[Turn, ...], tuple[str, ...]]


def _llava(value: dict[str, Any], context: Context) -> _Parts:
    """``{"image": "a.jpg" or ["a.jpg", ...], "conversations": [{"from": "human", "value": "..."}]}``."""
    if "conversations" not in value:
        raise DataError(
            f"{context.where}: no 'conversations', only {', '.join(sorted(value)[:8]) or 'an empty object'}; "
            "is this LLaVA's format?"
        )
    return _conversation(value["conversations"], "conversations", value, context)


def _messages(value: dict[str, Any], context: Context) -> _Parts:
    """``{"messages": [{"role": "user", "content": "..."}], "images": [...]}``.

    ``content`` may be a list of ``{"type": "image"}`` and ``{"type": "text", "text": "..."}``.

    Or ``texts``: ``[{"user": "...", "assistant": "..."}]`` (The Cauldron, FineVision).
    """
    if value.get("messages") is not None:
        return _conversation(value["messages"], "messages", value, context)
    pairs = value.get("texts")
    if pairs is None:
        raise DataError(f"{context.where}: no 'messages' and no 'texts', only {', '.join(sorted(value)[:8])}")
    if not isinstance(pairs, list):
        raise DataError(f"{context.where}: 'texts' is {kind_of(pairs)}, expected a list of question and answer")
    turns: list[Turn] = []
    for place, pair in enumerate(pairs, 1):
        if not isinstance(pair, dict) or not all(isinstance(pair.get(key), str) for key in ("user", "assistant")):
            raise DataError(f"{context.where}, text {place}: {kind_of(pair)}, expected 'user' and 'assistant' strings")
        turns += [Turn("user", pair["user"]), Turn("assistant", pair["assistant"])]
    return tuple(turns), _images(value, context)


def _pixmo(value: dict[str, Any], context: Context) -> _Parts:
    """``{"image_url": "https://...", "caption": "...", "transcripts": [...]}``; transcripts are not trained on."""
    url, caption = value.get("image_url"), value.get("caption") or ""  # null: counted by the audit, as an empty one
    if not isinstance(url, str) or not url:
        raise DataError(f"{context.where}: 'image_url' is {kind_of(url)}, expected a string")
    if not isinstance(caption, str):
        raise DataError(f"{context.where}: 'caption' is {kind_of(caption)}, expected a string")
    return (Turn("user", PIXMO_PROMPT), Turn("assistant", caption)), (context.urls.get(url) or file_of_url(url),)


def file_of_url(url: str) -> str:
    """File name of a downloaded image: sha256 of the url in hexadecimal, no extension (as Molmo's own downloader)."""
    return hashlib.sha256(url.encode()).hexdigest()


_PARSERS: dict[RowFormat, Callable[[dict[str, Any], Context], _Parts]] = {
    "llava": _llava,
    "messages": _messages,
    "pixmo": _pixmo,
}
_NEEDED: dict[RowFormat, str] = {
    "llava": "'conversations'",
    "messages": "'messages'",
    "pixmo": "'image_url' and 'caption'",
}


def _conversation(turns: Any, key: str, value: dict[str, Any], context: Context) -> _Parts:
    if not isinstance(turns, list):
        raise DataError(f"{context.where}: {key!r} is {kind_of(turns)}, expected a list of turns")
    images = _images(value, context)
    slots: list[str | int | None] = []
    read = tuple(_turn(turn, slots, f"{context.where}, turn {place}") for place, turn in enumerate(turns, 1))
    return read, _in_order(slots, images) if slots else images


def _turn(turn: Any, slots: list[str | int | None], where: str) -> Turn:
    """One turn; the images of typed parts are added to ``slots``: a path, a place in the row's images, or the next."""
    keys = next((keys for keys in _TURN_KEYS if isinstance(turn, dict) and all(key in turn for key in keys)), None)
    if keys is None:
        found = f"keys {sorted(turn)[:8]}" if isinstance(turn, dict) else kind_of(turn)
        raise DataError(f"{where}: {found}, expected an object with 'from' and 'value' (or 'role' and 'content')")
    role, text = turn[keys[0]], turn[keys[1]]
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{where}: {keys[0]!r} is {role!r}, expected one of {', '.join(_ROLES)}")
    if isinstance(text, list) and keys[1] == "content":
        text = "".join(_part(part, slots, f"{where}, part {place}") for place, part in enumerate(text, 1))
    if not isinstance(text, str):
        raise DataError(f"{where}: {keys[1]!r} is {kind_of(text)}, expected a string")
    return Turn(role=_ROLES[role], text=text)


def _part(part: Any, slots: list[str | int | None], where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind in ("image", "image_url"):
        slots.append(_slot(part, where))
        return f"{IMAGE_MARKER}\n"
    raise DataError(f"{where}: {kind_of(part)} of type {kind!r}, expected type 'text' with 'text', or type 'image'")


def _slot(part: dict[str, Any], where: str) -> str | int | None:
    given = next((part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None)
    if isinstance(given, dict):
        given = given.get("path") or given.get("url")
    if isinstance(given, str) and given and not given.startswith("data:"):
        return given
    if given is not None:
        raise DataError(
            f"{where}: an image written into the message; put images into files or into the column 'images'"
        )
    index = part.get("index")
    return index if isinstance(index, int) else None


def _in_order(slots: Sequence[str | int | None], images: tuple[str, ...]) -> tuple[str, ...]:
    """The row's images in the order in which typed parts name them; as they are where parts and images do not match."""
    following = iter(range(len(slots)))
    places = [next(following) if slot is None else slot for slot in slots if not isinstance(slot, str)]
    if sorted(places) != list(range(len(images))):
        return images + tuple(slot for slot in slots if isinstance(slot, str))
    chosen = iter(places)
    return tuple(slot if isinstance(slot, str) else images[next(chosen)] for slot in slots)


def _images(value: dict[str, Any], context: Context) -> tuple[str, ...]:
    """A path, a list of paths, images of the table, or nothing (null, empty)."""
    key = "image" if value.get("image") not in (None, "") else "images"
    given = value.get(key)
    if given is None or given == "":
        return ()
    items = given if isinstance(given, list) else [given]
    names = tuple(_name(item, place, context) for place, item in enumerate(items))
    if not all(names):
        raise DataError(f"{context.where}: {key!r} is {kind_of(given)}, expected a path or a list of paths")
    return tuple(name for name in names if name)


def _name(item: Any, place: int, context: Context) -> str | None:
    if item is EMBEDDED:
        assert context.embedded is not None
        return context.embedded(place)
    if isinstance(item, dict):
        item = item.get("path")
    return item if isinstance(item, str) and item else None


def kind_of(value: Any) -> str:
    """A value in few words, for messages."""
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

"""Rows of every format: what becomes a sample, in which order its images are, and what messages say."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from dpa.data.formats import EMBEDDED, PIXMO_PROMPT, Context, Row, RowFormat, format_of, parse_row
from dpa.data.samples import Turn
from dpa.errors import DataError

WHERE = "f.parquet, row 3"


def parse(format: RowFormat, value: Any, urls: dict[str, str] | None = None) -> Row:
    return parse_row(format, value, 3, Context(WHERE, lambda place: f"inside {place}", urls or {}))


def texts(row: Row) -> list[str]:
    return [turn.text for turn in row.turns]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["id", "image", "conversations"], "llava"),
        (["messages", "images"], "messages"),
        (["texts", "images"], "messages"),
        (["image_url", "caption", "transcripts"], "pixmo"),
    ],
)
def test_the_format_comes_from_the_columns(columns: list[str], expected: str) -> None:
    assert format_of(columns, WHERE) == expected


def test_unknown_columns_are_named() -> None:
    with pytest.raises(
        DataError, match=r"f\.parquet, row 3: no 'conversations', only answer, question; .*set `format`"
    ):
        format_of(["question", "answer"], WHERE)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def test_messages_with_strings() -> None:
    row = parse("messages", {"messages": [message("user", "Q"), message("assistant", "A")], "images": [EMBEDDED]})
    assert row.images == ("inside 0",)
    assert row.turns == (Turn("user", "<image>\nQ"), Turn("assistant", "A"))  # forgotten marker


def test_typed_parts_as_arrow_gives_them_with_nulls() -> None:
    content = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "Q", "index": None}]
    answer = [{"type": "text", "text": "A", "index": None}]
    row = parse(
        "messages", {"messages": [message("user", content), message("assistant", answer)], "images": [EMBEDDED]}
    )
    assert row.turns == (Turn("user", "<image>\nQ"), Turn("assistant", "A"))
    assert row.images == ("inside 0",)


@pytest.mark.parametrize(
    ("parts", "images", "expected"),
    [
        ([{"type": "image", "index": 1}, {"type": "image", "index": 0}], ["a", "b"], ("b", "a")),
        ([{"type": "image"}, {"type": "image"}], ["a", "b"], ("a", "b")),
        ([{"type": "image", "image": "x.png"}, {"type": "image"}], ["a"], ("x.png", "a")),
        ([{"type": "image_url", "image_url": {"url": "x.png"}}], None, ("x.png",)),
        ([{"type": "image", "path": "x.png"}], None, ("x.png",)),
        ([{"type": "image"}], ["a", "b"], ("a", "b")),  # does not match: the audit counts it
    ],
)
def test_images_are_in_the_order_of_their_parts(parts: list[Any], images: Any, expected: tuple[str, ...]) -> None:
    value = {"messages": [message("user", [*parts, {"type": "text", "text": "Q"}])], "images": images}
    row = parse("messages", value)
    assert row.images == expected
    assert texts(row)[0].count("<image>") == len(parts)


def test_pairs_of_the_cauldron() -> None:
    value = {
        "texts": [{"user": "Q", "assistant": "A", "source": "s"}, {"user": "R", "assistant": "B"}],
        "images": ["a"],
    }
    assert texts(parse("messages", value)) == ["<image>\nQ", "A", "R", "B"]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (EMBEDDED, ("inside 0",)),
        ([EMBEDDED, EMBEDDED], ("inside 0", "inside 1")),
        ({"path": "a.png"}, ("a.png",)),
        ("a.png", ("a.png",)),
        (None, ()),
        ([], ()),
    ],
)
def test_images_of_a_row(image: Any, expected: tuple[str, ...]) -> None:
    assert parse("llava", {"image": image, "conversations": []}).images == expected
    assert parse("llava", {"images": image, "conversations": []}).images == expected
    assert parse("messages", {"image": None, "images": image, "messages": []}).images == expected


def test_openai_names_in_conversations_and_shargpt_names_in_messages() -> None:
    assert texts(parse("llava", {"conversations": [message("user", "Q")]})) == ["Q"]
    assert texts(parse("messages", {"messages": [{"from": "gpt", "value": "A"}]})) == ["A"]


def test_pixmo_reads_the_caption_and_finds_the_file_by_the_url() -> None:
    url = "https://example.com/ä.jpg"
    value = {"image_url": url, "caption": "A cat.", "transcripts": ["uh a cat"]}
    row = parse("pixmo", value)
    assert row.images == (hashlib.sha256(url.encode()).hexdigest(),)
    assert row.turns == (Turn("user", f"<image>\n{PIXMO_PROMPT}"), Turn("assistant", "A cat."))
    assert parse("pixmo", value, {url: "x/1.jpg"}).images == ("x/1.jpg",)
    assert texts(parse("pixmo", value | {"caption": None}))[1] == ""


BAD: list[tuple[RowFormat, Any, str]] = [
    ("llava", [1], r"row 3: a list of 1, expected an object with 'conversations'"),
    ("messages", {"text": ""}, r"row 3: no 'messages' and no 'texts', only text"),
    ("messages", {"texts": "x"}, r"row 3: 'texts' is str 'x', expected a list"),
    ("messages", {"texts": [{"user": "Q"}]}, r"row 3, text 1: an object, expected 'user' and 'assistant'"),
    ("messages", {"messages": [message("tool", "x")]}, r"row 3, turn 1: 'role' is 'tool', expected one of human"),
    ("messages", {"messages": [message("user", None)]}, r"row 3, turn 1: 'content' is null, expected a string"),
    ("messages", {"messages": [message("user", [{"type": "video"}])]}, r"turn 1, part 1: an object of type 'video'"),
    (
        "messages",
        {"messages": [message("user", [{"type": "text", "text": None}])]},
        r"part 1: .* type 'text' with 'text'",
    ),
    (
        "messages",
        {"messages": [message("user", [{"type": "image", "image": "data:image/png;base64,AA"}])]},
        r"part 1: an image written into the message; put images into files",
    ),
    ("messages", {"messages": [], "images": [3]}, r"'images' is a list of 1, expected a path or a list of paths"),
    ("pixmo", {"caption": "x"}, r"row 3: 'image_url' is null, expected a string"),
    ("pixmo", {"image_url": "u", "caption": 3}, r"row 3: 'caption' is int '3', expected a string"),
]


@pytest.mark.parametrize(("format", "value", "expected"), BAD, ids=[expected[:40] for _, _, expected in BAD])
def test_bad_rows_are_named(format: RowFormat, value: Any, expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse(format, value)

"""The streaming list against the standard library, cut at every place."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpa.data.json_list as module
from dpa.data.json_list import list_items

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
OBJECTS = st.dictionaries(st.text(max_size=4), st.recursive(LEAVES, lambda x: st.lists(x, max_size=3), max_leaves=5))


@pytest.fixture(autouse=True)
def _one_byte_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prefix of every document is tried: each must be recognised as unfinished."""
    monkeypatch.setattr(module, "_READ", 1)


@given(st.lists(OBJECTS, max_size=4), st.booleans(), st.sampled_from([None, 1, 40]))
@settings(max_examples=60, deadline=None)
def test_same_as_the_standard_library(values: list[Any], ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(values, ensure_ascii=ascii_only, indent=indent)
    content = text.encode("utf-8", "surrogatepass")
    assert list(list_items(io.BytesIO(b" \n" + content + b"\n"))) == json.loads(text)


@given(st.lists(OBJECTS, min_size=1, max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_cut_file_is_refused_after_its_whole_items(values: list[Any], data: st.DataObject) -> None:
    content = json.dumps(values).encode()
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    found: list[Any] = []
    with pytest.raises(ValueError, match=r"."):
        found.extend(list_items(io.BytesIO(cut)))  # what comes before the error is kept
    assert found == values[: len(found)]


@pytest.mark.parametrize(
    ("content", "items", "message"),
    [
        (b"", 0, "ends too early"),
        (b"{}", 0, r"expected '\[', found '\{"),
        (b"[1, 2", 2, "ends too early"),
        (b"[1 2]", 1, "expected ']', found"),
        (b"[1, 2] x", 2, "more text after the end"),
        (b"[{}, nonsense, {}]", 1, "Expecting value"),
        (b'[{}, {"a": 1,, "b": "a long text that follows the fault"}]', 1, "Expecting property name"),
        (b'[{}, {"a": "\\x and a long text that follows the fault"}]', 1, "escape"),
        (b'[{}, {"a": "\xff and a long text"}]', 1, "not UTF-8"),
        (b'[{}, {"a": "\xe2\x82', 1, "not UTF-8"),
    ],
)
def test_faults_come_after_what_is_good(content: bytes, items: int, message: str) -> None:
    found: list[Any] = []
    with pytest.raises(ValueError, match=message):
        found.extend(list_items(io.BytesIO(content)))
    assert len(found) == items

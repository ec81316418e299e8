"""What a batch promises (dpa.types.Batch)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dpa.data.chat import Encoded
from dpa.data.collate import collate
from dpa.data.dataset import Item
from tests.unit.data.helpers import make_rules, make_tokenizer

RULES = make_rules(make_tokenizer("llama3"), "llama3")
I = RULES.image_token_id  # noqa: E741 (the placeholder, as it stands in the lists below)
P = RULES.pad_id


def item(name: str, ids: list[int], supervised: list[int], spans: tuple[tuple[int, int], ...] = ()) -> Item:
    pixels = torch.full((len(spans), 3, 4, 4), float(len(ids))) if spans else None
    marks = [place in supervised for place in range(len(ids))]
    return Item(Encoded(ids, marks, spans), pixels, name, "file, record 1")


def test_by_hand() -> None:
    batch = collate([item("a", [9, I, I, 5, 6], [3, 4], ((1, 3),)), item("b", [9, 5], [1])], RULES)
    assert batch.input_ids.tolist() == [[9, I, I, 5, 6], [9, 5, P, P, P]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert batch.supervised.int().tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.is_image.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert batch.image_counts == (1, 0)
    assert batch.has_image.tolist() == [True, False]
    assert batch.sample_ids == ("a", "b")
    assert batch.document_start_id == RULES.document_start_id
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (1, 3, 4, 4)
    for tensor in (batch.input_ids, batch.attention_mask, batch.position_ids):
        assert tensor.dtype == torch.int64
    assert batch.supervised.dtype == batch.is_image.dtype == torch.bool


def test_marks_of_supervised_tokens_in_reading_order() -> None:
    first, second = item("a", [9, I, I, 5, 6], [3, 4], ((1, 3),)), item("b", [9, 5, 7, 5], [1, 3])
    assert collate([first, second], RULES).marked is None
    first = replace(first, encoded=replace(first.encoded, marked=[False, False, False, False, True]))
    marked = collate([first, second], RULES).marked
    assert marked is not None
    assert marked[:2].tolist() == [0, 1]
    assert marked[2:].isnan().all()
    assert collate([first], RULES, filler=True).marked is None


def test_images_in_reading_order() -> None:
    two = item("a", [9, I, I, I, I, 5], [5], ((1, 3), (3, 5)))
    one = item("b", [I, I, 5], [2], ((0, 2),))
    batch = collate([two, one], RULES)
    assert batch.image_counts == (2, 1)
    assert batch.pixel_values is not None
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [6.0, 6.0, 3.0]


def test_text_alone_has_no_pixels_and_a_filler_nothing_to_learn() -> None:
    text = item("a", [9, 5, 6], [1, 2])
    batch = collate([text], RULES)
    assert batch.pixel_values is None
    assert batch.supervised.any()
    filler = collate([text], RULES, filler=True)
    assert not filler.supervised.any()
    assert torch.equal(filler.input_ids, batch.input_ids)


@pytest.mark.parametrize(
    "broken",
    [
        item("first token supervised", [9, 5], [0, 1]),
        item("image supervised", [9, I, I, 5], [1], ((1, 3),)),
        item("span of the wrong length", [9, I, I, 5], [3], ((1, 2),)),
        item("span beside the placeholders", [9, I, I, 5], [3], ((2, 4),)),
        replace(item("pixels missing", [9, I, I, 5], [3], ((1, 3),)), pixel_values=None),
        replace(item("pixels too many", [9, I, I, 5], [3], ((1, 3),)), pixel_values=torch.zeros(2, 3, 4, 4)),
    ],
    ids=lambda item: item.sample_id,
)
def test_what_cannot_happen_is_asserted(broken: Item) -> None:
    with pytest.raises(AssertionError):
        collate([broken], RULES)

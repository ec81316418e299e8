"""Rows of a pass: every sample exactly once, none too long, and everything is found again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpa.models.rows import arrange, fill_rows

LENGTHS = st.lists(st.integers(1, 60), max_size=40)


@given(LENGTHS, st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_every_sample_once_in_rows_within_the_limit(lengths: list[int], limit: int) -> None:
    rows = fill_rows(lengths, limit)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(row == sorted(row) and row for row in rows)
    filled = [sum(lengths[place] for place in row) for row in rows]
    assert all(tokens <= max(limit, *lengths) for tokens in filled)
    assert fill_rows(lengths, limit) == rows
    assert len(rows) >= sum(lengths) / max(limit, *lengths, 1)


@given(LENGTHS)
@settings(max_examples=40, deadline=None)
def test_one_row_where_there_is_no_limit(lengths: list[int]) -> None:
    assert fill_rows(lengths, sum(lengths) + 1) == ([list(range(len(lengths)))] if lengths else [])


def test_rows_are_about_equally_full() -> None:
    """Five of at most 128 would leave the last one nearly empty."""
    rows = fill_rows([20] * 26, 128)
    assert sorted(len(row) for row in rows) == [5, 5, 5, 5, 6]


def kept_positions() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    keep_BL = torch.rand(6, 9, generator=draw) < 0.4
    keep_BL[2] = False
    keep_BL[4] = True
    return keep_BL


@pytest.mark.parametrize("row_length", [None, 1, 16, 1000])
def test_positions_are_found_again(row_length: int | None) -> None:
    keep_BL, values_BL = kept_positions(), torch.arange(54).view(6, 9)
    rows = arrange(keep_BL, row_length)
    taken_RK = rows.take(values_BL, padding=-1)
    sample_N, column_N = keep_BL.nonzero(as_tuple=True)
    assert torch.equal(taken_RK[rows.places(sample_N, column_N)], values_BL[keep_BL])
    assert sorted(taken_RK[rows.filled].tolist()) == values_BL[keep_BL].tolist(), "each position once"
    assert sorted(rows.order) == [0, 1, 3, 4, 5]
    assert list(rows.lengths) == [int(keep_BL[sample].sum()) for sample in rows.order]
    in_order = torch.cat([values_BL[sample][keep_BL[sample]] for sample in rows.order])
    assert torch.equal(taken_RK[rows.filled], in_order), "samples follow each other, their positions in order"
    numbered = torch.cat([torch.arange(length) for length in rows.lengths])
    assert torch.equal(rows.numbered()[rows.filled], numbered)
    assert rows.packed is (row_length is not None)
    assert len(rows.sample) == {None: 5, 1: 3, 16: 2, 1000: 1}[row_length]


def test_a_row_each_is_the_batch_itself() -> None:
    real_BL = torch.arange(7) < torch.tensor([[7], [2], [5]])
    rows = arrange(real_BL)
    assert torch.equal(rows.filled, real_BL)
    assert torch.equal(rows.take(torch.arange(21).view(3, 7)), torch.arange(21).view(3, 7) * real_BL)


@pytest.mark.parametrize("row_length", [None, 8])
def test_nothing_at_all(row_length: int | None) -> None:
    rows = arrange(torch.zeros(3, 4, dtype=torch.bool), row_length)
    assert rows.take(torch.zeros(3, 4)).shape == (0, 0)
    assert rows.order == ()

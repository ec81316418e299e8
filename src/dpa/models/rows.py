"""Which positions of a batch take part in a pass, and where: moved together, several samples in a row where asked for.

A batch is right-padded, one sample per row: for integers and booleans that costs nothing. What costs is a pass over
its padding. So each pass lays out its own rows here: all real tokens for the pass with image, the kept text for the
pass without. With ``row_length=None`` every sample has a row of its own (and shorter ones are padded again); else rows
are filled with several samples, who must not see each other (``models.attention``).

Legend: B samples, L padded length of the batch, R rows of a pass, K slots per row (padded to the right), N tokens.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a pass. Samples without any position have no place in it."""

    sample: Tensor
    """int64 [R, K]: the sample that a slot belongs to; -1 at padding."""
    column: Tensor
    """int64 [R, K]: the column of the batch that a slot shows; 0 at padding."""
    row: Tensor
    """int64 [B]: the row of a sample that has one, else 0."""
    start: Tensor
    """int64 [B]: the first slot of a sample that has one, else 0."""
    slot: Tensor
    """int64 [B, L]: the slot of a position that takes part."""
    order: tuple[int, ...]
    """The samples, as they follow each other row after row."""
    lengths: tuple[int, ...]
    """Their numbers of positions, in that order; at least 1 each."""

    @property
    def filled(self) -> Tensor:
        """bool [R, K]: False at padding."""
        return self.sample >= 0

    @property
    def packed(self) -> bool:
        """Some row holds more than one sample."""
        return len(self.lengths) > len(self.sample)

    def take(self, values_BL: Tensor, padding: int | bool = 0) -> Tensor:
        """[B, L] -> [R, K]."""
        return values_BL[self.sample.clamp(min=0), self.column].masked_fill(~self.filled, padding)

    def numbered(self) -> Tensor:
        """int64 [R, K]: 0, 1, 2 ... inside each sample; 0 at padding."""
        return self.take(self.slot - self.start.unsqueeze(1))

    def places(self, sample_N: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
        """(row, slot), int64 [N] each, of positions that take part."""
        return self.row[sample_N], self.slot[sample_N, column_N]


def arrange(keep_BL: Tensor, row_length: int | None = None) -> Rows:
    """Moves the True positions of a bool [B, L] together. Waits for the device (shapes depend on values).

    Args:
        keep_BL: the positions that take part; their order within a sample is kept.
        row_length: fill rows up to so many slots, or up to the longest sample where that is longer
            (:func:`fill_rows`); None: one sample per row.
    """
    device = keep_BL.device
    lengths_B: list[int] = keep_BL.sum(dim=1).tolist()
    present = [sample for sample, length in enumerate(lengths_B) if length]
    if row_length is None:
        filling = [[sample] for sample in present]
    else:
        found = fill_rows([lengths_B[sample] for sample in present], row_length)
        filling = [[present[place] for place in row] for row in found]
    row_B, start_B, width = [0] * len(lengths_B), [0] * len(lengths_B), 0
    for row, samples in enumerate(filling):
        end = 0
        for sample in samples:
            row_B[sample], start_B[sample] = row, end
            end += lengths_B[sample]
        width = max(width, end)
    order = tuple(sample for samples in filling for sample in samples)
    place_2B = torch.tensor([row_B, start_B], device=device)
    slot_BL = keep_BL.cumsum(dim=1) - 1 + place_2B[1].unsqueeze(1)
    sample_T, column_T = keep_BL.nonzero(as_tuple=True)
    where = place_2B[0][sample_T], slot_BL[sample_T, column_T]
    sample_RK = torch.full((len(filling), width), -1, device=device).index_put(where, sample_T)
    column_RK = torch.zeros_like(sample_RK).index_put(where, column_T)
    lengths = tuple(lengths_B[sample] for sample in order)
    return Rows(sample_RK, column_RK, place_2B[0], place_2B[1], slot_BL, order, lengths)


def fill_rows(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Deals samples to rows: the longest first, always into the emptiest row; as few rows as the limit allows so.

    Rows come out about equally full, so that little is padded. A function of the arguments alone.

    Args:
        lengths: tokens per sample, at least 1 each.
        limit: tokens per row at most; a longer sample raises it to its own length.

    Returns:
        Per row its samples (places in ``lengths``), ascending; no row is empty.
    """
    if not lengths:
        return []
    limit = max(limit, *lengths)
    longest_first = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    count = -(-sum(lengths) // limit)
    while True:  # ends: with a row for each sample all fit
        fill = [(0, row) for row in range(count)]
        rows: list[list[int]] = [[] for _ in range(count)]
        for place in longest_first:
            tokens, row = fill[0]
            heapq.heapreplace(fill, (tokens + lengths[place], row))
            rows[row].append(place)
        if max(fill)[0] <= limit:
            return [sorted(row) for row in rows]
        count += 1

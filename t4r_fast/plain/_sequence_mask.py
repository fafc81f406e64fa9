"""What the masks of all kinds share: session lengths and the list of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def lengths(item_ids: Tensor, padding_idx: int) -> Tensor:
    """(B, 1) number of items of each session."""
    return (item_ids != padding_idx).sum(1, keepdim=True)


def shifted(item_ids: Tensor, padding_idx: int) -> Tensor:
    """The next item at each position, padding_idx in the last column."""
    last = torch.full_like(item_ids[:, :1], padding_idx)
    return torch.cat([item_ids[:, 1:], last], dim=1) if item_ids.shape[1] else item_ids


def row_list(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions of the chosen (B, L) bool in order, then -1: int64 (B * L,); and their number.

    No host synchronisation: each chosen position is written at its own running number, the others
    into one slot behind the list.
    """
    flat = chosen.reshape(-1)
    size = flat.shape[0]
    number = flat.cumsum(0)
    place = torch.where(flat, number - 1, size)
    rows = torch.full((size + 1,), -1, dtype=torch.int64, device=flat.device)
    rows = rows.scatter(0, place, torch.arange(size, device=flat.device))
    return rows[:size], flat.sum()


class Places(NamedTuple):
    """Of each of U packed items, int64 (U,). Behind the last session: session B of no items."""

    session: Tensor
    position: Tensor
    length: Tensor  # of the session


def places(item_ids: Tensor, offsets: Tensor) -> Places:
    index = torch.arange(item_ids.shape[0], device=item_ids.device)
    # the last of the offsets that are equal: sessions without items are none's
    session = torch.searchsorted(offsets.contiguous(), index, right=True) - 1
    lengths = torch.cat([offsets.diff(), offsets.new_zeros(1)])
    return Places(session, index - offsets[session], lengths[session])


def packed_mask(
    item_ids: Tensor, replaced: Tensor, chosen: Tensor, ahead: int, padding_idx: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """replaced, rows, targets and count; the target of a chosen item is `ahead` items behind it."""
    rows, count = row_list(chosen)
    at = torch.where(rows >= 0, rows + ahead, 0)
    return replaced, rows, torch.where(rows >= 0, item_ids[at], padding_idx), count

"""What the masks of all kinds share: session lengths and the list of rows."""

from __future__ import annotations

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

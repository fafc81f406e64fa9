"""mask_causal in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast.plain._sequence_mask import lengths, packed_mask, places, row_list, shifted

TRAIN, LAST, NEXT = range(3)


def mask_causal_fwd(
    item_ids: Tensor, mode: int, padding_idx: int, hide_history: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """targets, mask, rows and count."""
    column = torch.arange(item_ids.shape[1], device=item_ids.device)
    n = lengths(item_ids, padding_idx)
    if mode == NEXT:
        # an empty session is read at position 0
        read = column == (n - 1).clamp(min=0)
        targets = torch.full_like(item_ids, padding_idx)
        return targets, column >= n, *row_list(read)
    targets = shifted(item_ids, padding_idx)
    if mode == LAST:
        targets = torch.where(column == n - 2, targets, padding_idx)
    labelled = targets != padding_idx
    mask = ~labelled if mode == TRAIN or hide_history else column >= n
    return targets, mask, *row_list(labelled)


def mask_causal_packed_fwd(
    item_ids: Tensor, offsets: Tensor, mode: int, padding_idx: int, hide_history: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """replaced, rows, targets and count."""
    _, position, n = places(item_ids, offsets)
    nothing = torch.zeros_like(item_ids, dtype=torch.bool)
    if mode == NEXT:
        rows, count = row_list(position == n - 1)
        return nothing, rows, torch.full_like(rows, padding_idx), count
    labelled = position < n - 1 if mode == TRAIN else position == n - 2
    replaced = (position < n) & ~labelled if mode == TRAIN or hide_history else nothing
    return packed_mask(item_ids, replaced, labelled, 1, padding_idx)

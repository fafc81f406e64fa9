"""mask_mlm in plain PyTorch: integer thresholds, so that every backend gives the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast.plain._philox import philox
from t4r_fast.plain._sequence_mask import lengths, packed_mask, places, row_list, shifted

TRAIN, LAST, SHIFTED, NEXT = range(4)
# Draw kinds, part of the counter.
POSITION, ROW = 0, 1


def _words(seed: Tensor, draw: int, session: Tensor, block: Tensor) -> tuple[Tensor, ...]:
    """The four words of each counter."""
    key, offset = seed[0], seed[1]
    low, high = offset & 0xFFFFFFFF, (offset >> 32) & 0xFFFFFFFF
    return philox(key, (block, session, ((high << 3) & 0xFFFFFFFF) | draw, low))


def _train(item_ids: Tensor, seed: Tensor, threshold: int, padding_idx: int) -> Tensor:
    """(B, L) bool: Bernoulli on items, one more item for certain, never all items."""
    sessions, positions = item_ids.shape
    items = item_ids != padding_idx
    n = lengths(item_ids, padding_idx)
    session = torch.arange(sessions, device=item_ids.device)[:, None]
    block = torch.arange((positions + 3) // 4, device=item_ids.device)

    word = torch.stack(_words(seed, POSITION, session, block), dim=2)
    word = word.reshape(sessions, 4 * len(block))
    mask = items & (word[:, :positions] < threshold)

    extra, spared, _, _ = _words(seed, ROW, session, torch.zeros_like(session))
    column = torch.arange(positions, device=item_ids.device)
    mask = mask | (items & (column == (extra * n) >> 32))
    full = mask.sum(1, keepdim=True) == n
    return mask & ~(full & (column == (spared * n) >> 32))


def mask_mlm_fwd(
    item_ids: Tensor, seed: Tensor | None, threshold: int, mode: int, padding_idx: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """targets, mask, rows and count."""
    column = torch.arange(item_ids.shape[1], device=item_ids.device)
    n = lengths(item_ids, padding_idx)
    if mode == NEXT:
        column = torch.arange(item_ids.shape[1] + 1, device=item_ids.device)
        mask = column == n
        targets = torch.full_like(mask, padding_idx, dtype=torch.int64)
        return targets, mask, *row_list(mask)
    if mode == SHIFTED:
        targets = shifted(item_ids, padding_idx)
        mask = targets != padding_idx
    else:
        mask = (
            _train(item_ids, seed, threshold, padding_idx)
            if mode == TRAIN and seed is not None
            else column == n - 1
        )
        targets = torch.where(mask, item_ids, padding_idx)
    return targets, mask, *row_list(mask)


def _train_packed(item_ids: Tensor, offsets: Tensor, seed: Tensor, threshold: int) -> Tensor:
    """(U,) bool: the draws of _train."""
    session, position, n = places(item_ids, offsets)
    words = torch.stack(_words(seed, POSITION, session, position // 4), dim=1)
    word = words.gather(1, (position % 4)[:, None])[:, 0]
    extra, spared, _, _ = _words(seed, ROW, session, torch.zeros_like(session))
    mask = (position < n) & ((word < threshold) | (position == (extra * n) >> 32))
    # masked items before each item, and before the end
    before = torch.cat([offsets.new_zeros(1), mask.cumsum(0)])
    first = offsets[session]
    full = before[first + n] - before[first] == n
    return mask & ~(full & (position == (spared * n) >> 32))


def mask_mlm_packed_fwd(
    item_ids: Tensor,
    offsets: Tensor,
    seed: Tensor | None,
    threshold: int,
    mode: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """replaced, rows, targets and count."""
    if mode == TRAIN and seed is not None:
        replaced = _train_packed(item_ids, offsets, seed, threshold)
    else:
        _, position, n = places(item_ids, offsets)
        replaced = position < n - 1 if mode == SHIFTED else position == n - 1
    return packed_mask(item_ids, replaced, replaced, int(mode == SHIFTED), padding_idx)

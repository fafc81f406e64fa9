"""mask_permutation in plain PyTorch: integers decide, so that every backend gives the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast.plain._draws import counters
from t4r_fast.plain._philox import philox
from t4r_fast.plain._sequence_mask import lengths, row_list

TRAIN, LAST, NEXT = range(3)
# Draw kinds, part of the counter.
SPAN, PICK, ORDER = 4, 5, 6


def _spans(item_ids: Tensor, seed: Tensor, contexts: list[int], n: Tensor) -> Tensor:
    """(B, L) bool: one span in each stretch of the session."""
    sessions, positions = item_ids.shape
    key, high, low = counters(seed, SPAN)
    session = torch.arange(sessions, device=item_ids.device)[:, None]
    column = torch.arange(positions, device=item_ids.device)
    context_of = torch.tensor(contexts, device=item_ids.device)
    mask = torch.zeros_like(item_ids, dtype=torch.bool)
    current = torch.zeros_like(n)
    for step in range(-(-positions // contexts[0])):  # no stretch is shorter than the first
        words = philox(key, (torch.full_like(session, step), session, high, low))
        drawn = (words[0] * len(contexts)) >> 32
        span, context = drawn + 1, context_of[drawn]
        start = current + ((words[1] * (context - span + 1)) >> 32)
        inside = (column >= start) & (column < start + span) & (column < n) & (current < n)
        mask = mask | inside
        current = current + context
    return mask


def _train(
    item_ids: Tensor, seed: Tensor, contexts: list[int], permute_all: bool, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """(B, L) bool: what is predicted; (B, L) int64: its order, 0 for the rest."""
    sessions, positions = item_ids.shape
    n = lengths(item_ids, padding_idx)
    session = torch.arange(sessions, device=item_ids.device)[:, None]
    column = torch.arange(positions, device=item_ids.device)
    key, high, low = counters(seed, PICK)
    extra, spared, _, _ = philox(key, (torch.zeros_like(session), session, high, low))
    if permute_all:
        mask = item_ids != padding_idx
    else:
        mask = _spans(item_ids, seed, contexts, n)
        none = ~mask.any(1, keepdim=True) & (n > 0)
        mask = mask | (none & (column == (extra * n) >> 32))
    full = mask.sum(1, keepdim=True) == n
    mask = mask & ~(full & (column == (spared * n) >> 32))

    key, high, low = counters(seed, ORDER)
    block = torch.arange((positions + 3) // 4, device=item_ids.device)
    words = philox(key, (block, session, high, low))
    word = torch.stack(words, dim=2).reshape(sessions, 4 * len(block))[:, :positions]
    # equal words: by position
    return mask, torch.where(mask, word * positions + column + 1, 0)


def mask_permutation_fwd(
    item_ids: Tensor,
    seed: Tensor | None,
    contexts: list[int],
    permute_all: bool,
    mode: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """targets, mask, rows, count, perm_mask and the identity matrix."""
    n = lengths(item_ids, padding_idx)
    identity = torch.eye(item_ids.shape[1] + (mode == NEXT), device=item_ids.device)
    if mode == TRAIN and seed is not None:
        mask, order = _train(item_ids, seed, contexts, permute_all, padding_idx)
        hidden = mask[:, None, :] & (order[:, :, None] <= order[:, None, :])
        targets = torch.where(mask, item_ids, padding_idx)
        return targets, mask, *row_list(mask), hidden.float(), identity
    column = torch.arange(item_ids.shape[1] + (mode == NEXT), device=item_ids.device)
    mask = column == (n if mode == NEXT else n - 1)
    if mode == NEXT:
        targets = torch.full_like(mask, padding_idx, dtype=torch.int64)
    else:
        targets = torch.where(mask, item_ids, padding_idx)
    hidden = (column > column[:, None]) | mask[:, None, :]
    return targets, mask, *row_list(mask), hidden.float(), identity

"""target_rank in plain PyTorch: the counts of one chunk of items after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t4r_fast.plain._scores import (
    at_column,
    chunk_ranges,
    compute_dtype,
    keep_rows,
    rank_scores,
    spread,
)


def target_rank_fwd(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    ignore_index: int,
    need_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """above, tied_before and tied_after, int64, score and lse, each (N,) or (M,)."""
    kept = keep_rows(hidden.shape[0], rows, target, ignore_index, hidden)
    part = hidden[kept.source].double()
    wanted = torch.where(kept.valid, target[kept.source], 0)
    ranges = chunk_ranges(part.shape[0], items.shape[0], part.dtype)

    # The target's score is taken from the same product as the others': with several chunks the
    # product is made twice.
    own = part.new_zeros(part.shape[0], dtype=compute_dtype(items.dtype))
    for start, stop in ranges:
        chunk = rank_scores(part, items, bias, start, stop)
        own = at_column(chunk, wanted, start, own)

    above = torch.zeros_like(wanted)
    before = torch.zeros_like(wanted)
    tied = torch.zeros_like(wanted)
    top = part.new_full((part.shape[0],), -math.inf)
    total = part.new_zeros(part.shape[0])
    for start, stop in ranges:
        if len(ranges) > 1:
            chunk = rank_scores(part, items, bias, start, stop)
        equal = chunk == own[:, None]
        ids = torch.arange(start, stop, device=items.device)
        above = above + (~(chunk <= own[:, None])).sum(1)
        before = before + (equal & (ids < wanted[:, None])).sum(1)
        tied = tied + equal.sum(1)
        if need_lse:
            z = chunk.double() / temperature
            higher = torch.maximum(top, z.amax(1))
            # exp(-inf - -inf) is nan: a row of only -inf so far is shifted by 0
            shift = torch.where(higher == -math.inf, 0.0, higher)
            total = total * torch.exp(top - shift) + z.sub_(shift[:, None]).exp_().sum(1)
            top = higher
    nan = torch.isnan(own)
    above = above - nan.to(above.dtype)  # the target itself
    after = tied - before - (~nan).to(tied.dtype)  # the target ties with itself
    counts = spread(above, kept, -1), spread(before, kept, 0), spread(after, kept, 0)
    if not need_lse:
        return *counts, own.new_empty(0), own.new_empty(0)
    score = (own.double() / temperature).to(own.dtype)
    lse = (torch.where(top == -math.inf, 0.0, top) + torch.log(total)).to(own.dtype)
    return *counts, spread(score, kept, 0.0), spread(lse, kept, 0.0)

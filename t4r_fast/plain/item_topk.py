"""item_topk in plain PyTorch: the best of one chunk of items after another, merged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t4r_fast.plain._scores import (
    chunk_ranges,
    compute_dtype,
    keep_rows,
    rank_scores,
    spread,
)


def _order(scores: Tensor) -> Tensor:
    """The scores with nan like +inf."""
    return torch.nan_to_num(scores, math.inf, math.inf, -math.inf)


def _lowest_id_topk(order: Tensor, k: int) -> Tensor:
    """Columns (K, k) of the k largest of each row, equal ones by lowest column."""
    values, columns = torch.topk(order, k, dim=1)
    kth = values[:, -1:]
    # Which of the items equal to the k-th torch.topk takes is left open: settle that here.
    if torch.compiler.is_compiling():
        columns = _settle(order, kth, k)
    else:
        open_rows = ((order == kth).sum(1) > (values == kth).sum(1)).nonzero()[:, 0]
        if open_rows.numel():
            columns[open_rows] = _settle(order[open_rows], kth[open_rows], k)
    columns = columns.sort(dim=1).values
    by_score = order.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, by_score)


def _settle(order: Tensor, kth: Tensor, k: int) -> Tensor:
    larger = order > kth
    equal = order == kth
    room = k - larger.sum(1, keepdim=True)
    taken = larger | (equal & (equal.cumsum(1) <= room))  # exactly k of each row
    position = torch.arange(order.shape[1], device=order.device)
    return torch.topk(torch.where(taken, -position, -order.shape[1]), k, dim=1).indices


def _shut(scores: Tensor, start: int, exclude: Tensor | None, padding_idx: int | None) -> Tensor:
    """Scores with -inf for what must not be returned."""
    width = scores.shape[1]
    if exclude is not None:
        local = exclude - start
        local = torch.where((local >= 0) & (local < width), local, width)
        shut = torch.zeros(
            scores.shape[0], width + 1, dtype=torch.bool, device=scores.device
        ).scatter(1, local, True)
        scores = scores.masked_fill(shut[:, :width], -math.inf)
    if padding_idx is not None and start <= padding_idx < start + width:
        ids = torch.arange(start, start + width, device=scores.device)
        scores = scores.masked_fill(ids == padding_idx, -math.inf)
    return scores


def item_topk_fwd(
    hidden: Tensor,
    items: Tensor,
    k: int,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    exclude: Tensor | None,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor]:
    """scores and ids, (N, k) or (M, k)."""
    kept = keep_rows(hidden.shape[0], rows, None, 0, hidden)
    part = hidden[kept.source].double()
    if exclude is not None:
        exclude = exclude[kept.source]
    best = part.new_full((part.shape[0], k), -math.inf, dtype=compute_dtype(items.dtype))
    ids = torch.full((part.shape[0], k), -1, dtype=torch.int64, device=part.device)
    for start, stop in chunk_ranges(part.shape[0], items.shape[0], part.dtype):
        chunk = rank_scores(part, items, bias, start, stop)
        chunk = _shut(chunk, start, exclude, padding_idx)
        columns = _lowest_id_topk(_order(chunk), min(k, stop - start))
        # ids of earlier chunks are lower: a stable sort keeps ties in order
        best = torch.cat([best, chunk.gather(1, columns)], dim=1)
        ids = torch.cat([ids, columns + start], dim=1)
        place = _order(best).sort(dim=1, descending=True, stable=True).indices[:, :k]
        best, ids = best.gather(1, place), ids.gather(1, place)
    ids = torch.where(best == -math.inf, -1, ids)
    # Dividing last leaves the order, ties included, that of target_rank.
    return spread(best / temperature, kept, -math.inf), spread(ids, kept, -1)

"""target_rank: the place of each row's target among all items, by counting."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops._check import (
    check_scores,
    check_target,
    check_target_values,
    checked,
    full_precision,
)
from t4r_fast.ops._table import all_up_to_date
from t4r_fast.plain import target_rank as plain
from t4r_fast.plain._scores import compute_dtype


class TargetRank(NamedTuple):
    """How many items stand before the target; see `target_rank`."""

    above: Tensor
    tied_before: Tensor
    tied_after: Tensor


def target_rank(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_lse: bool = False,
) -> TargetRank | tuple[TargetRank, Tensor, Tensor]:
    """The number of items scored above and equal to each row's target; no N x V matrix is kept.

    z = hidden @ items.T + bias
    above[i]       = #{v != t: not (z[i, v] <= z[i, t])}     with t = target[i]
    tied_before[i] = #{v < t: z[i, v] == z[i, t]}
    tied_after[i]  = #{v > t: z[i, v] == z[i, t]}
    score[i]       = z[i, t] / temperature
    lse[i]         = logsumexp(z[i] / temperature)           cross-entropy is lse - score

    hidden        (N, D)  float32, float16, bfloat16, float64
    items         (V, D)  dtype of hidden, V >= 1
    target        (N,)    int64, 0 <= target < V, or ignore_index
    bias          (V,)    dtype of hidden or float32
    rows          (M,)    int64, which rows of hidden (and target) to rank; negative entries are
                          skipped, so that a list may have a fixed capacity
    temperature   float   > 0; ranks do not depend on it
    return_lse    True: the scores are made once for the ranks and for score and lse
    returns       TargetRank of three int64 tensors (N,), or (M,) with rows; with return_lse
                  (TargetRank, score, lse), both of that length, float32 (float64 for float64), in
                  nats

    A rank is 0-based: `above + tied_before` is the row's place when ties go by lowest id, as in
    `item_topk`. Skipped and ignored rows have above = -1, and ties, score and lse 0. A nan score
    stands above everything, and a target whose own score is nan stands last; lse is nan with a
    score of nan or inf, as in `tied_softmax_loss`. Not differentiable.
    The kernels give a row the same bits of score and lse whatever the number of threads and the
    other rows of the call.
    Memory: O(N) and one chunk of the items; the C++ kernels copy rows of hidden and items whose
    elements are not next to each other. Raises ValueError or TypeError on shapes, dtypes and
    temperature, IndexError on a target or row out of range.
    Replaces the top-k and one-hot of transformers4rec.torch.ranking_metric.
    """
    check_scores("target_rank", hidden, items, bias)
    check_target("target_rank", hidden, items, target, rows, ignore_index)
    if not temperature > 0:
        raise ValueError(f"target_rank: temperature must be > 0; got {temperature}")
    all_up_to_date(items, bias)
    name = backend.pick("target_rank", hidden)
    with torch.no_grad(), full_precision(name, hidden.device):
        *rank, score, lse = checked(
            name,
            lambda: check_target_values("target_rank", hidden, items, target, rows, ignore_index),
            backend.ops(name, plain).target_rank_fwd,
            *(hidden, items, target, bias, rows, float(temperature), ignore_index, return_lse),
        )
    return (TargetRank(*rank), score, lse) if return_lse else TargetRank(*rank)


def _fake(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    ignore_index: int,
    need_lse: bool,
) -> tuple[Tensor, ...]:
    size = (target if rows is None else rows).shape[0]
    dtype = compute_dtype(hidden.dtype)
    return (
        *(target.new_empty(size) for _ in range(3)),
        *(hidden.new_empty(size if need_lse else 0, dtype=dtype) for _ in range(2)),
    )


# score and lse are empty unless they are needed.
backend.declare(
    "target_rank",
    "target_rank_fwd(Tensor hidden, Tensor items, Tensor target, Tensor? bias, Tensor? rows,"
    " float temperature, int ignore_index, bool need_lse)"
    " -> (Tensor above, Tensor tied_before, Tensor tied_after, Tensor score, Tensor lse)",
    fake=_fake,
)

"""item_topk: the best k items of each row without its scores of all items."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops._check import (
    check_device,
    check_int64,
    check_row_values,
    check_rows,
    check_scores,
    check_values,
    checked,
    full_precision,
)
from t4r_fast.ops._table import all_up_to_date
from t4r_fast.plain import item_topk as plain

MAX_K = 128


def item_topk(
    hidden: Tensor,
    items: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    exclude: Tensor | None = None,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best-scored items of each row, best first; the N x V scores are never stored.

    scores, ids = ((hidden @ items.T + bias) / temperature).topk(k)  # equal scores: lowest id first

    hidden       (N, D)  float32, float16, bfloat16, float64
    items        (V, D)  dtype of hidden, V >= 1
    k            int     1 <= k <= 128
    bias         (V,)    dtype of hidden or float32; -inf takes an item out
    rows         (M,)    int64, which rows of hidden (and exclude) to answer; negative entries are
                         skipped, so that a list may have a fixed capacity
    temperature  float   > 0; divides the scores, does not change the order
    exclude      (N, S)  int64, item ids that row must not be given (say, those already seen);
                         negative entries are ignored
    padding_idx  int     an item id that no row is given
    returns      scores (N, k) float32 (float64 for float64) and ids (N, k) int64; with rows (M, k)

    Where fewer than k items are left the rest is score -inf and id -1, as is a skipped row; an item
    whose score is -inf is never returned. nan ranks as +inf, above everything. Not differentiable.
    The C++ kernels give a row the same bits whatever the number of threads and the other rows of
    the call: a session served alone gets what it gets in a batch.
    Memory: O(N k) and one chunk of the items; the C++ kernels copy rows of hidden and items whose
    elements are not next to each other. Raises ValueError or TypeError on shapes, dtypes and
    options, IndexError on a row or id out of range.
    Replaces torch.topk over the logits in transformers4rec.torch.model.base.Model and its Trainer.
    """
    check_scores("item_topk", hidden, items, bias)
    all_up_to_date(items, bias)
    check_rows("item_topk", hidden, rows)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MAX_K:
        raise ValueError(f"item_topk: k must be a whole number from 1 to {MAX_K}; got {k!r}")
    if not temperature > 0:
        raise ValueError(f"item_topk: temperature must be > 0; got {temperature}")
    if exclude is not None:
        _check_exclude(hidden, items, exclude)
    if padding_idx is not None and not 0 <= padding_idx < items.shape[0]:
        raise ValueError(
            f"item_topk: padding_idx must be an item id, 0 <= padding_idx < {items.shape[0]}; "
            f"got {padding_idx}"
        )
    name = backend.pick("item_topk", hidden)
    with torch.no_grad(), full_precision(name, hidden.device):
        return checked(
            name,
            lambda: _check_ids(hidden, items, rows, exclude),
            backend.ops(name, plain).item_topk_fwd,
            *(hidden, items, k, bias, rows, float(temperature), exclude, padding_idx),
        )


def _check_exclude(hidden: Tensor, items: Tensor, exclude: Tensor) -> None:
    check_int64("item_topk", "exclude", exclude, "(N, S)", 2)
    check_device("item_topk", "hidden", hidden, exclude=exclude)
    if exclude.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"item_topk: exclude must have one row per row of hidden, {hidden.shape[0]}; "
            f"got {exclude.shape[0]}"
        )


def _check_ids(hidden: Tensor, items: Tensor, rows: Tensor | None, exclude: Tensor | None) -> None:
    check_row_values("item_topk", hidden, rows)
    if exclude is not None:
        check_values(
            exclude >= items.shape[0],
            exclude,
            f"item_topk: exclude must be < {items.shape[0]} (the rows of items), "
            "or negative to be ignored",
            "place",
        )


def _fake(
    hidden: Tensor,
    items: Tensor,
    k: int,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    exclude: Tensor | None,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor]:
    size = hidden.shape[0] if rows is None else rows.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    scores = hidden.new_empty((size, k), dtype=dtype)
    return scores, hidden.new_empty((size, k), dtype=torch.int64)


backend.declare(
    "item_topk",
    "item_topk_fwd(Tensor hidden, Tensor items, int k, Tensor? bias, Tensor? rows,"
    " float temperature, Tensor? exclude, int? padding_idx) -> (Tensor, Tensor)",
    fake=_fake,
)

"""ranking_metrics: NDCG, recall, precision, MRR and MAP of one relevant item, from its rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops.target_rank import TargetRank
from t4r_fast.plain import ranking_metrics as plain

TIES = ("index", "mean", "best", "worst")


class RankingMetrics(NamedTuple):
    """One (N, len(ks)) float32 tensor per metric."""

    ndcg: Tensor
    recall: Tensor
    precision: Tensor
    mrr: Tensor
    map: Tensor


def ranking_metrics(
    rank: TargetRank | Tensor, ks: Sequence[int], *, ties: str = "index"
) -> RankingMetrics:
    """Ranking metrics at cut-offs ks of rows with one relevant item each.

    With r the 0-based rank, for r < k (all are 0 for r >= k):
    ndcg = 1 / log2(r + 2), recall = 1, precision = 1 / k, mrr = map = 1 / (r + 1)

    rank     TargetRank, or a (N,) integer tensor of 0-based ranks; negative for an ignored row
    ks       cut-offs, each >= 1
    ties     how items with the score of the target count (TargetRank only):
             "index"  lowest id first: the order of `item_topk`, so metrics equal what is served
             "mean"   the expected metric when ties are shuffled
             "best"   the target first
             "worst"  the target last
    returns  RankingMetrics of five (N, len(ks)) float32 tensors; an ignored row is nan

    With one relevant item, average precision is the reciprocal rank: `mrr` and `map` are equal.
    Not differentiable. Raises ValueError or TypeError on ks, ties or a rank that is none.
    Replaces transformers4rec.torch.ranking_metric, whose ties fall as torch.topk leaves them.
    """
    cuts = [_cut_off(k) for k in ks]
    if not cuts:
        raise ValueError("ranking_metrics: ks must hold at least one cut-off; got none")
    if ties not in TIES:
        raise ValueError(f"ranking_metrics: ties must be one of {', '.join(TIES)}; got {ties!r}")
    first, tied = _span(rank, ties)
    functions = backend.ops(backend.pick("ranking_metrics", first), plain)
    ndcg, recall, precision, mrr = functions.ranking_metrics_fwd(first, tied, cuts).unbind(0)
    return RankingMetrics(ndcg, recall, precision, mrr, mrr)


def _cut_off(k: int) -> int:
    if isinstance(k, bool) or int(k) != k or k < 1:
        raise ValueError(f"ranking_metrics: ks must be whole numbers >= 1; got {k!r}")
    return int(k)


def _span(rank: TargetRank | Tensor, ties: str) -> tuple[Tensor, Tensor]:
    """The first rank that the target may have, and how many more."""
    if isinstance(rank, TargetRank):
        above, before, after = rank
        if ties == "mean":
            return above, before + after
        offset = {"index": before, "best": torch.zeros_like(before), "worst": before + after}[ties]
        return above + offset, torch.zeros_like(above)
    if ties != "index":
        raise ValueError(
            f"ranking_metrics: ties={ties!r} needs a TargetRank (from target_rank); "
            "got a tensor of ranks, which does not say what is tied"
        )
    if rank.dim() != 1 or rank.is_floating_point() or rank.dtype == torch.bool:
        raise TypeError(
            "ranking_metrics: rank must be a TargetRank or an integer tensor (N,); "
            f"got {rank.dtype} {tuple(rank.shape)}"
        )
    rank = rank.long()
    return rank, torch.zeros_like(rank)

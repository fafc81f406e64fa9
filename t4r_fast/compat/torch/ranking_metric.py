"""Ranking metrics: how far up in the ranking of all items the right one stands.

For the next-item task each row has one right item, and every metric is a function of its rank,
which target_rank counts without forming scores. Dense scores and several right items per row work
too. State is one sum per k and a row count, in float64: constant memory, exact over batches.

Ties: among equal scores the lower item id ranks first, the order that item_topk serves. A row
without a target counts for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

from t4r_fast.compat.torch.relevance import extract_topk
from t4r_fast.model.next_item import LazyLogits
from t4r_fast.ops.ranking_metrics import ranking_metrics
from t4r_fast.ops.target_rank import TargetRank
from t4r_fast.registry import Registry

ranking_metrics_registry = Registry("ranking metric")


class RankingMetric(nn.Module):
    """A metric at several cut-offs.

    top_ks         int or list of ints >= 1
    labels_onehot  True: targets are item ids (N,), which stand for one-hot rows. False: targets are
                   (N, V) zeros and ones

    update(preds, target): preds are LazyLogits or (N, V) scores. compute(): the mean over all rows,
    (len(top_ks),) float32, nan before the first row. A call updates and returns the batch's mean.
    Replaces transformers4rec.torch.ranking_metric.RankingMetric.
    """

    field: str  # of RankingMetrics

    def __init__(self, top_ks: int | Sequence[int] | None = None, labels_onehot: bool = False):
        super().__init__()
        top_ks = [2, 5] if top_ks is None else top_ks
        self.top_ks = [top_ks] if isinstance(top_ks, int) else [int(k) for k in top_ks]
        if not self.top_ks or min(self.top_ks) < 1:
            raise ValueError(f"{type(self).__name__}: top_ks must be >= 1; got {top_ks!r}")
        self.labels_onehot = labels_onehot
        zeros = torch.zeros(len(self.top_ks), dtype=torch.float64)
        self.register_buffer("total", zeros, persistent=False)
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def name(self) -> str:
        """ndcg_at, recall_at, ...: the class name as metric keys spell it."""
        parts = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", type(self).__name__)
        return re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", parts).lower()

    # -- per-row values --------------------------------------------------------------------------

    def of_rank(self, rank: TargetRank) -> torch.Tensor:
        """(N, K) values from ranks; nan for rows without a target."""
        return getattr(ranking_metrics(rank, self.top_ks), self.field)

    def of_relevance(self, relevant: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """(N, K) values from `relevant` (N, max k), the labels in the order of the ranking, and
        `total` (N,), the number of right items of each row."""
        raise NotImplementedError

    # -- state -----------------------------------------------------------------------------------

    def add_rank(self, rank: TargetRank) -> torch.Tensor:
        """Count rows in by their ranks; returns their mean."""
        return self._add(self.of_rank(rank))

    def update(self, preds: LazyLogits | torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._add(self._per_row(preds, target))

    def forward(self, preds: LazyLogits | torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.update(preds, target)

    def compute(self) -> torch.Tensor:
        return (self.total / self.rows).to(torch.float32)

    def reset(self) -> None:
        self.total.zero_()
        self.rows.zero_()

    def _add(self, values: torch.Tensor) -> torch.Tensor:
        counted = ~values[:, 0].isnan()
        batch = values.to(torch.float64).nansum(dim=0)
        self.total += batch.to(self.total.device)
        self.rows += counted.sum().to(self.rows.device)
        return (batch / counted.sum()).to(torch.float32)

    def _per_row(self, preds: LazyLogits | torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if isinstance(preds, LazyLogits) and target.dim() == 1:
            return self.of_rank(preds.target_rank())
        scores = preds.dense() if isinstance(preds, LazyLogits) else preds
        if scores.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}: preds must be (rows, items) scores; got shape"
                f" {tuple(scores.shape)}"
            )
        if target.dim() == 1 and self.labels_onehot:
            return self.of_rank(_rank_in(scores, target))
        if target.shape != scores.shape:
            raise ValueError(
                f"{type(self).__name__}: target must have the shape of preds,"
                f" {tuple(scores.shape)}, or be item ids (N,) with labels_onehot=True; got shape"
                f" {tuple(target.shape)}"
            )
        k = min(max(self.top_ks), scores.shape[1])
        relevant = extract_topk([k], scores, target)[2].to(torch.float32)
        relevant = nn.functional.pad(relevant, (0, max(self.top_ks) - k))
        return self.of_relevance(relevant, target.sum(dim=1).to(torch.float32))


def _rank_in(scores: torch.Tensor, target: torch.Tensor) -> TargetRank:
    """target_rank on formed scores."""
    ids = torch.arange(scores.shape[1], device=scores.device)
    at_target = ids == target.unsqueeze(1)
    own = scores.gather(1, target.unsqueeze(1))
    above = (~(scores <= own) & ~at_target).sum(1)
    tied = (scores == own) & ~at_target
    before = (tied & (ids < target.unsqueeze(1))).sum(1)
    return TargetRank(above, before, tied.sum(1) - before)


def _discount(k: int, like: torch.Tensor) -> torch.Tensor:
    return 1.0 / torch.log2(torch.arange(2, k + 2, device=like.device, dtype=torch.float32))


@ranking_metrics_registry.register_with_multiple_names("precision_at", "precision")
class PrecisionAt(RankingMetric):
    """Share of the first k that are right: [rank < k] / k for one right item."""

    field = "precision"

    def of_relevance(self, relevant: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return torch.stack([relevant[:, :k].sum(1) / k for k in self.top_ks], dim=1)


@ranking_metrics_registry.register_with_multiple_names("recall_at", "recall")
class RecallAt(RankingMetric):
    """Share of the right items that are among the first k: [rank < k] for one right item."""

    field = "recall"

    def of_relevance(self, relevant: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        found = [relevant[:, :k].sum(1) / total for k in self.top_ks]
        return torch.stack(found, dim=1)


@ranking_metrics_registry.register_with_multiple_names("avg_precision_at", "avg_precision", "map")
class AvgPrecisionAt(RankingMetric):
    """Mean of the precisions at the places of the right items, over min(right items, k)."""

    field = "map"

    def of_relevance(self, relevant: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        places = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
        precision = relevant.cumsum(1) / places * relevant
        found = [precision[:, :k].sum(1) / total.clamp(max=k) for k in self.top_ks]
        return torch.stack(found, dim=1)


@ranking_metrics_registry.register_with_multiple_names("dcg_at", "dcg")
class DCGAt(RankingMetric):
    """Sum of 1 / log2(place + 1) over the right items among the first k (place from 1)."""

    field = "ndcg"  # with one right item the ideal is 1

    def of_relevance(self, relevant: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        gains = relevant * _discount(relevant.shape[1], relevant)
        found = [gains[:, :k].sum(1) for k in self.top_ks]
        return torch.where(total.unsqueeze(1) > 0, torch.stack(found, dim=1), torch.nan)


@ranking_metrics_registry.register_with_multiple_names("ndcg_at", "ndcg")
class NDCGAt(RankingMetric):
    """DCG over the DCG of the best ranking there could be."""

    field = "ndcg"

    def of_relevance(self, relevant: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        discount = _discount(relevant.shape[1], relevant)
        gains = relevant * discount
        places = torch.arange(relevant.shape[1], device=relevant.device)
        ideal = (places < total.unsqueeze(1)) * discount
        found = [gains[:, :k].sum(1) / ideal[:, :k].sum(1) for k in self.top_ks]
        return torch.stack(found, dim=1)


@ranking_metrics_registry.register_with_multiple_names("mrr_at", "mrr")
class MeanReciprocalRankAt(RankingMetric):
    """1 / place of the first right item if it is among the first k, else 0."""

    field = "mrr"

    def of_relevance(self, relevant: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        places = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
        best = torch.where(relevant > 0, 1.0 / places, 0.0)
        found = torch.stack([best[:, :k].amax(1) for k in self.top_ks], dim=1)
        return torch.where(total.unsqueeze(1) > 0, found, torch.nan)

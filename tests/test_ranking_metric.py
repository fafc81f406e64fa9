"""Ranking metrics: their definition, ties, streaming state."""

from __future__ import annotations

import math

import pytest
import torch

from t4r_fast.torch.model.lazy_logits import LazyLogits
from t4r_fast.torch.ranking_metric import (
    AvgPrecisionAt,
    DCGAt,
    MeanReciprocalRankAt,
    NDCGAt,
    PrecisionAt,
    RecallAt,
)

ALL = (PrecisionAt, RecallAt, AvgPrecisionAt, DCGAt, NDCGAt, MeanReciprocalRankAt)


def by_definition(kind, scores, relevant, k):
    """One row's metric from its sorted list, in plain Python."""
    order = sorted(range(len(scores)), key=lambda v: (-scores[v], v))[:k]
    hits = [relevant[v] for v in order]
    total = sum(relevant)
    gains = [h / math.log2(i + 2) for i, h in enumerate(hits)]
    if kind is PrecisionAt:
        return sum(hits) / k
    if kind is RecallAt:
        return sum(hits) / total
    if kind is AvgPrecisionAt:
        return sum(h * sum(hits[: i + 1]) / (i + 1) for i, h in enumerate(hits)) / min(total, k)
    if kind is DCGAt:
        return sum(gains)
    if kind is NDCGAt:
        return sum(gains) / sum(1 / math.log2(i + 2) for i in range(min(total, k)))
    first = next((i for i, h in enumerate(hits) if h), None)
    return 0.0 if first is None else 1 / (first + 1)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_one_right_item_matches_the_definition(kind, ties):
    torch.manual_seed(1)
    n, v = 60, 23
    hidden = torch.randint(-2, 3, (n, 3)).float() if ties else torch.randn(n, 8)
    items = torch.randint(-2, 3, (v, 3)).float() if ties else torch.randn(v, 8)
    target = torch.randint(0, v, (n,))
    scores = hidden @ items.T
    onehot = torch.nn.functional.one_hot(target, v)
    metric = kind(top_ks=[1, 5, 30], labels_onehot=True)
    want = torch.tensor(
        [
            sum(by_definition(kind, s, r, k) for s, r in zip(scores.tolist(), onehot.tolist())) / n
            for k in metric.top_ks
        ]
    )
    lazy = LazyLogits(hidden, items, target, padding_idx=-1)
    for preds, labels in ((scores, target), (lazy, target)):
        metric.reset()
        metric.update(preds, labels)
        torch.testing.assert_close(metric.compute(), want)
    formed = kind(top_ks=[1, 5, 30], labels_onehot=False)
    torch.testing.assert_close(formed(scores, onehot), want)


@pytest.mark.parametrize("kind", ALL)
def test_several_right_items_match_the_definition(kind):
    torch.manual_seed(2)
    scores = torch.randn(40, 17)
    relevant = (torch.rand(40, 17) < 0.2).long()
    relevant[:, 0] |= relevant.sum(1) == 0
    metric = kind(top_ks=[3, 10])
    pairs = list(zip(scores.tolist(), relevant.tolist()))
    want = [sum(by_definition(kind, s, r, k) for s, r in pairs) / 40 for k in metric.top_ks]
    torch.testing.assert_close(metric(scores, relevant), torch.tensor(want))


def test_equal_scores_do_not_flatter():
    # a model that scores every item alike ranks by id: only the first ids are "found"
    target = torch.arange(100)
    metric = RecallAt(top_ks=[10], labels_onehot=True)
    assert metric(torch.zeros(100, 100), target).item() == pytest.approx(0.1)


def test_state_is_exact_over_batches_and_skips_rows_without_target():
    torch.manual_seed(3)
    hidden, items = torch.randn(50, 4), torch.randn(30, 4)
    target = torch.randint(1, 30, (50,))
    target[::7] = 0
    whole, parts = NDCGAt([10], labels_onehot=True), NDCGAt([10], labels_onehot=True)
    whole.update(LazyLogits(hidden, items, target), target)
    for i in range(0, 50, 11):
        part = LazyLogits(hidden[i : i + 11], items, target[i : i + 11])
        parts.update(part, part.labels)
    kept = target != 0
    dense = NDCGAt([10], labels_onehot=True)(hidden[kept] @ items.T, target[kept])
    assert torch.equal(whole.compute(), parts.compute())
    torch.testing.assert_close(whole.compute(), dense)
    whole.reset()
    assert whole.compute().isnan().all()


def test_names_and_errors():
    names = [kind([1]).name for kind in ALL]
    assert names == [
        "precision_at",
        "recall_at",
        "avg_precision_at",
        "dcg_at",
        "ndcg_at",
        "mean_reciprocal_rank_at",
    ]
    with pytest.raises(ValueError, match="top_ks must be >= 1"):
        NDCGAt(top_ks=[0])
    with pytest.raises(ValueError, match="preds must be"):
        NDCGAt([1], labels_onehot=True)(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="target must have the shape of preds"):
        NDCGAt([1])(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))

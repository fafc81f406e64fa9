"""ranking_metrics against the definitions, over all ranks and over top-k lists."""

import math

import pytest
import torch
from harness import lanes, run_on

from t4r_fast.ops.ranking_metrics import ranking_metrics
from t4r_fast.ops.target_rank import TargetRank, target_rank

LANES = lanes("ranking_metrics")
KS = [1, 2, 10, 20, 500]


def one(rank, k):
    """ndcg, recall, precision, mrr, map of one rank, by definition."""
    if rank >= k:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    return 1 / math.log2(rank + 2), 1.0, 1 / k, 1 / (rank + 1), 1 / (rank + 1)


def expected(ranks_of_rows, ks=KS):
    """The mean over each row's possible ranks: five (N, len(ks)) tensors."""
    values = [
        [
            [sum(m) / len(ranks) for m in zip(*(one(r, k) for r in ranks))]
            if ranks
            else [math.nan] * 5
            for k in ks
        ]
        for ranks in ranks_of_rows
    ]
    return torch.tensor(values, dtype=torch.float64).reshape(-1, len(ks), 5).unbind(2)


def same(found, wanted):
    for name, a, b in zip(found._fields, found, wanted, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(
            a.cpu(), b.float(), rtol=2e-7, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_ranks(lane, dtype):
    ranks = [0, 1, 2, 9, 10, 19, 20, 499, 500, 10**6]
    with run_on(lane, "ranking_metrics") as device:
        found = ranking_metrics(torch.tensor([*ranks, -1], dtype=dtype, device=device), KS)
    same(found, expected([[r] for r in ranks] + [[]]))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("ties", ["index", "mean", "best", "worst"])
def test_ties(lane, ties):
    above, before, after = [0, 0, 3, 8, 19, 0, -1], [0, 2, 0, 5, 1, 600, 0], [0, 1, 4, 5, 0, 1, 0]
    ranks = {
        "index": lambda a, b, c: [a + b],
        "mean": lambda a, b, c: range(a, a + b + c + 1),
        "best": lambda a, b, c: [a],
        "worst": lambda a, b, c: [a + b + c],
    }[ties]
    wanted = [[] if a < 0 else list(ranks(a, b, c)) for a, b, c in zip(above, before, after)]
    with run_on(lane, "ranking_metrics") as device:
        rank = TargetRank(*(torch.tensor(t, device=device) for t in (above, before, after)))
        found = ranking_metrics(rank, KS, ties=ties)
    same(found, expected(wanted))


@pytest.mark.parametrize("lane", LANES)
def test_equals_the_metrics_of_a_top_k_list(lane):
    """Transformers4Rec's way: one-hot labels gathered in the order of torch.topk; no ties."""
    g = torch.Generator().manual_seed(0)
    hidden, items = torch.randn(50, 8, generator=g), torch.randn(60, 8, generator=g)
    target = torch.randint(0, 60, (50,), generator=g)
    with run_on(lane, "ranking_metrics") as device:
        moved = [t.to(device) for t in (hidden, items, target)]
        found = ranking_metrics(target_rank(*moved), [5, 20])
    for column, k in enumerate([5, 20]):
        top = (hidden @ items.T).topk(k).indices
        hit = (top == target[:, None]).float()
        discount = 1 / torch.log2(torch.arange(k) + 2.0)
        precision_at = hit.cumsum(1) / torch.arange(1, k + 1)
        wanted = {
            "ndcg": (hit * discount).sum(1),
            "recall": hit.sum(1),
            "precision": hit.sum(1) / k,
            "mrr": (hit / torch.arange(1, k + 1)).sum(1),
            "map": (precision_at * hit).sum(1),
        }
        for name, value in wanted.items():
            torch.testing.assert_close(getattr(found, name)[:, column].cpu(), value)


def test_equal_scores_are_worth_chance():
    """With all scores equal the expected recall@k is k / V."""
    rank = target_rank(torch.ones(40, 3), torch.ones(40, 3), torch.arange(40))
    for ties in ("mean", "index"):
        recall = ranking_metrics(rank, [10], ties=ties).recall.mean()
        assert recall.item() == pytest.approx(10 / 40)


def test_no_rows():
    assert ranking_metrics(torch.zeros(0, dtype=torch.int64), [5, 10]).ndcg.shape == (0, 2)


def test_compiles_to_one_graph():
    rank = TargetRank(torch.tensor([0, 3, -1]), torch.tensor([1, 0, 0]), torch.tensor([4, 0, 0]))

    def step(a, b, c):
        return tuple(ranking_metrics(TargetRank(a, b, c), [2, 5], ties="mean"))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*rank)
    for a, b in zip(step(*rank), compiled, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


R = torch.tensor([0, 1])
ERRORS = {
    "no ks": ((R, []), {}, ValueError, "ks must hold at least one"),
    "k": ((R, [5, 0]), {}, ValueError, "ks must be whole numbers >= 1; got 0"),
    "part": ((R, [1.5]), {}, ValueError, "ks must be whole numbers >= 1; got 1.5"),
    "ties": ((R, [5]), {"ties": "random"}, ValueError, "index, mean, best, worst; got 'random'"),
    "plain": ((R, [5]), {"ties": "mean"}, ValueError, "ties='mean' needs a TargetRank"),
    "float": ((R.float(), [5]), {}, TypeError, r"integer tensor \(N,\); got torch.float32 \(2,\)"),
    "shape": ((R[None], [5]), {}, TypeError, r"got torch.int64 \(1, 2\)"),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=rf"^ranking_metrics: .*{message}"):
        ranking_metrics(*args, **options)

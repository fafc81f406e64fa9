"""sampled_softmax_loss: cross-entropy over the target and K negatives, with sparse gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import t4r_fast
from benchmarks.case import (
    TUTORIAL_V,
    Benchmark,
    Call,
    Case,
    Inputs,
    Outputs,
    Provider,
    Work,
    ids,
    normal,
    with_gradients,
)

CASES = [
    Case("fwd+bwd", {"N": 1024, "V": 1_000_000, "D": 64, "K": 1000}, "quick", True, True),
    Case("fwd+bwd", {"N": 1024, "V": TUTORIAL_V, "D": 64, "K": 4096}, shown=True),
]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    n, v, d = case["N"], case["V"], case["D"]
    ranks = torch.arange(v, dtype=torch.float64)
    probability = ((ranks + 2) / (ranks + 1)).log() / torch.tensor(v + 1.0).log()
    return {
        "hidden": normal(n, d, dtype=dtype),
        "items": normal(v, d, dtype=dtype, scale=2 / d**0.5, seed=1),
        "target": ids(n, below=v, seed=2),
        "seed": torch.tensor([5, 6]),
        "probability": probability.float(),
    }


def ours(case: Case) -> Call:
    return with_gradients(
        lambda x: t4r_fast.sampled_softmax_loss(
            x["hidden"], x["items"], x["target"], num_negatives=case["K"], seed=x["seed"]
        ),
        "hidden",
        "items",
    )


def transformers4rec(sparse: bool):
    """_NextItemPredictionTask.sampled of 23.12; its table gradient is dense, `sparse` makes it so.

    Its negatives are others, so there is nothing to compare.
    """

    def make(case: Case) -> Call:
        def loss(x: Inputs) -> torch.Tensor:
            hidden, items, target = x["hidden"], x["items"], x["target"]
            twice = torch.multinomial(x["probability"], 2 * case["K"], replacement=True)
            negatives = twice.unique()[: case["K"]]
            expected = -torch.expm1(2 * case["K"] * torch.log1p(-x["probability"]))
            own = F.embedding(target, items, sparse=sparse)
            others = F.embedding(negatives, items, sparse=sparse)
            positive = (hidden * own).sum(1, keepdim=True)
            positive = positive - (expected[target] + 1e-16).log()[:, None]
            negative = hidden @ others.T - (expected[negatives] + 1e-16).log()
            hits = target[:, None] == negatives
            negative[hits] = torch.finfo(torch.float16).min / 100.0
            scores = torch.cat([positive, negative], 1)
            return F.cross_entropy(scores, torch.zeros_like(target))

        gradients = with_gradients(loss, "hidden", "items")

        def call(x: Inputs) -> Outputs:
            gradients(x)
            return {}

        return call

    return make


def work(case: Case, size: int) -> Work:
    """Scores and the products of both gradients; the items' rows gathered once and their
    gradients written."""
    scores = case["N"] * (case["K"] + 1)
    rows = (case["N"] + case["K"]) * case["D"] * size
    return Work(flop=6 * scores * case["D"], exp=scores, gather=rows, written=rows)


BENCHMARK = Benchmark(
    "sampled_softmax_loss",
    CASES,
    inputs,
    [
        Provider("t4r_fast", ours, ours=True),
        Provider("Transformers4Rec's steps", transformers4rec(sparse=False)),
        Provider("the same, sparse gradient", transformers4rec(sparse=True)),
    ],
    work,
)

"""target_rank: the place of the target among all items, which is all that evaluation needs; alone,
and with the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import t4r_fast
from benchmarks.case import (
    LARGE_V,
    TUTORIAL_V,
    Benchmark,
    Call,
    Case,
    Inputs,
    Outputs,
    Provider,
    Work,
    compiled,
    exact,
    ids,
)

CASES = [
    Case("rank", {"N": 256, "V": TUTORIAL_V, "D": 64}, "quick", shown=True),
    Case("rank", {"N": 1008, "V": TUTORIAL_V, "D": 64}, wide=True, shown=True),
    Case("rank", {"N": 1008, "V": TUTORIAL_V, "D": 128}, shown=True),
    Case("rank", {"N": 252, "V": LARGE_V, "D": 64}, shown=True),
    Case("rank and loss", {"N": 252, "V": TUTORIAL_V, "D": 64}, shown=True),
    Case("rank and loss", {"N": 252, "V": LARGE_V, "D": 64}, shown=True),
    Case("rank", {"N": 1008, "V": TUTORIAL_V, "D": 256}, "full"),
    Case("rank", {"N": 1008, "V": LARGE_V, "D": 64}, "full"),
]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    return {
        "hidden": exact(case["N"], case["D"], dtype=dtype),
        "items": exact(case["V"], case["D"], dtype=dtype, seed=1),
        "target": ids(case["N"], below=case["V"], seed=2),
    }


def with_loss(case: Case) -> bool:
    return case.kind == "rank and loss"


def alone(case: Case) -> bool:
    return case.kind == "rank"


def ours(case: Case) -> Call:
    def call(x: Inputs) -> Outputs:
        if alone(case):
            return t4r_fast.target_rank(x["hidden"], x["items"], x["target"])._asdict()
        rank, score, lse = t4r_fast.target_rank(
            x["hidden"], x["items"], x["target"], return_lse=True
        )
        return {**rank._asdict(), "loss": (lse - score).mean()}

    return call


def two_passes(x: Inputs) -> Outputs:
    rank = t4r_fast.target_rank(x["hidden"], x["items"], x["target"])
    loss = t4r_fast.tied_softmax_loss(x["hidden"], x["items"], x["target"])
    return {**rank._asdict(), "loss": loss}


def loss_and_top20(x: Inputs) -> Outputs:
    scores = x["hidden"] @ x["items"].T
    loss = F.cross_entropy(scores, x["target"])
    scores.topk(20)
    return {"loss": loss}


def count(
    hidden: torch.Tensor, items: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = hidden @ items.T
    own = scores.gather(1, target[:, None])
    return (scores > own).sum(1), (scores == own).sum(1)


def counted(function) -> Call:
    def call(x: Inputs) -> Outputs:
        return {"above": function(x["hidden"], x["items"], x["target"])[0]}

    return call


def top20(x: Inputs) -> Outputs:
    """Enough for metrics at 20, and what evaluation usually does; gives no rank beyond."""
    (x["hidden"] @ x["items"].T).topk(20)
    return {}


def work(case: Case, size: int) -> Work:
    n, v, d = case["N"], case["V"], case["D"]
    return Work(flop=2 * n * v * d, exp=n * v if with_loss(case) else 0, read=v * d * size)


BENCHMARK = Benchmark(
    "target_rank",
    CASES,
    inputs,
    [
        Provider("t4r_fast", ours, ours=True),
        Provider("matmul + topk(20)", lambda case: top20, only=alone),
        Provider("eager count", lambda case: counted(count), only=alone),
        Provider(
            "torch.compile count", lambda case: counted(compiled(count)), slow=True, only=alone
        ),
        Provider("target_rank + tied_softmax_loss", lambda case: two_passes, only=with_loss),
        Provider("matmul + cross_entropy + topk(20)", lambda case: loss_and_top20, only=with_loss),
    ],
    work,
)

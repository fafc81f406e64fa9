"""item_topk: the best 20 items of each row, as serving and prediction want them."""

from __future__ import annotations

import torch

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
)

CASES = [
    Case("topk", {"N": 256, "V": TUTORIAL_V, "D": 64, "K": 20}, "quick", shown=True),
    Case("topk", {"N": 1008, "V": TUTORIAL_V, "D": 64, "K": 20}, wide=True, shown=True),
    Case("topk", {"N": 1008, "V": TUTORIAL_V, "D": 128, "K": 20}, shown=True),
    Case("topk", {"N": 1, "V": LARGE_V, "D": 64, "K": 20}, shown=True),
    Case("topk", {"N": 252, "V": LARGE_V, "D": 64, "K": 100}),
    Case("topk", {"N": 1008, "V": TUTORIAL_V, "D": 256, "K": 20}, "full"),
]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    return {
        "hidden": exact(case["N"], case["D"], dtype=dtype),
        "items": exact(case["V"], case["D"], dtype=dtype, seed=1),
    }


def ours(case: Case) -> Call:
    def call(x: Inputs) -> Outputs:
        scores, ids = t4r_fast.item_topk(x["hidden"], x["items"], case["K"])
        return {"scores": scores, "ids": ids}

    return call


def plain(case: Case, wrap=lambda function: function) -> Call:
    """PyTorch's topk leaves open which of equal items it takes: only scores can be compared."""
    function = wrap(lambda hidden, items: (hidden @ items.T).topk(case["K"]).values)
    return lambda x: {"scores": function(x["hidden"], x["items"])}


def work(case: Case, size: int) -> Work:
    n, v, d = case["N"], case["V"], case["D"]
    return Work(flop=2 * n * v * d, read=v * d * size)


BENCHMARK = Benchmark(
    "item_topk",
    CASES,
    inputs,
    [
        Provider("t4r_fast", ours, ours=True),
        Provider("matmul + topk", plain),
        Provider("torch.compile", lambda case: plain(case, compiled), slow=True),
    ],
    work,
)

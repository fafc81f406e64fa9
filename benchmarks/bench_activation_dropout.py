"""activation_dropout: the middle of a feed-forward layer, GELU and dropout of packed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import t4r_fast
from benchmarks.case import (
    Benchmark,
    Call,
    Case,
    Inputs,
    Outputs,
    Provider,
    Work,
    compiled,
    normal,
    row_places,
)

# 1,500 rows are the items of some 250 sessions; 192 and 768 are a layer's width and four times it
CASES = [
    Case("fwd+bwd", {"R": 1500, "W": 192}, "quick", shown=True),
    Case("fwd+bwd", {"R": 1500, "W": 768}, wide=True, shown=True),
    Case("fwd", {"R": 1500, "W": 768}),
    Case("fwd+bwd_no_dropout", {"R": 1500, "W": 768}),
]
DROPOUT = 0.3


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    r, w = case["R"], case["W"]
    return {
        "x": normal(r, w, dtype=dtype),
        "bias": normal(w, dtype=dtype, seed=1),
        "dy": normal(r, w, dtype=dtype, seed=2),
        "places": row_places(r),
        "seed": torch.tensor([1, 2]),
    }


def of_case(case: Case, function: Callable[[Inputs, float], Tensor]) -> Call:
    dropout = 0.0 if case.kind.endswith("no_dropout") else DROPOUT

    def call(x: Inputs) -> Outputs:
        if case.kind == "fwd":
            with torch.no_grad():
                return {"y": function(x, dropout)}
        leaves = {name: x[name].detach().requires_grad_() for name in ("x", "bias")}
        y = function({**x, **leaves}, dropout)
        dx, dbias = torch.autograd.grad(y, list(leaves.values()), x["dy"])
        return {"y": y.detach(), "dx": dx, "dbias": dbias}

    return call


def without_draws(case: Case, call: Call) -> Call:
    """Baselines draw otherwise: what they drop is not to be compared."""
    if case.kind.endswith("no_dropout"):
        return call

    def timed(x: Inputs) -> Outputs:
        call(x)
        return {}

    return timed


def ours(case: Case) -> Call:
    return of_case(
        case,
        lambda x, dropout: t4r_fast.activation_dropout(
            x["x"], x["places"], bias=x["bias"], dropout=dropout, seed=x["seed"]
        ),
    )


def formula(x: Inputs, dropout: float) -> Tensor:
    return F.dropout(F.gelu(x["x"] + x["bias"]), dropout)


def eager(case: Case) -> Call:
    return without_draws(case, of_case(case, formula))


def torch_compile(case: Case) -> Call:
    return without_draws(case, of_case(case, compiled(formula)))


def work(case: Case, size: int) -> Work:
    """x read, y written; backward reads x and dy and writes dx. An exponential for each number."""
    n = case["R"] * case["W"]
    if case.kind == "fwd":
        return Work(exp=n, read=n * size, written=n * size)
    return Work(exp=2 * n, read=3 * n * size, written=2 * n * size)


BENCHMARK = Benchmark(
    "activation_dropout",
    CASES,
    inputs,
    [
        Provider("t4r_fast", ours, ours=True),
        Provider("F.gelu + F.dropout", eager),
        Provider("torch.compile", torch_compile, slow=True),
    ],
    work,
)

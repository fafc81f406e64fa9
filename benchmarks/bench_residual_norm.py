"""residual_norm: the end of a Transformer's layer, dropout, residual and layer norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import t4r_fast
from benchmarks.bench_activation_dropout import DROPOUT, without_draws
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

CASES = [
    Case("fwd+bwd", {"R": 1500, "W": 192}, "quick", shown=True),
    Case("fwd+bwd", {"R": 1500, "W": 768}, wide=True, shown=True),
    Case("fwd", {"R": 1500, "W": 768}),
    Case("fwd+bwd_no_dropout", {"R": 1500, "W": 768}),
]
LEAVES = ("x", "residual", "weight", "norm_bias", "bias")


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    r, w = case["R"], case["W"]
    return {
        "x": normal(r, w, dtype=dtype),
        "residual": normal(r, w, dtype=dtype, seed=1),
        "weight": normal(w, dtype=dtype, seed=2) + 1,
        "norm_bias": normal(w, dtype=dtype, seed=3),
        "bias": normal(w, dtype=dtype, seed=4),
        "dy": normal(r, w, dtype=dtype, seed=5),
        "places": row_places(r),
        "seed": torch.tensor([1, 2]),
    }


def of_case(case: Case, function: Callable[[Inputs, float], Tensor]) -> Call:
    dropout = 0.0 if case.kind.endswith("no_dropout") else DROPOUT

    def call(x: Inputs) -> Outputs:
        if case.kind == "fwd":
            with torch.no_grad():
                return {"y": function(x, dropout)}
        leaves = {name: x[name].detach().requires_grad_() for name in LEAVES}
        y = function({**x, **leaves}, dropout)
        grads = torch.autograd.grad(y, list(leaves.values()), x["dy"])
        found = {f"d{name}": grad for name, grad in zip(LEAVES, grads, strict=True)}
        return {"y": y.detach(), **found}

    return call


def ours(case: Case) -> Call:
    def function(x: Inputs, dropout: float) -> Tensor:
        parts = [x[name] for name in ("x", "residual", "weight", "norm_bias", "places")]
        return t4r_fast.residual_norm(*parts, bias=x["bias"], dropout=dropout, seed=x["seed"])

    return of_case(case, function)


def formula(x: Inputs, dropout: float) -> Tensor:
    z = F.dropout(x["x"] + x["bias"], dropout) + x["residual"]
    return F.layer_norm(z, z.shape[1:], x["weight"], x["norm_bias"])


def eager(case: Case) -> Call:
    return without_draws(case, of_case(case, formula))


def torch_compile(case: Case) -> Call:
    return without_draws(case, of_case(case, compiled(formula)))


def work(case: Case, size: int) -> Work:
    """x and residual read, y written; backward reads them and dy and writes dx and dresidual."""
    n = case["R"] * case["W"] * size
    if case.kind == "fwd":
        return Work(read=2 * n, written=n)
    return Work(read=5 * n, written=(2 if case.kind.endswith("no_dropout") else 3) * n)


BENCHMARK = Benchmark(
    "residual_norm",
    CASES,
    inputs,
    [
        Provider("t4r_fast", ours, ours=True),
        Provider("F.dropout + add + F.layer_norm", eager),
        Provider("torch.compile", torch_compile, slow=True),
    ],
    work,
)

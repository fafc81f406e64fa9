"""tied_table_step: a train step of the tied table, from hidden states to its changed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
)
from t4r_fast.ops._table import recorder_of
from t4r_fast.ops.tied_table_step import table_state
from t4r_fast.optim import TiedTableOptimizer

MANY = 1_000_000
LOOKUPS = 5120  # a batch of 256 sessions of 20
LR = 1e-3

# step: loss, gradients and the step of the table; lookup: a step of all rows without a softmax.
# Both AdamW.
CASES = [
    Case("step", {"N": 256, "V": TUTORIAL_V, "D": 64}, "quick", shown=True),
    Case("step", {"N": 1008, "V": TUTORIAL_V, "D": 64}, wide=True, shown=True),
    Case("step", {"N": 256, "V": MANY, "D": 64}, wide=True, shown=True),
    Case("lookup", {"N": 0, "V": MANY, "D": 64}, shown=True),
]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    n, v, d = case["N"], case["V"], case["D"]
    return {
        "hidden": normal(n, d, dtype=dtype),
        "items": normal(v, d, dtype=dtype, scale=2 / d**0.5, seed=1),
        "target": ids(n, below=v, seed=2),
        "ids": ids(LOOKUPS, below=v, seed=3),
        "rows": normal(LOOKUPS, d, dtype=dtype, scale=1e-3, seed=4),
    }


def train(
    make: Callable[[nn.Parameter], torch.optim.Optimizer],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[[Case], Call]:
    """Steps of one table, one after the other; the first from the inputs as they are."""

    def made(case: Case) -> Call:
        table: nn.Parameter | None = None
        optimizer: torch.optim.Optimizer | None = None

        def call(x: Inputs) -> Outputs:
            nonlocal table, optimizer
            if table is None or optimizer is None:
                table = nn.Parameter(x["items"].clone())
                optimizer = make(table)
            if case.kind == "step":
                hidden = x["hidden"].detach().requires_grad_()
                loss(hidden, table, x["target"]).backward()
            recorder = recorder_of(table)
            if recorder is not None:
                recorder.add_lookup(x["ids"], x["rows"])
            else:
                if table.grad is None:
                    table.grad = torch.zeros_like(table)
                table.grad.index_add_(0, x["ids"], x["rows"])
            optimizer.step()
            optimizer.zero_grad()
            return {"items": table.detach()}

        return call

    return made


def of_torch(table: nn.Parameter) -> torch.optim.Optimizer:
    fused = table.dtype != torch.bfloat16
    return torch.optim.AdamW([table], lr=LR, fused=fused)


def of_ours(table: nn.Parameter) -> torch.optim.Optimizer:
    return TiedTableOptimizer(table, lr=LR)


def ours(case: Case) -> Call:
    if case.kind == "step":
        return train(of_ours, t4r_fast.tied_softmax_loss)(case)
    # The optimizer would touch the looked up rows alone; here all rows move.
    items: Tensor | None = None
    state, step = {}, 0

    def call(x: Inputs) -> Outputs:
        nonlocal items, state, step
        if items is None:
            items = x["items"].clone()
            state = table_state(items, "adamw")
        step += 1
        lookup = [(x["ids"], x["rows"])]
        t4r_fast.tied_table_step(items, state, (), lookup, step=step, lr=LR, weight_decay=0.01)
        return {"items": items}

    return call


def eager_loss(hidden: Tensor, items: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ items.T).float(), target)


def work(case: Case, size: int) -> Work:
    """Scores in forward, in backward and in the step, and two products; table and two moments."""
    n, v, d = case["N"], case["V"], case["D"]
    table, passes = v * d * size, 2 if case.kind == "step" else 0
    return Work(
        flop=8 * n * v * d,
        exp=2 * n * v,
        read=(passes + 3) * table,
        written=3 * table,
    )


BENCHMARK = Benchmark(
    "tied_table_step",
    CASES,
    inputs,
    [
        Provider("t4r_fast", ours, ours=True),
        Provider("eager + AdamW(fused)", train(of_torch, eager_loss)),
        Provider("formed gradient + AdamW(fused)", train(of_torch, t4r_fast.tied_softmax_loss)),
    ],
    work,
)

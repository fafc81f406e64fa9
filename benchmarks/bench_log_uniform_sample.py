"""log_uniform_sample: negatives by popularity, without a table of the catalogue's probabilities."""

from __future__ import annotations

import torch

import t4r_fast
from benchmarks.case import Benchmark, Call, Case, Inputs, Outputs, Provider, Work

CASES = [
    Case("unique", {"N": 2000, "V": 1_000_000}, "quick", shown=True),
    Case("plain", {"N": 2000, "V": 1_000_000}, "quick"),
    Case("unique", {"N": 4096, "V": 10_000_000}),
]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    ranks = torch.arange(case["V"], dtype=torch.float64)
    probability = ((ranks + 2) / (ranks + 1)).log() / torch.tensor(case["V"] + 1.0).log()
    return {"seed": torch.tensor([5, 6]), "probability": probability.float()}


def ours(case: Case) -> Call:
    def call(x: Inputs) -> Outputs:
        return t4r_fast.log_uniform_sample(
            case["N"], case["V"], unique=case.kind == "unique", seed=x["seed"]
        )._asdict()

    return call


def transformers4rec(case: Case) -> Call:
    """LogUniformSampler.sample: twice as many draws, sorted, the first N of the different ones.

    Its ids are random in another way, so there is nothing to compare.
    """

    def call(x: Inputs) -> Outputs:
        if case.kind == "plain":
            torch.multinomial(x["probability"], case["N"], replacement=True)
        else:
            draws = torch.multinomial(x["probability"], 2 * case["N"], replacement=True)
            draws.unique()[: case["N"]]
        return {}

    return call


def work(case: Case, size: int) -> Work:
    """An exp and a log per draw; ids and log q written."""
    return Work(exp=2 * case["N"], written=12 * case["N"])


BENCHMARK = Benchmark(
    "log_uniform_sample",
    CASES,
    inputs,
    [
        Provider("t4r_fast", ours, ours=True),
        Provider(
            "Transformers4Rec's steps",
            transformers4rec,
            only=lambda case: case["V"] < 2**24,  # as many as torch.multinomial takes
        ),
    ],
    work,
)

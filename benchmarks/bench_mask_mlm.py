"""mask_mlm: which positions a masked language model hides, with targets and the list of rows."""

from __future__ import annotations

import torch

import t4r_fast
from benchmarks.case import Benchmark, Case, Inputs, Outputs, Provider, Work, packed, sessions

CASES = [
    Case("train", {"B": 256, "L": 20}, "quick", shown=True),
    Case("train", {"B": 4096, "L": 50}),
    Case("packed", {"B": 256, "L": 20}),
]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    item_ids = sessions(case)
    found = {"item_ids": item_ids, "seed": torch.tensor([3, 4])}
    return {**found, **packed(item_ids)} if case.kind == "packed" else found


def padded(x: Inputs) -> Outputs:
    return t4r_fast.mask_mlm(x["item_ids"], seed=x["seed"])._asdict()


def of_packed(x: Inputs) -> Outputs:
    return t4r_fast.mask_mlm(x["items"], offsets=x["offsets"], seed=x["seed"])._asdict()


def beside_packed(x: Inputs) -> Outputs:
    """The padded call on the same sessions; its outputs have other shapes."""
    padded(x)
    return {}


def transformers4rec(x: Inputs) -> Outputs:
    """MaskedLanguageModeling of Transformers4Rec 23.12, and the compaction that its head needs.

    Its random numbers are others, so there is nothing to compare.
    """
    item_ids = x["item_ids"]
    real = item_ids != 0
    mask = torch.bernoulli(torch.full(item_ids.shape, 0.15)).bool() & real
    one = torch.multinomial(real.float(), num_samples=1).squeeze(1)
    rows = torch.arange(item_ids.shape[0])
    mask[rows, one] = True
    labels = torch.where(mask, item_ids, 0)
    full = mask.sum(1) == real.sum(1)
    back = torch.multinomial(labels.float(), num_samples=1).squeeze(1)
    undone = rows[full]
    labels[undone, back[full]] = 0
    mask = labels != 0
    flat = labels.flatten()
    kept = (flat != 0).nonzero().squeeze(1)
    flat[kept]
    return {}


def work(case: Case, size: int) -> Work:
    """Ids read; targets and the row list of int64 and the mask of one byte written."""
    positions = case["B"] * case["L"]
    if case.kind == "packed":  # 2 to L items in a session
        positions = case["B"] * (case["L"] + 2) // 2
    return Work(read=8 * positions, written=17 * positions)


BENCHMARK = Benchmark(
    "mask_mlm",
    CASES,
    inputs,
    [
        Provider(
            "t4r_fast", lambda case: of_packed if case.kind == "packed" else padded, ours=True
        ),
        Provider("Transformers4Rec's steps", lambda case: transformers4rec),
        Provider(
            "t4r_fast, padded", lambda case: beside_packed, only=lambda case: case.kind == "packed"
        ),
    ],
    work,
)

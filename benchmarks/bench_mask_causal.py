"""mask_causal: next-item targets, mask and the list of rows."""

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
    found = {"item_ids": item_ids}
    return {**found, **packed(item_ids)} if case.kind == "packed" else found


def padded(x: Inputs) -> Outputs:
    return t4r_fast.mask_causal(x["item_ids"])._asdict()


def of_packed(x: Inputs) -> Outputs:
    return t4r_fast.mask_causal(x["items"], offsets=x["offsets"])._asdict()


def beside_packed(x: Inputs) -> Outputs:
    """The padded call on the same sessions; its outputs have other shapes."""
    padded(x)
    return {}


def transformers4rec(x: Inputs) -> Outputs:
    """CausalLanguageModeling of Transformers4Rec 23.12, and the compaction that its head needs.

    Its list of rows has another length, so that targets and mask alone are compared.
    """
    item_ids = x["item_ids"]
    targets = torch.cat([item_ids[:, 1:], torch.zeros_like(item_ids[:, :1])], dim=1)
    labelled = targets != 0
    flat = targets.flatten()
    kept = (flat != 0).nonzero().squeeze(1)
    flat[kept]
    return {} if "offsets" in x else {"targets": targets, "mask": ~labelled}


def work(case: Case, size: int) -> Work:
    """Ids read; targets and the row list of int64 and the mask of one byte written."""
    positions = case["B"] * case["L"]
    if case.kind == "packed":  # 2 to L items in a session
        positions = case["B"] * (case["L"] + 2) // 2
    return Work(read=8 * positions, written=17 * positions)


BENCHMARK = Benchmark(
    "mask_causal",
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

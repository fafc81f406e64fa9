"""mask_permutation: spans that are predicted, and who sees whom, (B, L, L)."""

from __future__ import annotations

import torch
from torch import Tensor

import t4r_fast
from benchmarks.case import Benchmark, Case, Inputs, Outputs, Provider, Work, sessions

CASES = [
    Case("train", {"B": 256, "L": 20}, "quick", shown=True),
    Case("train", {"B": 4096, "L": 50}),
]
PROBABILITY, LONGEST = 1 / 6, 5


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    return {"item_ids": sessions(case), "seed": torch.tensor([3, 4])}


def ours(x: Inputs) -> Outputs:
    return t4r_fast.mask_permutation(x["item_ids"], seed=x["seed"])._asdict()


def transformers4rec(x: Inputs) -> Outputs:
    """PermutationLanguageModeling of Transformers4Rec 23.12, step by step: a loop over sessions
    that takes each draw to the host, and the compaction that its head needs.

    Its random numbers are others, so there is nothing to compare.
    """
    item_ids = x["item_ids"]
    sessions, positions = item_ids.shape
    mask = torch.zeros_like(item_ids, dtype=torch.bool)
    hidden = torch.zeros(sessions, positions, positions)
    seen = torch.zeros(sessions, positions, positions)
    for b in range(sessions):
        real = item_ids[b] != 0
        _mark_spans(mask[b], int(real.sum()))
        mask[b] &= real
        if not bool(mask[b].any()):
            mask[b, torch.multinomial(real.float(), 1)] = True
        if bool((mask[b] == real).all()):
            mask[b, torch.multinomial(mask[b].float(), 1)] = False
        seen[b] = torch.eye(positions)
        order = torch.randperm(positions).masked_fill(~mask[b], -1)
        hidden[b] = (order[:, None] <= order[None, :]) & mask[b]
    targets = torch.where(mask, item_ids, 0).flatten()
    targets[(targets != 0).nonzero().squeeze(1)]
    return {}


def _mark_spans(mask: Tensor, length: int) -> None:
    at = 0
    while at < length:
        span = int(torch.randint(1, LONGEST + 1, (1,)))
        stretch = int(span / PROBABILITY)
        start = at + int(torch.randint(stretch - span + 1, (1,)))
        mask[start : start + span] = True
        at += stretch


def work(case: Case, size: int) -> Work:
    """Ids read; targets and the row list of int64, the mask and the L x L floats written."""
    positions = case["B"] * case["L"]
    return Work(read=8 * positions, written=(17 + 4 * case["L"]) * positions)


BENCHMARK = Benchmark(
    "mask_permutation",
    CASES,
    inputs,
    [
        Provider("t4r_fast", lambda case: ours, ours=True),
        Provider("Transformers4Rec's steps", lambda case: transformers4rec),
    ],
    work,
)

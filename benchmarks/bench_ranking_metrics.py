"""ranking_metrics: NDCG, recall, precision and MRR at cut-offs, from the targets' ranks."""

from __future__ import annotations

import torch

import t4r_fast
from benchmarks.case import Benchmark, Case, Inputs, Outputs, Provider, Work

CASES = [
    Case("metrics", {"N": 256, "V": 1000}, "quick"),
    Case("metrics", {"N": 16_384, "V": 1000}),
]
KS = (10, 20)


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Ranks, and as Transformers4Rec has them: which of the best 20 items is the target."""
    generator = torch.Generator().manual_seed(0)
    rank = torch.randint(case["V"], (case["N"],), generator=generator) // 10
    return {"rank": rank, "relevant": (torch.arange(max(KS)) == rank[:, None]).to(dtype)}


def ours(x: Inputs) -> Outputs:
    return t4r_fast.ranking_metrics(x["rank"], KS)._asdict()


def transformers4rec(x: Inputs) -> Outputs:
    """Its metrics of one-hot relevances; at each cut-off anew, as there."""
    found: dict[str, list[torch.Tensor]] = {}
    for k in KS:
        best = x["relevant"][:, :k]
        place = torch.arange(1, k + 1, dtype=best.dtype)
        gain = (best / torch.log2(place + 1)).sum(1)
        ideal = (best.sort(descending=True).values / torch.log2(place + 1)).sum(1)
        precision = best.cumsum(1) / place
        hits = best.sum(1)
        average = (precision * best).sum(1) / hits.clamp(min=1)
        values = {
            "ndcg": torch.where(ideal > 0, gain / ideal, 0.0),
            "recall": hits,
            "precision": hits / k,
            "mrr": (best / place).amax(1),
            "map": average,
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(columns, 1) for name, columns in found.items()}


def work(case: Case, size: int) -> Work:
    """Ranks read; four different metrics at each cut-off written."""
    return Work(read=8 * case["N"], written=16 * len(KS) * case["N"])


BENCHMARK = Benchmark(
    "ranking_metrics",
    CASES,
    inputs,
    [
        Provider("t4r_fast", lambda case: ours, ours=True),
        Provider("Transformers4Rec's steps", lambda case: transformers4rec),
    ],
    work,
)

"""ranking_metrics in plain PyTorch: each metric is a function of the rank."""

from __future__ import annotations

import torch
from torch import Tensor


def gains(k: int, device: torch.device) -> Tensor:
    """ndcg, recall, precision and mrr at cut-off k of ranks 0 to k - 1: float64 (4, k)."""
    place = torch.arange(1, k + 1, dtype=torch.float64, device=device)
    ones = torch.ones_like(place)
    return torch.stack([1.0 / torch.log2(place + 1.0), ones, ones / k, 1.0 / place])


def ranking_metrics_fwd(first: Tensor, tied: Tensor, ks: list[int]) -> Tensor:
    """The mean of each metric over the ranks first..first + tied: float32 (4, N, len(ks)).

    first and tied are (N,) int64; first < 0 gives nan.
    """
    columns = []
    for k in ks:
        sums = torch.zeros(4, k + 1, dtype=torch.float64, device=first.device)
        sums[:, 1:] = gains(k, first.device).cumsum(1)
        begin = first.clamp(0, k)
        end = (first + tied + 1).clamp(0, k)
        columns.append((sums[:, end] - sums[:, begin]) / (tied + 1))
    values = torch.stack(columns, dim=2)
    return torch.where(first[None, :, None] < 0, torch.nan, values).float()

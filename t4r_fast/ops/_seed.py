"""The seed of ops that draw: given, or taken from torch's default generator."""

from __future__ import annotations

import torch
from torch import Tensor


def check_seed(op: str, seed: Tensor | None, device: torch.device) -> Tensor:
    """A (2,) int64 (key, offset) on `device`; None draws it, so that torch.manual_seed governs."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (2,), device=device)
    if seed.shape != (2,) or seed.dtype != torch.int64:
        raise ValueError(
            f"{op}: seed must be int64 (2,), (key, offset); got {seed.dtype} {tuple(seed.shape)}"
        )
    if seed.device != device:
        raise ValueError(f"{op}: seed must be on device {device}; got {seed.device}")
    return seed

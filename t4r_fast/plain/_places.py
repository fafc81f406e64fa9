"""Rows that stand for positions of sessions: places (R,) int64, session << 32 | position, negative
for a row that stands for none."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast.plain._dropout import kept, key_of, threshold


def factors(
    places: Tensor, seed: Tensor | None, dropout: float, site: int, columns: int, dtype: torch.dtype
) -> Tensor | None:
    """(R, columns): 0 where a column is dropped, else 1 / (1 - dropout); None without a seed."""
    if seed is None:
        return None
    zero = torch.zeros_like(places)
    session, position = places.clamp(min=0) >> 32, places & 0xFFFFFFFF
    stays = kept(key_of(seed, site), threshold(dropout), session, position, zero, columns)
    return stays.to(dtype) * (1.0 / (1.0 - dropout))

"""Dropout from a counter: what is dropped depends on the seed, the site, the session and the place
in it, and on nothing else of the batch.

A site is a place in a model where something is dropped, such as "attention of layer 1". Each site
has a key of its own; the counter of a draw is (column // 4, position, session, head), and the word
is that of column % 4. An element goes where its word lies below the threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast.plain._draws import counters
from t4r_fast.plain._philox import philox

# The last of the eight draw kinds; see _draws.py.
DROPOUT = 7


def threshold(probability: float) -> int:
    """0 to 2**32: a word below it drops."""
    return round(probability * 2**32)


def key_of(seed: Tensor, site: int) -> Tensor:
    """() int64, the key of a site for a seed (2,)."""
    key, high, low = counters(seed, DROPOUT)
    zero = torch.zeros_like(key)
    w = philox(key, (zero + site, zero, high, low))
    return w[0] | (w[1] << 32)


def kept(
    key: Tensor, limit: int, session: Tensor, position: Tensor, head: Tensor, columns: int
) -> Tensor:
    """bool (..., columns): what stays, for words not below `limit`.

    session, position, head  int64 (...), broadcast together
    """
    block = torch.arange((columns + 3) // 4, device=key.device)
    words = philox(key, (block, position[..., None], session[..., None], head[..., None]))
    word = torch.stack(words, dim=-1).flatten(-2)
    return word[..., :columns] >= limit

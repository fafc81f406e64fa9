"""Dropout from a counter: what t4r_fast/plain/_dropout.py drops, bit for bit.

Numbers that need all bits of a float64 are handed to kernels as whole numbers, as in _draws.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels._draws import bits
from t4r_fast.plain._dropout import threshold

_DROPOUT = tl.constexpr(7)  # the kind of draw, three bits of the counter
_WORD = tl.constexpr(0xFFFFFFFF)


def dropout_arguments(seed: Tensor | None, dropout: float, site: int) -> dict[str, Any]:
    """What kernels are given; without a seed nothing is drawn."""
    drawn = seed is not None
    return {
        "seed_ptr": seed,
        "site": site,
        # a word above it stays
        "least": threshold(dropout) - 1 if drawn else 0,
        "scale": bits(1.0 / (1.0 - dropout)),
        "DRAWS": drawn,
    }


@triton.jit
def site_key(seed_ptr, site):
    """The key of a site, int64 (1, 1)."""
    key = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    zero = tl.zeros((1, 1), tl.int64)
    kind = ((((offset >> 32) & _WORD) << 3) & _WORD) | _DROPOUT
    w0, w1, _, _ = tl.philox(
        key,
        (zero + site).to(tl.uint32),
        zero.to(tl.uint32),
        (zero + kind).to(tl.uint32),
        (zero + (offset & _WORD)).to(tl.uint32),
    )
    return w0.to(tl.int64) | (w1.to(tl.int64) << 32)


@triton.jit
def stays(key, place, head, first, least, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """Which columns first to first + BLOCK_W stay in some rows: int1 (BLOCK_R, BLOCK_W).

    place  (BLOCK_R,) int64, session << 32 | position; `first` and BLOCK_W are multiples of 4
    """
    COUNTERS: tl.constexpr = BLOCK_W // 4
    block = (first // 4 + tl.arange(0, COUNTERS)).to(tl.uint32)
    position = (place & _WORD).to(tl.uint32)
    session = (place >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        key,
        tl.broadcast_to(block[None, :], (BLOCK_R, COUNTERS)),
        tl.broadcast_to(position[:, None], (BLOCK_R, COUNTERS)),
        tl.broadcast_to(session[:, None], (BLOCK_R, COUNTERS)),
        tl.full((BLOCK_R, COUNTERS), head, tl.int64).to(tl.uint32),
    )
    # the second index of a join is the faster one
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_R, BLOCK_W))
    return words > tl.full((1, 1), least, tl.int64).to(tl.uint32)

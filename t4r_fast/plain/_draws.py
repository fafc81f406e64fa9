"""Items drawn from a counter, in arithmetic that gives every backend the same ids.

A draw is two Philox words, made a number u of 53 bits in [0, 1). What follows uses float64
addition, multiplication and rounding to integers alone, which IEEE 754 rounds one way only: no exp
or log of a library, whose last bits differ. So an id never depends on the machine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t4r_fast.plain._philox import philox

# Draw kinds: three bits of the counter. 0 and 1 are those of mask_mlm, 4 to 6 mask_permutation's.
SAMPLE, NEGATIVE = 2, 3

_WORD = 0xFFFFFFFF
_LOG2E = 1.4426950408889634
# ln 2 in two parts; products of the first with small integers are exact
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_INVERSE_FACTORIALS = [1.0 / math.factorial(k) for k in range(13, -1, -1)]


def counters(seed: Tensor, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    """key, and the two words of the counter that hold the offset and the kind of draw."""
    key, offset = seed[0], seed[1]
    return key, ((((offset >> 32) & _WORD) << 3) & _WORD) | kind, offset & _WORD


def unit_draws(seed: Tensor, kind: int, sets: Tensor, start: int, count: int) -> Tensor:
    """u of draws start to start + count of each set: float64 (S, count). `start` is even."""
    key, high, low = counters(seed, kind)
    pair = torch.arange(start // 2, start // 2 + (count + 1) // 2, device=seed.device)
    w = philox(key, (pair, sets[:, None], high, low))  # each (S, pairs)
    bits = torch.stack([_bits(w[0], w[1]), _bits(w[2], w[3])], dim=2).flatten(1)
    return bits[:, :count].double() * 2.0**-53


def _bits(first: Tensor, second: Tensor) -> Tensor:
    """53 bits of two words."""
    return ((first >> 5) << 26) | (second >> 6)


def exact_exp(t: Tensor) -> Tensor:
    """exp of 0 <= t < 64 within 2 ulp, the same bits everywhere."""
    n = torch.floor(t * _LOG2E + 0.5)
    r = t - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = torch.full_like(t, _INVERSE_FACTORIALS[0])
    for factor in _INVERSE_FACTORIALS[1:]:
        p = p * r
        p = p + factor
    power = ((n.long() + 1023) << 52).view(torch.float64)
    return p * power


def log_uniform(u: Tensor, size: int, log_size: float) -> Tensor:
    """Classes 0 to size - 1, class c with probability log((c + 2) / (c + 1)) / log(size + 1)."""
    k = torch.floor(exact_exp(u * log_size)).long()
    return (k - 1).clamp(0, size - 1)


def uniform(u: Tensor, size: int) -> Tensor:
    """Numbers 0 to size - 1."""
    return torch.floor(u * float(size)).long().clamp(max=size - 1)


def log_uniform_log_q(classes: Tensor, log_size: float) -> Tensor:
    """float64 log-probabilities; -inf below class 0."""
    c = classes.double()
    q = torch.log1p(1.0 / (c + 1.0)) / log_size
    return torch.where(classes >= 0, q, 0.0).log()

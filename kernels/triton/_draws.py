"""Items drawn from a counter: the same ids as t4r_fast/plain/_draws.py, bit for bit.

float64 additions, products and rounding alone, each rounded by itself: kernels that draw are marked
_tuning.unfused. Numbers that need all bits of a float64 are handed to kernels as whole numbers, as
a launch makes a float32 of a Python float.
"""

from __future__ import annotations

import math
import struct

import triton
import triton.language as tl

# Codes of t4r_fast/plain/sampled_softmax_loss.py
LOG_UNIFORM, UNIFORM, POPULARITY, T4REC = (tl.constexpr(code) for code in range(4))
_NEGATIVE = tl.constexpr(3)  # the kind of draw, three bits of the counter
_WORD = tl.constexpr(0xFFFFFFFF)
_UNIT = tl.constexpr(2.0**-53)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(6.93147180369123816490e-01)
_LN2_LOW = tl.constexpr(1.90821492927058770002e-10)
# 1 / k! of k from 13 to 0
_FACTORS = tuple(tl.constexpr(1.0 / math.factorial(k)) for k in range(13, -1, -1))
(_F13, _F12, _F11, _F10, _F9, _F8, _F7, _F6, _F5, _F4, _F3, _F2, _F1, _F0) = _FACTORS


def bits(value: float) -> int:
    """The bits of a float64, for float64_of."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


@triton.jit
def float64_of(bits_):
    return tl.full((1,), bits_, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _exact_exp(t):
    """exp of 0 <= t < 64 within 2 ulp."""
    n = tl.floor(t * _LOG2E + 0.5)
    r = t - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = r * _F13 + _F12
    p = p * r + _F11
    p = p * r + _F10
    p = p * r + _F9
    p = p * r + _F8
    p = p * r + _F7
    p = p * r + _F6
    p = p * r + _F5
    p = p * r + _F4
    p = p * r + _F3
    p = p * r + _F2
    p = p * r + _F1
    p = p * r + _F0
    return p * ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def draw_items(
    seed_ptr, sets, number, cumulative_ptr, V, low, log_size, steps, SAMPLER: tl.constexpr
):
    """Draws by number of some sets, which broadcast together: ids, int64.

    log_size  bits of log(V - low + 1)
    steps     with popularity: halvings that leave one of V + 1 places
    """
    key = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    kind = ((((offset >> 32) & _WORD) << 3) & _WORD) | _NEGATIVE
    zero = ((number >> 1) + sets) * 0
    w0, w1, w2, w3 = tl.philox(
        key,
        (zero + (number >> 1)).to(tl.uint32),
        (zero + sets).to(tl.uint32),
        (zero + kind).to(tl.uint32),
        (zero + (offset & _WORD)).to(tl.uint32),
    )
    odd = (zero + number) % 2 == 1
    first = tl.where(odd, w2, w0).to(tl.int64)
    second = tl.where(odd, w3, w1).to(tl.int64)
    u = (((first >> 5) << 26) | (second >> 6)).to(tl.float64) * _UNIT
    if SAMPLER == UNIFORM:
        size = (zero + (V - low)).to(tl.int64)
        ids = tl.minimum((u * size.to(tl.float64)).to(tl.int64), size - 1) + low
    elif SAMPLER == POPULARITY:
        wanted = u * tl.load(cumulative_ptr + (V - 1))
        ids = zero.to(tl.int64)  # the first place whose sum is above `wanted`
        end = ids + V
        for _ in range(0, steps):
            middle = (ids + end) // 2
            open_ = ids < end
            above = tl.load(cumulative_ptr + middle, mask=open_, other=0.0) > wanted
            ids = tl.where(open_ & ~above, middle + 1, ids)
            end = tl.where(open_ & above, middle, end)
        ids = tl.minimum(ids, V - 1)
    else:
        whole = tl.floor(_exact_exp(u * float64_of(log_size))).to(tl.int64) - 1
        ids = tl.minimum(tl.maximum(whole, 0), V - low - 1) + low
    return ids


@triton.jit
def log1p(x):
    """log(1 + x) of float64 0 <= x < inf: the rounding of 1 + x cancels."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(x):
    """exp(x) - 1 of float64 x <= 0: the rounding of exp(x) cancels."""
    u = tl.exp(x)
    near = tl.where(u == 1.0, x, (u - 1.0) * (x / tl.where((u == 1.0) | (u < 0.5), 1.0, tl.log(u))))
    return tl.where(u < 0.5, u - 1.0, near)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) in float64."""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def expected(
    ids, inside, cumulative_ptr, V, low, log_size, log_count, log_range, SAMPLER: tl.constexpr
):
    """float64 log of how often a set holds each id on average; -inf for those never drawn.

    log_size, log_count, log_range  bits of log(V - low + 1), log(K), log(V - low)
    """
    if SAMPLER == POPULARITY:
        total = tl.load(cumulative_ptr + (V - 1))
        upto = tl.load(cumulative_ptr + ids, mask=inside, other=1.0)
        before = tl.load(cumulative_ptr + ids - 1, mask=inside & (ids > 0), other=0.0)
        q = tl.log((upto - before) / total)
    elif SAMPLER == UNIFORM:
        q = ids.to(tl.float64) * 0.0 - float64_of(log_range)
    else:
        c = tl.maximum(ids - low, 0).to(tl.float64)
        q = tl.log(log1p(1.0 / (c + 1.0)) / float64_of(log_size))
    return tl.where(ids < low, -float("inf"), q) + float64_of(log_count)

"""Device code that forward and backward of sampled_softmax_loss share.

A candidate's logit is z = product / temperature - offset; its float64 offset holds the bias and the
log of how often the candidate is drawn. Loops take it as two numbers whose sum it is: float64
arithmetic has 1/64 of the rate on some GPUs. HIT says what becomes of a candidate that is the
row's target.
"""

from __future__ import annotations

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._draws import draw_items, expected, float64_of, softplus

# What becomes of a candidate that is the row's target: nothing; weight 0; the offset of targets; a
# constant
HIT_STAYS, HIT_REMOVED, HIT_OFFSET, HIT_CONSTANT = range(4)
REMOVED = tl.constexpr(HIT_REMOVED)
OFFSET = tl.constexpr(HIT_OFFSET)
CONSTANT = tl.constexpr(HIT_CONSTANT)
# What an offset holds beside the bias: nothing; log of the expected count; log(1 + that count)
PLAIN, LOGQ, LOG1P = range(3)
_PLAIN = tl.constexpr(PLAIN)
_LOG1P = tl.constexpr(LOG1P)


@triton.jit
def offsets(
    ids,
    inside,
    bias_ptr,
    cumulative_ptr,
    V,
    low,
    log_size,
    log_count,
    log_range,
    temperature,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    SAMPLER: tl.constexpr,
    KIND: tl.constexpr,
):
    """float64 offsets of the logits of some items. Ids are in range, also where not inside."""
    found = ids.to(tl.float64) * 0.0
    if KIND != _PLAIN:
        found = expected(
            ids, inside, cumulative_ptr, V, low, log_size, log_count, log_range, SAMPLER
        )
        if KIND == _LOG1P:
            found = softplus(found)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + ids * stride_bias, mask=inside, other=0.0)
        if bias.dtype == tl.bfloat16:
            bias = bias.to(tl.float32)  # the interpreter makes no other type of it
        found = found - bias.to(tl.float64) / float64_of(temperature)
    return found


@triton.jit
def split_float64(x, SUM: tl.constexpr):
    """Two numbers of type SUM whose sum is x."""
    high = x.to(SUM)
    rest = x - high.to(tl.float64)
    return high, tl.where(rest == rest, rest, 0.0).to(SUM)  # infinite: no rest


@_tuning.unfused
@triton.jit
def _candidates_kernel(
    seed_ptr,
    ids_ptr,
    high_ptr,
    low_ptr,
    hit_high_ptr,
    hit_low_ptr,
    bias_ptr,
    cumulative_ptr,
    total,
    K,
    V,
    low,
    log_size,
    log_count,
    log_range,
    temperature,
    steps,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    SAMPLER: tl.constexpr,
    KIND: tl.constexpr,
    HIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Ids of all sets of K draws, and the parts of their offsets."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = at < total
    ids = draw_items(seed_ptr, at // K, at % K, cumulative_ptr, V, low, log_size, steps, SAMPLER)
    tl.store(ids_ptr + at, ids, mask=inside)
    if high_ptr is not None:
        found = offsets(
            ids, inside, bias_ptr, cumulative_ptr, V, low, log_size, log_count, log_range,
            temperature, stride_bias, HAS_BIAS, SAMPLER, KIND,
        )  # fmt: skip
        high, rest = split_float64(found, high_ptr.dtype.element_ty)
        tl.store(high_ptr + at, high, mask=inside)
        tl.store(low_ptr + at, rest, mask=inside)
    if HIT == OFFSET:
        found = offsets(
            ids, inside, bias_ptr, cumulative_ptr, V, low, log_size, log_count, log_range,
            temperature, stride_bias, HAS_BIAS, SAMPLER, _LOG1P,
        )  # fmt: skip
        high, rest = split_float64(found, hit_high_ptr.dtype.element_ty)
        tl.store(hit_high_ptr + at, high, mask=inside)
        tl.store(hit_low_ptr + at, rest, mask=inside)


@triton.jit
def candidate_logits(
    product,
    high,
    low,
    hit_high,
    hit_low,
    hit,
    scale,
    hit_value,
    HIT: tl.constexpr,
):
    """Logits of products; the parts of offsets, and hit, broadcast with them."""
    if HIT == OFFSET:
        high = tl.where(hit, hit_high, high)
        low = tl.where(hit, hit_low, low)
    z = product * scale - high - low
    if HIT == REMOVED:
        z = tl.where(hit, -float("inf"), z)
    if HIT == CONSTANT:
        z = tl.where(hit, hit_value, z)
    return z


@triton.jit
def gathered(
    ptr, rows, there, stride, start, D: tl.constexpr, SUM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Columns of some rows (BLOCK_H, BLOCK_E) of a matrix: (BLOCK_H, BLOCK_E, BLOCK_D)."""
    d = start + tl.arange(0, BLOCK_D)
    mask = there[:, :, None] & (d < D)[None, None, :]
    return tl.load(ptr + rows[:, :, None] * stride + d[None, None, :], mask=mask, other=0.0).to(SUM)

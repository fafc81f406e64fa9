"""Device code of the softmax over all items that tied_softmax_loss and tied_table_step share.

Logits are in units of log 2, so that probabilities are exp2(z - lse) without a multiplication:
z = (hidden @ items.T + bias) * scale, scale = log2(e) / temperature. With a softcap,
z = cap * tanh((hidden @ items.T + bias) * scale), scale = 1 / (temperature * softcap) and
cap = softcap * log2(e). Rows that take no part are not there: row numbers are compact, 0 <= k < K.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._scores import load_rows
from t4r_fast.kernels._tuning import TYPES, WIDE, Config, Key, config, interpreted, launch

LOG2E = 1.0 / math.log(2.0)
LOG2E_2 = tl.constexpr(2.0 * LOG2E)
# dz in float16 is kept below 2**15, and p below 2**15: 1e-10 of the largest is still a number.
HALF_EXPONENT = 14


def scales(temperature: float, softcap: float) -> tuple[float, float]:
    """scale and cap of the logits."""
    if softcap:
        return 1.0 / (temperature * softcap), softcap * LOG2E
    return LOG2E / temperature, 0.0


@triton.jit
def tanh(x):
    """Within 4 eps of tanh; 1 - 2 / (1 + exp(2 x)) alone loses the digits of a small x."""
    square = x * x
    if x.dtype == tl.float64:
        near = x * 0.0 + 25.0  # Lambert's continued fraction: 1e-17 at 0.6
        for k in tl.static_range(12):
            near = (23.0 - 2 * k) + square / near
        near = x / near
    else:
        near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    far = 1.0 - 2.0 / (1.0 + tl.exp2(x * LOG2E_2))
    return tl.where(tl.abs(x) < 0.6, near, far)


@triton.jit
def logits(product, offset, scale, cap, SOFTCAP: tl.constexpr):
    """z and the slope of the cap, of product = hidden @ items.T and offset = bias * scale."""
    z = product * scale + offset
    slope = 1.0
    if SOFTCAP:
        capped = tanh(z)
        # rows with and without a cap may share a launch
        slope = tl.where(cap > 0, 1.0 - capped * capped, 1.0)
        z = tl.where(cap > 0, capped * cap, z)
    return z, slope


@triton.jit
def item_offsets(
    bias_ptr, ids, inside, stride_bias, scale, HAS_BIAS: tl.constexpr, SUM: tl.constexpr
):
    """bias * scale of some items; -inf past the last item, which gives it the probability 0."""
    if HAS_BIAS:
        offset = tl.load(bias_ptr + ids * stride_bias, mask=inside, other=0.0).to(SUM) * scale
    else:
        offset = tl.zeros(ids.shape, SUM)
    return tl.where(inside, offset, -float("inf"))


@triton.jit
def power_of_two(exponent):
    """2.0 ** exponent in float32, exponent int32 held to the normal range."""
    field = tl.minimum(tl.maximum(exponent + 127, 1), 254)
    return (field << 23).to(tl.float32, bitcast=True)


@triton.jit
def first_not_below(sorted_ptr, count, value, steps):
    """Index of the first of `count` sorted numbers that is >= value; steps >= log2(count + 1)."""
    low = value * 0
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        searching = low < high
        below = tl.load(sorted_ptr + middle, mask=searching, other=0) < value
        low = tl.where(searching, tl.where(below, middle + 1, low), low)
        high = tl.where(searching, tl.where(below, high, middle), high)
    return low


@triton.jit
def product_of(
    first,
    first_ptr,
    first_rows,
    first_there,
    first_stride,
    second_ptr,
    second_rows,
    second_there,
    second_stride,
    column,
    D: tl.constexpr,
    SCORE: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products of some rows of two matrices with each other, and columns of the second's rows.

    first holds whole rows if D <= BLOCK_C; wider ones are read again, BLOCK_C columns at a time.
    Every element of a product sums in the same order, wherever it stands in a tile. NumPy's does
    not: in the interpreter SCORE is float64.
    """
    WIDE: tl.constexpr = tl.float64 if tl.float64 == SCORE else SUM
    if D <= BLOCK_C:
        second = load_rows(second_ptr, second_rows, second_there, second_stride, 0, D, BLOCK_D)
        product = tl.dot(
            first.to(SCORE), tl.trans(second).to(SCORE), input_precision=PRECISION, out_dtype=WIDE
        )
    else:
        product = tl.zeros((first_rows.shape[0], second_rows.shape[0]), WIDE)
        for c in range(0, D, BLOCK_C):
            left = load_rows(first_ptr, first_rows, first_there, first_stride, c, D, BLOCK_C)
            right = load_rows(second_ptr, second_rows, second_there, second_stride, c, D, BLOCK_C)
            product = tl.dot(
                left.to(SCORE), tl.trans(right).to(SCORE), product, input_precision=PRECISION,
                out_dtype=WIDE,
            )  # fmt: skip
        second = load_rows(second_ptr, second_rows, second_there, second_stride, column, D, BLOCK_D)
    return product.to(SUM), second


@triton.jit
def add_item_gradients(
    gradient,
    dbias,
    items,
    items_ptr,
    bias_ptr,
    hidden_ptr,
    factors_ptr,
    ids,
    first_row,
    last_row,
    column,
    R,
    V,
    stride_items,
    stride_bias,
    stride_hidden,
    scale,
    cap,
    unit,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    NEED_ITEMS: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    INPUT: tl.constexpr,
    DOT: tl.constexpr,
    SCORE: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add dz.T @ hidden of the rows first_row to last_row, but for their targets, to a tile's.

    dz = (weight * exp2(z - shift) + constant) * slope

    items    (BLOCK_V, BLOCK_D)  the tile itself if D <= BLOCK_C
    ids      (BLOCK_V,) int64
    column   where the columns of gradient begin; 0 unless D > BLOCK_D
    factors  (3 or more, R): shift, weight, constant
    unit     a power of two that dz is multiplied by before it is rounded
    """
    inside = ids < V
    offset = item_offsets(bias_ptr, ids, inside, stride_bias, scale, HAS_BIAS, SUM)
    for start in range(first_row, last_row, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        there = k < last_row
        k = k.to(tl.int64)
        product, rows = product_of(
            items, items_ptr, ids, inside, stride_items, hidden_ptr, k, there, stride_hidden,
            column, D, SCORE, SUM, PRECISION, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        # a row past the end has the shift inf and so the probability 0
        shift = tl.load(factors_ptr + k, mask=there, other=float("inf"))
        weight = tl.load(factors_ptr + R + k, mask=there, other=0.0)
        z, slope = logits(product, offset[:, None], scale, cap, SOFTCAP)
        if SOFTCAP:
            z = tl.where(inside[:, None], z, -float("inf"))
        dz = tl.exp2(z - shift[None, :]) * weight[None, :]
        if SMOOTHING:
            constant = tl.load(factors_ptr + 2 * R + k, mask=there, other=0.0)
            dz += tl.where(inside[:, None], constant[None, :], 0.0)
        if SOFTCAP:
            dz *= slope
        if NEED_BIAS:
            dbias += tl.sum(dz, 1)
        if NEED_ITEMS:
            narrow = (dz * unit).to(INPUT).to(DOT)
            gradient = tl.dot(
                narrow, rows.to(DOT), gradient, input_precision=PRECISION, out_dtype=SUM
            )
    return gradient, dbias


@triton.jit
def segment_sum(
    sorted_ptr,
    order_ptr,
    share_ptr,
    values_ptr,
    start,
    count,
    stride_values,
    column,
    D: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of share[k] * values[k] and of share[k] of the segments that begin at some entries.

    A segment is the entries j, k = order[j], whose sorted[j] are equal. `start` is (BLOCK_J,)
    int64; where no segment begins the sums are 0, and `begins` is False.
    """
    named = tl.load(sorted_ptr + start, mask=start < count, other=-1)
    before = tl.load(sorted_ptr + start - 1, mask=(start > 0) & (start < count), other=-1)
    begins = (start < count) & (named != before)
    total = tl.zeros((start.shape[0], BLOCK_D), SUM)
    shares = tl.zeros(start.shape, SUM)
    d = column + tl.arange(0, BLOCK_D)
    j = start[:, None] + tl.arange(0, BLOCK_K)[None, :]
    there = begins[:, None] & (j < count)
    left = tl.max(begins.to(tl.int32), 0)
    while left > 0:
        there = there & (tl.load(sorted_ptr + j, mask=there, other=-1) == named[:, None])
        k = j
        if HAS_ORDER:
            k = tl.load(order_ptr + j, mask=there, other=0)
        place = (k * stride_values)[:, :, None] + d[None, None, :]
        rows = tl.load(
            values_ptr + place, mask=there[:, :, None] & (d < D)[None, None, :], other=0.0
        ).to(SUM)
        if HAS_SHARE:
            share = tl.load(share_ptr + k, mask=there, other=0.0)
            rows *= share[:, :, None]
            shares += tl.sum(share, 1)
        total += tl.sum(rows, 1)
        j += BLOCK_K
        whole = tl.sum(there.to(tl.int32), 1) == BLOCK_K
        there = whole[:, None] & (j < count)
        left = tl.max(whole.to(tl.int32), 0)
    return total, shares, begins


@triton.jit
def _segment_sums_kernel(
    sorted_ptr,
    order_ptr,
    share_ptr,
    values_ptr,
    count_ptr,
    sums_ptr,
    shares_ptr,
    K,
    stride_values,
    D: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_SHARE: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sums[j] of the segments that begin at entry j, in the order of their entries; see there."""
    count = K
    if HAS_COUNT:
        count = tl.load(count_ptr)
    start = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D
    total, shares, begins = segment_sum(
        sorted_ptr, order_ptr, share_ptr, values_ptr, start, count, stride_values, column,
        D, HAS_ORDER, HAS_SHARE, SUM, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    d = column + tl.arange(0, BLOCK_D)
    place = (start * D)[:, None] + d[None, :]
    tl.store(sums_ptr + place, total, mask=begins[:, None] & (d < D)[None, :])
    if HAS_SHARE:  # noqa: SIM102, decided by the compiler
        if tl.program_id(1) == 0:
            tl.store(shares_ptr + start, shares, mask=begins)


@triton.jit
def segment_of(ids, sorted_ptr, count, steps):
    """Where the segment of each of some ids begins, and which ids have one."""
    place = first_not_below(sorted_ptr, count, ids, steps)
    found = tl.load(sorted_ptr + place, mask=place < count, other=-1)
    return place, found == ids


def segment_blocks(width: int) -> Config:
    """A segment per program, 16 rows of it at a time; more where a program costs much."""
    if interpreted():
        return config(4, 1, BLOCK_J=64, BLOCK_K=16)
    return config(1 if width <= 64 else 8, 1, BLOCK_J=1, BLOCK_K=16)


def segment_sums(
    named: Tensor,
    order: Tensor | None,
    share: Tensor | None,
    values: Tensor,
    count: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and of shares (K,) at the entries of `named` (sorted) where a segment begins.

    Where none begins they are not set. Every segment is summed by one program in a fixed order.
    """
    d = values.shape[1]
    sums = values.new_empty((named.shape[0], d), dtype=dtype)
    shares = values.new_empty(named.shape[0], dtype=dtype)
    width = min(triton.next_power_of_2(d), 256)
    made = segment_blocks(width)
    launch(
        _segment_sums_kernel,
        (triton.cdiv(named.shape[0], made["BLOCK_J"]), triton.cdiv(d, width)),
        made,
        sorted_ptr=named,
        order_ptr=order,
        share_ptr=share,
        values_ptr=values,
        count_ptr=count,
        sums_ptr=sums,
        shares_ptr=shares,
        K=named.shape[0],
        stride_values=values.stride(0),
        D=d,
        HAS_ORDER=order is not None,
        HAS_SHARE=share is not None,
        HAS_COUNT=count is not None,
        SUM=TYPES[dtype],
        BLOCK_D=width,
    )
    return sums, shares


def column_blocks(wanted: Key) -> dict[str, int]:
    """Columns that a program's sums have, and columns that scores are made of at a time.

    16-bit rows of up to 256 numbers are taken whole.
    """
    if wanted.arch == _tuning.INTERPRETER:
        most, whole, part = 64, 32, 32
    else:
        most, whole, part = {8: (64, 32, 32), 4: (128, 64, 32), 2: (256, 256, 64)}[wanted.itemsize]
    if wanted.width == WIDE:
        most = min(most, 128)
    block = min(wanted.width, most)
    return {"BLOCK_C": block if wanted.width <= whole else part, "BLOCK_D": block}


def types_of(dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of the matrix kernels that the dtype decides."""
    return {
        "INPUT": _tuning.TYPES[dtype],
        "DOT": _tuning.dot_type(dtype),
        "SCORE": tl.float64 if _tuning.interpreted() else _tuning.TYPES[dtype],
        "SUM": _tuning.sum_type(dtype),
        "PRECISION": _tuning.precision(dtype),
        # the smallest float16 is 6e-8, and probabilities among 1e7 items are smaller
        "EXPONENT": HALF_EXPONENT if dtype == torch.float16 else 0,
    }


def unit_rows(matrix: Tensor) -> Tensor:
    """The matrix with the elements of a row next to each other; a copy only if they are not."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()

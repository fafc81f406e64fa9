"""tied_softmax_loss on a GPU: two passes shaped like flash attention, without the N x V logits.

Forward: a program owns a block of rows and a part of the items, and keeps a running maximum, a
running sum and, for the gradient of hidden, a running mean of items under the softmax; a second
kernel merges the parts in their order. Backward: a program owns a tile of items and sums over all
rows; each row of the table is written once. Nothing is added atomically but counts, so the bits
depend on the inputs and the kind of GPU alone. Source: Dao, "FlashAttention-2", arXiv 2307.08691.

The rows that take part are compacted on the device, and how many there are is read there: a list
of fixed capacity costs what its rows cost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._scores import load_rows
from t4r_fast.kernels._softmax import (
    add_item_gradients,
    column_blocks,
    first_not_below,
    item_offsets,
    logits,
    power_of_two,
    product_of,
    scales,
    segment_of,
    segment_sums,
    types_of,
    unit_rows,
)
from t4r_fast.kernels._tuning import Config, Entry, Variant, config, launch

LN2 = tl.constexpr(math.log(2.0))
# What the running means hold: nothing, the items under the softmax, or all items times the slope
# of the softcap.
NOTHING, SOFTMAX, SLOPE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Programs per processor that a forward pass is split for.
RESIDENT = 2


@triton.jit
def _tied_softmax_loss_rows_kernel(
    target_ptr,
    rows_ptr,
    kept_ptr,
    count_ptr,
    R,
    N,
    stride_target,
    stride_rows,
    ignore_index,
    HAS_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """kept (3, R): slot, row of hidden and target of the rows that take part; how many they are."""
    count = tl.zeros((), tl.int64)
    for start in range(0, R, BLOCK_R):
        slot = start + tl.arange(0, BLOCK_R).to(tl.int64)
        there = slot < R
        source = slot
        if HAS_ROWS:
            source = tl.load(rows_ptr + slot * stride_rows, mask=there, other=-1)
        there = there & (source >= 0) & (source < N)
        wanted = tl.load(target_ptr + source * stride_target, mask=there, other=0)
        there = there & (wanted != ignore_index)
        place = count + tl.cumsum(there.to(tl.int64), 0) - 1
        tl.store(kept_ptr + place, slot, mask=there)
        tl.store(kept_ptr + R + place, source, mask=there)
        tl.store(kept_ptr + 2 * R + place, wanted, mask=there)
        count += tl.sum(there.to(tl.int64), 0)
    tl.store(count_ptr, count)


@triton.jit
def _split(count, V, slots, programs, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Blocks of rows, parts of the items for each, and tiles of items in a part.

    As many parts as fill the GPU. With more blocks than a quarter of it, up to eight times that, if
    the last round of programs is fuller.
    """
    blocks = tl.maximum(tl.cdiv(count, BLOCK_N), 1).to(tl.int32)
    tiles = tl.cdiv(V, BLOCK_V)
    parts = tl.maximum(slots // blocks, 1)
    if blocks * 4 > slots:
        best = 0.0
        for more in range(1, 9):
            work = blocks * more
            used = work / (tl.cdiv(work, slots) * slots)
            better = (used > best + 0.05) & (work <= programs)
            parts = tl.where(better, more, parts)
            best = tl.where(better, used, best)
    each = tl.cdiv(tiles, tl.minimum(parts, tiles))
    return blocks, tl.cdiv(tiles, each), each


@triton.jit
def _tied_softmax_loss_fwd_kernel(
    hidden_ptr,
    items_ptr,
    bias_ptr,
    kept_ptr,
    count_ptr,
    stats_ptr,
    means_ptr,
    R,
    V,
    slots,
    stride_hidden,
    stride_items,
    stride_bias,
    scale: tl.float64,
    cap: tl.float64,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    MEAN: tl.constexpr,
    INPUT: tl.constexpr,
    DOT: tl.constexpr,
    SCORE: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of rows over one part of the items.

    stats (programs, 4, BLOCK_N): maximum, sum, score of the target, sum of scores
    means (programs, BLOCK_N, D): sum of p * items, times 2**EXPONENT
    """
    program = tl.program_id(0)
    count = tl.load(count_ptr)
    blocks, parts, tiles = _split(count, V, slots, tl.num_programs(0), BLOCK_N, BLOCK_V)
    block, part = program % blocks, program // blocks
    column = tl.program_id(1) * BLOCK_D
    scale, cap = tl.full((), scale, SUM), tl.full((), cap, SUM)

    count = tl.where(part < parts, count, 0)
    k = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    there = k < count
    source = tl.load(kept_ptr + R + k, mask=there, other=0)
    hidden = load_rows(hidden_ptr, source, there, stride_hidden, 0, D, BLOCK_D)
    top = tl.full((BLOCK_N,), -float("inf"), SUM)
    total = tl.zeros((BLOCK_N,), SUM)
    z_target = tl.zeros((BLOCK_N,), SUM)
    z_sum = tl.zeros((BLOCK_N,), SUM)
    row = tl.arange(0, BLOCK_N)

    if MEAN != SLOPE:
        # The scores of the targets, from the products that score all items: a loss near 0 is a
        # difference of equal numbers. Looking for targets in the loop below costs 100 registers.
        last = tl.where((block * BLOCK_N < count) & (part == 0), BLOCK_N, 0)
        for start in range(0, last, BLOCK_V):
            place = start + tl.arange(0, BLOCK_V)
            other = block * BLOCK_N + place.to(tl.int64)
            inside = (other < count) & (place < BLOCK_N)
            ids = tl.load(kept_ptr + 2 * R + other, mask=inside, other=-1)
            inside = (ids >= 0) & (ids < V)
            product, _ = product_of(
                hidden, hidden_ptr, source, there, stride_hidden, items_ptr, ids, inside,
                stride_items, column, D, SCORE, SUM, PRECISION, BLOCK_C, BLOCK_D,
            )  # fmt: skip
            offset = item_offsets(bias_ptr, ids, inside, stride_bias, scale, HAS_BIAS, SUM)
            z, _ = logits(product, offset[None, :], scale, cap, SOFTCAP)
            z_target += tl.sum(tl.where(place[None, :] == row[:, None], z, 0.0), 1)

    mean = tl.zeros((BLOCK_N, BLOCK_D), SUM)
    first = part * tiles * BLOCK_V
    last = tl.minimum(first + tiles * BLOCK_V, V)
    last = tl.where(block * BLOCK_N < count, last, first)
    for start in range(first, last, BLOCK_V):
        # int32 while they are compared: int64 costs 28 registers (sm_90, 128 x 64)
        ids = start + tl.arange(0, BLOCK_V)
        inside = ids < V
        ids = ids.to(tl.int64)
        product, items = product_of(
            hidden, hidden_ptr, source, there, stride_hidden, items_ptr, ids, inside, stride_items,
            column, D, SCORE, SUM, PRECISION, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        offset = item_offsets(bias_ptr, ids, inside, stride_bias, scale, HAS_BIAS, SUM)
        z, slope = logits(product, offset[None, :], scale, cap, SOFTCAP)
        if SOFTCAP:
            z = tl.where(inside[None, :], z, -float("inf"))
        if MEAN == SLOPE:
            p = tl.where(inside[None, :], slope, 0.0)
        else:
            if SMOOTHING:
                z_sum += tl.sum(tl.where(inside[None, :], z, 0.0), 1)
            higher = tl.maximum(top, tl.max(z, 1))
            # exp2(-inf - -inf) is nan: a row of only -inf so far is shifted by 0
            shift = tl.where(higher == -float("inf"), 0.0, higher)
            p = tl.exp2(z - shift[:, None])
            shrink = tl.exp2(top - shift)
            total = total * shrink + tl.sum(p, 1)
            top = higher
            if MEAN == SOFTMAX:
                mean *= shrink[:, None]
                if SOFTCAP:
                    p *= slope
        if MEAN != NOTHING:
            if EXPONENT != 0:
                p *= 2**EXPONENT
            p = p.to(INPUT).to(DOT)
            mean = tl.dot(p, items.to(DOT), mean, input_precision=PRECISION, out_dtype=SUM)

    if tl.program_id(1) == 0:
        stats = stats_ptr + program.to(tl.int64) * 4 * BLOCK_N + row
        tl.store(stats, top, mask=there)
        tl.store(stats + BLOCK_N, total, mask=there)
        tl.store(stats + 2 * BLOCK_N, z_target, mask=there)
        tl.store(stats + 3 * BLOCK_N, z_sum, mask=there)
    if MEAN != NOTHING:
        d = column + tl.arange(0, BLOCK_D)
        place = program.to(tl.int64) * BLOCK_N + row
        means = means_ptr + place[:, None] * D + d[None, :]
        tl.store(means, mean, mask=there[:, None] & (d < D)[None, :])


@triton.jit
def _tied_softmax_loss_merge_kernel(
    kept_ptr,
    count_ptr,
    stats_ptr,
    means_ptr,
    loss_ptr,
    lse_ptr,
    mean_ptr,
    R,
    V,
    slots,
    programs,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    D: tl.constexpr,
    MEAN: tl.constexpr,
    SUM: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Loss, lse and mean of BLOCK_M rows from the parts of their items; BLOCK_M divides BLOCK_N."""
    count = tl.load(count_ptr)
    blocks, parts, _ = _split(count, V, slots, programs, BLOCK_N, BLOCK_V)
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    parts = tl.where(start < count, parts, 0)  # nothing to do
    label_smoothing = tl.full((), label_smoothing, tl.float64)
    z_loss = tl.full((), z_loss, tl.float64)
    k = start + tl.arange(0, BLOCK_M)
    there = k < count
    block, row = start // BLOCK_N, k % BLOCK_N
    slot = tl.load(kept_ptr + k, mask=there, other=0)

    top = tl.full((BLOCK_M,), -float("inf"), SUM)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        program = block + part * blocks
        stats = stats_ptr + (program * 4 * BLOCK_N)[:, None] + row[None, :]
        mask = (part < parts)[:, None] & there[None, :]
        top = tl.maximum(top, tl.max(tl.load(stats, mask=mask, other=-float("inf")), 0))
    shift = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((BLOCK_M,), SUM)
    z_target = tl.zeros((BLOCK_M,), tl.float64)
    z_sum = tl.zeros((BLOCK_M,), tl.float64)
    mean = tl.zeros((BLOCK_M, BLOCK_D), SUM)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        program = block + part * blocks
        stats = stats_ptr + (program * 4 * BLOCK_N)[:, None] + row[None, :]
        mask = (part < parts)[:, None] & there[None, :]
        weight = tl.exp2(tl.load(stats, mask=mask, other=-float("inf")) - shift[None, :])
        total += tl.sum(tl.load(stats + BLOCK_N, mask=mask, other=0.0) * weight, 0)
        targets = tl.load(stats + 2 * BLOCK_N, mask=mask, other=0.0)
        z_target += tl.sum(targets.to(tl.float64), 0)
        z_sum += tl.sum(tl.load(stats + 3 * BLOCK_N, mask=mask, other=0.0).to(tl.float64), 0)
        if MEAN != NOTHING:
            place = (program * BLOCK_N)[:, None] + row[None, :]
            means = means_ptr + (place * D)[:, :, None] + d[None, None, :]
            found = tl.load(means, mask=mask[:, :, None] & (d < D)[None, None, :], other=0.0)
            if MEAN == SOFTMAX:
                found *= weight[:, :, None]
            mean += tl.sum(found, 0)
    if MEAN != NOTHING:
        if MEAN == SOFTMAX:
            mean /= total[:, None]
        place = (slot * D)[:, None] + d[None, :]
        mean *= 2**-EXPONENT
        tl.store(mean_ptr + place, mean, mask=there[:, None] & (d < D)[None, :])
    if MEAN != SLOPE:
        there = k < tl.where(tl.program_id(1) == 0, count, 0)
        total = tl.where(there, total, 1.0)
        lse = (shift.to(tl.float64) + tl.log2(total.to(tl.float64))) * LN2
        loss = lse - z_target * LN2
        if label_smoothing > 0:
            uniform = lse - z_sum * LN2 / V
            loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
        if z_loss > 0:
            loss += z_loss * lse * lse
        tl.store(loss_ptr + slot, loss.to(SUM), mask=there)
        tl.store(lse_ptr + slot, lse, mask=there)


@triton.jit
def _tied_softmax_loss_factors_kernel(
    dloss_ptr,
    dlse_ptr,
    lse_ptr,
    hidden_ptr,
    items_ptr,
    bias_ptr,
    kept_ptr,
    count_ptr,
    compact_ptr,
    factors_ptr,
    largest_ptr,
    R,
    V,
    stride_dloss,
    stride_dlse,
    stride_hidden,
    stride_items,
    stride_bias,
    temperature: tl.float64,
    label_smoothing: tl.float64,
    z_loss: tl.float64,
    scale: tl.float64,
    cap: tl.float64,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What the gradient needs of each row, and its hidden row, without those that take no part.

    factors (5, R): shift, weight, constant, share times the slope at the target, and the weight
                    without what the shift lacks
    largest ()    : bits of the largest sum of a row's absolute factors, in float32
    """
    count = tl.load(count_ptr)
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    there = k < count
    slot = tl.load(kept_ptr + k, mask=there, other=0)
    source = tl.load(kept_ptr + R + k, mask=there, other=0)
    wanted = tl.load(kept_ptr + 2 * R + k, mask=there, other=-1)
    known = there & (wanted >= 0) & (wanted < V)

    lse = tl.load(lse_ptr + slot, mask=there, other=0.0)
    dloss = tl.load(dloss_ptr + slot * stride_dloss, mask=there, other=0.0).to(tl.float64)
    dlse = tl.load(dlse_ptr + slot * stride_dlse, mask=there, other=0.0).to(tl.float64)
    dloss, dlse = dloss / temperature, dlse / temperature
    # At |lse| = 1e4 the last bit of float32 is 1e-3 of all probabilities: what the shift lacks goes
    # into the weight.
    shift = (lse / LN2).to(SUM)
    lack = shift.to(tl.float64) - lse / LN2
    lack = tl.where(tl.abs(lse) == float("inf"), 0.0, lack)
    exact = dloss * (1.0 + 2.0 * z_loss * lse) + dlse
    weight = exact * tl.exp2(lack.to(SUM)).to(tl.float64)
    constant = -dloss * label_smoothing / V
    share = dloss * (label_smoothing - 1.0)

    product = tl.zeros((BLOCK_N,), SUM)
    for start in range(0, D, BLOCK_D):
        hidden = load_rows(hidden_ptr, source, there, stride_hidden, start, D, BLOCK_D)
        d = start + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (d < D)[None, :]
        tl.store(compact_ptr + k[:, None] * D + d[None, :], hidden, mask=inside)
        if SOFTCAP:
            items = load_rows(items_ptr, wanted, known, stride_items, start, D, BLOCK_D)
            product += tl.sum(hidden.to(SUM) * items.to(SUM), 1)
    slope = tl.zeros((BLOCK_N,), SUM) + 1.0
    if SOFTCAP:
        scale, cap = tl.full((), scale, SUM), tl.full((), cap, SUM)
        offset = item_offsets(bias_ptr, wanted, known, stride_bias, scale, HAS_BIAS, SUM)
        slope = logits(product, offset, scale, cap, SOFTCAP)[1]

    tl.store(factors_ptr + k, shift, mask=there)
    tl.store(factors_ptr + R + k, weight.to(SUM), mask=there)
    tl.store(factors_ptr + 2 * R + k, constant.to(SUM), mask=there)
    tl.store(factors_ptr + 3 * R + k, share.to(SUM) * slope, mask=there)
    tl.store(factors_ptr + 4 * R + k, exact.to(SUM), mask=there)
    size = (tl.abs(weight) + tl.abs(constant) + tl.abs(share)).to(tl.float32)
    bits = tl.where(there, size, 0.0).to(tl.int32, bitcast=True)
    tl.atomic_max(largest_ptr, tl.max(bits, 0), sem="relaxed")


@triton.jit
def _tied_softmax_loss_items_kernel(
    items_ptr,
    bias_ptr,
    compact_ptr,
    count_ptr,
    factors_ptr,
    largest_ptr,
    sorted_ptr,
    sums_ptr,
    shares_ptr,
    ditems_ptr,
    dbias_ptr,
    R,
    V,
    steps,
    stride_items,
    stride_bias,
    scale: tl.float64,
    cap: tl.float64,
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
    EXPONENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of one tile of items, from all rows."""
    count = tl.load(count_ptr).to(tl.int32)
    column = tl.program_id(1) * BLOCK_D
    scale, cap = tl.full((), scale, SUM), tl.full((), cap, SUM)
    unit = tl.full((), 1.0, SUM)
    back = unit
    if EXPONENT != 0:
        largest = tl.load(largest_ptr) >> 23  # the biased exponent
        unit = power_of_two(EXPONENT + 127 - largest)
        back = power_of_two(largest - 127 - EXPONENT)
    ids = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V).to(tl.int64)
    inside = ids < V
    items = load_rows(items_ptr, ids, inside, stride_items, 0, D, BLOCK_D)
    gradient = tl.zeros((BLOCK_V, BLOCK_D), SUM)
    dbias = tl.zeros((BLOCK_V,), SUM)
    gradient, dbias = add_item_gradients(
        gradient, dbias, items, items_ptr, bias_ptr, compact_ptr, factors_ptr,
        ids, 0, count, column, R, V, stride_items, stride_bias, D, scale, cap, unit,
        D, HAS_BIAS, SOFTCAP, SMOOTHING, NEED_ITEMS, NEED_BIAS, INPUT, DOT, SCORE, SUM, PRECISION,
        BLOCK_N, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    place, named = segment_of(ids, sorted_ptr, count, steps)
    if NEED_ITEMS:
        sums = load_rows(sums_ptr, place, named, D, column, D, BLOCK_D)
        d = column + tl.arange(0, BLOCK_D)
        gradient = (gradient * back + sums).to(INPUT)
        place_of = ids[:, None] * D + d[None, :]
        tl.store(ditems_ptr + place_of, gradient, mask=inside[:, None] & (d < D)[None, :])
    if NEED_BIAS:  # noqa: SIM102, decided by the compiler
        if tl.program_id(1) == 0:
            dbias += tl.load(shares_ptr + place, mask=named, other=0.0)
            tl.store(dbias_ptr + ids, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tied_softmax_loss_hidden_kernel(
    items_ptr,
    kept_ptr,
    count_ptr,
    sorted_ptr,
    order_ptr,
    factors_ptr,
    mean_ptr,
    slopes_ptr,
    sum_ptr,
    dhidden_ptr,
    R,
    N,
    V,
    steps,
    stride_items,
    D: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INPUT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dhidden of a block of rows: weight * mean + constant * sum of items + share * target's item.

    Rows that `rows` names more than once add up in the order of their slots.
    """
    count = tl.load(count_ptr)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    column = tl.program_id(1) * BLOCK_D
    first = first_not_below(sorted_ptr, count, n, steps)
    last = first_not_below(sorted_ptr, count, n + 1, steps)
    total = tl.zeros((BLOCK_N, BLOCK_D), SUM)
    for i in range(tl.max((last - first).to(tl.int32), 0)):
        k = first + i
        there = k < last
        if HAS_ROWS:
            k = tl.load(order_ptr + k, mask=there, other=0)
        slot = tl.load(kept_ptr + k, mask=there, other=0)
        wanted = tl.load(kept_ptr + 2 * R + k, mask=there, other=-1)
        known = there & (wanted >= 0) & (wanted < V)
        share = tl.load(factors_ptr + 3 * R + k, mask=there, other=0.0)
        weight = tl.load(factors_ptr + 4 * R + k, mask=there, other=0.0)
        mean = load_rows(mean_ptr, slot, there, D, column, D, BLOCK_D)
        items = load_rows(items_ptr, wanted, known, stride_items, column, D, BLOCK_D).to(SUM)
        total += weight[:, None] * mean + share[:, None] * items
        if SMOOTHING:
            constant = tl.load(factors_ptr + 2 * R + k, mask=there, other=0.0)
            if SOFTCAP:
                slopes = load_rows(slopes_ptr, slot, there, D, column, D, BLOCK_D)
            else:
                slopes = tl.load(sum_ptr + d, mask=d < D, other=0.0)[None, :]
            total += constant[:, None] * slopes
    place = n[:, None] * D + d[None, :]
    tl.store(dhidden_ptr + place, total.to(INPUT), mask=(n < N)[:, None] & (d < D)[None, :])


# -- launchers -------------------------------------------------------------------------------------

AMPERE, ADA, HOPPER = (80,), (86, 120), (90, 100)  # 164, 100 and 228 KiB of shared memory
_INTERPRETED = Entry(config(4, 1, BLOCK_N=32, BLOCK_V=64), archs=(0,))
_FLOAT64 = Entry(config(4, 1, BLOCK_N=16, BLOCK_V=32), itemsizes=(8,))
# Tiles are the largest that `make gpu-budget` compiles without spills; plain: without softcap and
# label smoothing.
CONFIGS = {
    "_tied_softmax_loss_fwd_kernel": (
        _INTERPRETED,
        _FLOAT64,
        Entry(config(4, 2, BLOCK_N=64, BLOCK_V=64), itemsizes=(2,), most_width=64, most_rows=128),
        Entry(config(8, 3, BLOCK_N=128, BLOCK_V=128), HOPPER, (2,), most_width=128, plain=True),
        Entry(config(8, 3, BLOCK_N=128, BLOCK_V=64), HOPPER, (2,), most_width=128),
        Entry(config(8, 2, BLOCK_N=128, BLOCK_V=32), HOPPER, (2,)),
        Entry(config(4, 3, BLOCK_N=128, BLOCK_V=64), AMPERE, (2,), most_width=64, plain=True),
        Entry(config(8, 2, BLOCK_N=128, BLOCK_V=64), AMPERE, (2,), most_width=128),
        Entry(config(8, 2, BLOCK_N=64, BLOCK_V=64), AMPERE, (2,)),
        Entry(config(4, 2, BLOCK_N=128, BLOCK_V=64), ADA, (2,), most_width=64, plain=True),
        Entry(config(8, 2, BLOCK_N=128, BLOCK_V=64), ADA, (2,), most_width=128, plain=True),
        Entry(config(8, 2, BLOCK_N=64, BLOCK_V=32), ADA, (2,)),
        Entry(config(8, 2, BLOCK_N=64, BLOCK_V=64), HOPPER, (4,), most_width=64, plain=True),
        Entry(config(4, 1, BLOCK_N=64, BLOCK_V=16), itemsizes=(4,), most_width=64),
        Entry(config(8, 1, BLOCK_N=32, BLOCK_V=32), itemsizes=(4,)),
    ),
    "_tied_softmax_loss_items_kernel": (
        _INTERPRETED,
        _FLOAT64,
        Entry(config(8, 3, BLOCK_N=64, BLOCK_V=128), HOPPER, (2,), most_width=128),
        Entry(config(8, 2, BLOCK_N=64, BLOCK_V=64), HOPPER, (2,)),
        Entry(config(4, 3, BLOCK_N=64, BLOCK_V=128), AMPERE, (2,), most_width=64),
        Entry(config(8, 3, BLOCK_N=64, BLOCK_V=128), AMPERE, (2,), most_width=128),
        Entry(config(8, 2, BLOCK_N=64, BLOCK_V=64), AMPERE, (2,)),
        Entry(config(4, 2, BLOCK_N=64, BLOCK_V=128), ADA, (2,), most_width=64, plain=True),
        Entry(config(8, 2, BLOCK_N=64, BLOCK_V=128), ADA, (2,), most_width=128),
        Entry(config(8, 2, BLOCK_N=32, BLOCK_V=64), ADA, (2,)),
        Entry(config(8, 2, BLOCK_N=64, BLOCK_V=64), HOPPER, (4,), most_width=64, plain=True),
        Entry(config(4, 1, BLOCK_N=32, BLOCK_V=32), itemsizes=(4,), most_width=128),
        Entry(config(8, 1, BLOCK_N=32, BLOCK_V=32), itemsizes=(4,)),
    ),
}
_MERGE = config(8, 1, BLOCK_P=32, BLOCK_M=1)


def _few_rows(like: Tensor) -> Config:
    """For kernels that read each row of like once."""
    wide = like.dtype == torch.float64 and not _tuning.interpreted()
    return config(8, 1, BLOCK_N=32 if wide else 64)


def _keep_rows(
    hidden: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    size = hidden.shape[0] if rows is None else rows.shape[0]
    kept = hidden.new_empty((3, size), dtype=torch.int64)
    count = hidden.new_empty((), dtype=torch.int64)
    launch(
        _tied_softmax_loss_rows_kernel,
        (1,),
        config(8, 1, BLOCK_R=64 if _tuning.interpreted() else 2048),
        target_ptr=target,
        rows_ptr=rows,
        kept_ptr=kept,
        count_ptr=count,
        R=size,
        N=hidden.shape[0],
        stride_target=target.stride(0),
        stride_rows=0 if rows is None else rows.stride(0),
        ignore_index=ignore_index,
        HAS_ROWS=rows is not None,
    )
    return kept, count


def _pass(
    mean: int,
    hidden: Tensor,
    items: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    count: Tensor,
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and the means of one pass over all items; 0 for rows that take no part."""
    size, (v, d) = kept.shape[1], items.shape
    options = softcap > 0 or label_smoothing > 0
    wanted = _tuning.key(hidden, rows=size, items=v, width=d, options=options)
    columns = column_blocks(wanted)
    width = columns["BLOCK_D"]
    chunks = triton.cdiv(d, width) if mean else 1
    slots = RESIDENT * _tuning.processors(hidden)
    scale, cap = scales(temperature, softcap)
    made = types_of(hidden.dtype)
    shared = {"kept_ptr": kept, "count_ptr": count, "R": size, "V": v, "slots": slots}
    dtype = _tuning.SUMS[hidden.dtype]

    def parts(c: Config) -> tuple[Tensor, Tensor, int]:
        programs = max(slots, triton.cdiv(size, c["BLOCK_N"]))
        stats = hidden.new_empty((programs, 4, c["BLOCK_N"]), dtype=dtype)
        means = hidden.new_empty((programs, c["BLOCK_N"], d if mean else 0), dtype=dtype)
        launch(
            _tied_softmax_loss_fwd_kernel,
            (programs, chunks),
            c,
            **shared,
            **made,
            hidden_ptr=hidden,
            items_ptr=items,
            bias_ptr=bias,
            stats_ptr=stats,
            means_ptr=means,
            stride_hidden=hidden.stride(0),
            stride_items=items.stride(0),
            stride_bias=0 if bias is None else bias.stride(0),
            scale=scale,
            cap=cap,
            D=d,
            HAS_BIAS=bias is not None,
            SOFTCAP=softcap > 0,
            SMOOTHING=label_smoothing > 0,
            MEAN=mean,
            **columns,
        )
        return stats, means, programs

    name = "_tied_softmax_loss_fwd_kernel"
    found = _tuning.chosen(name, CONFIGS, wanted, parts)
    stats, means, programs = parts(found)
    loss = hidden.new_zeros(size, dtype=dtype)
    lse = hidden.new_zeros(size, dtype=torch.float64)
    merge = config(4, 1, BLOCK_P=4, BLOCK_M=32) if _tuning.interpreted() else _MERGE
    merged = hidden.new_zeros((size if mean else 0, d), dtype=dtype)
    launch(
        _tied_softmax_loss_merge_kernel,
        (triton.cdiv(size, merge["BLOCK_M"]), chunks),
        merge,
        **shared,
        stats_ptr=stats,
        means_ptr=means,
        loss_ptr=loss,
        lse_ptr=lse,
        mean_ptr=merged,
        programs=programs,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        D=d,
        MEAN=mean,
        SUM=made["SUM"],
        EXPONENT=made["EXPONENT"],
        BLOCK_N=found["BLOCK_N"],
        BLOCK_V=found["BLOCK_V"],
        BLOCK_D=width,
    )
    return loss, lse, merged


def tied_softmax_loss_fwd(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    stash_items: int,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, no stash, and if needed the mean of the items under each row's softmax."""
    if stash_items:
        raise ValueError(
            f"tied_softmax_loss: stash_items must be 0 for backend 'triton'; got {stash_items}"
        )
    hidden, items = unit_rows(hidden), unit_rows(items)
    kept, count = _keep_rows(hidden, target, rows, ignore_index)
    options = (temperature, softcap, label_smoothing, z_loss)
    mean = SOFTMAX.value if need_mean else NOTHING.value
    loss, lse, means = _pass(mean, hidden, items, bias, kept, count, *options)
    return loss, lse, loss.new_empty((loss.shape[0], 0)), means


def tied_softmax_loss_bwd(
    dloss: Tensor,
    dlse: Tensor,
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    lse: Tensor,
    stash: Tensor,
    mean: Tensor,
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    need_hidden: bool,
    need_items: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, items and bias; an empty tensor where not needed."""
    hidden, items = unit_rows(hidden), unit_rows(items)
    kept, count = _keep_rows(hidden, target, rows, ignore_index)
    options = (temperature, softcap, label_smoothing, z_loss)
    need_bias = need_bias and bias is not None
    compact, factors, largest = _factors(
        dloss, dlse, hidden, items, bias, lse, kept, count, *options
    )
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    ditems = items.new_empty(items.shape if need_items else 0)
    dbias = (hidden if bias is None else bias).new_empty(items.shape[0] if need_bias else 0)
    if need_items or need_bias:
        _item_gradients(
            items, bias, compact, kept, count, factors, largest, ditems, dbias,
            need_items, need_bias, temperature, softcap, label_smoothing,
        )  # fmt: skip
    if need_hidden:
        if mean.shape[0] != kept.shape[1]:  # forward did not know that it would be needed
            mean = _pass(SOFTMAX.value, hidden, items, bias, kept, count, *options)[2]
        slopes = total = None
        if label_smoothing and softcap:
            slopes = _pass(SLOPE.value, hidden, items, bias, kept, count, *options)[2]
        elif label_smoothing:
            total = items.sum(0, dtype=factors.dtype)
        _hidden_gradients(items, rows, kept, count, factors, mean, slopes, total, dhidden)
    return dhidden, ditems, dbias


def _sorted(numbers: Tensor, count: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """The first `count` numbers in order, and where they stood; what is behind them stays there."""
    there = torch.arange(numbers.shape[0], device=numbers.device) < count
    found = torch.where(there, numbers, last).sort(stable=True)
    return found.values, found.indices


def _factors(
    dloss: Tensor,
    dlse: Tensor,
    hidden: Tensor,
    items: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    kept: Tensor,
    count: Tensor,
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that take part (R, D), what their gradients need (5, R), the largest of it."""
    size, (v, d) = kept.shape[1], items.shape
    dtype = _tuning.SUMS[hidden.dtype]
    compact = hidden.new_empty((size, d))
    factors = hidden.new_empty((5, size), dtype=dtype)
    largest = hidden.new_zeros((), dtype=torch.int32)
    scale, cap = scales(temperature, softcap)
    few = _few_rows(hidden)
    launch(
        _tied_softmax_loss_factors_kernel,
        (triton.cdiv(size, few["BLOCK_N"]),),
        few,
        dloss_ptr=dloss,
        dlse_ptr=dlse,
        lse_ptr=lse,
        hidden_ptr=hidden,
        items_ptr=items,
        bias_ptr=bias,
        kept_ptr=kept,
        count_ptr=count,
        compact_ptr=compact,
        factors_ptr=factors,
        largest_ptr=largest,
        R=size,
        V=v,
        stride_dloss=dloss.stride(0),
        stride_dlse=dlse.stride(0),
        stride_hidden=hidden.stride(0),
        stride_items=items.stride(0),
        stride_bias=0 if bias is None else bias.stride(0),
        temperature=temperature,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        scale=scale,
        cap=cap,
        D=d,
        HAS_BIAS=bias is not None,
        SOFTCAP=softcap > 0,
        SUM=_tuning.sum_type(hidden.dtype),
        BLOCK_D=min(triton.next_power_of_2(d), 64),
    )
    return compact, factors, largest


def _item_gradients(
    items: Tensor,
    bias: Tensor | None,
    compact: Tensor,
    kept: Tensor,
    count: Tensor,
    factors: Tensor,
    largest: Tensor,
    ditems: Tensor,
    dbias: Tensor,
    need_items: bool,
    need_bias: bool,
    temperature: float,
    softcap: float,
    label_smoothing: float,
) -> None:
    size, (v, d) = kept.shape[1], items.shape
    options = softcap > 0 or label_smoothing > 0
    wanted = _tuning.key(items, rows=size, items=v, width=d, options=options)
    columns = column_blocks(wanted)
    width = columns["BLOCK_D"]
    scale, cap = scales(temperature, softcap)
    named, order = _sorted(kept[2], count, v)
    sums, shares = segment_sums(named, order, factors[3], compact, count, factors.dtype)

    def run(c: Config) -> None:
        launch(
            _tied_softmax_loss_items_kernel,
            (triton.cdiv(v, c["BLOCK_V"]), triton.cdiv(d, width) if need_items else 1),
            c,
            **types_of(items.dtype),
            items_ptr=items,
            bias_ptr=bias,
            compact_ptr=compact,
            count_ptr=count,
            factors_ptr=factors,
            largest_ptr=largest,
            sorted_ptr=named,
            sums_ptr=sums,
            shares_ptr=shares,
            ditems_ptr=ditems,
            dbias_ptr=dbias,
            R=size,
            V=v,
            steps=size.bit_length() + 1,
            stride_items=items.stride(0),
            stride_bias=0 if bias is None else bias.stride(0),
            scale=scale,
            cap=cap,
            D=d,
            HAS_BIAS=bias is not None,
            SOFTCAP=softcap > 0,
            SMOOTHING=label_smoothing > 0,
            NEED_ITEMS=need_items,
            NEED_BIAS=need_bias,
            **columns,
        )

    run(_tuning.chosen("_tied_softmax_loss_items_kernel", CONFIGS, wanted, run))


def _hidden_gradients(
    items: Tensor,
    rows: Tensor | None,
    kept: Tensor,
    count: Tensor,
    factors: Tensor,
    mean: Tensor,
    slopes: Tensor | None,
    total: Tensor | None,
    dhidden: Tensor,
) -> None:
    size, (n, d) = kept.shape[1], dhidden.shape
    named, order = (kept[1], None) if rows is None else _sorted(kept[1], count, n)
    width = min(triton.next_power_of_2(d), 128)
    few = _few_rows(items)
    launch(
        _tied_softmax_loss_hidden_kernel,
        (triton.cdiv(n, few["BLOCK_N"]), triton.cdiv(d, width)),
        few,
        items_ptr=items,
        kept_ptr=kept,
        count_ptr=count,
        sorted_ptr=named,
        order_ptr=order,
        factors_ptr=factors,
        mean_ptr=mean,
        slopes_ptr=slopes,
        sum_ptr=total,
        dhidden_ptr=dhidden,
        R=size,
        N=n,
        V=items.shape[0],
        steps=size.bit_length() + 1,
        stride_items=items.stride(0),
        D=d,
        HAS_ROWS=rows is not None,
        SMOOTHING=slopes is not None or total is not None,
        SOFTCAP=slopes is not None,
        INPUT=_tuning.TYPES[dhidden.dtype],
        SUM=_tuning.sum_type(dhidden.dtype),
        BLOCK_D=width,
    )


def _case(dtype: torch.dtype, d: int, everything: bool) -> None:
    """One forward and one backward on the meta device, with no options or with all."""
    hidden, items, target, rows, like = (
        torch.empty(size, dtype=kind, device="meta")
        for size, kind in (
            ((4096, d), dtype), ((100_000, d), dtype), (4096, torch.int64), (4096, torch.int64),
            (4096, _tuning.SUMS[dtype]),
        )
    )  # fmt: skip
    bias = items[:, 0].contiguous() if everything else None
    options = (0.5, 30.0, 0.1, 1e-4, -100) if everything else (1.0, 0.0, 0.0, 0.0, -100)
    inputs = (hidden, items, target, bias, rows if everything else None)
    tied_softmax_loss_fwd(*inputs, *options, 0, False)
    _, lse, stash, mean = tied_softmax_loss_fwd(*inputs, *options, 0, True)
    tied_softmax_loss_bwd(like, like, *inputs, lse, stash, mean, *options, True, True, everything)


def variants(arch: int) -> Iterator[Variant]:
    """What the launchers compile on an architecture, by dtype, D and options."""
    for label, dtype, d, everything in _tuning.cases():
        yield from _tuning.recorded(arch, label, functools.partial(_case, dtype, d, everything))

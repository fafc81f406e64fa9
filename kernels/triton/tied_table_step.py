"""tied_table_step on a GPU: a program owns a tile of items, from its gradient to its last write.

It recomputes the softmax gradient of its items from the rows' factors, adds the sums of what was
looked up, and steps its rows of the table and of the optimizer's state, which no other program
reads or writes. Entries that name the same item are sorted, and summed first, a segment per
program, in their order. Rows too wide for that are stepped in slabs of bounded memory: a slab's
gradient, then its rows. All rules and their numbers are those of plain/tied_table_step.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._scores import load_rows
from t4r_fast.kernels._softmax import (
    add_item_gradients,
    column_blocks,
    item_offsets,
    logits,
    power_of_two,
    scales,
    segment_blocks,
    segment_of,
    segment_sum,
    segment_sums,
    types_of,
    unit_rows,
)
from t4r_fast.kernels._tuning import Config, Entry, Key, Variant, config, launch
from t4r_fast.plain import tied_table_step as plain

LN2 = tl.constexpr(math.log(2.0))
SGD, ADAGRAD, ADAMW, ROWWISE_ADAGRAD, ROWWISE_ADAMW = (
    tl.constexpr(kind)
    for kind in (
        plain.SGD,
        plain.ADAGRAD,
        plain.ADAMW,
        plain.ROWWISE_ADAGRAD,
        plain.ROWWISE_ADAMW,
    )
)
CHECK_EVERY, NEGLIGIBLE = tl.constexpr(plain.CHECK_EVERY), tl.constexpr(plain.NEGLIGIBLE)
# What becomes of a tile's gradient.
STEP, NORM, STORE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SLAB_BYTES = 16 * 2**20  # of the gradient of wide rows; stays in the L2 cache of large GPUs


@triton.jit
def _tied_table_step_factors_kernel(
    given_ptr,
    hidden_ptr,
    items_ptr,
    bias_ptr,
    target_ptr,
    factors_ptr,
    largest_ptr,
    K,
    V,
    stride_factors,
    stride_hidden,
    stride_target,
    stride_bias,
    scale: tl.float64,
    cap: tl.float64,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """factors (4, K): shift, weight, constant, share times the slope at the target; the largest."""
    k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    there = k < K
    wanted = tl.load(target_ptr + k * stride_target, mask=there, other=-1)
    known = there & (wanted >= 0) & (wanted < V)
    lse = tl.load(given_ptr + k, mask=there, other=0.0) / LN2
    weight = tl.load(given_ptr + K + k, mask=there, other=0.0)
    constant = tl.load(given_ptr + 2 * K + k, mask=there, other=0.0)
    share = tl.load(given_ptr + 3 * K + k, mask=there, other=0.0)
    size = tl.abs(weight) + tl.abs(constant) + tl.abs(share)
    # At |lse| = 1e4 the last bit of float32 is 1e-3 of all probabilities: what the shift lacks goes
    # into the weight. A row without weights may have any lse: inf makes its probabilities 0.
    shift = lse.to(SUM)
    lack = tl.where(tl.abs(lse) == float("inf"), 0.0, shift.to(tl.float64) - lse)
    weight *= tl.exp2(lack.to(SUM)).to(tl.float64)
    shift = tl.where(size == 0, float("inf"), shift)

    slope = tl.zeros((BLOCK_N,), SUM) + 1.0
    if SOFTCAP:
        product = tl.zeros((BLOCK_N,), SUM)
        for start in range(0, D, BLOCK_D):
            hidden = load_rows(hidden_ptr, k, there, stride_hidden, start, D, BLOCK_D).to(SUM)
            items = load_rows(items_ptr, wanted, known, D, start, D, BLOCK_D).to(SUM)
            product += tl.sum(hidden * items, 1)
        scale, cap = tl.full((), scale, SUM), tl.full((), cap, SUM)
        offset = item_offsets(bias_ptr, wanted, known, stride_bias, scale, HAS_BIAS, SUM)
        slope = logits(product, offset, scale, cap, SOFTCAP)[1]
    tl.store(factors_ptr + k, shift, mask=there)
    tl.store(factors_ptr + stride_factors + k, weight.to(SUM), mask=there)
    tl.store(factors_ptr + 2 * stride_factors + k, constant.to(SUM), mask=there)
    tl.store(factors_ptr + 3 * stride_factors + k, share.to(SUM) * slope, mask=there)
    bits = tl.where(there, size, 0.0).to(tl.float32).to(tl.int32, bitcast=True)
    tl.atomic_max(largest_ptr, tl.max(bits, 0), sem="relaxed")


@triton.jit
def _root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _quotient(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _update(
    w,
    first,
    second,
    g,
    lr,
    pace,
    correction,
    keep,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    weight_decay,
    momentum,
    D: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """One step of whole rows (rows, BLOCK_D), 0 past D; numbers are scalars or (rows, 1).

    pace        lr / (1 - beta1**step)
    correction  sqrt(1 - beta2**step)
    keep        1 - lr * weight_decay
    rest1       1 - beta1; rest2 likewise
    """
    if KIND == ADAMW or KIND == ROWWISE_ADAMW:  # noqa: SIM109, no `in` in Triton
        w = w * keep
        first = first + (g - first) * rest1
        if KIND == ADAMW:
            second = second * beta2 + g * g * rest2
            spread = _root(second)
        else:
            second = second * beta2 + (tl.sum(g * g, 1) / D)[:, None] * rest2
            spread = _root(second)
        spread = _quotient(spread, correction) + eps
        w = w - _quotient(first, spread) * pace
    else:
        g = g + weight_decay * w
        if KIND == SGD:
            if HAS_FIRST:
                first = first * momentum + g
                g = first
            w = w - g * lr
        else:
            square = g * g
            if KIND == ROWWISE_ADAGRAD:
                square = (tl.sum(square, 1) / D)[:, None]
            first = first + square
            w = w - _quotient(g, _root(first) + eps) * lr
    return w, first, second


@triton.jit
def _load_states(
    items_ptr,
    first_ptr,
    second_ptr,
    ids,
    there,
    D: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of the table and of its state; a state by row is (rows, 1), one that is not there 0."""
    w = load_rows(items_ptr, ids, there, D, 0, D, BLOCK_D).to(SUM)
    first = tl.zeros((ids.shape[0], 1), SUM)
    second = tl.zeros((ids.shape[0], 1), SUM)
    if KIND == ROWWISE_ADAGRAD:
        first = tl.load(first_ptr + ids, mask=there, other=0.0)[:, None]
    elif HAS_FIRST:
        first = load_rows(first_ptr, ids, there, D, 0, D, BLOCK_D)
    if KIND == ROWWISE_ADAMW:
        second = tl.load(second_ptr + ids, mask=there, other=0.0)[:, None]
    elif KIND == ADAMW:
        second = load_rows(second_ptr, ids, there, D, 0, D, BLOCK_D)
    return w, first, second


@triton.jit
def _store_states(
    items_ptr,
    first_ptr,
    second_ptr,
    w,
    first,
    second,
    ids,
    there,
    D: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    INPUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    place = ids[:, None] * D + d[None, :]
    mask = there[:, None] & (d < D)[None, :]
    tl.store(items_ptr + place, w.to(INPUT), mask=mask)
    if KIND == ROWWISE_ADAGRAD:
        tl.store(first_ptr + ids[:, None], first, mask=there[:, None])
    elif HAS_FIRST:
        tl.store(first_ptr + place, first, mask=mask)
    if KIND == ROWWISE_ADAMW:
        tl.store(second_ptr + ids[:, None], second, mask=there[:, None])
    elif KIND == ADAMW:
        tl.store(second_ptr + place, second, mask=mask)


@triton.jit
def _step_rows(
    items_ptr,
    first_ptr,
    second_ptr,
    ids,
    there,
    g,
    lr,
    pace,
    correction,
    beta1,
    beta2,
    eps,
    weight_decay,
    momentum,
    scale,
    D: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    INPUT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Step the rows ids by their gradients g (rows, BLOCK_D), in place; numbers are float64."""
    w, first, second = _load_states(
        items_ptr, first_ptr, second_ptr, ids, there, D, KIND, HAS_FIRST, SUM, BLOCK_D
    )
    # differences in float64: in float32 1 - 0.999 is off by 5e-5 of itself
    w, first, second = _update(
        w, first, second, g * tl.full((), scale, SUM), tl.full((), lr, SUM),
        tl.full((), pace, SUM), tl.full((), correction, SUM),
        tl.full((), 1.0 - lr * weight_decay, SUM), tl.full((), beta1, SUM),
        tl.full((), 1.0 - beta1, SUM), tl.full((), beta2, SUM), tl.full((), 1.0 - beta2, SUM),
        tl.full((), eps, SUM), tl.full((), weight_decay, SUM), tl.full((), momentum, SUM),
        D, KIND, HAS_FIRST,
    )  # fmt: skip
    _store_states(
        items_ptr, first_ptr, second_ptr, w, first, second, ids, there, D, KIND, HAS_FIRST, INPUT,
        BLOCK_D,
    )  # fmt: skip


@triton.jit
def _tied_table_step_items_kernel(
    items_ptr,
    first_ptr,
    second_ptr,
    hidden_ptr,
    factors_ptr,
    largest_ptr,
    bias_ptr,
    bounds_ptr,
    options_ptr,
    target_ptr,
    target_sums_ptr,
    ids_ptr,
    id_sums_ptr,
    gradient_ptr,
    found_ptr,
    from_item,
    V,
    K,
    L,
    groups,
    stride_hidden,
    stride_bias,
    steps,
    logit_scale: tl.float64,
    cap: tl.float64,
    lr: tl.float64,
    pace: tl.float64,
    correction: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    momentum: tl.float64,
    scale: tl.float64,
    D: tl.constexpr,
    MODE: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_SOFTMAX: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LOOKUP: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
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
    """The gradient of one tile of items, and by MODE their step, its squares, or the gradient.

    found  NORM: a float64 per program, STORE: (items from from_item on, D)
    """
    tile = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D
    ids = from_item + tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = ids < V
    g = tl.zeros((BLOCK_V, BLOCK_D), SUM)
    if HAS_SOFTMAX:
        unit = tl.full((), 1.0, SUM)
        back = unit
        if EXPONENT != 0:
            largest = tl.load(largest_ptr) >> 23  # the biased exponent
            unit = power_of_two(EXPONENT + 127 - largest)
            back = power_of_two(largest - 127 - EXPONENT)
        items = load_rows(items_ptr, ids, inside, D, 0, D, BLOCK_D)
        nothing = tl.zeros((BLOCK_V,), SUM)
        if GROUPED:
            for group in range(groups):
                z_scale = tl.load(options_ptr + 2 * group).to(SUM)
                z_cap = tl.load(options_ptr + 2 * group + 1).to(SUM)
                start = tl.load(bounds_ptr + group).to(tl.int32)
                stop = tl.load(bounds_ptr + group + 1).to(tl.int32)
                group_bias_ptr = bias_ptr
                if HAS_BIAS:
                    group_bias_ptr += tl.full((), group, tl.int64) * V
                g, nothing = add_item_gradients(
                    g, nothing, items, items_ptr, group_bias_ptr, hidden_ptr, factors_ptr, ids,
                    start, stop, column, K, V, D, 1, stride_hidden, z_scale, z_cap, unit,
                    D, HAS_BIAS, SOFTCAP, True, True, False, INPUT, DOT, SCORE, SUM, PRECISION,
                    BLOCK_N, BLOCK_C, BLOCK_D,
                )  # fmt: skip
        else:
            g, nothing = add_item_gradients(
                g, nothing, items, items_ptr, bias_ptr, hidden_ptr, factors_ptr, ids, 0, K, column,
                K, V, D, stride_bias, stride_hidden, tl.full((), logit_scale, SUM),
                tl.full((), cap, SUM), unit, D, HAS_BIAS, SOFTCAP, True, True, False, INPUT, DOT,
                SCORE, SUM, PRECISION, BLOCK_N, BLOCK_C, BLOCK_D,
            )  # fmt: skip
        place, named = segment_of(ids, target_ptr, K, steps)
        g = g * back + load_rows(target_sums_ptr, place, named, D, column, D, BLOCK_D)
    if HAS_LOOKUP:
        place, named = segment_of(ids, ids_ptr, L, steps)
        g += load_rows(id_sums_ptr, place, named, D, column, D, BLOCK_D)
    if HAS_GRADIENT:
        g += load_rows(gradient_ptr, ids, inside, D, column, D, BLOCK_D).to(SUM)
    if MODE == STEP:
        _step_rows(
            items_ptr, first_ptr, second_ptr, ids, inside, g, lr, pace, correction, beta1, beta2,
            eps, weight_decay, momentum, scale, D, KIND, HAS_FIRST, INPUT, SUM, BLOCK_D,
        )  # fmt: skip
    if MODE == NORM:
        square = tl.where(inside[:, None], g * g, 0.0)
        total = tl.sum(tl.sum(square, 1).to(tl.float64), 0)
        tl.store(found_ptr + tile * tl.num_programs(1) + tl.program_id(1), total)
    if MODE == STORE:
        d = column + tl.arange(0, BLOCK_D)
        place = (ids - from_item)[:, None] * D + d[None, :]
        tl.store(found_ptr + place, g, mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _tied_table_step_rows_kernel(
    items_ptr,
    first_ptr,
    second_ptr,
    ids_ptr,
    rows_ptr,
    K,
    V,
    lr: tl.float64,
    pace: tl.float64,
    correction: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    momentum: tl.float64,
    scale: tl.float64,
    D: tl.constexpr,
    KIND: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    INPUT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Step the items whose segments of sorted ids begin at this program's entries."""
    start = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J).to(tl.int64)
    g, _, begins = segment_sum(
        ids_ptr, None, None, rows_ptr, start, K, D, 0, D, False, False, SUM, BLOCK_K, BLOCK_D
    )
    ids = tl.load(ids_ptr + start, mask=begins, other=0)
    begins = begins & (ids >= 0) & (ids < V)
    _step_rows(
        items_ptr, first_ptr, second_ptr, ids, begins, g, lr, pace, correction, beta1, beta2, eps,
        weight_decay, momentum, scale, D, KIND, HAS_FIRST, INPUT, SUM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _tied_table_step_catch_up_kernel(
    items_ptr,
    first_ptr,
    second_ptr,
    last_ptr,
    ids_ptr,
    lrs_ptr,
    log_decay_ptr,
    highest_ptr,
    K,
    V,
    T,
    base,
    log2_beta1: tl.float64,
    log2_beta2: tl.float64,
    ahead: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps: tl.float64,
    weight_decay: tl.float64,
    momentum: tl.float64,
    D: tl.constexpr,
    KIND: tl.constexpr,
    ADAM: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_IDS: tl.constexpr,
    INPUT: tl.constexpr,
    SUM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The steps base + 1 to base + T, with gradient 0, of the rows that missed them.

    ahead  how much further a row can go than one step takes it: the quotient of the moments shrinks
           by at least ratio = beta1 / sqrt(beta2) a step; ratio / (1 - ratio)
    EPS    of SUM
    """
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J).to(tl.int64)
    there = j < K
    ids = j
    if HAS_IDS:
        ids = tl.load(ids_ptr + j, mask=there, other=-1)
        there = there & (ids >= 0) & (ids < V)
        before = tl.load(ids_ptr + j - 1, mask=there & (j > 0), other=-1)
        there = there & (ids != before)
    done = tl.maximum(tl.load(last_ptr + ids, mask=there, other=0), base) - base
    done = tl.where(there, done, T)
    behind = done < T
    w, first, second = _load_states(
        items_ptr, first_ptr, second_ptr, ids, behind, D, KIND, HAS_FIRST, SUM, BLOCK_D
    )
    power1 = tl.exp2((base + done).to(tl.float64) * log2_beta1)
    power2 = tl.exp2((base + done).to(tl.float64) * log2_beta2)
    active = behind
    left = tl.max(active.to(tl.int32), 0)
    while left > 0:
        if ADAM:
            # rows that the moments may still move by more than rounding, all missed steps together
            spread = _root(second) + tl.full((), eps, SUM)
            furthest = tl.max(_quotient(tl.abs(first), spread), 1)
            reach = furthest.to(tl.float64) * (tl.load(highest_ptr) * ahead)
            reach = reach / (1.0 - power1 * beta1)
            least = tl.max(tl.abs(w), 1).to(tl.float64) * (NEGLIGIBLE * EPS)
            moves = tl.where(reach <= least, 0, tl.max((first != 0).to(tl.int32), 1))
            active = active & (moves > 0)
        rounds = tl.max(tl.where(active, T - done, 0), 0)
        for _ in range(tl.minimum(rounds, CHECK_EVERY)):
            go = active & (done < T)
            power1 = tl.where(go, power1 * beta1, power1)
            power2 = tl.where(go, power2 * beta2, power2)
            lr = tl.load(lrs_ptr + done, mask=go, other=0.0)
            next_w, next_first, next_second = _update(
                w, first, second, tl.zeros_like(w), lr.to(SUM)[:, None],
                (lr / (1.0 - power1)).to(SUM)[:, None], tl.sqrt(1.0 - power2).to(SUM)[:, None],
                (1.0 - lr * weight_decay).to(SUM)[:, None], tl.full((), beta1, SUM),
                tl.full((), 1.0 - beta1, SUM), tl.full((), beta2, SUM),
                tl.full((), 1.0 - beta2, SUM), tl.full((), eps, SUM),
                tl.full((), weight_decay, SUM), tl.full((), momentum, SUM), D, KIND, HAS_FIRST,
            )  # fmt: skip
            w = tl.where(go[:, None], next_w, w)
            first = tl.where(go[:, None], next_first, first)
            second = tl.where(go[:, None], next_second, second)
            done += go.to(tl.int32)
        active = active & (done < T)
        left = tl.max(active.to(tl.int32), 0)
    if ADAM:
        rest = (T - done).to(tl.float64)
        decay = tl.load(log_decay_ptr + T) - tl.load(log_decay_ptr + done, mask=behind, other=0.0)
        w *= tl.exp(decay).to(SUM)[:, None]
        first *= tl.exp2(rest * log2_beta1).to(SUM)[:, None]
        second *= tl.exp2(rest * log2_beta2).to(SUM)[:, None]
    _store_states(
        items_ptr, first_ptr, second_ptr, w, first, second, ids, behind, D, KIND, HAS_FIRST, INPUT,
        BLOCK_D,
    )  # fmt: skip
    if HAS_IDS:
        tl.store(last_ptr + ids, tl.full((BLOCK_J,), base + T, tl.int32), mask=there)


# -- launchers -------------------------------------------------------------------------------------

CONFIGS = {
    "_tied_table_step_items_kernel": (
        Entry(config(4, 1, BLOCK_N=32, BLOCK_V=64), archs=(0,)),
        # More warps on a tile do its work twice: twice the exponentials by `make gpu-budget`.
        Entry(config(2, 1, BLOCK_N=16, BLOCK_V=32), itemsizes=(2,), most_width=64),
        Entry(config(4, 1, BLOCK_N=16, BLOCK_V=16)),  # fewer warps, or more items, spill
    ),
}


def _whole_rows(d: int) -> dict[str, int]:
    """BLOCK_D and warps for kernels that hold whole rows, 16 or more numbers of each a thread."""
    width = max(triton.next_power_of_2(d), 16)
    return {"BLOCK_D": width, "num_warps": min(max(width // 512, 1), 16)}


def _numbers(rule: plain.Rule) -> dict[str, float]:
    """The numbers of a step as kernels take them."""
    return {
        "lr": rule.lr,
        "pace": rule.lr / (1.0 - rule.beta1**rule.step),
        "correction": math.sqrt(1.0 - rule.beta2**rule.step),
        "beta1": rule.beta1,
        "beta2": rule.beta2,
        "eps": rule.eps,
        "weight_decay": rule.weight_decay,
        "momentum": rule.momentum,
        "scale": rule.scale,
    }


_NO_RULE = plain.Rule(plain.SGD, 1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def _softmax_arguments(
    items: Tensor,
    hidden: list[Tensor],
    target: list[Tensor],
    factors: list[Tensor],
    bias: list[Tensor],
    bias_of: list[int],
    options: list[float],
) -> dict[str, Any]:
    """Rows of all groups one after the other, with the factors that kernels take."""
    v, d = items.shape
    counts = [part.shape[0] for part in hidden]
    dtype = _tuning.SUMS[items.dtype]
    made = items.new_empty((4, sum(counts)), dtype=dtype)
    largest = items.new_zeros((), dtype=torch.int32)
    rows = unit_rows(hidden[0]) if len(hidden) == 1 else torch.cat(hidden)
    numbers, biases, first = [], [], 0
    few = config(4, 1, BLOCK_N=64 if _tuning.interpreted() else 16)
    for i, count in enumerate(counts):
        own = bias[bias_of[i]] if bias_of[i] >= 0 else None
        scale, cap = scales(*options[2 * i : 2 * i + 2])
        numbers += [scale, cap]
        biases.append(own)
        part = rows[first : first + count]
        launch(
            _tied_table_step_factors_kernel,
            (triton.cdiv(count, few["BLOCK_N"]),),
            few,
            given_ptr=factors[i].contiguous(),
            hidden_ptr=part,
            items_ptr=items,
            bias_ptr=own,
            target_ptr=target[i],
            factors_ptr=made[:, first:],
            largest_ptr=largest,
            K=count,
            V=v,
            stride_factors=made.stride(0),
            stride_hidden=part.stride(0),
            stride_target=target[i].stride(0),
            stride_bias=0 if own is None else own.stride(0),
            scale=scale,
            cap=cap,
            D=d,
            HAS_BIAS=own is not None,
            SOFTCAP=cap > 0,
            SUM=_tuning.sum_type(items.dtype),
            BLOCK_D=min(max(triton.next_power_of_2(d), 16), 64),
        )
        first += count
    named, order = torch.cat(target).sort(stable=True)
    sums, _ = segment_sums(named, order, made[3], rows, None, dtype)
    has_bias = any(own is not None for own in biases)
    grouped = len(hidden) > 1
    bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
    if grouped and has_bias:
        none = items.new_zeros(v, dtype=dtype)
        biases = [torch.stack([none if own is None else own.to(dtype) for own in biases])]
    return {
        "hidden_ptr": rows,
        "factors_ptr": made,
        "largest_ptr": largest,
        "bias_ptr": biases[0] if has_bias else None,
        "bounds_ptr": _filled(bounds, torch.int64, items) if grouped else None,
        "options_ptr": _filled(numbers, torch.float64, items) if grouped else None,
        "target_ptr": named,
        "target_sums_ptr": sums,
        "K": sum(counts),
        "groups": len(hidden),
        "stride_hidden": rows.stride(0),
        "stride_bias": biases[0].stride(-1) if has_bias else 0,
        "logit_scale": numbers[0],
        "cap": numbers[1],
        "HAS_SOFTMAX": True,
        "GROUPED": grouped,
        "HAS_BIAS": has_bias,
        "SOFTCAP": any(cap > 0 for cap in numbers[1::2]),
    }


def _filled(numbers: list[float] | list[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """A tensor of a few numbers; a copy from the host would wait, and cannot be captured."""
    return torch.stack([torch.full((), n, dtype=dtype, device=like.device) for n in numbers])


_NO_SOFTMAX: dict[str, Any] = {
    "hidden_ptr": None, "factors_ptr": None, "largest_ptr": None, "bias_ptr": None,
    "bounds_ptr": None, "options_ptr": None, "target_ptr": None, "target_sums_ptr": None, "K": 0,
    "groups": 0, "stride_hidden": 0, "stride_bias": 0, "logit_scale": 1.0, "cap": 0.0,
    "HAS_SOFTMAX": False, "GROUPED": False, "HAS_BIAS": False, "SOFTCAP": False,
}  # fmt: skip


def _gradient_arguments(
    items: Tensor,
    hidden: list[Tensor],
    target: list[Tensor],
    factors: list[Tensor],
    bias: list[Tensor],
    bias_of: list[int],
    options: list[float],
    ids: Tensor | None,
    rows: Tensor | None,
    gradient: Tensor | None,
) -> dict[str, Any]:
    """What the kernel that makes a tile's gradient takes, without its mode and its blocks."""
    made = _NO_SOFTMAX
    if hidden:
        made = _softmax_arguments(items, hidden, target, factors, bias, bias_of, options)
    sums = None
    if ids is not None and rows is not None:
        sums, _ = segment_sums(ids, None, None, unit_rows(rows), None, rows.dtype)
    lookups = 0 if ids is None else ids.shape[0]
    return {
        **made,
        **types_of(items.dtype),
        "items_ptr": items,
        "ids_ptr": ids,
        "id_sums_ptr": sums,
        "gradient_ptr": None if gradient is None else gradient.contiguous(),
        "V": items.shape[0],
        "L": lookups,
        "steps": max(made["K"], lookups).bit_length() + 1,
        "D": items.shape[1],
        "HAS_LOOKUP": ids is not None,
        "HAS_GRADIENT": gradient is not None,
    }


def _launch_tiles(
    arguments: dict[str, Any],
    mode: tl.constexpr,
    rule: plain.Rule,
    first: Tensor | None,
    second: Tensor | None,
    found: Tensor | None,
    start: int,
    stop: int,
    c: Config,
    columns: dict[str, int],
) -> None:
    """The gradient of the items start to stop, and what mode makes of it."""
    chunks = 1 if mode is STEP else triton.cdiv(arguments["D"], columns["BLOCK_D"])
    launch(
        _tied_table_step_items_kernel,
        (triton.cdiv(stop - start, c["BLOCK_V"]), chunks),
        c,
        **(arguments | {"V": stop} if mode is STORE else arguments),
        **_numbers(rule),
        first_ptr=first,
        second_ptr=second,
        found_ptr=found,
        from_item=start,
        MODE=mode.value,
        KIND=rule.kind,
        HAS_FIRST=first is not None,
        **columns,
    )


def _key(items: Tensor, arguments: dict[str, Any]) -> Key:
    return _tuning.key(items, rows=arguments["K"], items=items.shape[0], width=items.shape[1])


def tied_table_step_fwd(
    items: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    hidden: list[Tensor],
    target: list[Tensor],
    factors: list[Tensor],
    bias: list[Tensor],
    bias_of: list[int],
    options: list[float],
    ids: Tensor | None,
    rows: Tensor | None,
    gradient: Tensor | None,
    *numbers: int | float,
) -> None:
    """One step of all items, in place."""
    rule = plain.Rule(*numbers)
    arguments = _gradient_arguments(
        items, hidden, target, factors, bias, bias_of, options, ids, rows, gradient
    )
    wanted = _key(items, arguments)
    columns = column_blocks(wanted)
    # a step cannot be timed: it changes the table
    c = _tuning.fixed("_tied_table_step_items_kernel", CONFIGS, wanted)
    v, d = items.shape
    if d <= columns["BLOCK_D"]:
        _launch_tiles(arguments, STEP, rule, first, second, None, 0, v, c, columns)
        return
    dtype = _tuning.SUMS[items.dtype]
    slab = max(SLAB_BYTES // (d * dtype.itemsize), c["BLOCK_V"])
    buffer = items.new_empty((min(slab, v), d), dtype=dtype)
    for start in range(0, v, slab):
        stop = min(start + slab, v)
        _launch_tiles(arguments, STORE, rule, None, None, buffer, start, stop, c, columns)
        named = torch.arange(start, stop, device=items.device)
        tied_table_step_rows(items, first, second, named, buffer[: stop - start], *numbers)


def tied_table_step_norm(
    items: Tensor,
    hidden: list[Tensor],
    target: list[Tensor],
    factors: list[Tensor],
    bias: list[Tensor],
    bias_of: list[int],
    options: list[float],
    ids: Tensor | None,
    rows: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """Sum of squares of the gradient that tied_table_step_fwd would take, float64 ()."""
    arguments = _gradient_arguments(
        items, hidden, target, factors, bias, bias_of, options, ids, rows, gradient
    )
    wanted = _key(items, arguments)
    columns = column_blocks(wanted)
    v, d = items.shape

    def squares(c: Config) -> Tensor:
        programs = triton.cdiv(v, c["BLOCK_V"]) * triton.cdiv(d, columns["BLOCK_D"])
        found = items.new_empty(programs, dtype=torch.float64)
        _launch_tiles(arguments, NORM, _NO_RULE, None, None, found, 0, v, c, columns)
        return found

    name = "_tied_table_step_items_kernel"
    c = _tuning.chosen(name, CONFIGS, wanted, squares)
    return squares(c).sum()


def tied_table_step_rows(
    items: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    ids: Tensor,
    rows: Tensor,
    *numbers: int | float,
) -> None:
    """One step of the rows that ids (sorted) names, in place; all others stay."""
    rule = plain.Rule(*numbers)
    d = items.shape[1]
    made = segment_blocks(_whole_rows(d)["BLOCK_D"])
    launch(
        _tied_table_step_rows_kernel,
        (triton.cdiv(ids.shape[0], made["BLOCK_J"]),),
        made,
        **_numbers(rule),
        items_ptr=items,
        first_ptr=first,
        second_ptr=second,
        ids_ptr=ids,
        rows_ptr=rows.contiguous(),
        K=ids.shape[0],
        V=items.shape[0],
        D=d,
        KIND=rule.kind,
        HAS_FIRST=first is not None,
        INPUT=_tuning.TYPES[items.dtype],
        SUM=_tuning.sum_type(items.dtype),
        BLOCK_D=_whole_rows(d)["BLOCK_D"],
    )


def tied_table_step_catch_up(
    items: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    last: Tensor,
    ids: Tensor | None,
    base: int,
    lrs: Tensor,
    log_decay: Tensor,
    *numbers: int | float,
) -> None:
    """Give rows (ids, sorted, or all) the steps they missed, without a gradient.

    An id that is named more than once is caught up once.
    """
    rule = plain.Rule(*numbers)
    v, d = items.shape
    steps = lrs.shape[0]
    adam = rule.kind in (plain.ADAMW, plain.ROWWISE_ADAMW)
    momentum = rule.kind == plain.SGD and first is not None
    if not (adam or momentum or rule.weight_decay):  # nothing moves without a gradient
        if ids is not None:
            last.index_fill_(0, ids, base + steps)
        return
    ratio = rule.beta1 / math.sqrt(rule.beta2) if rule.beta2 > 0 else 1.0
    whole = _whole_rows(d)
    dtype = _tuning.SUMS[items.dtype]
    block = config(whole["num_warps"], 1, BLOCK_J=64 if _tuning.interpreted() else 1)
    count = v if ids is None else ids.shape[0]
    launch(
        _tied_table_step_catch_up_kernel,
        (triton.cdiv(count, block["BLOCK_J"]),),
        block,
        items_ptr=items,
        first_ptr=first,
        second_ptr=second,
        last_ptr=last,
        ids_ptr=ids,
        lrs_ptr=lrs,
        log_decay_ptr=log_decay,
        highest_ptr=lrs.amax(),
        K=count,
        V=v,
        T=steps,
        base=base,
        log2_beta1=_log2(rule.beta1),
        log2_beta2=_log2(rule.beta2),
        ahead=ratio / (1.0 - ratio) if ratio < 1.0 else math.inf,
        beta1=rule.beta1,
        beta2=rule.beta2,
        eps=rule.eps,
        weight_decay=rule.weight_decay,
        momentum=rule.momentum,
        D=d,
        KIND=rule.kind,
        ADAM=adam,
        HAS_FIRST=first is not None,
        HAS_IDS=ids is not None,
        INPUT=_tuning.TYPES[items.dtype],
        SUM=_tuning.sum_type(items.dtype),
        EPS=torch.finfo(dtype).eps,
        BLOCK_D=whole["BLOCK_D"],
    )


def _log2(beta: float) -> float:
    """log2 of beta; of 0 a number whose multiples are finite and whose powers of 2 are 0."""
    return math.log2(beta) if beta else -1e9


def _case(dtype: torch.dtype, d: int, everything: bool) -> None:
    """Every function on the meta device: a loss and a lookup, or two heads with every option."""

    def of(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def whole(*size: int) -> Tensor:
        return of(*size, dtype=torch.int64)

    rows, v, heads = 4096, 100_000, 2 if everything else 1
    items, wide = of(v, d), _tuning.SUMS[dtype]
    parts = (
        [of(rows, d)] * heads, [whole(rows)] * heads, [of(4, rows, dtype=torch.float64)] * heads,
        [of(v)] * everything, [0, -1] if everything else [-1],
        [1.0, 30.0, 0.5, 0.0] if everything else [1.0, 0.0],
    )  # fmt: skip
    found = (whole(rows), of(rows, d, dtype=wide), items if everything else None)
    tied_table_step_norm(items, *parts, *found)
    kinds = range(5) if d == 64 else (plain.ADAMW,)  # the width of the tutorial
    for kind in kinds:
        rule = (kind, 1, 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.9, 1.0)
        first = of(v, dtype=wide) if kind == plain.ROWWISE_ADAGRAD else of(v, d, dtype=wide)
        second = of(v, dtype=wide) if kind == plain.ROWWISE_ADAMW else of(v, d, dtype=wide)
        second = second if kind in (plain.ADAMW, plain.ROWWISE_ADAMW) else None
        tied_table_step_fwd(items, first, second, *parts, *found, *rule)
        tied_table_step_rows(items, first, second, *found[:2], *rule)
        missed = (of(v, dtype=torch.int32), whole(rows) if everything else None, 0)
        lrs = (of(8, dtype=torch.float64), of(9, dtype=torch.float64))
        tied_table_step_catch_up(items, first, second, *missed, *lrs, *rule)


def variants(arch: int) -> Iterator[Variant]:
    """What the launchers compile on an architecture, by dtype, D and options."""
    for label, dtype, d, everything in _tuning.cases():
        yield from _tuning.recorded(arch, label, functools.partial(_case, dtype, d, everything))

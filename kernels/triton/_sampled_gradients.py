"""Item gradients of sampled_softmax_loss, as sums over sorted entries.

An entry is a candidate of a set, a draw of a row, or a row's target. Entries are sorted by item, so
that an item's gradient is one sum in a fixed order, written once. How many items have a gradient is
known only to the device: outputs have a place per entry, and those past the last item hold the last
item's id and zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels._draws import float64_of
from t4r_fast.kernels._sampled import (
    CONSTANT,
    OFFSET,
    candidate_logits,
    gathered,
    offsets,
    split_float64,
)
from t4r_fast.kernels._scores import load_rows

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sampled_softmax_loss_bwd_kernel(
    hidden_ptr,
    items_ptr,
    source_ptr,
    wanted_ptr,
    ids_ptr,
    high_ptr,
    low_ptr,
    hit_high_ptr,
    hit_low_ptr,
    lse_high_ptr,
    lse_low_ptr,
    scaled_ptr,
    partial_ptr,
    dbias_ptr,
    M,
    K,
    total,
    tiles,
    set_rows,
    part_rows,
    temperature,
    hit_value,
    stride_hidden,
    stride_items,
    D: tl.constexpr,
    HIT: tl.constexpr,
    SUM: tl.constexpr,
    DOT: tl.constexpr,
    DZ: tl.constexpr,
    PRECISION: tl.constexpr,
    DZ_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dz.T @ hidden of a tile of a set's candidates and a part of the set's rows.

    source  (M,) row of hidden, -1 where an entry takes no part
    scaled  (M,) d loss / temperature
    """
    set_ = tl.program_id(0) // tiles
    k = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    column = tl.program_id(2) * BLOCK_D
    there = k < K
    at = set_.to(tl.int64) * K + k
    ids = tl.load(ids_ptr + at, mask=there, other=0)
    high = tl.load(high_ptr + at, mask=there, other=float("inf"))
    low = tl.load(low_ptr + at, mask=there, other=0.0)
    hit_high, hit_low = high, low
    if HIT == OFFSET:
        hit_high = tl.load(hit_high_ptr + at, mask=there, other=float("inf"))
        hit_low = tl.load(hit_low_ptr + at, mask=there, other=0.0)
    scale = (1.0 / float64_of(temperature)).to(SUM)
    constant = float64_of(hit_value).to(SUM)
    items = load_rows(items_ptr, ids, there, stride_items, 0, D, BLOCK_D)
    gradient = tl.zeros((BLOCK_K, BLOCK_D), SUM)
    dbias = tl.zeros((BLOCK_K,), SUM)
    first = set_.to(tl.int64) * set_rows + tl.program_id(1) * part_rows
    last = tl.minimum(tl.minimum(first + part_rows, (set_.to(tl.int64) + 1) * set_rows), M)
    for step in range(0, tl.maximum(last - first, 0).to(tl.int32), BLOCK_N):
        entry = first + step + tl.arange(0, BLOCK_N)
        source = tl.load(source_ptr + entry, mask=entry < last, other=-1)
        kept = source >= 0
        hidden = load_rows(hidden_ptr, source, kept, stride_hidden, 0, D, BLOCK_D)
        product = tl.dot(
            items.to(DOT), tl.trans(hidden.to(DOT)), input_precision=PRECISION, out_dtype=SUM
        )
        if D > BLOCK_D:
            for d in range(BLOCK_D, D, BLOCK_D):
                part = load_rows(items_ptr, ids, there, stride_items, d, D, BLOCK_D)
                hidden = load_rows(hidden_ptr, source, kept, stride_hidden, d, D, BLOCK_D)
                product = tl.dot(
                    part.to(DOT), tl.trans(hidden.to(DOT)), product,
                    input_precision=PRECISION, out_dtype=SUM,
                )  # fmt: skip
            hidden = load_rows(hidden_ptr, source, kept, stride_hidden, column, D, BLOCK_D)
        wanted = tl.load(wanted_ptr + entry, mask=kept, other=-1)
        hit = (ids[:, None] == wanted[None, :]) & (high < float("inf"))[:, None]
        z = candidate_logits(
            product, high[:, None], low[:, None], hit_high[:, None], hit_low[:, None], hit,
            scale[:, None], constant[:, None], HIT,
        )  # fmt: skip
        lse_high = tl.load(lse_high_ptr + entry, mask=kept, other=0.0)
        lse_low = tl.load(lse_low_ptr + entry, mask=kept, other=0.0)
        weight = tl.load(scaled_ptr + entry, mask=kept, other=0.0)
        dz = tl.exp2((z - lse_high[None, :] - lse_low[None, :]) * _LOG2E) * weight[None, :]
        if HIT == CONSTANT:
            dz = tl.where(hit, 0.0, dz)
        dz = tl.where(kept[None, :], dz, 0.0)
        dbias += tl.sum(dz, 1)
        gradient = tl.dot(
            dz.to(DZ), hidden.to(DOT).to(DZ), gradient,
            input_precision=DZ_PRECISION, out_dtype=SUM,
        )  # fmt: skip
    out = tl.program_id(1).to(tl.int64) * total + at
    d = column + tl.arange(0, BLOCK_D)
    mask = there[:, None] & (d < D)[None, :]
    tl.store(partial_ptr + out[:, None] * D + d[None, :], gradient, mask=mask)
    if column == 0:
        tl.store(dbias_ptr + out, dbias, mask=there)


@triton.jit
def _store_sums(
    out_ptr, dout_bias_ptr, head, filled, inside, item, column, sums, of_bias,
    D: tl.constexpr, DENSE: tl.constexpr, BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = column + tl.arange(0, BLOCK_D)
    if DENSE:
        row, mask = item, filled
    else:
        row, mask = head, inside
    tl.store(
        out_ptr + row[:, None] * D + d[None, :],
        sums.to(out_ptr.dtype.element_ty),
        mask=mask[:, None] & (d < D)[None, :],
    )
    if BIAS and column == 0:
        tl.store(dout_bias_ptr + row, of_bias.to(dout_bias_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _entry_sums_kernel(
    order_ptr,
    starts_ptr,
    sorted_ptr,
    partial_ptr,
    dbias_ptr,
    matrix_ptr,
    source_ptr,
    weight_ptr,
    out_ptr,
    out_bias_ptr,
    heads,
    total,
    parts,
    stride_matrix,
    D: tl.constexpr,
    DENSE: tl.constexpr,
    BIAS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of the entries of some items: candidates, then weight * a row of matrix.

    order, sorted  entries by item, and their items; starts  (heads + 1,) where items begin
    partial        (parts, total, D), dbias (parts, total): the candidates, entries 0 to total - 1
    source         row of matrix of the other entries; None: entry i has row i - total
    """
    head = tl.program_id(0).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.program_id(1) * BLOCK_D
    inside = head < heads
    begin = tl.load(starts_ptr + head, mask=inside, other=0)
    end = tl.load(starts_ptr + head + 1, mask=inside, other=0)
    filled = begin < end
    most = tl.max(end - begin, 0).to(tl.int32)
    sums = tl.zeros((BLOCK_H, BLOCK_D), SUM)
    of_bias = tl.zeros((BLOCK_H,), SUM)
    if most == 0:  # most places are past the last item
        _store_sums(
            out_ptr, out_bias_ptr, head, filled, inside, head, column, sums, of_bias,
            D, DENSE, BIAS, BLOCK_D,
        )  # fmt: skip
        return
    for step in range(0, most, BLOCK_E):
        at = begin[:, None] + step + tl.arange(0, BLOCK_E)[None, :]
        there = at < end[:, None]
        entry = tl.load(order_ptr + at, mask=there, other=0)
        if partial_ptr is not None:
            candidate = there & (entry < total)
            row = entry
            for _ in range(0, parts):
                sums += tl.sum(gathered(partial_ptr, row, candidate, D, column, D, SUM, BLOCK_D), 1)
                if BIAS:
                    of_bias += tl.sum(tl.load(dbias_ptr + row, mask=candidate, other=0.0), 1)
                row += total
        there = there & (entry >= total)
        row = entry - total
        weight = tl.load(weight_ptr + row, mask=there, other=0.0)
        if source_ptr is not None:
            row = tl.load(source_ptr + row, mask=there, other=0)
        found = gathered(matrix_ptr, row, there, stride_matrix, column, D, SUM, BLOCK_D)
        sums += tl.sum(weight[:, :, None] * found, 1)
        if BIAS:
            of_bias += tl.sum(weight, 1)
    item = tl.load(sorted_ptr + begin, mask=filled, other=0)
    _store_sums(
        out_ptr, out_bias_ptr, head, filled, inside, item, column, sums, of_bias,
        D, DENSE, BIAS, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _draw_sums_kernel(
    order_ptr,
    starts_ptr,
    sorted_ptr,
    hidden_ptr,
    items_ptr,
    source_ptr,
    wanted_ptr,
    weight_ptr,
    lse_high_ptr,
    lse_low_ptr,
    scaled_ptr,
    bias_ptr,
    cumulative_ptr,
    out_ptr,
    out_bias_ptr,
    heads,
    total,
    K,
    V,
    low,
    log_size,
    log_count,
    log_range,
    temperature,
    stride_hidden,
    stride_items,
    stride_bias,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAMPLER: tl.constexpr,
    KIND: tl.constexpr,
    TARGET_KIND: tl.constexpr,
    HIT: tl.constexpr,
    DENSE: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums of the entries of some items where every row has its own draws.

    Entries 0 to total - 1 are draws, K to a row, whose logits are computed again; the others are
    the rows' targets, with their weights.
    """
    head = tl.program_id(0).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.program_id(1) * BLOCK_D
    inside = head < heads
    begin = tl.load(starts_ptr + head, mask=inside, other=0)
    end = tl.load(starts_ptr + head + 1, mask=inside, other=0)
    filled = begin < end
    most = tl.max(end - begin, 0).to(tl.int32)
    sums = tl.zeros((BLOCK_H, BLOCK_D), SUM)
    of_bias = tl.zeros((BLOCK_H,), SUM)
    if most == 0:  # most places are past the last item
        _store_sums(
            out_ptr, out_bias_ptr, head, filled, inside, head, column, sums, of_bias,
            D, DENSE, HAS_BIAS, BLOCK_D,
        )  # fmt: skip
        return
    item = tl.load(sorted_ptr + begin, mask=filled, other=0)
    scale = (1.0 / float64_of(temperature)).to(SUM)
    offset = offsets(
        item, filled, bias_ptr, cumulative_ptr, V, low, log_size, log_count, log_range,
        temperature, stride_bias, HAS_BIAS, SAMPLER, KIND,
    )[:, None]  # fmt: skip
    high, low_ = split_float64(offset, SUM)
    hit_high, hit_low = high, low_
    if HIT == OFFSET:
        offset = offsets(
            item, filled, bias_ptr, cumulative_ptr, V, low, log_size, log_count, log_range,
            temperature, stride_bias, HAS_BIAS, SAMPLER, TARGET_KIND,
        )[:, None]  # fmt: skip
        hit_high, hit_low = split_float64(offset, SUM)
    for step in range(0, most, BLOCK_E):
        at = begin[:, None] + step + tl.arange(0, BLOCK_E)[None, :]
        there = at < end[:, None]
        entry = tl.load(order_ptr + at, mask=there, other=0)
        drawn = entry < total
        row = tl.where(drawn, entry // K, entry - total)
        source = tl.load(source_ptr + row, mask=there, other=-1)
        there = there & (source >= 0)
        hidden = gathered(hidden_ptr, source, there, stride_hidden, 0, D, SUM, BLOCK_D)
        vector = load_rows(items_ptr, item, filled, stride_items, 0, D, BLOCK_D).to(SUM)
        product = tl.sum(hidden * vector[:, None, :], 2)
        if D > BLOCK_D:
            for d in range(BLOCK_D, D, BLOCK_D):
                hidden = gathered(hidden_ptr, source, there, stride_hidden, d, D, SUM, BLOCK_D)
                vector = load_rows(items_ptr, item, filled, stride_items, d, D, BLOCK_D).to(SUM)
                product += tl.sum(hidden * vector[:, None, :], 2)
            hidden = gathered(hidden_ptr, source, there, stride_hidden, column, D, SUM, BLOCK_D)
        hit = tl.load(wanted_ptr + row, mask=there, other=-1) == item[:, None]
        z = candidate_logits(
            product, high, low_, hit_high, hit_low, hit, scale[:, None], 0.0, HIT
        )  # fmt: skip
        lse_high = tl.load(lse_high_ptr + row, mask=there, other=0.0)
        lse_low = tl.load(lse_low_ptr + row, mask=there, other=0.0)
        scaled = tl.load(scaled_ptr + row, mask=there, other=0.0)
        weight = tl.load(weight_ptr + row, mask=there & ~drawn, other=0.0)
        dz = tl.where(drawn, tl.exp2((z - lse_high - lse_low) * _LOG2E) * scaled, weight)
        dz = tl.where(there, dz, 0.0)
        sums += tl.sum(dz[:, :, None] * hidden, 1)
        of_bias += tl.sum(dz, 1)
    _store_sums(
        out_ptr, out_bias_ptr, head, filled, inside, item, column, sums, of_bias,
        D, DENSE, HAS_BIAS, BLOCK_D,
    )  # fmt: skip


class Segments(NamedTuple):
    """Entries by item, and R places for the different items: one per entry or one per item."""

    order: Tensor  # (E,) entries
    items: Tensor  # (E,) their items, rising; those that take no part last
    starts: Tensor  # (R + 1,) where each item begins; the end of all past the last
    ids: Tensor  # (R,) the different items, the last one again past the last


def segments(items: Tensor, count: int) -> Segments:
    """Sort entries by item; an item of `count` marks an entry that takes no part. No host sync."""
    places = min(items.shape[0], count)
    items, order = torch.sort(items, stable=True)
    valid = items < count
    new = valid.clone()
    new[1:] &= items[1:] != items[:-1]
    numbers = torch.cumsum(new, 0)
    wanted = torch.arange(1, places + 2, device=items.device)
    starts = torch.minimum(torch.searchsorted(numbers, wanted), valid.sum())
    last = (valid.sum() - 1).clamp(min=0)
    ids = items[torch.minimum(starts[:-1], last)].clamp(max=count - 1)
    return Segments(order, items, starts, ids)

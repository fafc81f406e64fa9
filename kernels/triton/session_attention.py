"""session_attention: tiles of a session's queries walk over its items with a running maximum.

Grids are made of shapes alone; no launcher reads a number of the device. Programs of a session take
its tiles in turn, so that one longer than expected is slower and nothing else. Backward makes the
scores again: for queries, for items, and for sums over sessions (position keys and biases). A
kernel for all three would need more registers than a thread has. Sums over sessions are kept apart
for groups of sessions, a number of them that no GPU decides, and added in order: no atomics, the
same bits every time. Queries of a list are put in the order of their items for dk and dv.
Source: Dao, "FlashAttention-2", arXiv 2307.08691.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._draws import bits, float64_of
from t4r_fast.kernels._dropout import dropout_arguments, site_key
from t4r_fast.kernels._scores import load_rows
from t4r_fast.kernels._session_tiles import (
    by_place,
    drawn,
    load_keys,
    load_queries,
    product,
    products_of_rows,
    queries_of,
    scores,
)
from t4r_fast.kernels._tuning import SUMS, Config, Variant, config, launch, sum_type


@triton.jit
def _session_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    offsets_ptr,
    rows_ptr,
    keys_ptr,
    key_bias_ptr,
    position_bias_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    B,
    U,
    M,
    halvings,
    site: tl.int64,
    least: tl.int64,
    scale: tl.int64,  # bits of 1 / (1 - dropout), and of the scores' factor
    score_scale: tl.int64,
    stride_offsets,
    stride_rows,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    H: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DRAWS: tl.constexpr,
    SUM: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(1)
    local = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    score_factor = float64_of(score_scale).to(SUM)
    q_ptr += head * stride_qh
    k_ptr += head * stride_kh
    v_ptr += head * stride_vh
    if RELATIVE:
        keys_ptr += head * D
        key_bias_ptr += head * D
        position_bias_ptr += head * D
    if DRAWS:
        key = site_key(seed_ptr, site)
        factor = float64_of(scale).to(SUM)
    session, start, length, source, place, count = queries_of(
        tl.program_id(0).to(tl.int64),
        offsets_ptr, rows_ptr, B, U, halvings, stride_offsets, stride_rows, HAS_ROWS,
    )  # fmt: skip
    for tile in range(tl.program_id(2), tl.cdiv(count, BLOCK), tl.num_programs(2)):
        query = source + tile * BLOCK + local
        here = place + tile * BLOCK
        live = local < count - tile * BLOCK
        asks = local < tl.where(length > 0, count - tile * BLOCK, 0)
        most = tl.full((BLOCK,), -float("inf"), SUM)
        total = tl.zeros((BLOCK,), SUM)
        out = tl.zeros((BLOCK, BLOCK_D), SUM)
        stop = length
        if CAUSAL:
            stop = tl.minimum(length, here + BLOCK)
        for first in range(0, stop, BLOCK):
            inside = first + local < length
            item = start + first + local
            s = scores(
                q_ptr, k_ptr, keys_ptr, key_bias_ptr, position_bias_ptr,
                query, asks, item, inside, here, first, length, M, score_factor, stride_q, stride_k,
                H, D, CAUSAL, RELATIVE, SUM, DOT, PRECISION, INTERPRETED, BLOCK, BLOCK_C,
            )  # fmt: skip
            # an item is seen in the first tile already, so `higher` is a number
            higher = tl.maximum(most, tl.max(s, 1))
            shrink = tl.exp(most - higher)
            p = tl.exp(s - higher[:, None])
            total = total * shrink + tl.sum(p, 1)
            if DRAWS:
                stay = drawn(key, session, here, head, first, least, BLOCK)
                p = tl.where(stay, p * factor, 0.0)
            v = load_rows(v_ptr, item, inside, stride_v, 0, D, BLOCK_D)
            out = out * shrink[:, None] + product(p, v, SUM, DOT, PRECISION, INTERPRETED)
            most = higher
        seen = length > 0
        total = tl.where(seen, total, 1.0)
        lse = tl.where(seen, most + tl.log(total), 0.0)
        tl.store(lse_ptr + query * H + head, lse, mask=live)
        tl.store(
            out_ptr + (query[:, None] * H + head) * D + d[None, :],
            (out / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=live[:, None] & (d < D)[None, :],
        )


@triton.jit
def _session_attention_queries_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    offsets_ptr,
    rows_ptr,
    keys_ptr,
    key_bias_ptr,
    position_bias_ptr,
    seed_ptr,
    lse_ptr,
    dq_ptr,
    shares_ptr,
    deltas_ptr,
    B,
    U,
    M,
    halvings,
    site: tl.int64,
    least: tl.int64,
    scale: tl.int64,
    score_scale: tl.int64,
    stride_offsets,
    stride_rows,
    stride_dout,
    stride_douth,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    H: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DRAWS: tl.constexpr,
    SUM: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq, and for the other kernels 1 / sum(p) and sum(p * dp)."""
    head = tl.program_id(1)
    local = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    in_width = (d < D)[None, :]
    score_factor = float64_of(score_scale).to(SUM)
    q_ptr += head * stride_qh
    k_ptr += head * stride_kh
    dout_ptr += head * stride_douth
    v_ptr += head * stride_vh
    if RELATIVE:
        keys_ptr += head * D
        key_bias_ptr += head * D
        position_bias_ptr += head * D
    if DRAWS:
        key = site_key(seed_ptr, site)
        factor = float64_of(scale).to(SUM)
    session, start, length, source, place, count = queries_of(
        tl.program_id(0).to(tl.int64),
        offsets_ptr, rows_ptr, B, U, halvings, stride_offsets, stride_rows, HAS_ROWS,
    )  # fmt: skip
    for tile in range(tl.program_id(2), tl.cdiv(count, BLOCK), tl.num_programs(2)):
        query = source + tile * BLOCK + local
        here = place + tile * BLOCK
        live = local < count - tile * BLOCK
        asks = local < tl.where(length > 0, count - tile * BLOCK, 0)
        lse = tl.load(lse_ptr + query * H + head, mask=asks, other=0.0)
        stop = length
        if CAUSAL:
            stop = tl.minimum(length, here + BLOCK)

        total = tl.zeros((BLOCK,), SUM)
        delta = tl.zeros((BLOCK,), SUM)
        for first in range(0, stop, BLOCK):
            inside = first + local < length
            item = start + first + local
            s = scores(
                q_ptr, k_ptr, keys_ptr, key_bias_ptr, position_bias_ptr,
                query, asks, item, inside, here, first, length, M, score_factor,
                stride_q, stride_k, H, D, CAUSAL, RELATIVE,
                SUM, DOT, PRECISION, INTERPRETED, BLOCK, BLOCK_C,
            )  # fmt: skip
            dp = products_of_rows(
                dout_ptr, v_ptr, query, asks, item, inside, stride_dout, stride_v,
                D, SUM, DOT, PRECISION, INTERPRETED, BLOCK, BLOCK_C,
            )  # fmt: skip
            if DRAWS:
                stay = drawn(key, session, here, head, first, least, BLOCK)
                dp = tl.where(stay, dp * factor, 0.0)
            p = tl.exp(s - lse[:, None])
            total += tl.sum(p, 1)
            delta += tl.sum(p * dp, 1)
        # The last bit of lse is in all of a row's, and out @ dout is a sum of rounded numbers:
        # with both made again here, the only item of a session has no gradient left over.
        share = 1.0 / tl.where(asks, total, 1.0)
        delta = delta * share
        tl.store(shares_ptr + query * H + head, share, mask=asks)
        tl.store(deltas_ptr + query * H + head, delta, mask=asks)

        dq = tl.zeros((BLOCK, BLOCK_D), SUM)
        for first in range(0, stop, BLOCK):
            inside = first + local < length
            item = start + first + local
            s = scores(
                q_ptr, k_ptr, keys_ptr, key_bias_ptr, position_bias_ptr,
                query, asks, item, inside, here, first, length, M, score_factor,
                stride_q, stride_k, H, D, CAUSAL, RELATIVE,
                SUM, DOT, PRECISION, INTERPRETED, BLOCK, BLOCK_C,
            )  # fmt: skip
            dp = products_of_rows(
                dout_ptr, v_ptr, query, asks, item, inside, stride_dout, stride_v,
                D, SUM, DOT, PRECISION, INTERPRETED, BLOCK, BLOCK_C,
            )  # fmt: skip
            if DRAWS:
                stay = drawn(key, session, here, head, first, least, BLOCK)
                dp = tl.where(stay, dp * factor, 0.0)
            ds = tl.exp(s - lse[:, None]) * share[:, None] * (dp - delta[:, None])
            ds = ds * score_factor
            k = load_rows(k_ptr, item, inside, stride_k, 0, D, BLOCK_D)
            dq += product(ds, k, SUM, DOT, PRECISION, INTERPRETED)
            if RELATIVE:
                moved = by_place(ds, BLOCK)
                keys = load_keys(keys_ptr, first - here, M, 0, H, D, BLOCK, BLOCK_D)
                dq += product(moved, keys, SUM, DOT, PRECISION, INTERPRETED)
        tl.store(
            dq_ptr + (query[:, None] * H + head) * D + d[None, :],
            dq.to(dq_ptr.dtype.element_ty),
            mask=live[:, None] & in_width,
        )


@triton.jit
def _session_attention_places_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    offsets_ptr,
    rows_ptr,
    keys_ptr,
    key_bias_ptr,
    position_bias_ptr,
    seed_ptr,
    lse_ptr,
    shares_ptr,
    deltas_ptr,
    sums_ptr,
    units,
    each,  # units of a program
    B,
    U,
    M,
    halvings,
    site: tl.int64,
    least: tl.int64,
    scale: tl.int64,
    score_scale: tl.int64,
    stride_offsets,
    stride_rows,
    stride_dout,
    stride_douth,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    H: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DRAWS: tl.constexpr,
    SUM: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A group's sums for the position keys and the two biases."""
    head = tl.program_id(1)
    local = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    in_width = (d < D)[None, :]
    score_factor = float64_of(score_scale).to(SUM)
    q_ptr += head * stride_qh
    k_ptr += head * stride_kh
    dout_ptr += head * stride_douth
    v_ptr += head * stride_vh
    keys_ptr += head * D
    key_bias_ptr += head * D
    position_bias_ptr += head * D
    group = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    sums_ptr += (group * (2 * M + 2) * H + head) * D
    dkey_bias = tl.zeros((BLOCK, BLOCK_D), SUM)
    dposition_bias = tl.zeros((2 * BLOCK, BLOCK_D), SUM)
    if DRAWS:
        key = site_key(seed_ptr, site)
        factor = float64_of(scale).to(SUM)
    unit = tl.program_id(0).to(tl.int64) * each
    for number in range(0, tl.minimum(each, units - unit).to(tl.int32)):
        session, start, length, source, place, count = queries_of(
            unit + number,
            offsets_ptr, rows_ptr, B, U, halvings, stride_offsets, stride_rows, HAS_ROWS,
        )  # fmt: skip
        count = tl.where(length > 0, count, 0)
        for tile in range(tl.program_id(2), tl.cdiv(count, BLOCK), tl.num_programs(2)):
            query = source + tile * BLOCK + local
            here = place + tile * BLOCK
            asks = local < count - tile * BLOCK
            lse = tl.load(lse_ptr + query * H + head, mask=asks, other=0.0)
            share = tl.load(shares_ptr + query * H + head, mask=asks, other=0.0)
            delta = tl.load(deltas_ptr + query * H + head, mask=asks, other=0.0)
            stop = length
            if CAUSAL:
                stop = tl.minimum(length, here + BLOCK)
            for first in range(0, stop, BLOCK):
                inside = first + local < length
                item = start + first + local
                s = scores(
                    q_ptr, k_ptr, keys_ptr, key_bias_ptr, position_bias_ptr,
                    query, asks, item, inside, here, first, length, M, score_factor,
                    stride_q, stride_k, H, D, CAUSAL, True,
                    SUM, DOT, PRECISION, INTERPRETED, BLOCK, BLOCK_C,
                )  # fmt: skip
                dp = products_of_rows(
                    dout_ptr, v_ptr, query, asks, item, inside, stride_dout, stride_v,
                    D, SUM, DOT, PRECISION, INTERPRETED, BLOCK, BLOCK_C,
                )  # fmt: skip
                if DRAWS:
                    stay = drawn(key, session, here, head, first, least, BLOCK)
                    dp = tl.where(stay, dp * factor, 0.0)
                ds = tl.exp(s - lse[:, None]) * share[:, None] * (dp - delta[:, None])
                ds = ds * score_factor
                k = load_rows(k_ptr, item, inside, stride_k, 0, D, BLOCK_D)
                dkey_bias += tl.sum(ds, 0)[:, None] * k.to(SUM)
                moved = by_place(ds, BLOCK)
                keys = load_keys(keys_ptr, first - here, M, 0, H, D, BLOCK, BLOCK_D)
                dposition_bias += tl.sum(moved, 0)[:, None] * keys.to(SUM)
                q = load_queries(
                    q_ptr, position_bias_ptr, query, asks, stride_q, 0, D, SUM, True, BLOCK_D
                )
                dkeys = product(tl.trans(moved), q, SUM, DOT, PRECISION, INTERPRETED)
                at = M - BLOCK + first - here + tl.arange(0, 2 * BLOCK)
                to = sums_ptr + at.to(tl.int64)[:, None] * (H * D) + d[None, :]
                mask = ((at >= 0) & (at < 2 * M))[:, None] & in_width
                # Other threads may have written these rows, of the tile before.
                tl.debug_barrier()
                tl.store(to, tl.load(to, mask=mask, other=0.0) + dkeys, mask=mask)
    to = sums_ptr + (2 * M) * H * D + d
    tl.store(to, tl.sum(dkey_bias, 0), mask=d < D)
    tl.store(to + H * D, tl.sum(dposition_bias, 0), mask=d < D)


@triton.jit
def _session_attention_items_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    offsets_ptr,
    rows_ptr,
    order_ptr,
    begins_ptr,
    keys_ptr,
    key_bias_ptr,
    position_bias_ptr,
    seed_ptr,
    lse_ptr,
    shares_ptr,
    deltas_ptr,
    dk_ptr,
    dv_ptr,
    B,
    U,
    M,
    halvings,
    site: tl.int64,
    least: tl.int64,
    scale: tl.int64,
    score_scale: tl.int64,
    stride_offsets,
    stride_rows,
    stride_dout,
    stride_douth,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_v,
    stride_vh,
    H: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    RELATIVE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DRAWS: tl.constexpr,
    SUM: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk and dv of a session's items; queries of a list in the order of their items."""
    head = tl.program_id(1)
    local = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    score_factor = float64_of(score_scale).to(SUM)
    q_ptr += head * stride_qh
    k_ptr += head * stride_kh
    dout_ptr += head * stride_douth
    v_ptr += head * stride_vh
    if RELATIVE:
        keys_ptr += head * D
        key_bias_ptr += head * D
        position_bias_ptr += head * D
    if DRAWS:
        key = site_key(seed_ptr, site)
        factor = float64_of(scale).to(SUM)
    # all items of session number program_id(0)
    session, start, length, _, _, count = queries_of(
        tl.program_id(0).to(tl.int64),
        offsets_ptr, rows_ptr, B, U, halvings, stride_offsets, stride_rows, False,
    )  # fmt: skip
    for tile in range(tl.program_id(2), tl.cdiv(count, BLOCK), tl.num_programs(2)):
        first = tile * BLOCK
        item = start + first + local
        written = first + local < count
        inside = first + local < length
        dk = tl.zeros((BLOCK, BLOCK_D), SUM)
        dv = tl.zeros((BLOCK, BLOCK_D), SUM)
        if HAS_ROWS:
            # nothing for what lies behind session B - 1
            begin = tl.load(begins_ptr + session).to(tl.int32)
            stop = tl.load(begins_ptr + tl.minimum(session + 1, B)).to(tl.int32)
            step = 1
        else:
            begin = first * 0
            stop = length
            step = BLOCK
            if CAUSAL:
                begin = first
        for number in range(begin, stop, step):
            if HAS_ROWS:
                source = tl.load(order_ptr + number)
                here = (tl.load(rows_ptr + source * stride_rows) - start).to(tl.int32)
                live = local < 1
            else:
                source = start + number
                here = number
                live = local < length - number
            query = source + local
            lse = tl.load(lse_ptr + query * H + head, mask=live, other=0.0)
            share = tl.load(shares_ptr + query * H + head, mask=live, other=0.0)
            delta = tl.load(deltas_ptr + query * H + head, mask=live, other=0.0)
            s = scores(
                q_ptr, k_ptr, keys_ptr, key_bias_ptr, position_bias_ptr,
                query, live, item, inside, here, first, length, M, score_factor, stride_q, stride_k,
                H, D, CAUSAL, RELATIVE, SUM, DOT, PRECISION, INTERPRETED, BLOCK, BLOCK_C,
            )  # fmt: skip
            dp = products_of_rows(
                dout_ptr, v_ptr, query, live, item, inside, stride_dout, stride_v,
                D, SUM, DOT, PRECISION, INTERPRETED, BLOCK, BLOCK_C,
            )  # fmt: skip
            p = tl.exp(s - lse[:, None]) * share[:, None]
            weight = p
            if DRAWS:
                stay = drawn(key, session, here, head, first, least, BLOCK)
                dp = tl.where(stay, dp * factor, 0.0)
                weight = tl.where(stay, p * factor, 0.0)
            ds = p * (dp - delta[:, None]) * score_factor
            dout = load_rows(dout_ptr, query, live, stride_dout, 0, D, BLOCK_D)
            dv += product(tl.trans(weight), dout, SUM, DOT, PRECISION, INTERPRETED)
            q = load_queries(
                q_ptr, key_bias_ptr, query, live, stride_q, 0, D, SUM, RELATIVE, BLOCK_D
            )
            dk += product(tl.trans(ds), q, SUM, DOT, PRECISION, INTERPRETED)
        at = (item[:, None] * H + head) * D + d[None, :]
        mask = written[:, None] & (d < D)[None, :]
        tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _session_attention_sums_kernel(
    sums_ptr,
    dkeys_ptr,
    dkey_bias_ptr,
    dposition_bias_ptr,
    groups,
    of_keys,  # numbers of dkeys, and of a bias
    of_bias,
    BLOCK: tl.constexpr,
):
    """The sums of groups, added in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = of_keys + 2 * of_bias
    total = tl.zeros((BLOCK,), sums_ptr.dtype.element_ty)
    for _ in range(0, groups):
        total += tl.load(sums_ptr + at, mask=at < count, other=0.0)
        sums_ptr += count
    total = total.to(dkeys_ptr.dtype.element_ty)
    tl.store(dkeys_ptr + at, total, mask=at < of_keys)
    at -= of_keys
    tl.store(dkey_bias_ptr + at, total, mask=(at >= 0) & (at < of_bias))
    at -= of_bias
    tl.store(dposition_bias_ptr + at, total, mask=(at >= 0) & (at < of_bias))


# Programs that share a session at most.
_SPLITS = 8
# Groups whose sums are kept apart: as many as keep a GPU busy with some heads, and no more numbers
# than 16 MiB of float32.
_GROUPS = 128
_GROUP_NUMBERS = 2**22
_SUMS = config(4, 1, BLOCK=128)


def _blocks(dtype: torch.dtype, width: int) -> Config:
    """Tiles of BLOCK queries and BLOCK items; of a head's width BLOCK_C columns at a time.

    Most sessions fit a tile of 16, and one of 32 took twice the registers that a thread has.
    """
    columns = max(triton.next_power_of_2(width), 16)
    wide = dtype == torch.float64
    # one stage: what the places' kernel adds up in memory must not be read ahead of its barrier
    return config(
        *(8 if wide else 4, 1),
        BLOCK=16,
        BLOCK_C=min(columns, 64 if _tuning.interpreted() else 16 if dtype.itemsize == 2 else 32),
        BLOCK_D=columns,
    )


def _unit_width(tensor: Tensor) -> Tensor:
    """The numbers of a head next to each other: a copy if they are not."""
    return tensor if tensor.stride(2) == 1 or tensor.shape[2] == 1 else tensor.contiguous()


class _Call:
    """The arguments that all kernels have, and how they are launched."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        rows: Tensor | None,
        keys: Tensor | None,
        key_bias: Tensor | None,
        position_bias: Tensor | None,
        causal: bool,
        scale: float,
        dropout: float,
        seed: Tensor | None,
        site: int,
    ) -> None:
        self.q, self.k, self.v = (_unit_width(t) for t in (q, k, v))
        self.offsets, self.rows = offsets, rows
        self.relative = [
            t if t is None else t.contiguous() for t in (keys, key_bias, position_bias)
        ]
        self.reach = 0 if keys is None else keys.shape[0] // 2
        self.sessions = offsets.shape[0] - 1
        self.heads, self.width = q.shape[1:]
        self.config = _blocks(q.dtype, self.width)
        self.options = {
            "score_scale": bits(scale),
            "CAUSAL": causal,
            "HAS_ROWS": rows is not None,
            **dropout_arguments(seed if dropout else None, dropout, site),
        }

    @property
    def units(self) -> int:
        """Queries of a list, or sessions and what lies behind them."""
        return self.sessions + 1 if self.rows is None else self.rows.shape[0]

    @property
    def splits(self) -> int:
        """Programs of a session: a program for each tile of one twice as long as the mean."""
        longest = 2 * triton.cdiv(self.k.shape[0], max(self.sessions, 1))
        if self.reach:
            longest = min(longest, self.reach)
        return max(1, min(triton.cdiv(longest, self.config["BLOCK"]), _SPLITS))

    def arguments(self) -> dict[str, Any]:
        q, k, v, rows = self.q, self.k, self.v, self.rows
        keys, key_bias, position_bias = self.relative
        return {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "offsets_ptr": self.offsets,
            "rows_ptr": rows,
            "keys_ptr": keys,
            "key_bias_ptr": key_bias,
            "position_bias_ptr": position_bias,
            "B": self.sessions,
            "U": k.shape[0],
            "M": self.reach,
            "halvings": self.sessions.bit_length(),
            "stride_offsets": self.offsets.stride(0),
            "stride_rows": 0 if rows is None else rows.stride(0),
            "stride_q": q.stride(0),
            "stride_qh": q.stride(1),
            "stride_k": k.stride(0),
            "stride_kh": k.stride(1),
            "stride_v": v.stride(0),
            "stride_vh": v.stride(1),
            "H": self.heads,
            "D": self.width,
            "RELATIVE": keys is not None,
            "SUM": sum_type(q.dtype),
            "DOT": _tuning.dot_type(q.dtype),
            "PRECISION": _tuning.precision(q.dtype),
            "INTERPRETED": _tuning.interpreted(),
            **self.options,
        }


def session_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    keys: Tensor | None,
    key_bias: Tensor | None,
    position_bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    """out (R, H, Dh) and lse (R, H)."""
    call = _Call(
        *(q, k, v, offsets, rows, keys, key_bias, position_bias),
        *(causal, scale, dropout, seed, site),
    )
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=SUMS[q.dtype])
    launch(
        _session_attention_fwd_kernel,
        (call.units, call.heads, 1 if rows is not None else call.splits),
        call.config,
        **call.arguments(),
        out_ptr=out,
        lse_ptr=lse,
    )
    return out, lse


def session_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    keys: Tensor | None,
    key_bias: Tensor | None,
    position_bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dkeys, dkey_bias, dposition_bias; the last three empty without keys."""
    call = _Call(
        *(q, k, v, offsets, rows, keys, key_bias, position_bias),
        *(causal, scale, dropout, seed, site),
    )
    dout = _unit_width(dout)
    dq, dk, dv = (q.new_empty(t.shape) for t in (q, k, v))
    shares, deltas = (torch.empty_like(lse) for _ in range(2))
    splits = 1 if rows is not None else call.splits
    shared = {
        **call.arguments(),
        "dout_ptr": dout,
        "lse_ptr": lse,
        "shares_ptr": shares,
        "deltas_ptr": deltas,
        "stride_dout": dout.stride(0),
        "stride_douth": dout.stride(1),
    }
    launch(
        _session_attention_queries_kernel,
        (call.units, call.heads, splits),
        call.config,
        **shared,
        dq_ptr=dq,
    )
    order = begins = None
    if rows is not None:
        order = torch.argsort(rows, stable=True)
        begins = torch.searchsorted(rows[order], offsets.contiguous())
    launch(
        _session_attention_items_kernel,
        (call.sessions + 1, call.heads, call.splits),
        call.config,
        **shared,
        order_ptr=order,
        begins_ptr=begins,
        dk_ptr=dk,
        dv_ptr=dv,
    )
    if keys is None:
        return dq, dk, dv, *(q.new_empty(0) for _ in range(3))
    numbers = (2 * call.reach + 2) * call.heads * call.width
    most = max(1, min(_GROUPS, _GROUP_NUMBERS // numbers) // splits)
    each = max(1, triton.cdiv(call.units, most))
    groups = max(1, triton.cdiv(call.units, each))  # one of nothing writes zeros
    sums = lse.new_zeros((groups * splits, 2 * call.reach + 2, call.heads, call.width))
    del shared["RELATIVE"]
    launch(
        _session_attention_places_kernel,
        (groups, call.heads, splits),
        call.config,
        **shared,
        sums_ptr=sums,
        units=call.units,
        each=each,
    )
    of_relative = [q.new_empty(t.shape) for t in call.relative if t is not None]
    launch(
        _session_attention_sums_kernel,
        (triton.cdiv(sums[0].numel(), _SUMS["BLOCK"]),),
        _SUMS,
        sums_ptr=sums,
        dkeys_ptr=of_relative[0],
        dkey_bias_ptr=of_relative[1],
        dposition_bias_ptr=of_relative[2],
        groups=groups * splits,
        of_keys=of_relative[0].numel(),
        of_bias=of_relative[1].numel(),
    )
    return dq, dk, dv, *of_relative


def _case(
    dtype: torch.dtype, width: int, relative: bool, causal: bool, rows: bool, drop: bool
) -> None:
    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, items, sessions, reach = 4, 2048, 256, 20
    k = empty(items, heads, width)
    q = empty(512, heads, width) if rows else k
    some = [empty(2 * reach, heads, width), *(empty(heads, width) for _ in range(2))]
    rest = (
        empty(sessions + 1, dtype=torch.int64),
        empty(512, dtype=torch.int64) if rows else None,
        *(some if relative else [None] * 3),
        *(causal, 0.125, 0.3 if drop else 0.0),
        empty(2, dtype=torch.int64) if drop else None,
        0,
    )
    out, lse = session_attention_fwd(q, k, k, *rest)
    session_attention_bwd(out, q, k, k, lse, *rest)


# dtype, width, with "all" options, relative, causal, a list of queries, dropout
_VARIANTS = (
    (torch.bfloat16, 48, True, True, False, True, True),
    (torch.bfloat16, 64, False, True, False, False, True),
    (torch.float32, 48, True, True, False, True, True),
    (torch.float32, 64, False, False, True, False, False),
)


def variants(arch: int) -> Iterator[Variant]:
    """What the launchers compile on an architecture, of a few models: XLNet's attention in
    training, its last layer's on a list of queries, and causal attention without dropout."""
    for dtype, width, everything, *options in _VARIANTS:
        label = f"{_tuning.TYPE_NAMES[dtype]} D{width}{' all' if everything else ''}"
        yield from _tuning.recorded(arch, label, functools.partial(_case, dtype, width, *options))

"""Tiles of attention inside sessions: BLOCK queries of one session for BLOCK of its items.

Tiles of items begin at the session's first, so that a query has the same sums wherever its session
stands in a batch. Queries of a list come one to a tile, the first of its rows: the list may have
any order, and the instructions are those of a query among others, so the bits are too.

The position term takes no shifted copy: rows M - (i - j) of a tile are 2 * BLOCK - 1 rows next to
each other, and what a query takes of its products with them is gathered inside the tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from t4r_fast.kernels._dropout import stays
from t4r_fast.kernels._scores import load_rows


@triton.jit
def product(
    a, b, SUM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr
):
    """a @ b. Interpreted in float64 and rounded once, for the reason that _scores.py gives."""
    a, b = a.to(DOT), b.to(DOT)
    if INTERPRETED:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(SUM)
    else:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=SUM)


@triton.jit
def session_of(item, offsets_ptr, B, halvings, stride_offsets):
    """The session of an item below offsets[B]: the last that begins at or before it."""
    low = item * 0
    high = low + B
    for _ in range(0, halvings):
        middle = (low + high) // 2
        open_ = high - low > 1
        before = tl.load(offsets_ptr + middle * stride_offsets) <= item
        high = tl.where(open_ & (before == 0), middle, high)
        low = tl.where(open_ & before, middle, low)
    return low


@triton.jit
def queries_of(
    unit,
    offsets_ptr,
    rows_ptr,
    B,
    U,
    halvings,
    stride_offsets,
    stride_rows,
    HAS_ROWS: tl.constexpr,
):
    """Where the queries of a unit stand: an entry of rows, or session number `unit`.

    Session B is what lies behind the sessions: its queries see no items, so they are written as 0.

    session  its number
    start    its first item
    length   how many of its items are seen
    source   the unit's first row of q
    place    of that query in the session
    count    queries
    """
    if HAS_ROWS:
        item = tl.load(rows_ptr + unit * stride_rows)
        there = (item >= 0) & (item < tl.load(offsets_ptr + B * stride_offsets))
        session = session_of(tl.where(there, item, 0), offsets_ptr, B, halvings, stride_offsets)
        start = tl.load(offsets_ptr + session * stride_offsets)
        end = tl.load(offsets_ptr + tl.minimum(session + 1, B) * stride_offsets)
        length = tl.where(there, end - start, 0).to(tl.int32)
        place = tl.where(there, item - start, 0).to(tl.int32)
        source = unit
        count = place * 0 + 1
    else:
        session = unit
        start = tl.load(offsets_ptr + session * stride_offsets)
        end = tl.load(offsets_ptr + tl.minimum(session + 1, B) * stride_offsets)
        count = (tl.where(session < B, end, U) - start).to(tl.int32)
        length = tl.where(session < B, count, 0)
        source = start
        place = count * 0
    return session, start, length, source, place, count


@triton.jit
def load_queries(
    q_ptr, bias_ptr, query, asks, stride_q, start, D: tl.constexpr, SUM: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns start to start + BLOCK_D of some queries and a bias; 0 for those that do not ask."""
    q = load_rows(q_ptr, query, asks, stride_q, start, D, BLOCK_D).to(SUM)
    if HAS_BIAS:
        d = start + tl.arange(0, BLOCK_D)
        bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(SUM)
        q = tl.where(asks[:, None], q + bias[None, :], 0.0)
    return q


@triton.jit
def load_keys(
    keys_ptr, ahead, M, start, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Position keys of a tile whose items are `ahead` of its queries: (2 * BLOCK, BLOCK_D)."""
    at = (M - BLOCK + ahead + tl.arange(0, 2 * BLOCK)).to(tl.int64)
    return load_rows(keys_ptr, at, (at >= 0) & (at < 2 * M), H * D, start, D, BLOCK_D)


@triton.jit
def products_of_rows(
    a_ptr, b_ptr, rows, kept, items, inside, stride_a, stride_b,
    D: tl.constexpr, SUM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """a[rows] @ b[items].T, BLOCK_C columns at a time."""
    total = tl.zeros((BLOCK, BLOCK), SUM)
    for start in range(0, D, BLOCK_C):
        a = load_rows(a_ptr, rows, kept, stride_a, start, D, BLOCK_C)
        b = load_rows(b_ptr, items, inside, stride_b, start, D, BLOCK_C)
        total += product(a, tl.trans(b), SUM, DOT, PRECISION, INTERPRETED)
    return total


@triton.jit
def scores(
    q_ptr, k_ptr, keys_ptr, key_bias_ptr, position_bias_ptr,
    query, asks, item, inside, here, first, length, M, scale, stride_q, stride_k,
    H: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, RELATIVE: tl.constexpr,
    SUM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Scores of queries, places `here` on, for items, places `first` on; -inf for those not seen.

    Queries are read again for every tile, BLOCK_C columns at a time: kept in registers, and for
    float32 split in parts of tf32, they alone would take all that a thread has.
    """
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    s = tl.zeros((BLOCK, BLOCK), SUM)
    every = tl.zeros((BLOCK, 2 * BLOCK), SUM)
    for start in range(0, D, BLOCK_C):
        q = load_queries(
            q_ptr, key_bias_ptr, query, asks, stride_q, start, D, SUM, RELATIVE, BLOCK_C
        )
        k = load_rows(k_ptr, item, inside, stride_k, start, D, BLOCK_C)
        s += product(q, tl.trans(k), SUM, DOT, PRECISION, INTERPRETED)
        if RELATIVE:
            q = load_queries(
                q_ptr, position_bias_ptr, query, asks, stride_q, start, D, SUM, True, BLOCK_C
            )
            keys = load_keys(keys_ptr, first - here, M, start, H, D, BLOCK, BLOCK_C)
            every += product(q, tl.trans(keys), SUM, DOT, PRECISION, INTERPRETED)
    if RELATIVE:
        s += tl.gather(every, column - row + BLOCK, 1)
    seen = (first + column < length) & (row >= 0)
    if CAUSAL:
        seen = seen & (first + column <= here + row)
    return tl.where(seen, s * scale, -float("inf"))


@triton.jit
def by_place(ds, BLOCK: tl.constexpr):
    """What `scores` gathered, put back: (BLOCK, 2 * BLOCK) from (BLOCK, BLOCK)."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, 2 * BLOCK)[None, :] + row - BLOCK
    inside = (column >= 0) & (column < BLOCK)
    return tl.where(inside, tl.gather(ds, tl.where(inside, column, 0), 1), 0.0)


@triton.jit
def drawn(key, session, here, head, first, least, BLOCK: tl.constexpr):
    """Which probabilities of a tile stay."""
    at = (session << 32) | (here + tl.arange(0, BLOCK)).to(tl.int64)
    return stays(key, at, head, first, least, BLOCK, BLOCK)

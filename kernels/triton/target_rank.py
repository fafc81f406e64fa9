"""target_rank: one pass over the items that counts, per row, those scored above and equal to the
target. Programs take a block of rows and a range of items; their counts are whole numbers, so that
adding them in any order gives the same.

The target's score is the diagonal of a tile whose items are the targets of the block: the product
of the same shape, whose elements all sum in one order. So a target equals itself, and items with
equal vectors tie, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._scores import (
    Problem,
    example,
    kept_entries,
    load_rows,
    tile_scores,
)
from t4r_fast.kernels._tuning import Variant, launch
from torch import Tensor

import triton
import triton.language as tl


@triton.jit
def _target_rank_fwd_kernel(
    hidden_ptr,
    items_ptr,
    target_ptr,
    bias_ptr,
    rows_ptr,
    above_ptr,
    before_ptr,
    after_ptr,
    M,
    N,
    V,
    tiles,  # of items, per program
    ignore_index,
    stride_hidden,
    stride_items,
    stride_target,
    stride_bias,
    stride_rows,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCORE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tl.static_assert(BLOCK_N <= BLOCK_V and BLOCK_V < 1024)
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_V)
    first_entry = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_id = tl.program_id(1).to(tl.int64) * tiles * BLOCK_V

    entry = first_entry + row
    source, kept = kept_entries(rows_ptr, entry, M, N, stride_rows, HAS_ROWS)
    target = tl.load(target_ptr + source * stride_target, mask=kept, other=ignore_index)
    kept = kept & (target != ignore_index)
    # the same targets once more, as a tile of items
    source_of_column, named = kept_entries(
        rows_ptr, first_entry + column, M, N, stride_rows, HAS_ROWS
    )
    targets = tl.load(
        target_ptr + source_of_column * stride_target, mask=named & (column < BLOCK_N), other=-1
    )

    hidden = load_rows(hidden_ptr, source, kept, stride_hidden, 0, D, BLOCK_D)
    z = tile_scores(
        hidden, hidden_ptr, source, kept, items_ptr, targets, (targets >= 0) & (targets < V),
        bias_ptr, stride_hidden, stride_items, stride_bias,
        D, HAS_BIAS, SCORE, DOT, PRECISION, INTERPRETED, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    own = tl.sum(tl.where(row[:, None] == column[None, :], z, 0.0), 1)
    above = tl.zeros((BLOCK_N,), tl.int32)
    before = tl.zeros((BLOCK_N,), tl.int32)
    after = tl.zeros((BLOCK_N,), tl.int32)
    stop = tl.minimum(tl.cdiv(V - first_id, BLOCK_V), tiles).to(tl.int32)
    stop = tl.where(tl.max(kept.to(tl.int32), 0) > 0, stop, 0)
    for tile in range(0, stop):
        start = first_id + tile * BLOCK_V
        ids = start + column
        z = tile_scores(
            hidden, hidden_ptr, source, kept, items_ptr, ids, ids < V,
            bias_ptr, stride_hidden, stride_items, stride_bias,
            D, HAS_BIAS, SCORE, DOT, PRECISION, INTERPRETED, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        # 32 bits from here: the target's place in the tile, and how many items the tile has
        place = tl.minimum(tl.maximum(target - start, -1), BLOCK_V).to(tl.int32)
        left = tl.minimum(V - start, BLOCK_V).to(tl.int32)
        tied = tl.where(column[None, :] < place[:, None], 1 << 10, 1 << 20)
        count = tl.where(z <= own[:, None], tl.where(z == own[:, None], tied, 0), 1)
        other = (column < left)[None, :] & (column[None, :] != place[:, None])
        # three counts below 1024 in one sum
        counts = tl.sum(tl.where(other, count, 0), 1)
        above += counts & 1023
        before += (counts >> 10) & 1023
        after += counts >> 20

    skipped = tl.where(tl.program_id(1) == 0, -1, 0)
    tl.atomic_add(
        above_ptr + entry,
        tl.where(kept, above, skipped).to(tl.int64),
        mask=entry < M,
        sem="relaxed",
    )
    tl.atomic_add(before_ptr + entry, before.to(tl.int64), mask=kept & (before > 0), sem="relaxed")
    tl.atomic_add(after_ptr + entry, after.to(tl.int64), mask=kept & (after > 0), sem="relaxed")


_PROGRAMS = 4  # per processor, so that the last ones to end leave few processors idle


def target_rank_fwd(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """above, tied_before and tied_after, each int64 (N,) or (M,)."""
    problem = Problem(hidden, items, bias, rows)
    above, before, after = (target.new_zeros((problem.entries,)) for _ in range(3))
    chosen = problem.config()
    grid, tiles = problem.grid(chosen, _PROGRAMS)
    launch(
        _target_rank_fwd_kernel,
        grid,
        chosen,
        **problem.arguments(),
        target_ptr=target,
        above_ptr=above,
        before_ptr=before,
        after_ptr=after,
        tiles=tiles,
        ignore_index=ignore_index,
        stride_target=target.stride(0),
    )
    return above, before, after


def variants(arch: int) -> Iterator[Variant]:
    """What target_rank_fwd compiles on an architecture, by dtype, D and options."""
    for label, dtype, width, everything in _tuning.cases():
        arguments = example(dtype, width, everything)
        target = torch.empty(arguments["hidden"].shape[0], dtype=torch.int64, device="meta")
        yield from _tuning.recorded(
            arch,
            label,
            functools.partial(target_rank_fwd, **arguments, target=target, ignore_index=-100),
        )

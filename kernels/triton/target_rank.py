"""target_rank: one pass over the items that counts, per row, those scored above and equal to the
target. Programs take a block of rows and a range of items; their counts are whole numbers, so that
adding them in any order gives the same. For the log-sum-exp the ranges depend on the number of
items alone, and a second kernel merges their sums in order: the bits of a row's do not depend on
the other rows.

The target's score is the diagonal of a tile whose items are the targets of the block: the product
of the same shape, whose elements all sum in one order. So a target equals itself, and items with
equal vectors tie, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._scores import (
    Problem,
    example,
    kept_entries,
    load_rows,
    tile_scores,
)
from t4r_fast.kernels._tuning import Config, Variant, config, launch

# Below every score but -inf and nan: float32's lowest number, also for float64.
LOWEST = tl.constexpr(-3.4028234663852886e38)


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
    score_ptr,
    sums_ptr,
    M,
    N,
    V,
    tiles,  # of items, per program
    ignore_index,
    inverse_temperature: tl.float64,
    stride_hidden,
    stride_items,
    stride_target,
    stride_bias,
    stride_rows,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    NEED_LSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCORE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """sums (2, ranges, M): of each range of items the top and the sum of exp(score - top)."""
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
    if NEED_LSE:
        scale = tl.full((), inverse_temperature, SCORE)
        score = own * scale
        # also where the target has -inf or nan
        top = tl.where(score > LOWEST, score, LOWEST)
        total = tl.zeros((BLOCK_N,), SCORE)
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
        if NEED_LSE:
            z = tl.where((column < left)[None, :], z * scale, -float("inf"))
            higher = tl.maximum(top, tl.max(z, 1))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
            top = higher

    if NEED_LSE:
        slot = tl.program_id(1).to(tl.int64) * M + entry
        tl.store(sums_ptr + slot, top, mask=kept)
        tl.store(sums_ptr + tl.num_programs(1).to(tl.int64) * M + slot, total, mask=kept)
        if tl.program_id(1) == 0:
            tl.store(score_ptr + entry, score, mask=kept)
    skipped = tl.where(tl.program_id(1) == 0, -1, 0)
    tl.atomic_add(
        above_ptr + entry,
        tl.where(kept, above, skipped).to(tl.int64),
        mask=entry < M,
        sem="relaxed",
    )
    tl.atomic_add(before_ptr + entry, before.to(tl.int64), mask=kept & (before > 0), sem="relaxed")
    tl.atomic_add(after_ptr + entry, after.to(tl.int64), mask=kept & (after > 0), sem="relaxed")


@triton.jit
def _target_rank_merge_kernel(
    above_ptr, sums_ptr, lse_ptr, M, ranges, SCORE: tl.constexpr, BLOCK_M: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = entry < M
    kept = kept & (tl.load(above_ptr + entry, mask=kept, other=-1) >= 0)
    top = tl.full((BLOCK_M,), LOWEST, SCORE)
    place = entry
    for _ in range(0, ranges):
        top = tl.maximum(top, tl.load(sums_ptr + place, mask=kept, other=LOWEST))
        place += M
    total = tl.zeros((BLOCK_M,), tl.float64)
    sums = place  # behind all tops
    place = entry
    for _ in range(0, ranges):
        apart = tl.load(sums_ptr + place, mask=kept, other=LOWEST) - top
        share = tl.load(sums_ptr + sums, mask=kept, other=0.0)
        total += share.to(tl.float64) * tl.exp(apart).to(tl.float64)
        place += M
        sums += M
    lse = top.to(tl.float64) + tl.log(total)
    tl.store(lse_ptr + entry, lse.to(SCORE), mask=kept)


_PROGRAMS = 4  # per processor, so that the last ones to end leave few processors idle
# Of the items, for the log-sum-exp: enough for a GPU with one block of rows.
_RANGES = 128
_RANGE_TILES = 16


def target_rank_fwd(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    ignore_index: int,
    need_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """above, tied_before and tied_after, int64, score and lse, each (N,) or (M,)."""
    problem = Problem(hidden, items, bias, rows)
    above, before, after = (target.new_zeros((problem.entries,)) for _ in range(3))
    chosen = problem.config()
    grid, tiles = problem.grid(chosen, _PROGRAMS)
    if need_lse:
        grid, tiles = _ranges(problem, chosen)
    dtype = _tuning.SUMS[hidden.dtype]
    score, lse = (hidden.new_zeros(problem.entries * need_lse, dtype=dtype) for _ in range(2))
    sums = hidden.new_empty((2, grid[1], problem.entries * need_lse), dtype=dtype)
    launch(
        _target_rank_fwd_kernel,
        grid,
        chosen,
        **problem.arguments(),
        target_ptr=target,
        above_ptr=above,
        before_ptr=before,
        after_ptr=after,
        score_ptr=score,
        sums_ptr=sums,
        tiles=tiles,
        ignore_index=ignore_index,
        inverse_temperature=1.0 / temperature,
        stride_target=target.stride(0),
        NEED_LSE=need_lse,
    )
    if need_lse:
        merge = config(4, 1, BLOCK_M=32 if _tuning.interpreted() else 128)
        launch(
            _target_rank_merge_kernel,
            (triton.cdiv(problem.entries, merge["BLOCK_M"]),),
            merge,
            above_ptr=above,
            sums_ptr=sums,
            lse_ptr=lse,
            M=problem.entries,
            ranges=grid[1],
            SCORE=_tuning.sum_type(hidden.dtype),
        )
    return above, before, after, score, lse


def _ranges(problem: Problem, chosen: Config) -> tuple[tuple[int, int], int]:
    """As Problem.grid, but splits of the items that do not depend on the rows."""
    tiles = triton.cdiv(problem.items.shape[0], chosen["BLOCK_V"])
    least = 1 if _tuning.interpreted() else _RANGE_TILES
    each = triton.cdiv(tiles, min(_RANGES, triton.cdiv(tiles, least)))
    return (triton.cdiv(problem.entries, chosen["BLOCK_N"]), triton.cdiv(tiles, each)), each


def _case(**arguments: Tensor | None) -> None:
    """Ranks alone, and with the log-sum-exp."""
    for need_lse in (False, True):
        target_rank_fwd(**arguments, temperature=0.5, ignore_index=-100, need_lse=need_lse)


def variants(arch: int) -> Iterator[Variant]:
    """What target_rank_fwd compiles on an architecture, by dtype, D and options."""
    for label, dtype, width, everything in _tuning.cases():
        arguments = example(dtype, width, everything)
        target = torch.empty(arguments["hidden"].shape[0], dtype=torch.int64, device="meta")
        yield from _tuning.recorded(
            arch, label, functools.partial(_case, **arguments, target=target)
        )

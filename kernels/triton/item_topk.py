"""item_topk: one pass over the items that keeps, per row, a list of scores above a threshold.

Programs take a block of rows and a range of items. A score that beats the row's k-th best of the
last count goes to the end of the row's list; when a list might overflow, the lists of the block are
cut to their k best, which raises the thresholds. So rows are sorted a few times and not once per
tile, and the answer is exact for scores of any order. A second kernel merges the ranges.

List entries are 64-bit keys that sort by score and then by lowest item: the score's 32 bits in an
order of whole numbers, 31 bits of the item's place in the range, inverted, and one that says nan.
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

EMPTY = tl.constexpr(-(2**63))  # below every key
_LARGEST = tl.constexpr(2**63 - 1)
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _ordered(score):
    """Whole numbers in the order of the scores, nan like inf and the zeros alike; is it nan."""
    nan = score != score
    score = tl.where(nan, float("inf"), tl.where(score == 0.0, 0.0, score))
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _LAST), nan


@triton.jit
def _key(ordered, place, nan):
    return (ordered.to(tl.int64) << 32) | ((place ^ _LAST).to(tl.int64) << 1) | nan.to(tl.int64)


@triton.jit
def _place(key):
    return ((key >> 1) & _LAST) ^ _LAST


@triton.jit
def _score(key):
    """The score of a key, inf for nan and -inf for none."""
    ordered = (key >> 32).to(tl.int32)
    score = (ordered ^ ((ordered >> 31) & _LAST)).to(tl.float32, bitcast=True)
    return tl.where(key == EMPTY, -float("inf"), score)


@triton.jit
def _largest(keys, K: tl.constexpr, INTERPRETED: tl.constexpr):
    """The K largest of each row, falling. Keys differ, but for EMPTY."""
    if INTERPRETED:  # tl.topk takes seconds there
        above = tl.sum((keys[:, None, :] > keys[:, :, None]).to(tl.int32), 2)
        at_rank = above[:, :, None] == tl.arange(0, K)[None, None, :]
        return tl.max(tl.where(at_rank, keys[:, :, None], EMPTY), 1)
    return tl.topk(keys, K)


# Not inlined: the loop over the items keeps its pipeline and its registers.
@triton.jit(noinline=True)
def _cut_lists(
    lists_ptr,
    counts_ptr,
    thresholds_ptr,
    first_list,
    rows_ptr,
    exclude_ptr,
    first_entry,
    first_id,
    M,
    N,
    E,
    k,
    stride_rows,
    stride_exclude,
    stride_excluded,
    HAS_ROWS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRETED: tl.constexpr,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Leave the k best of each list, best first, less what is excluded; k <= K."""
    # what other threads of the program wrote
    tl.debug_barrier()
    for start in range(0, BLOCK_N, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        at = tl.arange(0, CAPACITY)
        entry = first_entry + row
        inside = entry < M
        count = tl.load(counts_ptr + first_list + row, mask=inside, other=0)
        list_ptr = lists_ptr + (first_list + row)[:, None] * CAPACITY
        filled = at[None, :] < count[:, None]
        keys = tl.load(list_ptr + at[None, :], mask=filled, other=EMPTY)
        if HAS_EXCLUDE:
            source, kept = kept_entries(rows_ptr, entry, M, N, stride_rows, HAS_ROWS)
            place = _place(keys)
            for e in range(0, E):
                excluded_ptr = exclude_ptr + source * stride_exclude + e * stride_excluded
                excluded = tl.load(excluded_ptr, mask=kept, other=-1) - first_id
                keys = tl.where(place == excluded[:, None], EMPTY, keys)
        best = _largest(keys, K, INTERPRETED)
        rank = tl.arange(0, K)
        kept_key = rank[None, :] < k
        kth = tl.min(tl.where(kept_key, best, _LARGEST), 1)
        count = tl.sum((kept_key & (best != EMPTY)).to(tl.int32), 1)
        tl.debug_barrier()  # everybody has read
        tl.store(list_ptr + rank[None, :], best, mask=inside[:, None])
        tl.store(counts_ptr + first_list + row, count, mask=inside)
        tl.store(thresholds_ptr + first_list + row, _score(kth), mask=inside)
    tl.debug_barrier()


@triton.jit
def _item_topk_fwd_kernel(
    hidden_ptr,
    items_ptr,
    bias_ptr,
    rows_ptr,
    exclude_ptr,
    lists_ptr,
    counts_ptr,
    thresholds_ptr,
    M,
    N,
    V,
    E,
    k,
    tiles,  # of items, per program
    padding,  # an item that no row is given, or -1
    stride_hidden,
    stride_items,
    stride_bias,
    stride_rows,
    stride_exclude,
    stride_excluded,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    SCORE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tl.static_assert(K + BLOCK_V <= CAPACITY)
    row = tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_V)
    first_entry = tl.program_id(0).to(tl.int64) * BLOCK_N
    first_id = tl.program_id(1).to(tl.int64) * tiles * BLOCK_V
    first_list = tl.program_id(1).to(tl.int64) * M + first_entry

    entry = first_entry + row
    inside = entry < M
    source, kept = kept_entries(rows_ptr, entry, M, N, stride_rows, HAS_ROWS)
    hidden = load_rows(hidden_ptr, source, kept, stride_hidden, 0, D, BLOCK_D)
    list_ptr = lists_ptr + (first_list + row)[:, None] * CAPACITY
    count = tl.zeros((BLOCK_N,), tl.int32)
    # a row that is skipped has no score above its threshold
    threshold = tl.where(kept, -float("inf"), float("inf"))
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
        left = tl.minimum(V - start, BLOCK_V).to(tl.int32)
        shut = tl.minimum(tl.maximum(padding - start, -1), BLOCK_V).to(tl.int32)
        open_ = (column < left) & (column != shut)
        # nan is not <= and must not pass a threshold of inf; ids rise, so that a tie is worse
        above = ~(z <= threshold[:, None]) & (threshold[:, None] < float("inf"))
        passes = (above & open_[None, :]).to(tl.int32)
        news = tl.sum(passes, 1)
        if tl.max(news, 0) > 0:
            ordered, nan = _ordered(z)
            key = _key(ordered, (tile * BLOCK_V + column)[None, :], nan)
            at = count[:, None] + tl.cumsum(passes, 1) - 1
            tl.store(list_ptr + at, key, mask=passes > 0)
            count += news
            if tl.max(count, 0) > CAPACITY - BLOCK_V:
                tl.store(counts_ptr + first_list + row, count, mask=inside)
                _cut_lists(
                    lists_ptr, counts_ptr, thresholds_ptr, first_list, rows_ptr, exclude_ptr,
                    first_entry, first_id, M, N, E, k, stride_rows, stride_exclude,
                    stride_excluded, HAS_ROWS, HAS_EXCLUDE, BLOCK_N, BLOCK_R, INTERPRETED, K,
                    CAPACITY,
                )  # fmt: skip
                count = tl.load(counts_ptr + first_list + row, mask=inside, other=0)
                threshold = tl.load(thresholds_ptr + first_list + row, mask=kept, other=0.0)
                threshold = tl.where(kept, threshold, float("inf"))
    tl.store(counts_ptr + first_list + row, count, mask=inside)
    _cut_lists(
        lists_ptr, counts_ptr, thresholds_ptr, first_list, rows_ptr, exclude_ptr,
        first_entry, first_id, M, N, E, k, stride_rows, stride_exclude,
        stride_excluded, HAS_ROWS, HAS_EXCLUDE, BLOCK_N, BLOCK_R, INTERPRETED, K, CAPACITY,
    )  # fmt: skip


@triton.jit
def _item_topk_merge_kernel(
    lists_ptr,
    scores_ptr,
    ids_ptr,
    M,
    k,
    splits,
    split_items,
    temperature,
    INTERPRETED: tl.constexpr,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The k best of the lists of all splits, (splits, M, CAPACITY).

    Lists are sorted and splits are in the order of their items: of equal scores the one that
    stands first has the lowest item.
    """
    entry = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = entry < M
    rank = tl.arange(0, K)
    place = tl.arange(0, BLOCK_S * K)
    best = tl.full((BLOCK_N, K), EMPTY, tl.int64)
    for start in range(0, splits, BLOCK_S):
        split = start + place // K
        at = (split.to(tl.int64)[None, :] * M + entry[:, None]) * CAPACITY + (place % K)[None, :]
        there = inside[:, None] & ((split < splits) & (place % K < k))[None, :]
        keys = tl.load(lists_ptr + at, mask=there, other=EMPTY)
        placed = _key((keys >> 32).to(tl.int32), (start * K + place)[None, :], keys & 1)
        placed = tl.where(keys == EMPTY, EMPTY, placed)
        found = _largest(placed, K, INTERPRETED)
        both = tl.reshape(tl.join(best, found), (BLOCK_N, 2 * K))
        best = _largest(both, K, INTERPRETED)
    there = best != EMPTY
    where_ = _place(best)
    split = where_ // K
    at = (split * M + entry[:, None]) * CAPACITY + where_ % K
    keys = tl.load(lists_ptr + at, mask=there & inside[:, None], other=EMPTY)
    score = tl.where(best & 1 == 1, float("nan"), _score(best))
    ids = tl.where(there, split * split_items + _place(keys), -1)
    divisor = tl.zeros((BLOCK_N, K), tl.float32) + temperature
    out = entry[:, None] * k + rank[None, :]
    mask = inside[:, None] & (rank < k)[None, :]
    tl.store(scores_ptr + out, tl.div_rn(score, divisor), mask=mask)
    tl.store(ids_ptr + out, ids, mask=mask)


# Entries of a list on a GPU: with 64 to come in a tile, the k <= 128 best see 64 to 176 newcomers
# before they are sorted again.
_CAPACITY = 256
_WIDE_ROWS = 64
_WARPS = 8  # of 64 rows: with 4, one tile's scores, keys and places fill the registers
_CUT_ROWS = 8  # whose lists are sorted at once: 2,048 keys, 16 registers of each thread
_PROGRAMS = 2  # per processor; each has a list of 2 KiB per row
_MERGE = config(1, 1, BLOCK_N=1)
_MERGE_KEYS = 512
# in the interpreter the number of calls counts, not their size
_INTERPRETED_MERGE = config(1, 1, BLOCK_N=16)
_INTERPRETED_MERGE_KEYS = 256


def item_topk_fwd(
    hidden: Tensor,
    items: Tensor,
    k: int,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    exclude: Tensor | None,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor]:
    """scores float32 and ids int64, (N, k) or (M, k). Not for float64, whose keys have 96 bits."""
    if hidden.dtype == torch.float64:
        raise TypeError(
            "item_topk: hidden must be float32, float16 or bfloat16 on backend 'triton'; got "
            "torch.float64 (use backend 'plain')"
        )
    problem = Problem(hidden, items, bias, rows)
    entries, interpreted = problem.entries, _tuning.interpreted()
    chosen = problem.config()
    if not interpreted:
        narrow = chosen["BLOCK_N"] < _WIDE_ROWS
        # 2 spill on sm_80, but of 16 columns
        stages = 1 if narrow and chosen["BLOCK_D"] > 16 else chosen.num_stages
        warps = _WARPS // (2 if narrow else 1)
        chosen = Config(chosen.blocks, warps, stages)
    grid, tiles = problem.grid(chosen, _PROGRAMS)
    bucket = max(16, triton.next_power_of_2(k))
    capacity = triton.next_power_of_2(bucket + chosen["BLOCK_V"]) if interpreted else _CAPACITY
    lists = hidden.new_empty((grid[1], entries, capacity), dtype=torch.int64)
    sizes = {"k": k, "M": entries, "K": bucket, "CAPACITY": capacity}
    launch(
        _item_topk_fwd_kernel,
        grid,
        chosen,
        **{**problem.arguments(), **sizes},
        exclude_ptr=exclude,
        lists_ptr=lists,
        counts_ptr=hidden.new_empty((grid[1], entries), dtype=torch.int32),
        thresholds_ptr=hidden.new_empty((grid[1], entries), dtype=torch.float32),
        E=0 if exclude is None else exclude.shape[1],
        tiles=tiles,
        padding=-1 if padding_idx is None else padding_idx,
        stride_exclude=0 if exclude is None else exclude.stride(0),
        stride_excluded=0 if exclude is None else exclude.stride(1),
        HAS_EXCLUDE=exclude is not None,
        BLOCK_R=chosen["BLOCK_N"] if interpreted else _CUT_ROWS,
    )
    scores = hidden.new_empty((entries, k), dtype=torch.float32)
    ids = hidden.new_empty((entries, k), dtype=torch.int64)
    merge = _INTERPRETED_MERGE if interpreted else _MERGE
    keys = _INTERPRETED_MERGE_KEYS if interpreted else _MERGE_KEYS
    launch(
        _item_topk_merge_kernel,
        (triton.cdiv(entries, merge["BLOCK_N"]),),
        merge,
        lists_ptr=lists,
        scores_ptr=scores,
        ids_ptr=ids,
        splits=grid[1],
        split_items=tiles * chosen["BLOCK_V"],
        temperature=temperature,
        INTERPRETED=interpreted,
        BLOCK_S=keys // bucket,
        **sizes,
    )
    return scores, ids


def variants(arch: int) -> Iterator[Variant]:
    """What item_topk_fwd compiles on an architecture, by dtype, D, options and k."""
    for label, dtype, width, everything in _tuning.cases():
        if dtype == torch.float64:
            continue
        arguments = example(dtype, width, everything)
        exclude = None
        if everything:
            exclude = torch.empty(
                arguments["hidden"].shape[0], 50, dtype=torch.int64, device="meta"
            )
        for k in (10, 20, 50, 100) if label == "bf16 D64 all" else (20,):
            call = functools.partial(
                item_topk_fwd,
                **arguments,
                k=k,
                temperature=1.0,
                exclude=exclude,
                padding_idx=0,
            )
            yield from _tuning.recorded(arch, f"{label} k={k}", call)

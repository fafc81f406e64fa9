"""Scores of all items in chunks of bounded memory, for the rows that take part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# One chunk of scores. Below 32 MiB the C library keeps freed memory: no page faults (rank of 256
# rows among 118,000 items of width 64, one Zen 4 thread: 0.4 s with 16 MiB, 1.0 s with 64 MiB).
# Smaller chunks make top-k slow.
CHUNK_BYTES = 16 * 2**20
# Below this many items per chunk, products get slow; more than 32k rows then exceed CHUNK_BYTES.
MIN_CHUNK = 128


class Kept(NamedTuple):
    """The rows that take part: K of the M entries of an output."""

    source: Tensor  # (K,) row of hidden
    slot: Tensor  # (K,) entry of the output
    valid: Tensor  # (K,) False only under torch.compile, where K = M
    size: int  # M


def keep_rows(
    n: int, rows: Tensor | None, target: Tensor | None, ignore_index: int, like: Tensor
) -> Kept:
    """Drop negative entries of rows and ignored targets.

    Eager code computes the kept rows only. Under torch.compile shapes are fixed: all M entries are
    computed and the others are overwritten.
    """
    source = torch.arange(n, device=like.device) if rows is None else rows
    size = source.shape[0]
    valid = (source >= 0) if n else torch.zeros_like(source, dtype=torch.bool)
    if n and target is not None:
        valid = valid & (target[source.clamp(min=0)] != ignore_index)
    slot = torch.arange(size, device=like.device)
    if n == 0 or not torch.compiler.is_compiling():
        source, slot, valid = source[valid], slot[valid], valid[valid]
    return Kept(source.clamp(min=0), slot, valid, size)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def chunk_ranges(rows: int, items: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    size = max(MIN_CHUNK, CHUNK_BYTES // (max(rows, 1) * dtype.itemsize))
    return [(start, min(start + size, items)) for start in range(0, items, size)]


def scores(hidden: Tensor, items: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
    """hidden @ items[start:stop].T + bias[start:stop], in hidden's dtype: (K, stop - start)."""
    part = items[start:stop].to(hidden.dtype)
    if bias is None:
        return hidden @ part.T
    return torch.addmm(bias[start:stop].to(hidden.dtype), hidden, part.T)


def score_chunks(
    hidden: Tensor, items: Tensor, bias: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    for start, stop in chunk_ranges(hidden.shape[0], items.shape[0], hidden.dtype):
        yield start, stop, scores(hidden, items, bias, start, stop)


def rank_scores(
    hidden: Tensor, items: Tensor, bias: Tensor | None, start: int, stop: int
) -> Tensor:
    """Scores to compare with each other: computed in float64, rounded to the op's precision.

    A float32 product of a library sums in an order that depends on the column (measured: equal
    items in one product differed in the last bit), which breaks the ties of equal items at random.
    hidden is float64; for float64 inputs nothing wider is at hand.
    """
    dtype = compute_dtype(items.dtype)
    return scores(hidden, items, bias, start, stop).to(dtype)


def at_column(chunk: Tensor, column: Tensor, start: int, otherwise: Tensor) -> Tensor:
    """chunk[i, column[i] - start] where that is inside the chunk, else otherwise[i]."""
    local = column - start
    inside = (local >= 0) & (local < chunk.shape[1])
    local = local.clamp(0, chunk.shape[1] - 1)
    return torch.where(inside, chunk.gather(1, local[:, None])[:, 0], otherwise)


def spread(values: Tensor, kept: Kept, fill: float) -> Tensor:
    """values of the kept rows at their places in an output of M rows, `fill` elsewhere."""
    shape = (kept.size, *values.shape[1:])
    keep = kept.valid.reshape(-1, *[1] * (values.dim() - 1))
    return values.new_full(shape, fill).index_copy(0, kept.slot, torch.where(keep, values, fill))

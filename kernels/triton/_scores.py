"""Scores of a block of rows for a tile of items, and what target_rank and item_topk share.

Both ops take the same blocks and the same instructions, so that a rank is the place in the list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._tuning import Config, Entry, config


@triton.jit
def kept_entries(rows_ptr, entry, M, N, stride_rows, HAS_ROWS: tl.constexpr):
    """The row of hidden of each entry of the output, and which entries name one."""
    kept = entry < M
    if HAS_ROWS:
        source = tl.load(rows_ptr + entry * stride_rows, mask=kept, other=-1)
        kept = (source >= 0) & (source < N)
    else:
        source = entry
    return tl.where(kept, source, 0), kept


@triton.jit
def load_rows(ptr, rows, kept, stride, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns start to start + BLOCK_D of some rows of a matrix; 0 outside."""
    d = start + tl.arange(0, BLOCK_D)
    mask = kept[:, None]
    if D % BLOCK_D != 0 or D == 0:
        mask = mask & (d < D)[None, :]
    # rows are int64: V * D passes 2**31 at 8.4 million items of width 256
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=mask, other=0.0)


@triton.jit
def add_product(
    total, hidden, items, DOT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr
):
    """total + hidden @ items.T.

    Every element of the product sums over D in the same order, wherever it stands in the tile: what
    the ops promise of equal items. NumPy's product, which the interpreter takes, does not; there
    sums are made in float64 and rounded once, which hides it.
    """
    hidden, items = hidden.to(DOT), items.to(DOT)
    if INTERPRETED:
        hidden, items = hidden.to(tl.float64), items.to(tl.float64)
    return tl.dot(hidden, tl.trans(items), total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def tile_scores(
    hidden,
    hidden_ptr,
    source,
    kept,
    items_ptr,
    ids,
    inside,
    bias_ptr,
    stride_hidden,
    stride_items,
    stride_bias,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SCORE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden @ items[ids].T + bias[ids] in float32 (float64 for float64): (BLOCK_N, BLOCK_V).

    hidden holds the first BLOCK_D columns of the rows; wider ones are read again for every tile.
    """
    SUM: tl.constexpr = tl.float64 if INTERPRETED else SCORE
    z = tl.zeros((BLOCK_N, BLOCK_V), SUM)
    if D <= BLOCK_D:
        items = load_rows(items_ptr, ids, inside, stride_items, 0, D, BLOCK_D)
        z = add_product(z, hidden, items, DOT, PRECISION, INTERPRETED)
    else:
        for start in range(0, D, BLOCK_D):
            part = load_rows(hidden_ptr, source, kept, stride_hidden, start, D, BLOCK_D)
            items = load_rows(items_ptr, ids, inside, stride_items, start, D, BLOCK_D)
            z = add_product(z, part, items, DOT, PRECISION, INTERPRETED)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + ids * stride_bias, mask=inside, other=0.0)
        z = z + bias.to(SUM)[None, :]
    return z.to(SCORE)


# Ids within a split take 31 bits.
MAX_SPLIT = 2**30
# Tiles that pay for what a program does once: the scores of its targets, its list of the best
MIN_TILES = 8

# One table for both ops, never tuned: a sum in tf32x3 goes block by block of D, and a rank is a
# place in a list only if both ops sum alike.
_SCORES = "scores"
CONFIGS = {
    _SCORES: (
        Entry(config(1, 1, BLOCK_N=16, BLOCK_V=16, BLOCK_D=32), archs=(_tuning.INTERPRETER,)),
        Entry(config(4, 3, BLOCK_N=64, BLOCK_V=64, BLOCK_D=16), itemsizes=(2,), most_width=16),
        Entry(config(4, 3, BLOCK_N=64, BLOCK_V=64, BLOCK_D=32), itemsizes=(2,), most_width=32),
        Entry(config(4, 3, BLOCK_N=64, BLOCK_V=64, BLOCK_D=64), itemsizes=(2,), most_width=64),
        Entry(config(4, 3, BLOCK_N=64, BLOCK_V=64, BLOCK_D=128), itemsizes=(2,), most_width=128),
        Entry(config(4, 2, BLOCK_N=64, BLOCK_V=64, BLOCK_D=64), archs=(90, 100), itemsizes=(2,)),
        Entry(config(8, 2, BLOCK_N=64, BLOCK_V=64, BLOCK_D=64), itemsizes=(2,)),
        Entry(config(4, 2, BLOCK_N=64, BLOCK_V=64, BLOCK_D=32), archs=(90, 100), itemsizes=(4,)),
        Entry(config(4, 2, BLOCK_N=32, BLOCK_V=64, BLOCK_D=32), itemsizes=(4,), most_width=128),
        Entry(config(4, 2, BLOCK_N=32, BLOCK_V=64, BLOCK_D=16), itemsizes=(4,)),
        Entry(config(4, 2, BLOCK_N=32, BLOCK_V=32, BLOCK_D=16), itemsizes=(8,)),
    )
}


class Problem:
    """The arguments that both ops have, and how they are launched."""

    def __init__(
        self, hidden: Tensor, items: Tensor, bias: Tensor | None, rows: Tensor | None
    ) -> None:
        self.hidden, self.items = dense_rows(hidden), dense_rows(items)
        self.bias, self.rows = bias, rows
        self.entries = hidden.shape[0] if rows is None else rows.shape[0]

    def config(self) -> Config:
        items, width = self.items.shape
        key = _tuning.key(self.hidden, rows=self.entries, items=items, width=width)
        return _tuning.fixed(_SCORES, CONFIGS, key)

    def grid(self, chosen: Config, programs: int) -> tuple[tuple[int, int], int]:
        """Row blocks and splits of the items, for some programs per processor; tiles in a split."""
        wanted = programs * _tuning.processors(self.hidden)
        return grid(self.entries, self.items.shape[0], chosen, wanted)

    def arguments(self) -> dict[str, Any]:
        """The arguments that the kernels of both ops have, but for the tiles."""
        hidden, items, bias, rows = self.hidden, self.items, self.bias, self.rows
        return {
            "hidden_ptr": hidden,
            "items_ptr": items,
            "bias_ptr": bias,
            "rows_ptr": rows,
            "M": self.entries,
            "N": hidden.shape[0],
            "V": items.shape[0],
            "stride_hidden": hidden.stride(0),
            "stride_items": items.stride(0),
            "stride_bias": 0 if bias is None else bias.stride(0),
            "stride_rows": 0 if rows is None else rows.stride(0),
            "D": hidden.shape[1],
            "HAS_BIAS": bias is not None,
            "HAS_ROWS": rows is not None,
            "SCORE": _tuning.sum_type(hidden.dtype),
            "DOT": _tuning.dot_type(hidden.dtype),
            "PRECISION": _tuning.precision(hidden.dtype),
            "INTERPRETED": _tuning.interpreted(),
        }


def grid(entries: int, items: int, chosen: Config, programs: int) -> tuple[tuple[int, int], int]:
    blocks = triton.cdiv(entries, chosen["BLOCK_N"])
    tiles = triton.cdiv(items, chosen["BLOCK_V"])
    least = 1 if _tuning.interpreted() else MIN_TILES
    splits = min(max(programs // max(blocks, 1), 1), triton.cdiv(tiles, least))
    each = min(triton.cdiv(tiles, splits), MAX_SPLIT // chosen["BLOCK_V"])
    return (blocks, triton.cdiv(tiles, each)), each


def dense_rows(matrix: Tensor) -> Tensor:
    """The matrix, copied if elements of a row are not next to each other."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] < 2 else matrix.contiguous()


def example(dtype: torch.dtype, width: int, everything: bool) -> dict[str, Tensor | None]:
    """Arguments of both ops without data, from which to compile."""
    n, v = 4096, 2**20
    return {
        "hidden": torch.empty(n, width, dtype=dtype, device="meta"),
        "items": torch.empty(v, width, dtype=dtype, device="meta"),
        "bias": torch.empty(v, device="meta") if everything else None,
        "rows": torch.empty(n, dtype=torch.int64, device="meta") if everything else None,
    }

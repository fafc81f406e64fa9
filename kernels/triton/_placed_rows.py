"""Rows that stand for positions of sessions: launchers' arguments and loads that ops share."""

from __future__ import annotations

import torch
from t4r_fast.kernels._tuning import Config, config
from torch import Tensor

import triton
import triton.language as tl

# Sums over rows are made of those of blocks of so many rows, whatever the GPU: 94 programs for the
# 1,500 rows of a batch, each with its numbers in registers.
SUMMED_ROWS = 16
# Numbers of a block; 16 of a thread.
_BLOCK = 2048


def unit_rows(tensor: Tensor) -> Tensor:
    """The elements of a row next to each other: a copy if they are not."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def blocks(width: int, most: int | None = None) -> Config:
    """BLOCK_R rows of BLOCK_W columns, all columns or `most`."""
    columns = max(triton.next_power_of_2(max(width, 1)), 4)
    columns = columns if most is None else min(columns, most)
    rows = max(1, min(_BLOCK // columns, SUMMED_ROWS))
    warps = max(1, min(rows * columns // 512, 16))
    return config(warps, 1, BLOCK_R=rows, BLOCK_W=columns)


@triton.jit
def load_places(places_ptr, row, R, stride_places):
    """Places of some rows; -1 outside."""
    return tl.load(places_ptr + row * stride_places, mask=row < R, other=-1)


@triton.jit
def load_columns(ptr, column, stride, W: tl.constexpr, BLOCK_W: tl.constexpr, SUM: tl.constexpr):
    """A number for each of some columns, (1, BLOCK_W); 0 outside."""
    if W % BLOCK_W == 0:
        found = tl.load(ptr + column * stride)
    else:
        found = tl.load(ptr + column * stride, mask=column < W, other=0.0)
    return found.to(SUM)[None, :]


@triton.jit
def inside(rows_there, column, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Mask of a block: rows that stand for something, and columns that exist."""
    mask = rows_there[:, None]
    if W % BLOCK_W != 0:
        mask = mask & (column < W)[None, :]
    return mask


@triton.jit
def outputs(row, R, column, W: tl.constexpr, BLOCK_W: tl.constexpr):
    """Mask of what a block writes."""
    return inside(row < R, column, W, BLOCK_W)


def sum_of_blocks(parts: Tensor) -> Tensor:
    """(blocks, ...) over the blocks, always in one order."""
    return torch.sum(parts, 0)

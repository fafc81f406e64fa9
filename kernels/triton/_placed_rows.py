"""Rows that stand for positions of sessions: launchers' arguments and loads that ops share."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels._tuning import Config, config

# Sums over rows are made of those of blocks of so many rows, whatever the GPU: 94 programs for the
# 1,500 rows of a batch, each with its numbers in registers.
SUMMED_ROWS = 16
# Numbers of a block of whole rows; 16 of a thread.
_BLOCK = 2048
_LEAST_COLUMNS = 64


def unit_rows(tensor: Tensor) -> Tensor:
    """The elements of a row next to each other: a copy if they are not."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def whole_rows(width: int, dtype: torch.dtype) -> Config:
    """BLOCK_R rows of all columns. The width itself is no constant: a few blocks serve all.

    float64 takes two registers a number, so a thread gets half as many.
    """
    share = 256 if dtype == torch.float64 else 512
    columns = max(triton.next_power_of_2(width), _LEAST_COLUMNS)
    rows = max(1, min(_BLOCK // columns, SUMMED_ROWS))
    warps = max(1, min(rows * columns // share, 16))
    return config(warps, 1, BLOCK_R=rows, BLOCK_W=columns)


@triton.jit
def load_places(places_ptr, row, R, stride_places):
    """Places of some rows; -1 outside."""
    return tl.load(places_ptr + row * stride_places, mask=row < R, other=-1)


@triton.jit
def load_columns(ptr, column, stride, W, SUM: tl.constexpr):
    """A number for each of some columns, (1, BLOCK_W); 0 outside."""
    return tl.load(ptr + column * stride, mask=column < W, other=0.0).to(SUM)[None, :]


@triton.jit
def block_mask(rows_there, column, W):
    """Rows that are there, and columns that are."""
    return rows_there[:, None] & (column < W)[None, :]


def sum_of_blocks(parts: Tensor) -> Tensor:
    """(blocks, ...) over the blocks, always in one order."""
    return torch.sum(parts, 0)

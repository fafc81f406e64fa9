"""activation_dropout: blocks of rows and columns; backward makes the activation from x and draws
again. A program of backward takes SUMMED_ROWS rows, whose sums for bias are added up afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._draws import float64_of
from t4r_fast.kernels._dropout import dropout_arguments, site_key, stays
from t4r_fast.kernels._placed_rows import (
    SUMMED_ROWS,
    block_mask,
    load_columns,
    load_places,
    sum_of_blocks,
    unit_rows,
)
from t4r_fast.kernels._tuning import SUMS, Variant, config, launch, sum_type
from t4r_fast.plain.activation_dropout import ACTIVATIONS

# One for all widths, of which multiples of 64 are the rule: 8 numbers of a thread.
_BLOCKS = config(4, 1, BLOCK_R=SUMMED_ROWS, BLOCK_W=64)
_NONE, _GELU, _GELU_TANH, _RELU = (tl.constexpr(number) for number in range(len(ACTIVATIONS)))
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_TAU = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
# 2 sqrt(2 / pi), and that times 0.044715
_OUTER = tl.constexpr(1.5957691216057308)
_INNER = tl.constexpr(1.5957691216057308 * 0.044715)


@triton.jit
def _share(x, ACTIVATION: tl.constexpr):
    """act(x) / x and its derivative, of the two forms of gelu."""
    if ACTIVATION == _GELU:
        share = 0.5 + 0.5 * tl.erf(x * _ROOT_HALF)
        slope = tl.exp(-0.5 * x * x) * _ROOT_TAU
    else:
        v = x * (_OUTER + _INNER * x * x)
        e = tl.exp(-tl.abs(v))
        high = 1.0 / (1.0 + e)
        share = tl.where(v > 0, high, e * high)
        slope = high * (e * high) * (_OUTER + 3.0 * _INNER * x * x)
    return share, slope


@triton.jit
def _activation_dropout_fwd_kernel(
    x_ptr,
    places_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    R,
    W,
    site: tl.int64,
    least: tl.int64,
    scale: tl.int64,
    stride_x,
    stride_places,
    stride_bias,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DRAWS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * BLOCK_W
    column = first + tl.arange(0, BLOCK_W)
    place = load_places(places_ptr, row, R, stride_places)
    mask = block_mask(place >= 0, column, W)
    x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=mask, other=0.0).to(SUM)
    if HAS_BIAS:
        x += load_columns(bias_ptr, column, stride_bias, W, SUM)
    y = x
    if ACTIVATION == _RELU:
        y = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION != _NONE:
        share, _ = _share(x, ACTIVATION)
        y = x * share
    if DRAWS:
        kept = stays(site_key(seed_ptr, site), place, 0, first, least, BLOCK_R, BLOCK_W)
        y = y * tl.where(kept, float64_of(scale).to(SUM), 0.0)
    y = tl.where(mask, y, 0.0)
    to = y_ptr + row[:, None] * W + column[None, :]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=block_mask(row < R, column, W))


@triton.jit
def _activation_dropout_bwd_kernel(
    dy_ptr,
    x_ptr,
    places_ptr,
    bias_ptr,
    seed_ptr,
    dx_ptr,
    sums_ptr,
    R,
    W,
    site: tl.int64,
    least: tl.int64,
    scale: tl.int64,
    stride_dy,
    stride_x,
    stride_places,
    stride_bias,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DRAWS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_W
    column = first + tl.arange(0, BLOCK_W)
    total = tl.zeros((BLOCK_R, BLOCK_W), SUM)
    if HAS_BIAS:
        bias = load_columns(bias_ptr, column, stride_bias, W, SUM)
    if DRAWS:
        key = site_key(seed_ptr, site)
        factor = float64_of(scale).to(SUM)
    for start in range(0, ROWS, BLOCK_R):
        row = block * ROWS + start + tl.arange(0, BLOCK_R)
        place = load_places(places_ptr, row, R, stride_places)
        mask = block_mask(place >= 0, column, W)
        x = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=mask, other=0.0).to(SUM)
        if HAS_BIAS:
            x += bias
        d = tl.load(dy_ptr + row[:, None] * stride_dy + column[None, :], mask=mask, other=0.0)
        d = d.to(SUM)
        if DRAWS:
            kept = stays(key, place, 0, first, least, BLOCK_R, BLOCK_W)
            d = d * tl.where(kept, factor, 0.0)
        if ACTIVATION == _RELU:
            d = tl.where(x <= 0, 0.0, d)
        elif ACTIVATION != _NONE:
            share, slope = _share(x, ACTIVATION)
            d = d * (share + x * slope)
        d = tl.where(mask, d, 0.0)
        to = dx_ptr + row[:, None] * W + column[None, :]
        tl.store(to, d.to(dx_ptr.dtype.element_ty), mask=block_mask(row < R, column, W))
        total += d
    if HAS_SUMS:
        tl.store(sums_ptr + block * W + column, tl.sum(total, 0), mask=column < W)


def activation_dropout_fwd(
    x: Tensor,
    places: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout: float,
    site: int,
) -> Tensor:
    """y (R, W)."""
    x = unit_rows(x)
    rows, width = x.shape
    y = x.new_empty((rows, width))
    launch(
        _activation_dropout_fwd_kernel,
        (triton.cdiv(rows, _BLOCKS["BLOCK_R"]), triton.cdiv(width, _BLOCKS["BLOCK_W"])),
        _BLOCKS,
        x_ptr=x,
        places_ptr=places,
        bias_ptr=bias,
        y_ptr=y,
        R=rows,
        stride_x=x.stride(0),
        stride_places=places.stride(0),
        stride_bias=0 if bias is None else bias.stride(0),
        W=width,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        SUM=sum_type(x.dtype),
        **dropout_arguments(seed, dropout, site),
    )
    return y


def activation_dropout_bwd(
    dy: Tensor,
    x: Tensor,
    places: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout: float,
    site: int,
    needs_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dx (R, W), and dbias (W,) or (0,)."""
    x, dy = unit_rows(x), unit_rows(dy)
    rows, width = x.shape
    dx = x.new_empty((rows, width))
    programs = triton.cdiv(rows, SUMMED_ROWS)
    sums = x.new_empty((programs if needs_bias else 0, width), dtype=SUMS[x.dtype])
    launch(
        _activation_dropout_bwd_kernel,
        (programs, triton.cdiv(width, _BLOCKS["BLOCK_W"])),
        _BLOCKS,
        dy_ptr=dy,
        x_ptr=x,
        places_ptr=places,
        bias_ptr=bias,
        dx_ptr=dx,
        sums_ptr=sums,
        R=rows,
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        stride_places=places.stride(0),
        stride_bias=0 if bias is None else bias.stride(0),
        W=width,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_SUMS=needs_bias,
        SUM=sum_type(x.dtype),
        ROWS=SUMMED_ROWS,
        **dropout_arguments(seed, dropout, site),
    )
    like = x if bias is None else bias
    return dx, sum_of_blocks(sums).to(like.dtype) if needs_bias else like.new_empty((0,))


def _case(dtype: torch.dtype, width: int, everything: bool) -> None:
    x = torch.empty(1024, width, dtype=dtype, device="meta")
    places = torch.empty(1024, dtype=torch.int64, device="meta")
    seed = torch.empty(2, dtype=torch.int64, device="meta") if everything else None
    bias = x[0] if everything else None
    name = "gelu" if everything else "gelu_tanh"
    options = (ACTIVATIONS.index(name), 0.3 if everything else 0.0, 0)
    activation_dropout_fwd(x, places, bias, seed, *options)
    activation_dropout_bwd(x, x, places, bias, seed, *options, everything)


def variants(arch: int) -> Iterator[Variant]:
    """What the launchers compile on an architecture, by dtype and options; not by width.

    Of the activations the two that take registers; the others are parts of them. float16 differs
    from bfloat16 in conversions alone.
    """
    for label, dtype, width, everything in _tuning.cases():
        if label.startswith(("tf32", "fp16")) or width != (256 if everything else 64):
            continue
        yield from _tuning.recorded(arch, label, functools.partial(_case, dtype, width, everything))

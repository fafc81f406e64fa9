"""residual_norm: blocks of whole rows; backward draws again and makes the sum from x and residual.
A program of backward takes SUMMED_ROWS rows, whose sums for weight, norm_bias and bias are added up
afterwards.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._draws import bits, float64_of
from t4r_fast.kernels._dropout import dropout_arguments, site_key, stays
from t4r_fast.kernels._placed_rows import (
    SUMMED_ROWS,
    block_mask,
    load_columns,
    load_places,
    sum_of_blocks,
    unit_rows,
    whole_rows,
)
from t4r_fast.kernels._tuning import SUMS, Variant, launch, sum_type


@triton.jit
def _row_sums(
    x_ptr,
    residual_ptr,
    row,
    column,
    mask,
    stride_x,
    stride_residual,
    bias,
    factor,
    HAS_BIAS: tl.constexpr,
    DRAWS: tl.constexpr,
    SUM: tl.constexpr,
):
    """dropout(x + bias) + residual; 0 outside the mask."""
    z = tl.load(x_ptr + row[:, None] * stride_x + column[None, :], mask=mask, other=0.0).to(SUM)
    if HAS_BIAS:
        z += bias
    if DRAWS:
        z = z * factor
    residual = residual_ptr + row[:, None] * stride_residual + column[None, :]
    z += tl.load(residual, mask=mask, other=0.0).to(SUM)
    return tl.where(mask, z, 0.0)


@triton.jit
def _residual_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    norm_bias_ptr,
    places_ptr,
    bias_ptr,
    seed_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    R,
    W,
    eps: tl.int64,
    site: tl.int64,
    least: tl.int64,
    scale: tl.int64,
    stride_x,
    stride_residual,
    stride_weight,
    stride_norm_bias,
    stride_places,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    DRAWS: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_W)
    place = load_places(places_ptr, row, R, stride_places)
    mask = block_mask(place >= 0, column, W)
    bias = 0.0
    if HAS_BIAS:
        bias = load_columns(bias_ptr, column, stride_bias, W, SUM)
    factor = 1.0
    if DRAWS:
        kept = stays(site_key(seed_ptr, site), place, 0, 0, least, BLOCK_R, BLOCK_W)
        factor = tl.where(kept, float64_of(scale).to(SUM), 0.0)
    z = _row_sums(
        x_ptr, residual_ptr, row, column, mask, stride_x, stride_residual, bias, factor,
        HAS_BIAS, DRAWS, SUM,
    )  # fmt: skip
    mean = tl.sum(z, 1) / W
    apart = tl.where(mask, z - mean[:, None], 0.0)
    # a row that stands for none has nothing to divide by
    variance = tl.where(place >= 0, tl.sum(apart * apart, 1) / W + float64_of(eps).to(SUM), 1.0)
    rstd = tl.where(place >= 0, 1.0 / tl.sqrt(variance), 0.0)
    weight = load_columns(weight_ptr, column, stride_weight, W, SUM)
    norm_bias = load_columns(norm_bias_ptr, column, stride_norm_bias, W, SUM)
    y = tl.where(mask, apart * rstd[:, None] * weight + norm_bias, 0.0)
    to = y_ptr + row[:, None] * W + column[None, :]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=block_mask(row < R, column, W))
    tl.store(mean_ptr + row, mean, mask=row < R)
    tl.store(rstd_ptr + row, rstd, mask=row < R)


@triton.jit
def _residual_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    places_ptr,
    bias_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    sums_ptr,
    R,
    W,
    site: tl.int64,
    least: tl.int64,
    scale: tl.int64,
    stride_dy,
    stride_x,
    stride_residual,
    stride_weight,
    stride_places,
    stride_bias,
    HAS_BIAS: tl.constexpr,
    DRAWS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_W)
    of_weight = tl.zeros((BLOCK_R, BLOCK_W), SUM)
    of_norm_bias = tl.zeros((BLOCK_R, BLOCK_W), SUM)
    of_bias = tl.zeros((BLOCK_R, BLOCK_W), SUM)
    weight = load_columns(weight_ptr, column, stride_weight, W, SUM)
    bias = 0.0
    if HAS_BIAS:
        bias = load_columns(bias_ptr, column, stride_bias, W, SUM)
    if DRAWS:
        key = site_key(seed_ptr, site)
        value = float64_of(scale).to(SUM)
    for start in range(0, ROWS, BLOCK_R):
        row = block * ROWS + start + tl.arange(0, BLOCK_R)
        place = load_places(places_ptr, row, R, stride_places)
        mask = block_mask(place >= 0, column, W)
        factor = 1.0
        if DRAWS:
            factor = tl.where(stays(key, place, 0, 0, least, BLOCK_R, BLOCK_W), value, 0.0)
        z = _row_sums(
            x_ptr, residual_ptr, row, column, mask, stride_x, stride_residual, bias, factor,
            HAS_BIAS, DRAWS, SUM,
        )  # fmt: skip
        mean = tl.load(mean_ptr + row, mask=place >= 0, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=place >= 0, other=0.0)[:, None]
        dy = tl.load(dy_ptr + row[:, None] * stride_dy + column[None, :], mask=mask, other=0.0)
        dy = dy.to(SUM)
        unit = tl.where(mask, (z - mean) * rstd, 0.0)
        g = dy * weight
        first = (tl.sum(g, 1) / W)[:, None]
        second = (tl.sum(g * unit, 1) / W)[:, None]
        dz = tl.where(mask, (g - first - unit * second) * rstd, 0.0)
        dx = dz * factor
        at = row[:, None] * W + column[None, :]
        written = block_mask(row < R, column, W)
        tl.store(dresidual_ptr + at, dz.to(dresidual_ptr.dtype.element_ty), mask=written)
        if DRAWS:
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=written)
        if HAS_SUMS:
            of_weight += dy * unit
            of_norm_bias += dy
            of_bias += dx
    if HAS_SUMS:
        to = sums_ptr + block * 3 * W + column
        tl.store(to, tl.sum(of_weight, 0), mask=column < W)
        tl.store(to + W, tl.sum(of_norm_bias, 0), mask=column < W)
        tl.store(to + 2 * W, tl.sum(of_bias, 0), mask=column < W)


def residual_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    places: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout: float,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (R, W); mean and 1 / sqrt(var + eps), each (R,)."""
    x, residual = unit_rows(x), unit_rows(residual)
    rows, width = x.shape
    y = x.new_empty((rows, width))
    mean = x.new_empty((rows,), dtype=SUMS[x.dtype])
    rstd = torch.empty_like(mean)
    chosen = whole_rows(width, x.dtype)
    launch(
        _residual_norm_fwd_kernel,
        (triton.cdiv(rows, chosen["BLOCK_R"]),),
        chosen,
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=weight,
        norm_bias_ptr=norm_bias,
        places_ptr=places,
        bias_ptr=bias,
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        R=rows,
        eps=bits(eps),
        stride_x=x.stride(0),
        stride_residual=residual.stride(0),
        stride_weight=weight.stride(0),
        stride_norm_bias=norm_bias.stride(0),
        stride_places=places.stride(0),
        stride_bias=0 if bias is None else bias.stride(0),
        W=width,
        HAS_BIAS=bias is not None,
        SUM=sum_type(x.dtype),
        **dropout_arguments(seed, dropout, site),
    )
    return y, mean, rstd


def residual_norm_bwd(
    dy: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    places: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout: float,
    site: int,
    of_columns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, with no rows where it is dresidual; dresidual; gradients of columns, (3, W) or (0, W)."""
    x, residual, dy = unit_rows(x), unit_rows(residual), unit_rows(dy)
    rows, width = x.shape
    dx = x.new_empty((0 if seed is None else rows, width))
    dresidual = x.new_empty((rows, width))
    programs = triton.cdiv(rows, SUMMED_ROWS)
    sums = x.new_empty((programs if of_columns else 0, 3, width), dtype=SUMS[x.dtype])
    launch(
        _residual_norm_bwd_kernel,
        (programs,),
        whole_rows(width, x.dtype),
        dy_ptr=dy,
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=weight,
        places_ptr=places,
        bias_ptr=bias,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dx_ptr=dx,
        dresidual_ptr=dresidual,
        sums_ptr=sums,
        R=rows,
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        stride_residual=residual.stride(0),
        stride_weight=weight.stride(0),
        stride_places=places.stride(0),
        stride_bias=0 if bias is None else bias.stride(0),
        W=width,
        HAS_BIAS=bias is not None,
        HAS_SUMS=of_columns,
        SUM=sum_type(x.dtype),
        ROWS=SUMMED_ROWS,
        **dropout_arguments(seed, dropout, site),
    )
    return dx, dresidual, sum_of_blocks(sums) if of_columns else sums[:, 0].clone()


def _case(dtype: torch.dtype, width: int, everything: bool) -> None:
    x = torch.empty(1024, width, dtype=dtype, device="meta")
    places = torch.empty(1024, dtype=torch.int64, device="meta")
    seed = torch.empty(2, dtype=torch.int64, device="meta") if everything else None
    bias, dropout = (x[0], 0.3) if everything else (None, 0.0)
    _, mean, rstd = residual_norm_fwd(x, x, x[0], x[0], places, bias, seed, 1e-5, dropout, 0)
    given = (x, x, x[0], places, bias, seed, mean, rstd, dropout, 0)
    residual_norm_bwd(x, *given, everything)


def variants(arch: int) -> Iterator[Variant]:
    """What the launchers compile on an architecture, by dtype, block of columns and options.

    float16 differs from bfloat16 in conversions alone.
    """
    for label, dtype, width, everything in _tuning.cases():
        if label.startswith(("tf32", "fp16")) or width not in (64, 256, 512):
            continue
        yield from _tuning.recorded(arch, label, functools.partial(_case, dtype, width, everything))

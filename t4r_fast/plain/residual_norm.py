"""residual_norm in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast.plain._places import factors
from t4r_fast.plain._scores import compute_dtype


def _sum(
    x: Tensor, residual: Tensor, places: Tensor, bias: Tensor | None, factor: Tensor | None
) -> Tensor:
    """dropout(x + bias) + residual, 0 in rows that stand for none."""
    z = x.to(compute_dtype(x.dtype))
    z = z if bias is None else z + bias.to(z.dtype)
    z = z if factor is None else z * factor
    return torch.where(places[:, None] >= 0, z + residual.to(z.dtype), 0.0)


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
    factor = factors(places, seed, dropout, site, x.shape[1], compute_dtype(x.dtype))
    z = _sum(x, residual, places, bias, factor)
    mean = z.mean(1)
    centered = z - mean[:, None]
    rstd = (centered.square().mean(1) + eps).rsqrt()
    y = centered * rstd[:, None] * weight.to(z.dtype) + norm_bias.to(z.dtype)
    return torch.where(places[:, None] >= 0, y, 0.0).to(x.dtype), mean, rstd


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
    """dx, dresidual, and the gradients of weight, norm_bias and bias.

    Without a seed dx is dresidual and has no rows. The last are (3, W) in the type of sums, or have
    no rows.
    """
    there = places[:, None] >= 0
    factor = factors(places, seed, dropout, site, x.shape[1], compute_dtype(x.dtype))
    z = _sum(x, residual, places, bias, factor)
    # a row that stands for none may have an rstd of 1 / sqrt(0)
    unit = torch.where(there, (z - mean[:, None]) * rstd[:, None], 0.0)
    dy = torch.where(there, dy.to(z.dtype), 0.0)
    g = dy * weight.to(z.dtype)
    dz = g - g.mean(1, keepdim=True) - unit * (g * unit).mean(1, keepdim=True)
    dz = torch.where(there, dz * rstd[:, None], 0.0)
    dx = dz if factor is None else dz * factor
    sums = z.new_empty((0, z.shape[1]))
    if of_columns:
        sums = torch.stack([(dy * unit).sum(0), dy.sum(0), dx.sum(0)])
    return (
        (x.new_empty((0, x.shape[1])) if factor is None else dx.to(x.dtype)),
        dz.to(x.dtype),
        sums,
    )

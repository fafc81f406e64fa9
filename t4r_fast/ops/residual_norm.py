"""residual_norm: bias, dropout, residual and layer norm of a packed layer in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from t4r_fast import backend
from t4r_fast.ops._check import check_device, full_precision
from t4r_fast.ops._dropout import check_column_vector, check_dropout, check_rows_at
from t4r_fast.plain import residual_norm as plain
from t4r_fast.plain._scores import compute_dtype

_OP = "residual_norm"


def residual_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    places: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """layer_norm(dropout(x + bias) + residual) for rows that are items of sessions.

    z = (x + bias) * (drawn >= dropout) / (1 - dropout) + residual
    y = (z - mean(z)) / sqrt(var(z) + eps) * weight + norm_bias       by row, var of the population

    x           (R, W)  float32, float16, bfloat16 (computed in float32) or float64; any strides
    residual    (R, W)  dtype of x
    weight      (W,)    dtype of x or float32
    norm_bias   (W,)    dtype of x or float32
    places      (R,)    int64, session << 32 | position of each row; negative for a row that stands
                        for none: it is not read, its y and its gradients are 0
    bias        (W,)    dtype of x or float32
    eps         float   >= 0
    dropout     float   0 <= dropout < 1. With 0 nothing is drawn
    seed        (2,)    int64 (key, offset); None draws it from torch's default generator
    site        int     0 <= site < 2**32: which dropout of the model this is. Sites of one model
                        must differ, or they drop the same columns
    returns     (R, W)  dtype of x

    What is dropped depends on seed, site, session, position and column alone: it is the same on
    every backend, for any number of threads and any order or packing of the rows. So is a row of y:
    on one backend it does not depend on other rows. Differentiable once in x, residual, weight,
    norm_bias and bias; saved are x, residual, and mean and 1 / sqrt(var + eps) of each row: z is
    made again. Gradients of weight, norm_bias and bias are sums in one order, whatever the number
    of threads. Memory beyond outputs: O(W), and 3 W numbers per 64 rows (Triton: 16) in backward.
    Raises ValueError or TypeError on shapes, dtypes and options out of range.
    Source of the draws: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    Replaces dropout, sum and layer norm of the layers of transformers' XLNet and BERT.
    """
    check_rows_at(_OP, x, places)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"{_OP}: residual must be {x.dtype} {tuple(x.shape)}, as x; "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    check_device(_OP, "x", x, residual=residual)
    if x.shape[1] == 0:
        raise ValueError(f"{_OP}: x must have W >= 1; got {tuple(x.shape)}")
    for name, vector in (("weight", weight), ("norm_bias", norm_bias), ("bias", bias)):
        check_column_vector(_OP, name, vector, x)
    if not eps >= 0:
        raise ValueError(f"{_OP}: eps must be >= 0; got {eps}")
    seed = check_dropout(_OP, dropout, seed, site, x.device)
    tensors = (x, residual, weight, norm_bias, places, bias, seed)
    return _ResidualNorm.apply(*tensors, float(eps), float(dropout), site)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Tensor:
        ctx.backend = backend.pick(_OP, x)
        ctx.options = (dropout, site)
        ctx.like = norm_bias.dtype
        functions = backend.ops(ctx.backend, plain)
        with full_precision(ctx.backend, x.device):
            y, mean, rstd = functions.residual_norm_fwd(
                x, residual, weight, norm_bias, places, bias, seed, eps, dropout, site
            )
        ctx.save_for_backward(x, residual, weight, places, bias, seed, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        of_columns = needs[2] or needs[3] or needs[5]
        functions = backend.ops(ctx.backend, plain)
        with full_precision(ctx.backend, dy.device):
            dx, dresidual, sums = functions.residual_norm_bwd(
                dy, *ctx.saved_tensors, *ctx.options, of_columns
            )
        # without dropout x and residual have one gradient
        dx = dx if dx.shape[0] == dresidual.shape[0] else dresidual
        weight, bias = ctx.saved_tensors[2], ctx.saved_tensors[4]
        return (
            dx,
            dresidual,
            sums[0].to(weight.dtype) if needs[2] else None,
            sums[1].to(ctx.like) if needs[3] else None,
            None,
            sums[2].to(bias.dtype) if needs[5] else None,
            *[None] * 4,
        )


def _fake_fwd(
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
    each = x.new_empty(x.shape[:1], dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape), each, torch.empty_like(each)


def _fake_bwd(
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
    return (
        x.new_empty((0 if seed is None else x.shape[0], x.shape[1])),
        x.new_empty(x.shape),
        x.new_empty((3 if of_columns else 0, x.shape[1]), dtype=compute_dtype(x.dtype)),
    )


backend.declare(
    _OP,
    "residual_norm_fwd(Tensor x, Tensor residual, Tensor weight, Tensor norm_bias, Tensor places, "
    "Tensor? bias, Tensor? seed, float eps, float dropout, int site) -> (Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
)
backend.declare(
    _OP,
    "residual_norm_bwd(Tensor dy, Tensor x, Tensor residual, Tensor weight, Tensor places, "
    "Tensor? bias, Tensor? seed, Tensor mean, Tensor rstd, float dropout, int site, "
    "bool of_columns) -> (Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
)

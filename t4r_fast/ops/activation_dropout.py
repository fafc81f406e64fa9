"""activation_dropout: bias, activation and dropout of a packed Transformer's layer in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from t4r_fast import backend
from t4r_fast.ops._check import full_precision
from t4r_fast.ops._dropout import check_column_vector, check_dropout, check_rows_at
from t4r_fast.plain import activation_dropout as plain
from t4r_fast.plain.activation_dropout import ACTIVATIONS

_OP = "activation_dropout"


def activation_dropout(
    x: Tensor,
    places: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "gelu",
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """dropout(act(x + bias)) for rows that are items of sessions; no mask is stored.

    y = act(x + bias) * (drawn >= dropout) / (1 - dropout)

    x           (R, W)  float32, float16, bfloat16 (computed in float32) or float64; any strides
    places      (R,)    int64, session << 32 | position of each row; negative for a row that stands
                        for none: it is not read, its y and its gradient are 0
    bias        (W,)    dtype of x or float32
    activation  "none"; "gelu", x Phi(x); "gelu_tanh", GPT-2's approximation of it; "relu"
    dropout     float   0 <= dropout < 1. With 0 nothing is drawn
    seed        (2,)    int64 (key, offset); None draws it from torch's default generator
    site        int     0 <= site < 2**32: which dropout of the model this is. Sites of one model
                        must differ, or they drop the same columns
    returns     (R, W)  dtype of x

    What is dropped depends on seed, site, session, position and column alone: it is the same on
    every backend, for any number of threads and any order or packing of the rows. So is a row of y:
    on one backend it does not depend on other rows. Differentiable once in x and bias; backward
    makes the activation from x and draws again. The gradient of bias is a sum in one order,
    whatever the number of threads. Memory beyond outputs: O(W), and in backward W numbers per 64
    rows (Triton: 16).
    Raises ValueError or TypeError on shapes, dtypes and options out of range.
    Source of the draws: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    Replaces activation and dropout of a feed-forward layer of transformers' XLNet, BERT and GPT-2.
    """
    check_rows_at(_OP, x, places)
    check_column_vector(_OP, "bias", bias, x)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{_OP}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}"
        )
    seed = check_dropout(_OP, dropout, seed, site, x.device)
    options = (ACTIVATIONS.index(activation), float(dropout), site)
    return _ActivationDropout.apply(x, places, bias, seed, *options)


class _ActivationDropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        places: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        activation: int,
        dropout: float,
        site: int,
    ) -> Tensor:
        ctx.backend = backend.pick(_OP, x)
        ctx.options = (activation, dropout, site)
        ctx.save_for_backward(x, places, bias, seed)
        functions = backend.ops(ctx.backend, plain)
        with full_precision(ctx.backend, x.device):
            return functions.activation_dropout_fwd(x, places, bias, seed, *ctx.options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_bias = ctx.needs_input_grad[2]
        functions = backend.ops(ctx.backend, plain)
        with full_precision(ctx.backend, dy.device):
            dx, dbias = functions.activation_dropout_bwd(
                dy, *ctx.saved_tensors, *ctx.options, needs_bias
            )
        return dx, None, dbias if needs_bias else None, None, None, None, None


def _fake_fwd(
    x: Tensor,
    places: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    activation: int,
    dropout: float,
    site: int,
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_bwd(
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
    like = x if bias is None else bias
    return x.new_empty(x.shape), like.new_empty((x.shape[1] if needs_bias else 0,))


_ARGUMENTS = (
    "Tensor x, Tensor places, Tensor? bias, Tensor? seed, int activation, float dropout, int site"
)
backend.declare(_OP, f"activation_dropout_fwd({_ARGUMENTS}) -> Tensor", fake=_fake_fwd)
backend.declare(
    _OP,
    f"activation_dropout_bwd(Tensor dy, {_ARGUMENTS}, bool needs_bias) -> (Tensor, Tensor)",
    fake=_fake_bwd,
)

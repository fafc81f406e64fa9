"""activation_dropout in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from t4r_fast.plain._places import factors
from t4r_fast.plain._scores import compute_dtype

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")
_GELU_MODES = {"gelu": "none", "gelu_tanh": "tanh"}


def _argument(x: Tensor, places: Tensor, bias: Tensor | None) -> Tensor:
    """x + bias, 0 in rows that stand for none."""
    a = x.to(compute_dtype(x.dtype))
    a = a if bias is None else a + bias.to(a.dtype)
    return torch.where(places[:, None] >= 0, a, 0.0)


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
    y = _argument(x, places, bias)
    name = ACTIVATIONS[activation]
    if name in _GELU_MODES:
        y = F.gelu(y, approximate=_GELU_MODES[name])
    elif name == "relu":
        y = F.relu(y)
    factor = factors(places, seed, dropout, site, x.shape[1], y.dtype)
    return (y if factor is None else y * factor).to(x.dtype)


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
    a = _argument(x, places, bias)
    da = torch.where(places[:, None] >= 0, dy.to(a.dtype), 0.0)
    factor = factors(places, seed, dropout, site, x.shape[1], a.dtype)
    da = da if factor is None else da * factor
    name = ACTIVATIONS[activation]
    if name in _GELU_MODES:
        da = torch.ops.aten.gelu_backward(da, a, approximate=_GELU_MODES[name])
    elif name == "relu":
        da = torch.where(a <= 0, 0.0, da)
    like = x if bias is None else bias
    dbias = da.sum(0).to(like.dtype) if needs_bias else like.new_empty((0,))
    return da.to(x.dtype), dbias

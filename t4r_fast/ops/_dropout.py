"""Argument checks of ops that drop, over rows that stand for positions of sessions."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast.ops._check import FLOAT_DTYPES, check_device, check_int64, names
from t4r_fast.ops._seed import check_seed
from t4r_fast.plain._dropout import threshold


def check_rows_at(op: str, x: Tensor, places: Tensor) -> None:
    """x (R, W) of a float dtype, places (R,) on its device."""
    if x.dim() != 2:
        raise ValueError(f"{op}: x must have shape (R, W); got {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: x must be {names(FLOAT_DTYPES)}; got {x.dtype}")
    check_int64(op, "places", places, "(R,)", 1)
    if places.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: places must have one entry per row of x, {x.shape[0]}; got {places.shape[0]}"
        )
    check_device(op, "x", x, places=places)


def check_column_vector(op: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    """A number for each column of x, in its dtype or float32."""
    if vector is None:
        return
    if vector.shape != x.shape[1:]:
        raise ValueError(
            f"{op}: {name} must have shape (W,), ({x.shape[1]},); got {tuple(vector.shape)}"
        )
    if vector.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: {name} must have the dtype of x, {x.dtype}, or float32; got {vector.dtype}"
        )
    check_device(op, "x", x, **{name: vector})


def check_dropout(
    op: str, dropout: float, seed: Tensor | None, site: int, device: torch.device
) -> Tensor | None:
    """The seed to draw with; None if nothing is drawn, as below a dropout of 2**-33."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{op}: dropout must be 0 <= dropout < 1; got {dropout}")
    if not 0 <= site < 2**32:
        raise ValueError(f"{op}: site must be 0 <= site < 2**32; got {site}")
    draws = threshold(dropout) > 0
    if seed is not None or draws:
        seed = check_seed(op, seed, device)
    return seed if draws else None

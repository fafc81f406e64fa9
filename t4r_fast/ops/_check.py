"""Argument checks that several ops share: shapes and dtypes at once, values where they are read.

Reading a value on the host costs tens of microseconds on a CPU and a synchronisation on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_scores(op: str, hidden: Tensor, items: Tensor, bias: Tensor | None) -> None:
    """hidden (N, D) and items (V, D) of one float dtype on one device; bias (V,)."""
    if hidden.dim() != 2:
        raise ValueError(f"{op}: hidden must have shape (N, D); got {tuple(hidden.shape)}")
    if items.dim() != 2 or items.shape[1] != hidden.shape[1] or items.shape[0] == 0:
        raise ValueError(
            f"{op}: items must have shape (V, D) with V >= 1 and the D of hidden, "
            f"{hidden.shape[1]}; got {tuple(items.shape)}"
        )
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: hidden must be {names(FLOAT_DTYPES)}; got {hidden.dtype}")
    if items.dtype != hidden.dtype:
        raise TypeError(
            f"{op}: items must have the dtype of hidden, {hidden.dtype}; got {items.dtype} "
            "(convert one of them)"
        )
    if bias is not None:
        if bias.shape != items.shape[:1]:
            raise ValueError(
                f"{op}: bias must have shape (V,), ({items.shape[0]},); got {tuple(bias.shape)}"
            )
        if bias.dtype not in (hidden.dtype, torch.float32):
            raise TypeError(
                f"{op}: bias must have the dtype of hidden, {hidden.dtype}, or float32; "
                f"got {bias.dtype}"
            )
    check_device(op, "hidden", hidden, items=items, bias=bias)


def check_device(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on the device of {first_name}, {first.device}; "
                f"got {tensor.device}"
            )


def check_int64(op: str, name: str, tensor: Tensor, shape: str, dim: int) -> None:
    if tensor.dim() != dim:
        raise ValueError(f"{op}: {name} must have shape {shape}; got {tuple(tensor.shape)}")
    if tensor.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64; got {tensor.dtype}")


def check_offsets(op: str, offsets: Tensor, first_name: str, first: Tensor) -> None:
    """offsets (B + 1,) of packed sessions; their values are left to check_offset_values."""
    check_int64(op, "offsets", offsets, "(B + 1,)", 1)
    if offsets.shape[0] == 0:
        raise ValueError(f"{op}: offsets must have shape (B + 1,), one entry at least; got (0,)")
    check_device(op, first_name, first, offsets=offsets)


def check_offset_values(op: str, offsets: Tensor, size: int) -> None:
    """ValueError unless offsets rise from 0 to at most size; see check_values."""
    step = offsets.diff()
    right = (offsets[0] == 0) & (offsets[-1] <= size) & (step >= 0).all()
    rule = f"{op}: offsets must rise from 0 to at most {size}, the items that there are"
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        torch._assert_async(right, rule)
    elif not bool(right):
        if offsets[0] != 0:
            place = 0
        elif bool((step < 0).any()):
            place = int((step < 0).nonzero()[0]) + 1
        else:
            place = offsets.shape[0] - 1
        raise ValueError(f"{rule}; got {int(offsets[place])} at entry {place}")


def check_last_offset(op: str, offsets: Tensor, size: int) -> None:
    """ValueError unless packed sessions end within the size items that there are."""
    right = (offsets[-1] >= 0) & (offsets[-1] <= size)
    rule = f"{op}: offsets must end at 0 to {size}, the items that there are"
    if torch.compiler.is_compiling() or offsets.device.type != "cpu":
        torch._assert_async(right, rule)
    elif not bool(right):
        raise ValueError(f"{rule}; got {int(offsets[-1])}")


def check_target(
    op: str, hidden: Tensor, items: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int
) -> None:
    """target (N,), item ids or ignore_index; rows (M,), row numbers of hidden or negative.

    Their values are left to check_target_values.
    """
    check_int64(op, "target", target, "(N,)", 1)
    if target.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"{op}: target must have one entry per row of hidden, {hidden.shape[0]}; "
            f"got {target.shape[0]}"
        )
    check_rows(op, hidden, rows)
    check_device(op, "hidden", hidden, target=target)


def check_rows(op: str, hidden: Tensor, rows: Tensor | None) -> None:
    if rows is not None:
        check_int64(op, "rows", rows, "(M,)", 1)
        check_device(op, "hidden", hidden, rows=rows)


def checked(name: str, check: Callable[[], None], kernel: Callable[..., T], *arguments: Any) -> T:
    """kernel(*arguments) on backend `name`, its values checked.

    Native kernels check values where they read them. `check`, whose errors name place and value,
    runs when one of C++ has refused; a CUDA kernel traps, after which nothing on the device runs.
    For the other backends `check` runs first.
    """
    if name not in ("cpu", "cuda"):
        check()
    if name != "cpu" or torch.compiler.is_compiling():
        return kernel(*arguments)
    try:
        return kernel(*arguments)
    except RuntimeError as error:
        refused = error
    check()
    raise refused


def full_precision(name: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """No autocast for a kernel that is made of PyTorch's operations; native ones know none."""
    if name in ("cpu", "cuda"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_target_values(
    op: str, hidden: Tensor, items: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int
) -> None:
    check_row_values(op, hidden, rows)
    if rows is None:
        wrong = ((target < 0) | (target >= items.shape[0])) & (target != ignore_index)
        where = "row"
        value = target
    elif hidden.shape[0]:
        value = target[rows.clamp(min=0)]
        wrong = ((value < 0) | (value >= items.shape[0])) & (value != ignore_index) & (rows >= 0)
        where = "entry of rows"
    else:
        return
    check_values(
        wrong,
        value,
        f"{op}: target must be 0 <= target < {items.shape[0]} (the rows of items) "
        f"or ignore_index, {ignore_index}",
        where,
    )


def check_row_values(op: str, hidden: Tensor, rows: Tensor | None) -> None:
    if rows is not None:
        check_values(
            rows >= hidden.shape[0],
            rows,
            f"{op}: rows must be < {hidden.shape[0]} (the rows of hidden), or negative to skip",
            "entry",
        )


def check_values(wrong: Tensor, values: Tensor, rule: str, where: str) -> None:
    """IndexError naming the first wrong value and its place.

    On a GPU and under torch.compile it is a device-side assertion: no host synchronisation.
    """
    if torch.compiler.is_compiling() or wrong.device.type != "cpu":
        torch._assert_async(~wrong.any(), rule)
    elif bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        at = place[0] if len(place) == 1 else tuple(place)
        raise IndexError(f"{rule}; got {values[tuple(place)].item()} at {where} {at}")

"""SequenceMask and the checks that the mask ops share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SequenceMask(NamedTuple):
    """What a sequence model hides and what it must predict.

    targets  (B, L) int64, the item to predict at each position, padding_idx where none
    mask     (B, L) bool, positions whose input becomes the [MASK] vector
    rows     (B * L,) int64, flat positions b * L + i whose output is used, in order, then -1
    count    () int64, how many rows are used
    """

    targets: Tensor
    mask: Tensor
    rows: Tensor
    count: Tensor


def check_padding(op: str, item_ids: Tensor, padding_idx: int) -> None:
    """ValueError naming the first item behind padding; see check_values."""
    item = item_ids != padding_idx
    after_pad = item[:, 1:] & ~item[:, :-1]
    rule = f"{op}: item_ids must have its padding ({padding_idx}) on the right only"
    if torch.compiler.is_compiling() or item_ids.device.type != "cpu":
        torch._assert_async(~after_pad.any(), rule)
    elif bool(after_pad.any()):
        row, position = after_pad.nonzero()[0].tolist()
        raise ValueError(f"{rule}; got an item after padding in row {row}, position {position + 1}")


def check_mode(op: str, mode: str, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        raise ValueError(f"{op}: mode must be one of {', '.join(modes)}; got {mode!r}")

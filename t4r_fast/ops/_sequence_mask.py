"""SequenceMask, PackedMask, and the checks that the mask ops share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from t4r_fast.ops._check import check_int64, check_offset_values, check_offsets


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
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which means nothing here


class PackedMask(NamedTuple):
    """The same of packed sessions: U items of B sessions one after the other, without padding.

    replaced  (U,) bool, items whose vectors become the [MASK] vector; False behind the last session
    rows      (U,) int64, items at which a prediction is made, in order, then -1
    targets   (U,) int64, the item to predict at each row, then padding_idx
    count     () int64, how many rows are used
    """

    replaced: Tensor
    rows: Tensor
    targets: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which means nothing here


def check_items(op: str, item_ids: Tensor, offsets: Tensor | None) -> None:
    if offsets is None:
        check_int64(op, "item_ids", item_ids, "(B, L)", 2)
    else:
        check_int64(op, "item_ids", item_ids, "(U,) because it has offsets", 1)
        check_offsets(op, offsets, "item_ids", item_ids)


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


def check_packed(op: str, item_ids: Tensor, offsets: Tensor, padding_idx: int) -> None:
    """ValueError naming the first wrong offset, or the first item that is padding."""
    check_offset_values(op, offsets, item_ids.shape[0])
    inside = torch.arange(item_ids.shape[0], device=item_ids.device) < offsets[-1]
    wrong = inside & (item_ids == padding_idx)
    rule = f"{op}: item_ids with offsets must hold no padding ({padding_idx})"
    if torch.compiler.is_compiling() or item_ids.device.type != "cpu":
        torch._assert_async(~wrong.any(), rule)
    elif bool(wrong.any()):
        raise ValueError(f"{rule}; got it at item {int(wrong.nonzero()[0])}")


def packed_fake(item_ids: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shapes of a PackedMask."""
    return (
        item_ids.new_empty(item_ids.shape, dtype=torch.bool),
        item_ids.new_empty(item_ids.shape),
        item_ids.new_empty(item_ids.shape),
        item_ids.new_empty(()),
    )


def check_mode(op: str, mode: str, modes: tuple[str, ...]) -> None:
    if mode not in modes:
        raise ValueError(f"{op}: mode must be one of {', '.join(modes)}; got {mode!r}")

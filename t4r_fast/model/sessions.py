"""A batch as a value: the items of its sessions one after the other, without padding.

Padded batches are packed here and nowhere else, and packed vectors are padded here for bodies that
know no other form. On a CPU a packed batch is as long as its items; where reading a number from
the device would make the host wait, and under torch.compile, it has the fixed capacity of the
padded batch, and what lies behind the last item is never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Products take a multiple of this many rows. A product of fewer than four rows, or a thread's share
# of it, goes another way in MKL, whose sums have other bits; with whole blocks the bits of a row do
# not depend on the rows beside it, nor on the number of threads (torch 2.13, 1 to 16 threads).
ROW_BLOCK = 8


class Sessions(NamedTuple):
    """U items of B sessions, one after the other.

    columns  name -> (U,) or (U, W) for each item
    offsets  (B + 1,) int64; session b is offsets[b] to offsets[b + 1]. U may exceed offsets[-1]
    longest  no session has more items
    """

    columns: dict[str, Tensor]
    offsets: Tensor
    longest: int

    @property
    def count(self) -> int:  # type: ignore[override]  # hides tuple.count
        """Sessions, B."""
        return self.offsets.shape[0] - 1

    @property
    def rows(self) -> int:
        """Items, U: the capacity."""
        return next(iter(self.columns.values())).shape[0]


class Layout(NamedTuple):
    """Where the items of a packed batch stand.

    offsets  (B + 1,) int64, of Sessions
    places   (U,) int64, see places_of
    longest  no session has more items
    """

    offsets: Tensor
    places: Tensor
    longest: int


def fixed_capacity(tensor: Tensor) -> bool:
    """Whether shapes may not depend on values: reading one would make the host wait."""
    return tensor.device.type != "cpu" or torch.compiler.is_compiling()


def whole_blocks(rows: int) -> int:
    """The next multiple of ROW_BLOCK."""
    return rows + -rows % ROW_BLOCK


def lengths_of(item_ids: Tensor, padding_idx: int) -> Tensor:
    """(B,) int64, items of each session of a batch that is padded on the right."""
    return (item_ids != padding_idx).sum(1)


def pack(columns: Mapping[str, Tensor], lengths: Tensor) -> Sessions:
    """Padded columns, (B, L), (B, L, W), or (B,), (B, 1), (B, W') of the session, as Sessions.

    A column of the session is repeated for each of its items. What is padded is no matter: only
    `lengths` (B,) says where a session ends.
    """
    width = max(c.shape[1] for c in columns.values() if c.dim() > 1)
    offsets = offsets_of(lengths)
    if fixed_capacity(lengths):
        at = packed_index(lengths, width)
        at = torch.nn.functional.pad(at, (0, whole_blocks(at.shape[0]) - at.shape[0]))
    else:
        place = torch.arange(width, device=lengths.device)
        at = (place < lengths[:, None]).flatten().nonzero().squeeze(1)
        # a block even without an item: a row to make the [MASK] of an empty session of
        rows = whole_blocks(at.shape[0]) or min(ROW_BLOCK, lengths.shape[0] * width)
        at = torch.nn.functional.pad(at, (0, rows - at.shape[0]))
    session = torch.div(at, width, rounding_mode="floor")
    packed = {
        name: c.flatten(0, 1).index_select(0, at)
        if c.dim() > 1 and c.shape[1] == width
        else c.index_select(0, session)
        for name, c in columns.items()
    }
    return Sessions(packed, offsets, width)


def offsets_of(lengths: Tensor) -> Tensor:
    """(B,) lengths to (B + 1,) offsets."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def packed_index(lengths: Tensor, width: int) -> Tensor:
    """(B * L,) int64: flat padded positions of the items in order; behind them, position 0."""
    place = torch.arange(width, device=lengths.device)
    is_item = (place < lengths[:, None]).flatten()
    number = torch.where(is_item, is_item.cumsum(0) - 1, is_item.shape[0])
    at = number.new_zeros(is_item.shape[0] + 1)
    flat = torch.arange(is_item.shape[0], device=lengths.device)
    return at.scatter(0, number, flat)[:-1]


def session_and_place(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Session and place in it of each of `rows` packed items, both int64; -1 behind the last."""
    at = torch.arange(rows, device=offsets.device)
    session = torch.searchsorted(offsets, at, right=True) - 1
    real = at < offsets[-1]
    place = at - offsets[session.clamp(max=offsets.shape[0] - 1)]
    return torch.where(real, session, -1), torch.where(real, place, -1)


def places_of(offsets: Tensor, rows: int) -> Tensor:
    """(U,) int64, session << 32 | place: what a draw of an item depends on; -1 behind the last."""
    session, place = session_and_place(offsets, rows)
    return torch.where(session < 0, -1, (session << 32) | place)


def layout_of(sessions: Sessions) -> Layout:
    return Layout(sessions.offsets, places_of(sessions.offsets, sessions.rows), sessions.longest)


def whole_rows(count: int, length: int, device: torch.device) -> Layout:
    """Of a padded batch whose padding is part of the computation: sessions of equal length."""
    offsets = torch.arange(count + 1, device=device) * length
    return Layout(offsets, places_of(offsets, count * length), length)


def padded_index(offsets: Tensor, width: int, newest: bool = False) -> tuple[Tensor, Tensor]:
    """(B, L) int64, the packed item at each padded position, and (B, L) bool, whether there is
    one.

    newest  of longer sessions the last L items, else the first
    """
    place = torch.arange(width, device=offsets.device)
    start = offsets[:-1]
    if newest:
        start = torch.maximum(start, offsets[1:] - width)
    at = start[:, None] + place
    there = at < offsets[1:, None]
    return torch.where(there, at, 0), there


def pad(
    values: Tensor, offsets: Tensor, width: int, padding: float = 0, newest: bool = False
) -> Tensor:
    """(U, ...) packed to (B, L, ...) padded on the right; see padded_index for newest."""
    at, there = padded_index(offsets, width, newest)
    if values.shape[0] == 0:
        return values.new_full((*at.shape, *values.shape[1:]), padding)
    padded = values.index_select(0, at.flatten()).view(*at.shape, *values.shape[1:])
    there = there.view(*there.shape, *(1,) * (values.dim() - 1))
    return torch.where(there, padded, padding)


def with_one_more(sessions: Sessions) -> tuple[Sessions, Tensor]:
    """Each session with a place behind its last item; (B,) int64, where the new places are.

    A column repeats its last value there (an empty session gets whatever is at hand).
    """
    offsets, count, filled = sessions.offsets, sessions.count, sessions.rows
    more = offsets + torch.arange(count + 1, device=offsets.device)
    rows = torch.arange(whole_blocks(filled + count), device=offsets.device)
    session = (torch.searchsorted(more, rows, right=True) - 1).clamp(max=max(count - 1, 0))
    # the new place of session b reads the item before it; nobody reads what is behind the last one
    at = torch.minimum(rows - session, offsets[1:][session] - 1) if count else rows
    at = at.clamp(min=0, max=max(filled - 1, 0))
    columns = {name: c.index_select(0, at) for name, c in sessions.columns.items()}
    return Sessions(columns, more, sessions.longest + 1), more[1:] - 1

"""Ragged columns, one after the other with offsets, to padded ones, and which id pads them.

A column `x` comes as `x__values` (n,) or (n, W) and `x__offsets` (B + 1,): session b holds values
offsets[b] to offsets[b + 1]. Serving and Merlin's loader send them so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from t4r_fast.compat import get_compat
from t4r_fast.errors import InputError
from t4r_fast.model import sessions

_VALUES, _OFFSETS = "__values", "__offsets"


def pad_batch(
    batch: Mapping[str, torch.Tensor],
    padding_lengths: Mapping[str, int],
    keep_newest: bool | None = None,
    padding_idx: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Columns of a batch at fixed lengths, padded on the right.

    padding_lengths  column name -> L. Ragged columns become (B, L) or (B, L, W); columns that are
                     padded already, (B, M) or (B, M, W), get this length too
    keep_newest      of longer sessions the last L items stay, else the first, as in the reference.
                     None: True, except at compat 0.1
    padding_idx      column name -> the id that pads it; other columns are padded with 0

    Raises ValueError when a ragged column has no length, or one of its two parts is missing.
    """
    newest = get_compat() != "0.1" if keep_newest is None else keep_newest
    pads = padding_idx or {}
    padded = {}
    for key, column in batch.items():
        if key.endswith(_VALUES):
            name = key.removesuffix(_VALUES)
            if name + _OFFSETS not in batch:
                raise ValueError(f"pad_batch: column {key!r} comes without {name + _OFFSETS!r}")
        elif key.endswith(_OFFSETS):
            name = key.removesuffix(_OFFSETS)
            if name not in padding_lengths:
                raise ValueError(f"pad_batch: padding_lengths has no length for column {name!r}")
            if name + _VALUES not in batch:
                raise ValueError(f"pad_batch: column {key!r} comes without {name + _VALUES!r}")
            values, length = batch[name + _VALUES], padding_lengths[name]
            padded[name] = _padded(values, column, length, newest, pads.get(name, 0))
        elif key in padding_lengths and column.dim() > 1:
            lengths = torch.full((len(column) + 1,), column.shape[1], device=column.device)
            starts = lengths.cumsum(0) - lengths
            length, pad = padding_lengths[key], pads.get(key, 0)
            padded[key] = _padded(column.flatten(0, 1), starts, length, False, pad)
        else:
            padded[key] = column
    return padded


def pad_inputs(
    inputs: Mapping[str, torch.Tensor],
    max_sequence_length: int | None = None,
    keep_newest: bool | None = None,
    padding_idx: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """Ragged columns of a batch, padded to its longest session or to max_sequence_length, whichever
    is shorter; other columns as they are.

    keep_newest, padding_idx  see pad_batch

    Reads the lengths on the host where a column is ragged. Raises as pad_batch does.
    """
    offsets = {
        name.removesuffix(_OFFSETS): column
        for name, column in inputs.items()
        if name.endswith(_OFFSETS)
    }
    if not offsets:
        return dict(inputs)
    longest = max(int(torch.diff(column.flatten()).max()) for column in offsets.values())
    if max_sequence_length is not None:
        longest = min(longest, max_sequence_length)
    return pad_batch(inputs, dict.fromkeys(offsets, longest), keep_newest, padding_idx)


def is_ragged(inputs: Mapping[str, torch.Tensor]) -> bool:
    """Does any column come as values and offsets?"""
    return any(name.endswith(_OFFSETS) for name in inputs)


def model_padding(model: Any) -> dict[str, int]:
    """List column of ids -> the id that pads it: the masking's for items, else the tables'."""
    pads: dict[str, int] = {}
    for head in getattr(model, "heads", ()):
        inputs = head.inputs
        if getattr(inputs, "schema", None) is None or not hasattr(inputs, "padding_idx"):
            continue
        item, masking = inputs.item_id, inputs.masking
        for column in inputs.schema:
            if column.is_categorical and (column.is_list or column.name == item):
                pads[column.name] = inputs.padding_idx
        if item is not None and masking is not None:
            pads[item] = masking.padding_idx
    return pads


def check_padding(model: Any, loader: Any, caller: str) -> None:
    """Raises InputError where a loader of ours pads with another id than the model takes for
    padding, so that it would learn padding as an item."""
    for part in (loader, getattr(loader, "dataset", None)):
        given = getattr(part, "padding_ids", None) or {}
        wanted = {n: pad for n, pad in model_padding(model).items() if given.get(n, pad) != pad}
        if wanted:
            raise InputError(
                f"{caller}: the data loader pads with other ids than the model's: column -> id"
                f" { ({n: given[n] for n in wanted}) }, the model's {wanted}; give"
                f" ParquetDataLoader(padding_idx={wanted}), or build the model without padding_idx"
            )


def _padded(
    values: torch.Tensor, offsets: torch.Tensor, length: int, newest: bool, pad: int
) -> torch.Tensor:
    if values.dim() == 2 and values.shape[1] == 1:  # Triton sends columns as (n, 1)
        values = values.squeeze(1)
    return sessions.pad(values, offsets.flatten().long(), length, pad, newest)

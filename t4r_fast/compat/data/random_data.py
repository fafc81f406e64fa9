"""Random batches that fit a schema."""

from __future__ import annotations

import math

import torch

from t4r_fast.schema import ColumnSchema, Schema


def random_data_from_schema(
    schema: Schema,
    num_rows: int,
    max_session_length: int | None = None,
    min_session_length: int = 5,
    device: torch.device | str | None = None,
    ragged: bool = False,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """A batch of random values for all columns of a schema.

    num_rows             sessions, >= 1
    max_session_length   longest session, and the width of the lists. None: every session has the
                         columns' own value_count.max
    min_session_length   shortest session, with max_session_length
    ragged               lists as `x__values` and `x__offsets` instead of padded with 0
    seed                 of the values; torch's random state is neither read nor changed

    returns  ids int64 from max(1, min) to max of the column's domain; numbers float32 in [0, 1);
             lists (num_rows, L), vectors one axis more, other columns (num_rows,)

    Lists of one session have one length. Raises ValueError on sizes out of range, and for a list
    without a length. Replaces transformers4rec.torch.utils.schema_utils.random_data_from_schema.
    """
    longest = max_session_length
    if num_rows < 1 or (longest is not None and not 0 <= min_session_length <= longest):
        raise ValueError(
            "random_data_from_schema: num_rows must be >= 1 and min_session_length between 0 and"
            f" max_session_length; got {num_rows}, {min_session_length}, {longest}"
        )
    draw = torch.Generator().manual_seed(seed)
    lengths = None
    if longest is not None:
        lengths = torch.randint(min_session_length, longest + 1, (num_rows,), generator=draw)
    batch: dict[str, torch.Tensor] = {}
    for column in schema:
        width = _width(column)
        if not column.is_list:
            batch[column.name] = _values(column, (num_rows, *width), draw)
            continue
        own = lengths
        if own is None:
            own = torch.full((num_rows,), _own_length(column))
        if ragged:
            batch[f"{column.name}__values"] = _values(column, (int(own.sum()), *width), draw)
            batch[f"{column.name}__offsets"] = torch.cat([own.new_zeros(1), own.cumsum(0)])
            continue
        length = _own_length(column) if longest is None else longest
        values = _values(column, (num_rows, length, *width), draw)
        inside = torch.arange(length) < own[:, None]
        batch[column.name] = values * inside.view(num_rows, length, *(1 for _ in width))
    return {name: values.to(device) for name, values in batch.items()}


def _width(column: ColumnSchema) -> tuple[int, ...]:
    """The axes of one value: () for ids and numbers, (W,) for vectors."""
    shape = tuple(column.properties.get("shape") or ())
    return shape[-1:] if math.prod(shape) > 1 else ()


def _own_length(column: ColumnSchema) -> int:
    if column.value_count is None or column.value_count.max < 1:
        raise ValueError(
            f"random_data_from_schema: column {column.name!r} is a list without value_count; give"
            " max_session_length"
        )
    return int(column.value_count.max)


def _values(column: ColumnSchema, shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    domain = column.int_domain
    if domain is None:
        return torch.rand(shape, generator=draw)
    low = max(1, int(domain.min))
    return torch.randint(low, max(low, int(domain.max)) + 1, shape, generator=draw)

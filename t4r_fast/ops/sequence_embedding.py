"""sequence_embedding: from padded id and number columns to the input of a sequence model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops._check import FLOAT_DTYPES, check_device, check_int64, check_values, names
from t4r_fast.reference import sequence_embedding as reference

AGGREGATIONS = ("concat", "sum")


def sequence_embedding(
    columns: Sequence[Tensor],
    tables: Sequence[Tensor | None],
    *,
    aggregation: str = "concat",
    mask: Tensor | None = None,
    mask_vector: Tensor | None = None,
    zero_padding: bool = False,
    padding_idx: int = 0,
) -> Tensor:
    """Look up, join and mask the columns of padded sequences.

    parts = [table[column] for id columns, column itself for continuous ones]
    out   = concat(parts, -1) or sum(parts)
    out[pad] = 0 with zero_padding; then out[mask] = mask_vector

    columns       each (B, L) int64 ids with a table, or (B, L) or (B, L, W_f) numbers without one
    tables        for each column (V_f, D_f), or None for a continuous column; one dtype for all:
                  float32, float16, bfloat16 or float64
    aggregation   "concat" in the order of columns, W = sum of widths; "sum", all widths equal
    mask          (B, L) bool, positions that become mask_vector
    mask_vector   (W,)   dtype of the tables
    zero_padding  positions whose first id column is padding_idx become 0; the mask wins
    padding_idx   the id of padding in all columns; as in torch.nn.Embedding its row of a table is
                  looked up but gets no gradient from here
    returns       (B, L, W) in the dtype of the tables

    Differentiable in tables, continuous columns and mask_vector; table gradients are dense and
    deterministic. B = 0 or L = 0 gives an empty result. Raises ValueError or TypeError on shapes,
    dtypes and options, IndexError naming column, position and id when an id is outside its table.
    Replaces transformers4rec.torch's SequenceEmbeddingFeatures, ConcatFeatures and
    MaskSequence.apply_mask_to_inputs.
    """
    columns, tables = list(columns), list(tables)
    _check_columns(columns, tables)
    width = _check_widths(columns, tables, aggregation)
    _check_mask(columns, tables, mask, mask_vector, width)
    if zero_padding and all(table is None for table in tables):
        raise ValueError(
            "sequence_embedding: zero_padding needs an id column to find padding; got none"
        )
    backend.pick("sequence_embedding", columns[0])
    return reference.sequence_embedding(
        columns, tables, aggregation, mask, mask_vector, zero_padding, padding_idx
    )


def _check_columns(columns: list[Tensor], tables: list[Tensor | None]) -> None:
    if not columns or len(columns) != len(tables):
        raise ValueError(
            "sequence_embedding: columns and tables must be equally many, at least one; "
            f"got {len(columns)} and {len(tables)}"
        )
    floats = [t for t in tables if t is not None]
    floats += [c for c, t in zip(columns, tables) if t is None]
    for index, (column, table) in enumerate(zip(columns, tables)):
        name = f"columns[{index}]"
        if column.shape[:2] != columns[0].shape[:2] or column.dim() not in (2, 3):
            raise ValueError(
                f"sequence_embedding: {name} must have shape (B, L) of columns[0], "
                f"{tuple(columns[0].shape[:2])}; got {tuple(column.shape)}"
            )
        if table is not None:
            check_int64("sequence_embedding", name, column, "(B, L) because it has a table", 2)
            if table.dim() != 2:
                raise ValueError(
                    f"sequence_embedding: tables[{index}] must have shape (V, D); "
                    f"got {tuple(table.shape)}"
                )
            check_values(
                (column < 0) | (column >= table.shape[0]),
                column,
                f"sequence_embedding: {name} must hold ids from 0 to {table.shape[0] - 1} "
                f"(tables[{index}] has {table.shape[0]} rows)",
                "position",
            )
        value = column if table is None else table
        if value.dtype not in FLOAT_DTYPES or value.dtype != floats[0].dtype:
            raise TypeError(
                "sequence_embedding: tables and continuous columns must share one dtype of "
                f"{names(FLOAT_DTYPES)}; got {value.dtype} in "
                f"{name if table is None else f'tables[{index}]'} and {floats[0].dtype} before"
            )
        check_device(
            "sequence_embedding",
            "columns[0]",
            columns[0],
            **{name: column, f"tables[{index}]": table},
        )


def _check_widths(columns: list[Tensor], tables: list[Tensor | None], aggregation: str) -> int:
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"sequence_embedding: aggregation must be one of {', '.join(AGGREGATIONS)}; "
            f"got {aggregation!r}"
        )
    widths = []
    for column, table in zip(columns, tables):
        if table is not None:
            widths.append(table.shape[1])
        else:
            widths.append(column.shape[2] if column.dim() == 3 else 1)
    if aggregation == "concat":
        return sum(widths)
    if len(set(widths)) > 1:
        raise ValueError(
            f"sequence_embedding: aggregation 'sum' needs columns of one width; got {widths}"
        )
    return widths[0]


def _check_mask(
    columns: list[Tensor],
    tables: list[Tensor | None],
    mask: Tensor | None,
    mask_vector: Tensor | None,
    width: int,
) -> None:
    if (mask is None) != (mask_vector is None):
        raise ValueError("sequence_embedding: mask and mask_vector must be given together")
    if mask is None or mask_vector is None:
        return
    if mask.shape != columns[0].shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"sequence_embedding: mask must be bool {tuple(columns[0].shape[:2])}; "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    value = next((t for t in tables if t is not None), columns[0])
    if mask_vector.shape != (width,) or mask_vector.dtype != value.dtype:
        raise ValueError(
            f"sequence_embedding: mask_vector must be {value.dtype} ({width},); "
            f"got {mask_vector.dtype} {tuple(mask_vector.shape)}"
        )
    check_device("sequence_embedding", "columns[0]", columns[0], mask=mask, mask_vector=mask_vector)

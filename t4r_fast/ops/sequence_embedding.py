"""sequence_embedding: from the id and number columns of sessions to a sequence model's input."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from t4r_fast import backend
from t4r_fast.ops._check import (
    FLOAT_DTYPES,
    check_device,
    check_int64,
    check_last_offset,
    check_offsets,
    check_values,
    checked,
    names,
)
from t4r_fast.ops._table import eagerly, formed_gradient, may_share_gradient, recorded, recorder_of
from t4r_fast.plain import sequence_embedding as plain

AGGREGATIONS = ("concat", "sum")
_OP = "sequence_embedding"


def sequence_embedding(
    columns: Sequence[Tensor],
    tables: Sequence[Tensor | None],
    *,
    offsets: Tensor | None = None,
    aggregation: str = "concat",
    mask: Tensor | None = None,
    mask_vector: Tensor | None = None,
    zero_padding: bool = False,
    padding_idx: int = 0,
    sparse: bool | Sequence[bool] = False,
) -> Tensor:
    """Look up, join and mask the columns of padded or packed sequences.

    parts = [table[column] for id columns, column itself for continuous ones]
    out   = concat(parts, -1) or sum(parts)
    out[pad] = 0 with zero_padding; then out[mask] = mask_vector; out[offsets[-1]:] = 0

    columns       each (B, L) int64 ids with a table, or (B, L) or (B, L, W_f) numbers without one;
                  with offsets (U,), or (U, W_f): U items of packed sessions
    tables        for each column (V_f, D_f), or None for a continuous column; one dtype for all:
                  float32, float16, bfloat16 or float64
    offsets       (B + 1,) int64 of packed sessions. Only offsets[-1] is read, 0 to U: items behind
                  it are never read, get zeros and have no gradient
    aggregation   "concat" in the order of columns, W = sum of widths; "sum", all widths equal
    mask          (B, L) or (U,) bool, positions that become mask_vector
    mask_vector   (W,)   dtype of the tables
    zero_padding  positions whose first id column is padding_idx become 0; the mask wins. Not with
                  offsets
    padding_idx   the id of padding in all columns; as in torch.nn.Embedding its row of a table is
                  looked up but gets no gradient from here
    sparse        for all tables or for each column: the gradient is a sparse tensor of the rows
                  that occur, as in torch.nn.Embedding: for leaf tensors, and not for
                  torch.compile. A dense one is V x D zeros and the same rows; on a CPU, where
                  tied_softmax_loss has formed one of the same leaf, these rows are added to it. On
                  a GPU a sparse one has B * L or U rows, zeros among them, not coalesced
    returns       (B, L, W) or (U, W) in the dtype of the tables

    Differentiable once in tables, continuous columns and mask_vector. Table gradients are sums in
    the order of positions, in float32 for 16-bit tables: deterministic. Tables and columns may be
    views; a table whose rows are not contiguous is copied. B = 0, L = 0 or U = 0 gives an empty
    result. Raises ValueError or TypeError on shapes, dtypes, options and offsets, IndexError naming
    column, position and id when an id is outside its table.
    Replaces transformers4rec.torch's SequenceEmbeddingFeatures, ConcatFeatures and
    MaskSequence.apply_mask_to_inputs.
    """
    columns, tables = list(columns), list(tables)
    lead = 2 if offsets is None else 1  # axes of all columns: (B, L) or (U,)
    _check_columns(columns, tables, lead)
    items = columns[0].shape[:lead]
    width = _check_widths(columns, tables, aggregation, lead)
    _check_mask(columns, tables, mask, mask_vector, width, items)
    if offsets is not None:
        check_offsets(_OP, offsets, "columns[0]", columns[0])
        if zero_padding:
            raise ValueError(
                "sequence_embedding: zero_padding must be False with offsets: packed sessions hold"
                " no padding"
            )
        # One session of U positions, up to the one that the kernels read from offsets
        columns = [column[None] for column in columns]
        mask = None if mask is None else mask[None]
    if zero_padding and all(table is None for table in tables):
        raise ValueError(
            "sequence_embedding: zero_padding needs an id column to find padding; got none"
        )
    managed = [table is not None and recorder_of(table) is not None for table in tables]
    asked = [sparse] * len(columns) if isinstance(sparse, bool) else list(sparse)
    if len(asked) != len(columns):
        raise ValueError(
            f"sequence_embedding: sparse must be one bool or one per column, {len(columns)}; got"
            f" {len(asked)}"
        )
    sparse_for = tuple(s or m for s, m in zip(asked, managed))
    options = _Options(aggregation == "sum", zero_padding, padding_idx, sparse_for)
    arguments = (options, mask, offsets, mask_vector, columns, tables)
    out = eagerly(_look_up_managed, *arguments) if any(managed) else _look_up(*arguments)
    return out if offsets is None else out[0]


def _look_up(
    options: _Options,
    mask: Tensor | None,
    offsets: Tensor | None,
    mask_vector: Tensor | None,
    columns: list[Tensor],
    tables: list[Tensor | None],
) -> Tensor:
    name = backend.pick(_OP, columns[0])
    if name == "plain":
        _check_ids(columns, tables, offsets)
        return plain.sequence_embedding(columns, tables, mask, mask_vector, offsets, *options)
    return checked(
        name,
        lambda: _check_ids(columns, tables, offsets),
        _SequenceEmbedding.apply,
        *(options, mask, offsets, mask_vector, *columns, *tables),
    )


def _look_up_managed(
    options: _Options,
    mask: Tensor | None,
    offsets: Tensor | None,
    mask_vector: Tensor | None,
    columns: list[Tensor],
    tables: list[Tensor | None],
) -> Tensor:
    """Tables of an optimizer of t4r_fast.optim are brought up to date, and it gets their rows."""
    _check_ids(columns, tables, offsets)  # the recorder reads them first
    padding_idx = options.padding_idx
    read = [
        c.flatten
        if offsets is None or t is None
        else functools.partial(plain.ids_inside, c.flatten(), t, offsets, padding_idx)
        for c, t in zip(columns, tables)
    ]
    tables = [t if t is None else recorded(t, ids) for ids, t in zip(read, tables)]
    return _look_up(options, mask, offsets, mask_vector, columns, tables)


def _check_columns(columns: list[Tensor], tables: list[Tensor | None], lead: int) -> None:
    """Columns have `lead` axes, and those of numbers maybe one more."""
    axes = "(B, L)" if lead == 2 else "(U,)"
    if not columns or len(columns) != len(tables):
        raise ValueError(
            "sequence_embedding: columns and tables must be equally many, at least one; "
            f"got {len(columns)} and {len(tables)}"
        )
    floats = [t for t in tables if t is not None]
    floats += [c for c, t in zip(columns, tables) if t is None]
    for index, (column, table) in enumerate(zip(columns, tables)):
        name = f"columns[{index}]"
        if column.shape[:lead] != columns[0].shape[:lead] or column.dim() - lead not in (0, 1):
            raise ValueError(
                f"sequence_embedding: {name} must have shape {axes} of columns[0], "
                f"{tuple(columns[0].shape[:lead])}; got {tuple(column.shape)}"
            )
        if table is not None:
            check_int64("sequence_embedding", name, column, f"{axes} because it has a table", lead)
            if table.dim() != 2:
                raise ValueError(
                    f"sequence_embedding: tables[{index}] must have shape (V, D); "
                    f"got {tuple(table.shape)}"
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


def _check_ids(columns: list[Tensor], tables: list[Tensor | None], offsets: Tensor | None) -> None:
    if offsets is not None:
        check_last_offset(_OP, offsets, columns[0].shape[1])
    for index, (column, table) in enumerate(zip(columns, tables)):
        if table is None:
            continue
        wrong = (column < 0) | (column >= table.shape[0])
        if offsets is not None:
            column = column[0]
            wrong = wrong[0] & plain.is_inside(column.shape[0], offsets)
        check_values(
            wrong,
            column,
            f"sequence_embedding: columns[{index}] must hold ids from 0 to "
            f"{table.shape[0] - 1} (tables[{index}] has {table.shape[0]} rows)",
            "position" if offsets is None else "item",
        )


def _check_widths(
    columns: list[Tensor], tables: list[Tensor | None], aggregation: str, lead: int
) -> int:
    """The width of the output."""
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
            widths.append(column.shape[lead] if column.dim() > lead else 1)
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
    items: torch.Size,
) -> None:
    if (mask is None) != (mask_vector is None):
        raise ValueError("sequence_embedding: mask and mask_vector must be given together")
    if mask is None or mask_vector is None:
        return
    if mask.shape != items or mask.dtype != torch.bool:
        raise ValueError(
            f"sequence_embedding: mask must be bool {tuple(items)}; "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    value = next((t for t in tables if t is not None), columns[0])
    if mask_vector.shape != (width,) or mask_vector.dtype != value.dtype:
        raise ValueError(
            f"sequence_embedding: mask_vector must be {value.dtype} ({width},); "
            f"got {mask_vector.dtype} {tuple(mask_vector.shape)}"
        )
    check_device("sequence_embedding", "columns[0]", columns[0], mask=mask, mask_vector=mask_vector)


class _Options(NamedTuple):
    sum: bool
    zero_padding: bool
    padding_idx: int
    sparse: tuple[bool, ...]  # per column


class _SequenceEmbedding(torch.autograd.Function):
    # Five parameters, and an odd number of arguments: torch.compile leaves ctx out where there is
    # one argument more than there are parameters (torch 2.13, no gradient needed).
    @staticmethod
    def forward(
        ctx: Any,
        options: _Options,
        mask: Tensor | None,
        offsets: Tensor | None,
        *vector_columns_tables: Any,  # tensors, or None where there is none
    ) -> Tensor:
        mask_vector, *both = vector_columns_tables
        count = len(both) // 2
        columns, tables = both[:count], both[count:]
        ctx.backend = backend.pick(_OP, columns[0])
        ctx.options = options
        ctx.shapes = [
            column.shape if table is None else table.shape for column, table in zip(columns, tables)
        ]
        # Tables are not saved: an optimizer may step between forward and backward. Backward asks
        # only which tensors they are.
        ctx.tables = [t if t is not None and may_share_gradient(t) else None for t in tables]
        ids = [None if table is None else column for column, table in zip(columns, tables)]
        ctx.save_for_backward(mask, offsets, *ids)
        return backend.ops(ctx.backend, plain).sequence_embedding_fwd(
            columns,
            tables,
            options.sum,
            mask,
            mask_vector,
            options.zero_padding,
            options.padding_idx,
            offsets,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        mask, offsets, *columns = ctx.saved_tensors
        count, options, needs = len(columns), ctx.options, ctx.needs_input_grad
        formed = [None if table is None else formed_gradient(table) for table in ctx.tables]
        sparse = [s or g is not None for s, g in zip(options.sparse, formed)]
        of_columns, of_tables = needs[4 : 4 + count], needs[4 + count :]
        widths = [
            1 if ids is None and len(shape) == 2 else shape[-1]
            for ids, shape in zip(columns, ctx.shapes)
        ]
        ids, gradients, vector = backend.ops(ctx.backend, plain).sequence_embedding_bwd(
            dout,
            columns,
            [-1 if c is None else shape[0] for c, shape in zip(columns, ctx.shapes)],
            widths,
            options.sum,
            mask,
            options.zero_padding,
            options.padding_idx,
            any(sparse),
            [int(c or t) for c, t in zip(of_columns, of_tables)] + [int(needs[3])],
            offsets,
        )
        dcolumns: list[Tensor | None] = [None] * count
        dtables: list[Tensor | None] = [None] * count
        for f, shape in enumerate(ctx.shapes):
            if of_columns[f]:
                dcolumns[f] = gradients[f].reshape(shape)
            elif of_tables[f] and sparse[f]:
                # C++: ids are ascending and different. CUDA: a row for each position, see below
                rows = torch.sparse_coo_tensor(
                    *(ids[f][None], gradients[f], shape),
                    is_coalesced=ctx.backend == "cpu",
                    check_invariants=False,
                )
                whole = formed[f]
                if whole is None:
                    dtables[f] = rows
                else:
                    whole.add_(rows)
            elif of_tables[f] and any(sparse):
                dense = gradients[f].new_zeros(shape)
                # of the rows of an id all but one are zeros: the same bits in any order
                dtables[f] = dense.index_add_(0, ids[f], gradients[f])
            elif of_tables[f]:
                dtables[f] = gradients[f]
        return None, None, None, vector if needs[3] else None, *dcolumns, *dtables


def _fake_fwd(
    columns: list[Tensor],
    tables: list[Tensor | None],
    sum: bool,
    mask: Tensor | None,
    mask_vector: Tensor | None,
    zero_padding: bool,
    padding_idx: int,
    offsets: Tensor | None = None,
) -> Tensor:
    widths = [
        table.shape[1] if table is not None else column.shape[2] if column.dim() == 3 else 1
        for column, table in zip(columns, tables)
    ]
    like = next((t for t in tables if t is not None), columns[0])
    width = widths[0]
    if not sum:
        for other in widths[1:]:
            width = width + other
    return like.new_empty((*columns[0].shape[:2], width))


def _fake_bwd(
    dout: Tensor,
    columns: list[Tensor | None],
    rows: list[int],
    widths: list[int],
    sum: bool,
    mask: Tensor | None,
    zero_padding: bool,
    padding_idx: int,
    sparse: bool,
    needs: list[int],
    offsets: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of columns: their shape. Of tables: dense, or ids and rows if sparse.

    A device cannot tell the host how many ids occur, so CUDA gives B * L rows: an id's gradient in
    its first row, zeros in its other ones, and zeros for padding_idx (0 if the table has no such
    row) in what is left. C++ gives the ids that occur, once, ascending.
    """
    ids, gradients = [], []
    for column, size, width, needed in zip(columns, rows, widths, needs):
        shape: tuple[Any, ...] = (0,)
        found: Any = 0
        if needed and column is None:
            shape = (*dout.shape[:2], width)
        elif needed and sparse:
            if dout.device.type == "cuda":
                found = dout.shape[0] * dout.shape[1]
            else:
                found = torch.library.get_ctx().new_dynamic_size()
            shape = (found, width)
        elif needed:
            shape = (size, width)
        ids.append(dout.new_empty((found,), dtype=torch.int64))
        gradients.append(dout.new_empty(shape))
    return ids, gradients, dout.new_empty((dout.shape[2] if needs[-1] else 0,))


backend.declare(
    _OP,
    "sequence_embedding_fwd(Tensor[] columns, Tensor?[] tables, bool sum, Tensor? mask, "
    "Tensor? mask_vector, bool zero_padding, int padding_idx, Tensor? offsets=None) -> Tensor",
    fake=_fake_fwd,
)
backend.declare(
    _OP,
    "sequence_embedding_bwd(Tensor dout, Tensor?[] columns, int[] rows, int[] widths, bool sum, "
    "Tensor? mask, bool zero_padding, int padding_idx, bool sparse, int[] needs, "
    "Tensor? offsets=None) -> (Tensor[], Tensor[], Tensor)",
    fake=_fake_bwd,
)

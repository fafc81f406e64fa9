"""Columns to vectors: lookup, join, projection and the [MASK] vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from t4r_fast.model.bodies.sites import Drops
from t4r_fast.model.mask import Mask
from t4r_fast.model.sessions import Layout, Sessions
from t4r_fast.ops.activation_dropout import activation_dropout
from t4r_fast.ops.sequence_embedding import sequence_embedding


class Inputs(NamedTuple):
    """What makes vectors of a batch's columns.

    item        the column of item ids
    tables      column -> its embedding table, None for numbers; in the order of the join
    how         "concat" or "sum"
    projection  modules behind the join, each of which gives a row from this row alone
    padding_idx the id whose row the lookup does not train
    """

    item: str
    tables: dict[str, nn.Embedding | None]
    how: str
    projection: tuple[nn.Module, ...]
    padding_idx: int


def vectors(
    inputs: Inputs,
    sessions: Sessions,
    mask: Mask,
    mask_vector: Tensor,
    layout: Layout,
    seed: Tensor | None,
) -> Tensor:
    """(U, D), with the [MASK] vector where the mask says so; zeros behind the last item where
    nothing follows the join."""
    in_join = mask.replaced is not None and len(inputs.projection) == 0  # as Dynamo takes it
    dtype = next((t.weight.dtype for t in inputs.tables.values() if t is not None), torch.float32)
    columns = [sessions.columns[name] for name in inputs.tables]
    x = sequence_embedding(
        [c.to(dtype) if t is None else c.long() for c, t in zip(columns, inputs.tables.values())],
        [None if t is None else t.weight for t in inputs.tables.values()],
        offsets=sessions.offsets,
        aggregation=inputs.how,
        mask=mask.replaced if in_join else None,
        mask_vector=mask_vector if in_join else None,
        padding_idx=inputs.padding_idx,
        sparse=[t is not None and t.sparse for t in inputs.tables.values()],
    )
    x = row_by_row(inputs.projection, x, layout.places, seed, site=1 << 20)
    if mask.replaced is None or in_join:
        return x
    return torch.where(mask.replaced.unsqueeze(1), mask_vector.to(x.dtype), x)


def row_by_row(
    modules: tuple[nn.Module, ...], x: Tensor, places: Tensor, seed: Tensor | None, site: int
) -> Tensor:
    """Modules that give each row from this row alone; their dropout draws as all others here do.

    seed  None: no dropout
    """
    for number, module in enumerate(modules):
        if type(module) is nn.Dropout:
            drop = Drops(module.p, seed)(site + number)
            if drop:
                x = activation_dropout(x, places, activation="none", **drop)
        else:
            x = module(x)
    return x

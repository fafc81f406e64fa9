"""Model.grow_items: the same model with more rows in its tables.

The model's description (t4r_fast.model.architecture) is built once more with the larger numbers,
and the weights are copied, so that whatever depends on a number of items follows.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from t4r_fast.compat import compat_level
from t4r_fast.compat.torch.model.recommending import next_item_task, tables
from t4r_fast.errors import InputError
from t4r_fast.model import architecture
from t4r_fast.ops._table import up_to_date
from t4r_fast.schema import Schema

if TYPE_CHECKING:
    from t4r_fast.compat.torch.model.base import Model

_SAMPLER = (".sampler.dist", ".sampler.unique_sampling_dist")  # made anew with a state dict


def grow_items(model: Model, items: Schema | int) -> Model:
    """See Model.grow_items."""
    rows = _rows(model, items)
    item = model.input_schema.item_id_column_name
    with compat_level(model._level):
        description = architecture.describe(model)
        architecture.check(model, description)
        before = next_item_task(model).target_dim
        _enlarge(description, rows, before, rows.get(item, before))
        grown = architecture.rebuild(description)
    for parameter in model.parameters():
        up_to_date(parameter)  # rows that t4r_fast.optim has not come to yet
    state = {n: t for n, t in model.state_dict().items() if not n.endswith(_SAMPLER)}
    grown.to(next(model.parameters()).device)
    fresh = grown.state_dict()
    grown.load_state_dict({n: _grown(t, fresh[n]) for n, t in state.items()})
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    for name, parameter in grown.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return grown.train(model.training)


def _rows(model: Model, items: Schema | int) -> dict[str, int]:
    """Column -> rows, of the tables that grow."""
    schema = model.input_schema
    if schema is None:
        raise InputError("grow_items: the input block has no schema; build it by from_schema")
    have = {name: table.weight.shape[0] for name, table in tables(model)}
    if isinstance(items, Schema):
        absent = sorted(set(have) - set(items.column_names))
        if absent:
            raise InputError(f"grow_items: the schema lacks the model's columns {absent}")
        want = {name: items[name].cardinality for name in have}
    elif isinstance(items, int) and not isinstance(items, bool):
        want = {schema.item_id_column_name: items}
    else:
        raise TypeError(
            f"grow_items: items must be a schema or a number of rows; got a {type(items).__name__}"
        )
    for name, rows in want.items():
        if rows < have[name]:
            raise InputError(
                f"grow_items: column {name!r} has {have[name]} rows and cannot shrink to {rows};"
                " a workflow keeps old ids where it was made by Workflow.update"
            )
    return {name: rows for name, rows in want.items() if rows > have[name]}


def _enlarge(written: Any, rows: dict[str, int], before: int, after: int) -> None:
    """Write the new numbers into a description."""
    if isinstance(written, list):
        for part in written:
            _enlarge(part, rows, before, after)
    if not isinstance(written, dict):
        return
    if isinstance(written.get("schema"), str):
        schema = Schema().from_proto_text(written["schema"])
        for column in schema:
            if column.name in rows and column.int_domain is not None:
                column.int_domain = dataclasses.replace(
                    column.int_domain, max=rows[column.name] - 1
                )
        written["schema"] = schema.to_proto_text()
        return
    arguments = written.get("arguments", {})
    if written.get("new") == "TableConfig" and arguments.get("name") in rows:
        arguments["vocabulary_size"] = rows[arguments["name"]]
    if written.get("new") == "NextItemPredictionTask" and arguments.get("target_dim") == before:
        arguments["target_dim"] = after
    for part in written.values():
        _enlarge(part, rows, before, after)


def _grown(old: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """`old`, and where `fresh` has more rows, rows drawn like the old ones behind them."""
    if old.shape == fresh.shape:
        return old
    count = fresh.shape[0] - old.shape[0]
    mean = old.float().mean(0)
    deviation = old.float().std(0) if old.dim() > 1 else torch.zeros_like(mean)
    noise = torch.randn((count, *old.shape[1:]), device=old.device)
    return torch.cat([old, (mean + deviation * noise).to(old.dtype)])

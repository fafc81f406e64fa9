"""Model.recommend: checked columns in, the best items out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from t4r_fast.compat.torch.model.prediction_task import Asked, NextItemPredictionTask
from t4r_fast.compat.torch.padding import is_ragged, model_padding, pad_inputs
from t4r_fast.errors import InputError

if TYPE_CHECKING:
    from t4r_fast.compat.torch.model.base import Model


def recommend(
    model: Model,
    inputs: Mapping[str, torch.Tensor],
    top_k: int,
    recommend_from: int | None,
    recommend_seen: bool | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See Model.recommend."""
    task = next_item_task(model)
    pads = model_padding(model) if is_ragged(inputs) else None
    padded = pad_inputs(inputs, model.max_sequence_length, model._level != "0.1", pads)
    check_inputs(model, padded)
    training = model.training
    if training:
        model.eval()
    try:
        with torch.no_grad():
            found = model(padded, asked=Asked(top_k, recommend_from, recommend_seen))
    finally:
        if training:
            model.train()
    return found[task.task_name] if isinstance(found, dict) else found


def next_item_task(model: Model, caller: str = "recommend") -> NextItemPredictionTask:
    """The model's next-item task. Raises InputError unless there is exactly one."""
    tasks = [t for t in model.prediction_tasks if isinstance(t, NextItemPredictionTask)]
    if len(tasks) != 1:
        raise InputError(
            f"{caller}: the model must have one NextItemPredictionTask; it has {len(tasks)}"
        )
    return tasks[0]


def tables(model: Model) -> Iterator[tuple[str, nn.Embedding]]:
    """Column name and embedding table of each id column."""
    for head in model.heads:
        categorical = getattr(head.inputs, "categorical_module", None)
        yield from getattr(categorical, "embedding_tables", {}).items()


def check_inputs(model: Model, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError, naming the column, before any kernel reads by a wrong id."""
    schema = model.input_schema
    missing = [n for n in (schema.column_names if schema else ()) if n not in inputs]
    if missing:
        raise InputError(f"recommend: inputs lack the columns {missing}, which the model reads")
    for name, table in tables(model):
        ids, rows = inputs[name], table.weight.shape[0]
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"recommend: column {name!r} must hold whole numbers; got {ids.dtype}")
        bad = ((ids < 0) | (ids >= rows)).nonzero()
        if len(bad):
            place = bad[0].tolist()
            raise InputError(
                f"recommend: column {name!r}, session {place[0]}: id {int(ids[tuple(place)])} is no"
                f" row of the table, 0 <= id < {rows}; encode events by the workflow that the model"
                " was trained with"
            )
    item = next((h.inputs.item_id for h in model.heads if getattr(h.inputs, "item_id", None)), None)
    if item is None:
        return
    shape = inputs[item].shape
    for name in schema.column_names if schema else ():
        if inputs[name].dim() >= 2 and inputs[name].shape[:2] != shape:
            raise InputError(
                f"recommend: column {name!r} must have the sessions and positions of {item!r},"
                f" {tuple(shape)}; got {tuple(inputs[name].shape)}"
            )
    empty = (inputs[item] == next_item_task(model).padding_idx).all(dim=1).nonzero()
    if len(empty):
        raise InputError(f"recommend: session {int(empty[0])} (counted from 0) has no items")

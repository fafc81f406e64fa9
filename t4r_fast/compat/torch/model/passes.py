"""One pass of a Model, in which every value travels as an argument.

A head whose parts all give a row from this row alone, around a body that knows packed sessions,
becomes a SessionModel of t4r_fast.model and runs without padding. All others run padded, block by
block. A part counts as known by its exact class, without hooks and with nothing overridden.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from t4r_fast.compat.torch.block.base import Block, SequentialBlock
from t4r_fast.compat.torch.block.mlp import DenseBlock
from t4r_fast.compat.torch.block.transformer import GPT2Prepare, TransformerBlock
from t4r_fast.compat.torch.block.transformer import _first as first_output
from t4r_fast.compat.torch.features.continuous import ContinuousFeatures, column
from t4r_fast.compat.torch.features.sequence import (
    AGGREGATIONS,
    Encoded,
    TabularSequenceFeatures,
    only_looks_up,
)
from t4r_fast.compat.torch.masking import (
    CausalLanguageModeling,
    Drawn,
    MaskedLanguageModeling,
    MaskSequence,
    ReplacementLanguageModeling,
)
from t4r_fast.compat.torch.model.prediction_task import Asked, NextItemPredictionTask
from t4r_fast.compat.torch.model.task import PredictionTask
from t4r_fast.compat.torch.tabular.aggregation import ConcatFeatures
from t4r_fast.model import sessions
from t4r_fast.model.bodies import gru
from t4r_fast.model.inputs import Inputs
from t4r_fast.model.known import is_hooked, is_row_by_row, packed_body
from t4r_fast.model.mask import Causal, Masked, Masking, in_blocks, used
from t4r_fast.model.model import Body, Hidden, SessionModel, behind_inputs, hidden
from t4r_fast.ops._seed import check_seed
from t4r_fast.ops._sequence_mask import check_padding


def outputs(
    body: nn.Module,
    tasks: Mapping[str, nn.Module],
    columns: Mapping[str, torch.Tensor],
    targets: Any,
    training: bool,
    testing: bool,
    asked: Asked | None,
) -> dict[str, Any]:
    """What tasks on a body make of a padded batch, by task name."""
    found = session_model(body, tasks)
    if found is not None:
        model, attends_padding = found
        run = _whole if attends_padding else _packed
        ((name, task),) = tasks.items()
        return {name: run(body, task, model, columns, training, testing, asked)}
    x, batch = _body(body, columns, training, testing)
    found = {}
    for name, task in tasks.items():
        target = targets.get(task.target_name) if isinstance(targets, Mapping) else targets
        if _own_forward(task) or batch is None:
            options = {} if asked is None or asked.top_k is None else {"top_k": asked.top_k}
            found[name] = task(x, targets=target, training=training, testing=testing, **options)
        else:
            options = {"asked": asked} if isinstance(task, NextItemPredictionTask) else {}
            found[name] = task.run(x, batch, target, training, testing, **options)
    return found


def _own_forward(task: nn.Module) -> bool:
    """Whether a task must be called as a module: it has hooks, or a forward of its own."""
    known = (PredictionTask.forward, NextItemPredictionTask.forward)
    return is_hooked(task) or type(task).forward not in known


# -- padded ----------------------------------------------------------------------------------------


def _body(
    body: nn.Module, columns: Mapping[str, torch.Tensor], training: bool, testing: bool
) -> tuple[Any, Encoded | None]:
    """The body's output, and the batch as a value; None where a part of somebody's own hides it."""
    known = type(body) is SequentialBlock and not is_hooked(body) and len(body)
    inputs = body[0] if known else None
    if type(inputs) is not TabularSequenceFeatures or is_hooked(inputs):
        return body(columns, training=training, testing=testing), None
    batch = inputs.encoded(columns, training, testing)
    inputs.note(batch)
    x = batch.vectors
    for block, mode in zip(list(body)[1:], body.modes()[1:], strict=True):
        if type(block) is TransformerBlock and not is_hooked(block):
            x = block.run(x, batch.drawn)
        else:
            x = block(x, **({"training": training, "testing": testing} if mode else {}))
    return x, batch


# -- packed ----------------------------------------------------------------------------------------


def _packed(
    body: nn.Module,
    task: NextItemPredictionTask,
    model: SessionModel,
    columns: Mapping[str, torch.Tensor],
    training: bool,
    testing: bool,
    asked: Asked | None,
) -> dict[str, Any] | torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    item, inputs = model.inputs.item, body[0]
    if training and isinstance(inputs.masking, ReplacementLanguageModeling):
        inputs.masking.warn_if_alone()
    item_ids = column(columns, item).long()
    if not training and not testing:  # else the mask op looks
        check_padding("inference", item_ids, model.masking.padding_idx)
    lengths = sessions.lengths_of(item_ids, model.masking.padding_idx)
    wanted = {name: column(columns, name) for name in model.inputs.tables}
    batch = sessions.pack({**wanted, item: item_ids}, lengths)
    found = hidden(model, batch, training, testing, dropout=body.training)
    inputs.note(Encoded(found.vectors, item_ids, None, {}))
    inputs.masking.note(partial(_drawn, inputs.masking, item_ids, found))
    targets = found.mask.targets
    return _result(task, model, found.vectors, targets, item_ids, training, testing, asked)


def _whole(
    body: nn.Module,
    task: NextItemPredictionTask,
    model: SessionModel,
    columns: Mapping[str, torch.Tensor],
    training: bool,
    testing: bool,
    asked: Asked | None,
) -> dict[str, Any] | torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """With padding that is attended to, and so is part of the computation: sessions of one length,
    whose last layer runs where a prediction is made alone."""
    batch = body[0].encoded(columns, training, testing)
    body[0].note(batch)
    count, width, _ = batch.vectors.shape
    layout = sessions.whole_rows(count, width, batch.vectors.device)
    seed = check_seed("dropout", None, batch.vectors.device) if body.training else None
    rows, targets, padding_idx = batch.drawn.rows, None, model.masking.padding_idx
    if training or testing:
        targets = batch.drawn.masked_targets.flatten()[rows.clamp(min=0)]
        targets = torch.where(rows < 0, padding_idx, targets)
        one = not training and model.masking.one_target
        rows, targets = used(rows, targets, count if one else None, padding_idx)
    else:
        rows = in_blocks(rows[:count])
    x = behind_inputs(model, batch.vectors.flatten(0, 1), layout, rows, seed)
    return _result(task, model, x, targets, batch.item_ids, training, testing, asked)


def _result(
    task: NextItemPredictionTask,
    model: SessionModel,
    x: torch.Tensor,
    targets: torch.Tensor | None,
    item_ids: torch.Tensor,
    training: bool,
    testing: bool,
    asked: Asked | None,
) -> dict[str, Any] | torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """What the task makes of the vectors (R, D) at which a prediction is made."""
    count = len(item_ids)
    if not training and not testing:
        return task.recommended(x[:count], asked, item_ids)
    if not training and model.masking.one_target:
        return task.scored(x[:count], targets[:count], None, training)
    rows = None
    if sessions.fixed_capacity(targets):  # most rows have no target then
        at = torch.arange(targets.shape[0], device=targets.device)
        rows = torch.where(targets == model.masking.padding_idx, -1, at)
    return task.scored(x, targets, rows, training)


def _drawn(masking: MaskSequence, item_ids: torch.Tensor, found: Hidden) -> Drawn:
    """The mask of a packed batch in the padded form, for code that reads it from the masking."""
    mask = found.mask
    offsets, longer = found.sessions.offsets, found.sessions.longest
    rows, there = mask.rows.clamp(min=0), mask.rows >= 0
    session, place = sessions.session_and_place(offsets, found.sessions.rows)
    flat = torch.where(there, session[rows] * longer + place[rows], -1)
    targets = torch.full((len(item_ids), longer), masking.padding_idx, device=item_ids.device)
    if mask.targets is not None:
        targets.view(-1)[flat[there]] = mask.targets[there]
    replaced = torch.zeros_like(targets, dtype=torch.bool)
    if mask.replaced is not None:
        replaced = sessions.pad(mask.replaced, offsets, longer, False)
    schema = replaced
    return Drawn(item_ids, schema, targets, flat, replaced, masking.eval_on_last_item_seq_only)


def session_model(
    body: nn.Module, tasks: Mapping[str, nn.Module]
) -> tuple[SessionModel, bool] | None:
    """A body and its one task as a SessionModel, and whether it attends to padding; None where they
    must run padded, block by block."""
    if torch.compiler.is_exporting() or type(body) is not SequentialBlock or len(tasks) != 1:
        return None
    (task,) = tasks.values()
    if type(task) is not NextItemPredictionTask:
        return None
    blocks = list(body)
    at = next((n for n, b in enumerate(blocks) if type(b) in (TransformerBlock, Block)), 0)
    if not at or any(is_hooked(m) for part in (body, task) for m in part.modules()):
        return None
    if any(m.training != body.training for m in body.modules()):
        return None  # each part drops or not as its own mode says
    inputs, masking = _inputs(blocks[0]), _masking(blocks[0])
    run = _body_of(blocks[at], blocks[0])
    between, after = _rows(blocks[1:at]), _rows([*blocks[at + 1 :], task.task_block])
    if inputs is None or masking is None or run is None or between is None or after is None:
        return None
    causal, attends_padding, function = run
    if isinstance(masking, Causal) and not causal and not attends_padding:
        return None  # it sees what it must predict, as it was warned of
    vector = blocks[0].masking.masked_item_embedding
    model = SessionModel(inputs, masking, vector, between, function, after)
    return model, attends_padding


def _inputs(block: nn.Module) -> Inputs | None:
    if type(block) is not TabularSequenceFeatures:
        return None
    if block.pre is not None or block.post is not None:
        return None
    how = AGGREGATIONS.get(type(block.aggregation or ConcatFeatures()))
    projection = _rows([block.projection_module])
    tables: dict[str, nn.Embedding | None] = {}
    for module in block.merge_values:
        if only_looks_up(module) and module.pre is None:
            tables.update(module.embedding_tables.items())
        elif _only_picks(module):
            tables.update(dict.fromkeys(module.features))
        else:
            return None
    if how is None or projection is None or block.item_id is None:
        return None
    return Inputs(
        block.item_id,
        {name: tables[name] for name in sorted(tables)},
        how,
        projection,
        block.padding_idx,
    )


def _only_picks(module: nn.Module) -> bool:
    if type(module) is not ContinuousFeatures:
        return False
    return module.pre is None and module.post is None and module.aggregation is None


def _masking(block: nn.Module) -> Masking | None:
    masking = getattr(block, "masking", None)
    if type(masking) is CausalLanguageModeling:
        return Causal(
            masking.padding_idx,
            masking.train_on_last_item_seq_only,
            masking.eval_on_last_item_seq_only,
            masking.hide_history,
        )
    if type(masking) not in (MaskedLanguageModeling, ReplacementLanguageModeling):
        return None
    last = masking.eval_on_last_item_seq_only
    every = "train" if masking.eval_all_items == "masked" else "shifted"
    return Masked(masking.padding_idx, masking.mlm_probability, "last" if last else every)


def _body_of(block: nn.Module, inputs: nn.Module) -> tuple[bool, bool, Body] | None:
    """Whether a body looks back alone, whether it attends to padding, and its function over packed
    sessions."""
    if type(block) is Block:
        if type(block.module) is not nn.GRU or gru.why_not(block.module):
            return None
        return True, False, partial(_run_gru, block.module)
    known = block.prepare_module is None or type(block.prepare_module) is GPT2Prepare
    if not known or block.output_fn is not first_output or block.masking is not inputs.masking:
        return None
    found = packed_body(block.transformer)
    if isinstance(found, str):
        return None
    return found.looks_back, block.attend_padding and not found.looks_back, found.run


def _run_gru(module: nn.GRU, x, layout, rows, seed):
    return gru.gru(module, x, layout, rows)


def _rows(blocks: list[nn.Module | None]) -> tuple[nn.Module, ...] | None:
    """The modules inside these blocks, one after the other; None where one is not row by row."""
    found: list[nn.Module] = []
    for block in blocks:
        if block is None:
            continue
        if type(block) in (SequentialBlock, DenseBlock, nn.Sequential):
            inner = _rows(list(block))
            if inner is None:
                return None
            found += inner
        elif is_row_by_row(block):
            found.append(block)
        else:
            return None
    return tuple(found)

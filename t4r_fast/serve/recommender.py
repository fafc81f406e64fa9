"""One answer for every way to serve: raw events, the fitted workflow, the model, product ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import polars as pl
import torch

from t4r_fast.compat.torch.model.base import Model
from t4r_fast.compat.torch.model.prediction_task import Asked
from t4r_fast.compat.torch.model.recommending import next_item_task, tables
from t4r_fast.compat.torch.padding import model_padding, pad_batch
from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow
from t4r_fast.etl.columns import CATEGORICAL, CONTINUOUS
from t4r_fast.etl.features import FIRST_ID
from t4r_fast.ops.item_topk import MAX_K
from t4r_fast.schema import Schema

SESSIONS = 256  # scored at once by recommend_encoded: bounds its memory


@dataclasses.dataclass
class Recommendations:
    """The best items of some sessions, best first.

    sessions  the sessions' values in the events, in the order in which they first came
    items     for each session its products, as they stand in the events; fewer than asked for
              where no more are left
    ids       (B, k) int64, the model's ids of these products; -1 where none is left
    scores    (B, k) float32; -inf where none is left
    """

    sessions: list
    items: list[list]
    ids: np.ndarray
    scores: np.ndarray


class Recommender:
    """Answers raw events of sessions with the products that come next.

    Threads may share it, and the model: a call writes nothing that another one reads, so requests
    are answered at the same time, each as if it were alone.

    model     a trained Model with one next-item task; it is put in evaluation mode
    workflow  the fitted ETL workflow of its training data; None: answer() takes encoded sessions
    length    positions that sessions are padded to, as in training; longer sessions keep their
              newest events. None: the model's max_sequence_length, else the longest session in its
              schema, else the workflow's max_length

    Products that the workflow does not know count as its one unknown product; they and padding are
    never recommended. Raises InputError when model and workflow are of different data.
    """

    def __init__(self, model: Model, workflow: Workflow | None, length: int | None = None) -> None:
        self.model, self.task, self.schema = model, next_item_task(model), read_schema(model)
        if length is not None and length < 1:
            raise InputError(f"length must be at least 1; got {length}")
        self.length = served_length(model, workflow) if length is None else length
        self.workflow = None if workflow is None else needed_part(model, workflow)
        # without a workflow nobody knows which ids beside padding stand for no product
        first = self.task.padding_idx + 1 if workflow is None else FIRST_ID
        self._first = max(first, self.task.recommend_from)
        if model.training:
            model.eval()

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column of the events that are read: session, item, time and what the model's side
        features need."""
        return self.fitted.columns

    @property
    def fitted(self) -> Workflow:
        """The workflow; raises InputError where there is none."""
        if self.workflow is None:
            raise InputError("this Recommender has no workflow; it takes encoded sessions alone")
        return self.workflow

    def recommend(
        self, events: pl.DataFrame, top_k: int = 20, *, exclude_seen: bool = False
    ) -> Recommendations:
        """The best next products of each session in the events.

        events        a frame with `columns`, in any order; at least one event
        top_k         1 to 128
        exclude_seen  True: no product of the session's own (of its last `length` events)

        Raises InputError naming the column on values that are not what the ETL takes.
        """
        keys, inputs = self.encode(events)
        scores, ids = self.answer(inputs, top_k, exclude_seen)
        return Recommendations(keys, self.products(ids), ids, scores)

    def recommend_encoded(
        self, sessions: pl.DataFrame, top_k: int = 20, *, exclude_seen: bool = False
    ) -> Recommendations:
        """As recommend(), of sessions in the ETL's encoding, in their order.

        sessions  a list column per column that the model reads, as in the ETL's parquet files;
                  `user_session` names the sessions, else their places do, from 1

        Raises InputError on a missing column, an empty session or an id that a table lacks.
        """
        check_top_k(top_k)
        missing = [name for name in self.schema.column_names if name not in sessions.columns]
        if missing:
            raise InputError(f"sessions lack the columns {missing}, which the model reads")
        counts = sessions[self.schema.item_id_column_name].list.len().fill_null(0)
        if (counts == 0).any():
            raise InputError(f"session {(counts == 0).arg_max()} (counted from 0) has no items")
        named = "user_session" in sessions.columns
        keys = sessions["user_session"].to_list() if named else [*range(1, sessions.height + 1)]
        parts = [
            self.answer(self.padded(part), top_k, exclude_seen)
            for part in sessions.iter_slices(SESSIONS)
        ]
        scores = np.concatenate([np.empty((0, top_k), np.float32), *(s for s, _ in parts)])
        ids = np.concatenate([np.empty((0, top_k), np.int64), *(i for _, i in parts)])
        return Recommendations(keys, self.products(ids), ids, scores)

    def encode(self, events: pl.DataFrame) -> tuple[list, dict[str, torch.Tensor]]:
        """The sessions of raw events, and the padded columns that the model reads."""
        column = self.columns["session"]
        if column in events.columns:
            keys = events[column]
            missing = keys.is_null() | (keys == "" if keys.dtype == pl.String else False)
            if missing.any():
                row = int(missing.to_numpy().argmax()) + 1
                raise InputError(
                    f"events: column {column!r}, row {row} (the first row of data is 1): the"
                    " session is missing"
                )
        if not events.height:
            raise InputError("events: there are none; a session needs at least one event")
        sessions = self.fitted.transform(events, min_length=1)
        order = pl.DataFrame({"user_session": events[column].unique(maintain_order=True)})
        if order["user_session"].dtype != sessions["user_session"].dtype:
            order = order.cast({"user_session": sessions["user_session"].dtype})
        sessions = order.join(sessions, on="user_session", how="left", maintain_order="left")
        return sessions["user_session"].to_list(), self.padded(sessions)

    def padded(self, sessions: pl.DataFrame) -> dict[str, torch.Tensor]:
        """(B, length) of each column that the model reads, from lists in the ETL's encoding."""
        ragged = {}
        for column in self.schema:
            kind = torch.float32 if column.type == "FLOAT" else torch.int64
            lists = sessions[column.name]
            counts = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
            values = lists.explode(empty_as_null=False, keep_nulls=False).to_numpy()
            offsets = np.concatenate([[0], np.cumsum(counts)])
            ragged[f"{column.name}__values"] = torch.tensor(values, dtype=kind)
            ragged[f"{column.name}__offsets"] = torch.from_numpy(offsets)
        names = self.schema.column_names
        newest = self.fitted.rules.keep == "last"
        pads = model_padding(self.model)
        return pad_batch(ragged, dict.fromkeys(names, self.length), newest, pads)

    def answer(
        self, inputs: Mapping[str, torch.Tensor], top_k: int, exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids, (B, top_k), of padded columns."""
        check_top_k(top_k)
        scores, ids = self.model.recommend(
            inputs,
            top_k,
            recommend_from=self._first,
            recommend_seen=False if exclude_seen else None,
        )
        return scores.float().numpy(), ids.numpy()

    def scores(self, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
        """(B, V) float32, the scores of all items, of padded columns."""
        with torch.no_grad():
            found = self.model(inputs, asked=Asked())
        found = found[self.task.task_name] if isinstance(found, dict) else found
        return found.float().numpy()

    def products(self, ids: np.ndarray) -> list[list]:
        """Per row the products of the ids, without the places where none was left."""
        found = self.fitted.items(np.maximum(ids, 0).ravel())
        width = ids.shape[1]
        rows = [found[i * width : (i + 1) * width] for i in range(len(ids))]
        return [[p for p, i in zip(row, row_ids) if i >= 0] for row, row_ids in zip(rows, ids)]


def check_top_k(top_k: object, where: str = "") -> None:
    """Raise InputError unless it is a number of products that an answer can have."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_K:
        raise InputError(f"{where}top_k must be a whole number from 1 to {MAX_K}; got {top_k!r}")


def read_schema(model: Model) -> Schema:
    """The columns that a model reads. Raises InputError where its input block does not know."""
    if model.input_schema is None:
        raise InputError("the model's input block has no schema; build it by from_schema")
    return model.input_schema


def served_length(model: Model, workflow: Workflow | None) -> int:
    """The positions that a model's sessions are padded to; see Recommender."""
    if model.max_sequence_length is not None:
        return int(model.max_sequence_length)
    schema = model.input_schema
    if schema is not None:
        count = schema[schema.item_id_column_name].value_count
        if count is not None and count.max:
            return int(count.max)
    if workflow is None:
        raise InputError("length: the model does not know how long its sessions are; give length")
    return workflow.rules.max_length


def needed_part(model: Model, workflow: Workflow) -> Workflow:
    """The workflow with the roles alone that the model's columns need.

    Raises InputError when the model reads columns that the workflow does not make, or has tables
    of other sizes than its vocabularies.
    """
    schema = read_schema(model)
    suffix = workflow.rules.suffix
    made = {name + suffix: name for name in workflow.feature_names()}
    reads = schema.column_names
    missing = [name for name in reads if name not in made]
    if missing:
        raise InputError(
            f"the model reads {missing}, which the workflow does not make; it makes {list(made)}"
        )
    roles = {"session", "item", "time"}
    for name in (made[column] for column in reads):
        roles.update([CATEGORICAL[name]] if name in CATEGORICAL else CONTINUOUS[name])
    for column, table in tables(model):
        role = CATEGORICAL[made[column]]
        rows = workflow.vocabularies[role].height + FIRST_ID
        if table.weight.shape[0] != rows:
            raise InputError(
                f"column {column!r}: the model's table has {table.weight.shape[0]} rows and the"
                f" workflow {rows} ids of role {role}: they are of different ETL runs"
            )
    part = dataclasses.replace(
        workflow,
        columns={r: c for r, c in workflow.columns.items() if r in roles},
        vocabularies={r: v for r, v in workflow.vocabularies.items() if r in roles},
    )
    part.index()
    return part

"""A small shop for tests of serving: events, the fitted workflow, models with random weights."""

from __future__ import annotations

import functools

import polars as pl
import torch

import t4r_fast.torch as tr
from t4r_fast import etl
from t4r_fast.generate import generate_events

ITEM = "product_id-list_seq"
LENGTH = 6  # shorter than some sessions


@functools.lru_cache(maxsize=1)
def shop(folder: str) -> tuple[pl.DataFrame, etl.Workflow]:
    """Events, and the workflow fitted on all but the last day."""
    path = f"{folder}/events.csv"
    generate_events(path, items=80, sessions_per_day=120, days=2)
    events = pl.read_csv(path)
    return events, etl.Workflow.fit(path, max_length=12)


def make_model(workflow: etl.Workflow, side: bool = False, **task) -> tr.Model:
    schema = workflow.schema() if side else workflow.schema().select_by_name([ITEM])
    torch.manual_seed(5)
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, max_sequence_length=LENGTH, d_output=16, masking="mlm", embedding_dim_default=16
    )
    config = tr.XLNetConfig.build(16, 2, 1, LENGTH, initializer_range=0.5)
    block = tr.TransformerBlock(config, masking=inputs.masking, attend_padding=False)
    task = tr.NextItemPredictionTask(weight_tying=True, **task)
    model = tr.Model(
        tr.Head(tr.SequentialBlock(inputs, block), task, inputs=inputs),
        max_sequence_length=LENGTH,
    )
    with torch.no_grad():
        model.heads[0].inputs.item_embedding_table.weight.normal_()
    return model.eval()


def latest(events: pl.DataFrame, sessions: int) -> pl.DataFrame:
    """The events of the last sessions, in the order of their time."""
    keys = events["user_session"].unique(maintain_order=True).tail(sessions)
    return events.filter(pl.col("user_session").is_in(keys.implode()))


def lists(events: pl.DataFrame, workflow: etl.Workflow) -> dict[str, torch.Tensor]:
    """(B, LENGTH) item ids by plain Python, sessions in the order of their first event."""
    ids = dict(zip(workflow.vocabularies["item"]["value"], workflow.vocabularies["item"]["id"]))
    by_session: dict[str, list[tuple[str, int]]] = {}
    for session, time, item in events.select("user_session", "event_time", "product_id").rows():
        by_session.setdefault(session, []).append((time, item))
    rows = torch.zeros(len(by_session), LENGTH, dtype=torch.int64)
    for row, found in zip(rows, by_session.values()):
        found = sorted(found, key=lambda pair: pair[0])
        items = [i for n, (_, i) in enumerate(found) if n == 0 or found[n - 1][1] != i]
        items = [ids.get(i, 2) for i in items][-LENGTH:]
        row[: len(items)] = torch.tensor(items)
    return {ITEM: rows}

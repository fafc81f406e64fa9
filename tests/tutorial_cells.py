"""The tutorial's models, written as its cells write them, and batches for them."""

from __future__ import annotations

import torch

import t4r_fast.torch as tr
from t4r_fast.schema import ColumnSchema, Schema, ValueCount
from t4r_fast.torch.ranking_metric import NDCGAt, RecallAt

ITEM = "product_id-list_seq"
NUMBERS = (
    "product_recency_days_log_norm-list_seq",
    "et_dayofweek_sin-list_seq",
    "et_dayofweek_cos-list_seq",
    "price_log_norm-list_seq",
    "relative_price_to_avg_categ_id-list_seq",
)
LENGTH = 20


def schema(items: int, categories: int = 567, brands: int = 2641) -> Schema:
    """The tutorial's columns for tables of these many rows."""
    count = ValueCount(2, LENGTH)
    ids = {ITEM: items, "category_id-list_seq": categories, "brand-list_seq": brands}
    columns = [
        ColumnSchema.create_categorical(
            name, rows - 1, value_count=count, tags=["list", *(["item_id"] if name == ITEM else [])]
        )
        for name, rows in ids.items()
    ]
    columns += [
        ColumnSchema.create_continuous(n, value_count=count, tags=["list"]) for n in NUMBERS
    ]
    return Schema(columns)


def batch(schema: Schema, sessions: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Random sessions of 2 to `length` items, padded on the right."""
    n = torch.randint(2, length + 1, (sessions, 1))
    out = {}
    for column in schema:
        shape = (sessions, length)
        values = (
            torch.randint(3, column.cardinality, shape)
            if column.is_categorical
            else torch.randn(shape)
        )
        out[column.name] = torch.where(torch.arange(length) < n, values, 0)
    return out


def metrics() -> list:
    return [
        NDCGAt(top_ks=[10, 20], labels_onehot=True),
        RecallAt(top_ks=[10, 20], labels_onehot=True),
    ]


def gru(schema: Schema, batch_first: bool = False) -> tr.Model:
    d_model = 128
    schema = schema.select_by_name([ITEM])
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, max_sequence_length=LENGTH, masking="causal"
    )
    body = tr.SequentialBlock(
        inputs,
        tr.MLPBlock([d_model]),
        tr.Block(
            torch.nn.GRU(d_model, d_model, num_layers=1, batch_first=batch_first),
            [None, LENGTH, d_model],
        ),
    )
    task = tr.NextItemPredictionTask(weight_tying=True, hf_format=True, metrics=metrics())
    return tr.Model(tr.Head(body, task, inputs=inputs))


def xlnet(schema: Schema, side: bool = False, masking: str = "mlm", **config) -> tr.Model:
    d_model = 192
    if not side:
        schema = schema.select_by_name([ITEM])
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema,
        max_sequence_length=LENGTH,
        aggregation="concat",
        d_output=d_model,
        masking=masking,
    )
    config = {"n_head": 4, "n_layer": 2, **config}
    transformer = tr.XLNetConfig.build(d_model=d_model, total_seq_length=LENGTH, **config)
    body = tr.SequentialBlock(
        inputs, tr.MLPBlock([192]), tr.TransformerBlock(transformer, masking=inputs.masking)
    )
    task = tr.NextItemPredictionTask(weight_tying=True, hf_format=True, metrics=metrics())
    return tr.Model(tr.Head(body, task, inputs=inputs))

"""Random events and sessions that fit a schema.

Values are drawn independently: nothing can be learned of them beyond how popular items are. Events
with structure come from `t4r-fast generate`.
"""

from __future__ import annotations

import numpy as np
import polars as pl

from t4r_fast.compat.data.preprocessing import session_aggregator
from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema, Tags, ValueCount


def generate_session_interactions(
    num_interactions: int,
    schema: Schema,
    maximum_length: int = 20,
    minmum_length: int = 2,
    device: str = "gpu",
    seed: int = 0,
) -> pl.DataFrame:
    """Random sessions: generate_item_interactions, then session_aggregator.

    minmum_length  the shortest session that is kept; the reference spells it so
    device         no effect: this runs on the CPU
    seed           of the values

    Replaces transformers4rec.data.synthetic.generate_session_interactions, which fails in 23.12.
    """
    events = generate_item_interactions(num_interactions, schema, seed)
    return session_aggregator(schema, events, maximum_length, minmum_length)


def generate_item_interactions(
    num_interactions: int, schema: Schema, seed: int = 0
) -> pl.DataFrame:
    """Random events, (num_interactions,) of every column.

    schema  one column tagged session_id and one item_id; columns tagged session have one value for
            each session, columns tagged item one for each item where they are ids, else for each
            event
    seed    of the values

    Item ids are log-normal, so that few of them stand for most events. The reference gives pandas.
    Raises InputError when the schema lacks one of the two columns.
    """
    rng = np.random.default_rng(seed)
    session = _one(schema, Tags.SESSION_ID)
    item = _one(schema, Tags.ITEM_ID)
    sessions = rng.integers(1, max(2, int(session.int_domain.max)), num_interactions)
    drawn = rng.lognormal(3.0, 1.0, num_interactions).astype(np.int64)
    items = np.clip(drawn, 1, int(item.int_domain.max))
    columns = {session.name: sessions, item.name: items}
    of_which = np.unique(sessions, return_inverse=True)[1]
    for column in schema.select_by_tag(Tags.SESSION):
        count = int(of_which.max(initial=-1)) + 1
        columns[column.name] = _values(column, count, rng)[of_which]
    for column in schema.select_by_tag(Tags.ITEM):
        if column.name in columns:
            continue
        if column.int_domain is None:
            columns[column.name] = _values(column, num_interactions, rng)
        else:
            high = max(1, int(column.int_domain.max) - 1)
            columns[column.name] = 1 + (items - 1) * high // (int(items.max(initial=1)) + 1)
    return pl.DataFrame(columns)


def _one(schema: Schema, tag: Tags) -> ColumnSchema:
    found = list(schema.select_by_tag(tag))
    if len(found) != 1 or found[0].int_domain is None:
        raise InputError(
            f"generate_item_interactions: the schema needs one id column tagged {tag}; got"
            f" {[c.name for c in found]}"
        )
    return found[0]


def _values(column: ColumnSchema, count: int, rng: np.random.Generator) -> np.ndarray:
    if column.has_tags([Tags.BINARY_CLASSIFICATION]):
        return rng.integers(0, 2, count)
    if column.int_domain is not None:
        return rng.integers(1, max(2, int(column.int_domain.max)), count)
    domain = column.float_domain
    bounded = domain is not None and np.isfinite([domain.min, domain.max]).all()
    return rng.uniform(domain.min, domain.max, count) if bounded else rng.uniform(size=count)


_LIST = ValueCount(1, 20)
#: Sessions of a shop with a target of each kind.
synthetic_ecommerce_data_schema = Schema(
    [
        ColumnSchema.create_categorical("session_id", 5000, tags=[Tags.SESSION_ID]),
        ColumnSchema.create_categorical(
            "item_id", 10_000, tags=[Tags.ITEM_ID, Tags.LIST], value_count=_LIST
        ),
        ColumnSchema.create_categorical(
            "category", 100, tags=[Tags.LIST, Tags.ITEM], value_count=_LIST
        ),
        ColumnSchema.create_continuous(
            "item_recency",
            min_value=0,
            max_value=1,
            tags=[Tags.LIST, Tags.ITEM],
            value_count=_LIST,
        ),
        ColumnSchema.create_categorical("day", 11, tags=[Tags.SESSION]),
        ColumnSchema.create_categorical(
            "purchase", 3, tags=[Tags.SESSION, Tags.BINARY_CLASSIFICATION]
        ),
        ColumnSchema.create_continuous(
            "price", min_value=0, max_value=1, tags=[Tags.SESSION, Tags.REGRESSION]
        ),
    ]
)

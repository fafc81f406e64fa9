"""Steps from events to sessions, on data frames: Polars' or pandas', the same kind comes back.

For data that do not fit in memory and for everything else that the tutorial does there is
`t4r-fast etl`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from t4r_fast.errors import InputError
from t4r_fast.schema import Schema, Tags

FIRST_SEEN_ITEM_COL_NAME = "item_ts_first"


def remove_consecutive_interactions(
    df: Any,
    session_id_col: str = "session_id",
    item_id_col: str = "item_id",
    timestamp_col: str = "timestamp",
) -> Any:
    """The events in order of session and time, without those that repeat the item before them.

    Replaces transformers4rec.utils.data_utils.remove_consecutive_interactions.
    """
    events = _polars(df).sort(session_id_col, timestamp_col, maintain_order=True)
    session, item = pl.col(session_id_col), pl.col(item_id_col)
    again = (session == session.shift(1)) & (item == item.shift(1))
    return _like(df, events.filter(~again.fill_null(False)))


def add_item_first_seen_col_to_df(
    df: Any,
    item_id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    first_seen_column_name: str = FIRST_SEEN_ITEM_COL_NAME,
) -> Any:
    """A further column: when the event's item was first seen.

    Replaces transformers4rec.utils.data_utils.add_item_first_seen_col_to_df.
    """
    first = pl.col(timestamp_column).min().over(item_id_column)
    return _like(df, _polars(df).with_columns(first.alias(first_seen_column_name)))


def session_aggregator(
    schema: Schema,
    data: Any,
    maximum_length: int = 20,
    minimum_length: int = 2,
    device: str = "gpu",
) -> Any:
    """Events to sessions: lists of the item columns, the first value of the session columns.

    schema          one column tagged session_id; columns tagged item become `<name>-list_trim`,
                    columns tagged session `<name>-first`
    maximum_length  of longer sessions the first items are kept
    minimum_length  shorter ones are dropped
    device          no effect: this runs on the CPU

    Events stand in the order of the data. Raises InputError without a column tagged session_id or
    item. Replaces transformers4rec.utils.data_utils.session_aggregator, which needs NVTabular.
    """
    items = schema.select_by_tag(Tags.ITEM).column_names
    items += [n for n in schema.select_by_tag(Tags.ITEM_ID).column_names if n not in items]
    sessions = schema.select_by_tag(Tags.SESSION_ID).column_names
    if len(sessions) != 1 or not items:
        raise InputError(
            "session_aggregator: the schema needs one column tagged session_id and at least one"
            f" tagged item; got {sessions} and {items}"
        )
    of_session = schema.select_by_tag(Tags.SESSION).column_names
    grouped = _polars(data).group_by(sessions[0], maintain_order=True)
    table = grouped.agg(
        *(pl.col(n).first().alias(f"{n}-first") for n in of_session),
        *(pl.col(n).head(maximum_length).alias(f"{n}-list_trim") for n in items),
    )
    table = table.filter(pl.col(f"{items[0]}-list_trim").list.len() >= minimum_length)
    return _like(data, table.drop(sessions[0]))


def save_time_based_splits(
    data: Any,
    output_dir: str | os.PathLike[str],
    partition_col: str = "day_idx",
    timestamp_col: str = "ts/first",
    test_size: float = 0.1,
    val_size: float = 0.1,
    overwrite: bool = True,
    cpu: bool = False,
) -> None:
    """Write <output_dir>/<value of partition_col>/{train,valid,test}.parquet.

    timestamp_col        rows of a partition are ordered by it
    test_size, val_size  shares of the rows, drawn at random as the reference draws them on the CPU
    overwrite            delete the folder first
    cpu                  no effect: this runs on the CPU

    Raises InputError on shares out of range or columns that are missing.
    Replaces transformers4rec.utils.data_utils.save_time_based_splits.
    """
    train_size = 1 - val_size - test_size
    if test_size < 0 or val_size < 0 or train_size < 0:
        raise InputError(
            "save_time_based_splits: test_size and val_size must be >= 0 and together <= 1; got"
            f" {test_size} and {val_size}"
        )
    table = _polars(data)
    column = partition_col[0] if isinstance(partition_col, list) else partition_col
    missing = [n for n in (column, timestamp_col) if n not in table.columns]
    if missing:
        raise InputError(f"save_time_based_splits: no column {missing}; got {table.columns}")
    folder = Path(output_dir)
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    for (value,), part in table.partition_by(column, as_dict=True).items():
        part = part.sort(timestamp_col, maintain_order=True).drop(column)
        # the reference's numbers: numpy's old generator, seeded with 1 for each partition
        draw = np.random.RandomState(1).rand(len(part))
        chosen = {
            "train": draw <= train_size,
            "valid": (draw > train_size) & (draw <= train_size + val_size),
            "test": draw > 1 - test_size,
        }
        target = folder / str(value)
        target.mkdir(parents=True, exist_ok=True)
        for name, rows in chosen.items():
            part.filter(pl.Series(rows)).write_parquet(target / f"{name}.parquet")


def _polars(df: Any) -> pl.DataFrame:
    if isinstance(df, pl.DataFrame):
        return df
    if isinstance(df, pl.LazyFrame):
        return df.collect()
    if type(df).__module__.partition(".")[0] == "pandas":
        return pl.from_pandas(df)
    raise TypeError(f"a data frame of Polars or pandas is needed; got {type(df).__name__}")


def _like(df: Any, result: pl.DataFrame) -> Any:
    return result if isinstance(df, (pl.DataFrame, pl.LazyFrame)) else result.to_pandas()

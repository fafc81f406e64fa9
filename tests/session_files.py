"""Small session folders in the layout of the ETL, for tests that need no events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from t4r_fast.schema import ColumnSchema, Schema, Tags, ValueCount

ITEM = "product_id-list_seq"
CATEGORICAL = ("category_id-list_seq", "brand-list_seq")
CONTINUOUS = (
    "product_recency_days_log_norm-list_seq",
    "et_dayofweek_sin-list_seq",
    "et_dayofweek_cos-list_seq",
    "price_log_norm-list_seq",
    "relative_price_to_avg_categ_id-list_seq",
)


def session_schema(items: int, side: bool = False) -> Schema:
    counts = ValueCount(2, 20)

    def categorical(name, rows, tags):
        column = ColumnSchema.create_categorical(name, num_items=rows - 1, tags=tags)
        column.value_count = counts
        return column

    columns = [categorical(ITEM, items, [Tags.ITEM_ID, Tags.ITEM, Tags.LIST])]
    if side:
        columns += [categorical(name, 12, [Tags.ITEM, Tags.LIST]) for name in CATEGORICAL]
        columns += [
            ColumnSchema.create_continuous(name, value_count=counts, tags=[Tags.LIST])
            for name in CONTINUOUS
        ]
    return Schema(columns)


def write_windows(
    folder: Path, windows: dict[int, dict[str, list[list[int]]]], items: int, side: bool = False
) -> Path:
    """windows: {1: {"train": [[3, 4], ...], "valid": ..., "test": ...}}; a split may be missing."""
    for window, splits in windows.items():
        at = folder / "sessions_by_day" / str(window)
        at.mkdir(parents=True)
        for split in ("train", "valid", "test"):
            sessions = splits.get(split, [])
            frame = {ITEM: pl.Series(sessions, dtype=pl.List(pl.Int64))}
            if side:
                frame |= {
                    name: pl.Series(
                        [[3 + i % 9 for i in s] for s in sessions], dtype=pl.List(pl.Int64)
                    )
                    for name in CATEGORICAL
                }
                frame |= {
                    name: pl.Series(
                        [np.cos(np.asarray(s, dtype=float)).tolist() for s in sessions],
                        dtype=pl.List(pl.Float32),
                    )
                    for name in CONTINUOUS
                }
            pl.DataFrame(frame).write_parquet(at / f"{split}.parquet")
    session_schema(items, side).to_proto_text(folder / "schema.pbtxt")
    return folder


def walks(seed: int, sessions: int, items: int, length: int = 6) -> list[list[int]]:
    """Sessions that step through the ids in a ring: even a small model learns the next one."""
    rng = np.random.default_rng(seed)
    span = items - 3
    starts = rng.integers(0, span, sessions)
    strides = rng.integers(1, 3, sessions)
    lengths = rng.integers(2, length + 1, sessions)
    return [
        [int(3 + (s + d * i) % span) for i in range(n)]
        for s, d, n in zip(starts, strides, lengths, strict=True)
    ]

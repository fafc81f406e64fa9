"""Record batches of the reference's data loaders: tests/parity/loaders.json.

Run it in an environment that holds transformers4rec 23.12 (not ours):

    python tests/parity/record_loaders.py

The columns and the batches are recorded, no code.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from merlin_standard_lib import ColumnSchema, Schema
from merlin_standard_lib.schema.schema import ValueCount
from transformers4rec.torch.utils.data_utils import (
    MerlinDataLoader,
    ParquetDataset,
    PyarrowDataLoader,
)

ROWS, LENGTH, BATCH = 8, 4, 3
LISTS = {"item": pa.list_(pa.int64()), "price": pa.list_(pa.float32())}
OTHERS = {"user": pa.int64(), "age": pa.float32(), "click": pa.int64(), "like": pa.float32()}


def columns() -> dict:
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(1, 7, ROWS)]
    return {
        "item": [[int(i) for i in rng.integers(1, 50, n)] for n in lengths],
        "price": [[round(float(x), 3) for x in rng.random(n)] for n in lengths],
        "user": [int(i) for i in rng.integers(1, 9, ROWS)],
        "age": [round(float(x), 3) for x in rng.random(ROWS)],
        "click": [int(i) for i in rng.integers(0, 2, ROWS)],
        "like": [round(float(x), 3) for x in rng.random(ROWS)],
    }


def schema() -> Schema:
    count = ValueCount(1, 6)
    return Schema(
        [
            ColumnSchema.create_categorical(
                "item", 50, value_count=count, tags=["item_id", "list"]
            ),
            ColumnSchema.create_continuous("price", value_count=count, tags=["list"]),
            ColumnSchema.create_categorical("user", 9),
            ColumnSchema.create_continuous("age"),
            ColumnSchema("click").with_tags(["binary_classification", "target"]),
        ]
    )


def plain(value):
    if isinstance(value, dict):
        return {name: plain(v) for name, v in sorted(value.items())}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value if value is None else np.asarray(value).tolist()


def main() -> None:
    stored = columns()
    kinds = {**LISTS, **OTHERS}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/data.parquet"
        pq.write_table(pa.table({n: pa.array(v, kinds[n]) for n, v in stored.items()}), file)
        named = ["item", "price", "user", "like", "click"]
        single = ParquetDataset(file, named, ["like"], LENGTH)
        found = {
            "merlin_from_schema": list(
                MerlinDataLoader.from_schema(schema(), file, BATCH, LENGTH, shuffle=False)
            ),
            "merlin": list(
                MerlinDataLoader(
                    file,
                    BATCH,
                    LENGTH,
                    cats=["item", "user"],
                    conts=["price", "age"],
                    labels=["click", "like"],
                    lists=["item", "price"],
                    drop_last=True,
                )
            ),
            "merlin_collated": list(
                MerlinDataLoader(
                    file,
                    BATCH,
                    LENGTH,
                    cats=["item"],
                    labels=["click"],
                    lists=["item"],
                    collate_fn=lambda batches: (batches[0][0]["item"].sum(1), batches[0][1]),
                )
            ),
            "pyarrow_from_schema": list(
                PyarrowDataLoader.from_schema(schema(), file, BATCH, LENGTH, num_workers=0)
            ),
            "pyarrow": list(
                PyarrowDataLoader(
                    file, BATCH, LENGTH, named, ["click", "like"], num_workers=0, drop_last=True
                )
            ),
            "dataset": [single[i] for i in range(ROWS)],
        }
    recorded = {"columns": stored, **{name: plain(batches) for name, batches in found.items()}}
    path = Path(__file__).with_name("loaders.json")
    path.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

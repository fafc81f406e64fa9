"""Three small data sets with the columns of the reference's testing data.

Names, domains and tags are the reference's; the values are random, drawn when `path` is first read.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t4r_fast.compat.data.dataset import Dataset
from t4r_fast.schema import ColumnSchema, FloatDomain, IntDomain, Schema, ValueCount

ROWS = 1000


class TestingData(Dataset):
    """A schema, and 1,000 random sessions at `path`, the same in every process.

    Both files are made when they are first asked for, in a folder that goes with the process.
    """

    __test__ = False  # pytest takes classes named so for tests

    def __init__(self, name: str, schema: Schema) -> None:
        self.name = name
        self._schema = schema

    @functools.cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="t4r_fast-testing-")

    @functools.cached_property
    def path(self) -> str:
        """A parquet file with the sessions."""
        file = Path(self._folder.name) / f"{self.name}.parquet"
        pq.write_table(self._table(), file)
        return str(file)

    @functools.cached_property
    def schema_path(self) -> str:
        """A JSON file with the schema."""
        file = Path(self._folder.name) / f"{self.name}.json"
        file.write_text(self.schema.to_json())
        return str(file)

    def _table(self) -> pa.Table:
        rng = np.random.default_rng(0)
        counts = [c.value_count for c in self.schema if c.value_count is not None]
        longest = min([20, *(c.max for c in counts)])
        lengths = rng.integers(min(2, longest), longest + 1, ROWS)
        offsets = pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32())
        columns: dict[str, pa.Array] = {}
        for column in self.schema:
            listed = column.value_count is not None
            values = pa.array(_values(column, int(lengths.sum()) if listed else ROWS, rng))
            columns[column.name] = pa.ListArray.from_arrays(offsets, values) if listed else values
        return pa.table(columns)


def _values(column: ColumnSchema, count: int, rng: np.random.Generator) -> np.ndarray:
    if column.int_domain is not None:
        low = max(1, int(column.int_domain.min))
        # few ids stand for most events, as in real catalogues
        spread = rng.power(0.4, count) * (int(column.int_domain.max) - low + 1)
        return low + spread.astype(np.int64)
    if column.type == "INT":
        return rng.integers(1_600_000_000, 1_700_000_000, count)
    if column.has_tags(["binary_classification"]):
        return rng.integers(0, 2, count).astype(np.float32)
    domain = column.float_domain
    low, high = (0.0, 1.0) if domain is None else (domain.min, domain.max)
    return rng.uniform(low, max(low, high), count).astype(np.float32)


def _ids(name: str, high: int, tags: str, count: tuple[int, int] | None = None, low: int = 0):
    values = None if count is None else ValueCount(*count)
    domain = IntDomain(name, low, high, True)
    return ColumnSchema(name, "INT", tags.split(), domain, value_count=values)


def _number(
    name: str,
    tags: str,
    count: tuple[int, int] | None = None,
    low: float | None = None,
    high: float = 1.0,
):
    values = None if count is None else ValueCount(*count)
    domain = None if low is None else FloatDomain(name, low, high)
    return ColumnSchema(name, "FLOAT", tags.split(), None, domain, values)


def _sequences() -> Schema:
    count = (2, 185)
    timed = "continuous time list"
    age = "timestamp/age_days/LogOp/Normalize/list"
    return Schema(
        [
            _number(age, "continuous list", count, -2.92, 1.53),
            *(
                _number(f"timestamp/{part}/list", timed, count, low, high)
                for part, low, high in (
                    ("hour", 0.0, 1.61),
                    ("weekday", 0.0, 1.57),
                    ("day", 0.05, 1.74),
                    ("month", 0.59, 1.34),
                    ("year", 1.0, 1.0),
                    ("hour/sin", 0.0, 0.41),
                    ("hour/cos", 0.91, 1.0),
                    ("weekday/sin", 0.74, 1.0),
                    ("weekday/cos", -0.68, 0.63),
                )
            ),
            _ids("item_id/list", 51_996, "item_id list categorical item", count, 1),
            _ids("category/list", 332, "list categorical item", count, 1),
            _ids("user_country", 62, "categorical", low=1),
            _number("user_age", "continuous", low=0.0, high=0.41),
        ]
    )


def _music() -> Schema:
    count = (1, 20)
    return Schema(
        [
            _ids("session_id", 10_000, "categorical session_id"),
            _ids("item_id", 10_000, "categorical item_id item list", count),
            _ids("item_category", 100, "categorical item list", count),
            _number("item_recency", "continuous item list", count, 0.0),
            _ids("item_genres", 100, "categorical item list", count),
            _ids("user_id", 10_000, "categorical user_id"),
            _ids("country", 100, "categorical user"),
            _number("click", "binary_classification target"),
            _number("play_percentage", "regression target"),
            _number("like", "binary_classification target"),
        ]
    )


def _events() -> Schema:
    return Schema(
        [
            _ids("user_id", 1797, "categorical", low=1),
            ColumnSchema("event_timestamp", "INT"),
            _number("item_age_days_norm", "continuous", low=-2.92, high=-1.25),
            *(
                _number(f"event_{part}", "continuous", low=0.0)
                for part in ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos")
            ),
            _ids("item_id", 51_996, "item_id categorical item", low=1),
            _ids("categories", 331, "list categorical item", (1, 4), 1),
            _ids("user_country", 62, "categorical", low=1),
            _number("user_age", "continuous", low=0.0, high=0.41),
        ]
    )


#: Sessions of a shop: items, their categories, times.
tabular_sequence_testing_data = TestingData("tabular_sequence", _sequences())
#: Sessions of a music service, with targets for several tasks.
music_streaming_testing_data = TestingData("music_streaming", _music())
#: Single events, no sequences of items.
tabular_testing_data = TestingData("tabular", _events())

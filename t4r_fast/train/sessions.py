"""The sessions of an ETL output: which windows there are, their files, their schema and numbers."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from t4r_fast.errors import InputError
from t4r_fast.schema import Schema

SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class WindowPair:
    """Train on one window, evaluate on the next one that has sessions."""

    train: int
    evaluate: int


class SessionData:
    """The folder `sessions_by_day` (or the ETL output that holds it) and its schema.

    path    folder with `<window>/{train,valid,test}.parquet`, or its parent
    schema  a pbtxt file; by default `schema.pbtxt` beside or above the windows

    Raises InputError when there are no windows or no schema.
    """

    def __init__(
        self, path: str | os.PathLike[str], schema: str | os.PathLike[str] | None = None
    ) -> None:
        root = Path(path)
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; `t4r-fast etl` writes sessions_by_day/")
        self.folder = root / "sessions_by_day" if (root / "sessions_by_day").is_dir() else root
        self.windows = sorted(
            int(p.name)
            for p in self.folder.iterdir()
            if p.is_dir() and p.name.isdecimal() and (p / "train.parquet").is_file()
        )
        if not self.windows:
            raise InputError(
                f"{self.folder}: no window folders such as 1/train.parquet;"
                " give the output folder of `t4r-fast etl`"
            )
        self.schema_path = Path(schema) if schema is not None else self._find_schema()
        self.schema = Schema().from_proto_text(self.schema_path)
        self.item_column = self.schema.item_id_column_name
        self.items = self.schema[self.item_column].cardinality

    def _find_schema(self) -> Path:
        for folder in (self.folder, self.folder.parent):
            if (folder / "schema.pbtxt").is_file():
                return folder / "schema.pbtxt"
        raise InputError(
            f"{self.folder}: no schema.pbtxt beside or above the windows; name it with --schema"
        )

    def file(self, window: int, split: str) -> Path:
        """The parquet file of one split; InputError when it is missing or unreadable."""
        if window not in self.windows:
            known = ", ".join(map(str, self.windows))
            raise InputError(f"{self.folder}: there is no window {window}; there are {known}")
        path = self.folder / str(window) / f"{split}.parquet"
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        return path

    def rows(self, window: int, split: str) -> int:
        """Sessions in one file, from its footer."""
        path = self.file(window, split)
        try:
            return pq.ParquetFile(path).metadata.num_rows
        except Exception as e:
            raise InputError(f"{path}: not a readable parquet file ({e}); run the ETL again") from e

    def lists(self, window: int, split: str) -> pl.Series:
        """The item ids of each session, pads at the right removed: a Series of lists."""
        path = self.file(window, split)
        frame = pl.scan_parquet(path)
        if self.item_column not in frame.collect_schema().names():
            raise InputError(f"{path}: no column {self.item_column!r}, which the schema names")
        column = pl.col(self.item_column)
        return (
            frame.select(column.list.eval(pl.element().filter(pl.element() != 0)).alias("items"))
            .collect()
            .to_series()
        )

    def pairs(self, first: int | None = None, last: int | None = None) -> list[WindowPair]:
        """The sliding windows: train windows first..last, each with the next window's `valid`.

        Windows without training sessions are no training windows, and windows without validation
        sessions are never evaluated on. Raises InputError when nothing is left.
        """
        full = [w for w in self.windows if self.rows(w, "train") > 0]
        judged = [w for w in self.windows if self.rows(w, "valid") > 0]
        pairs = []
        for window in full:
            if (first is not None and window < first) or (last is not None and window > last):
                continue
            later = [w for w in judged if w > window]
            if later:
                pairs.append(WindowPair(window, later[0]))
        if not pairs:
            wanted = "" if first is None and last is None else f" of windows {first} to {last}"
            raise InputError(
                f"{self.folder}: sliding windows need a window with training sessions and a later"
                f" one with validation sessions; none{wanted} (there are windows"
                f" {', '.join(map(str, self.windows))}). Use a shorter --window in the ETL"
            )
        return pairs

    def summary(self) -> dict:
        """Numbers for the report: sessions, items, windows, lengths."""
        windows, lengths = [], pl.Series("n", [], dtype=pl.UInt32)
        for window in self.windows:
            counts = {split: self.rows(window, split) for split in SPLITS}
            windows.append({"window": window, **counts})
            for split in SPLITS:
                lengths = lengths.append(self.lists(window, split).list.len().alias("n"))
        histogram = lengths.value_counts().sort("n")
        return {
            "sessions": len(lengths),
            "interactions": int(lengths.sum()),
            "items": self.items - 3,
            "mean_length": round(float(lengths.mean() or 0.0), 3),
            "windows": windows,
            "length_histogram": {int(n): int(c) for n, c in histogram.iter_rows()},
            "columns": self.schema.column_names,
        }

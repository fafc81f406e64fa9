"""Sessions in memory: parquet row groups to checked ragged columns, and those to padded batches.

A list column stays as Arrow stores it, one flat array of values and the start of each row; a batch
is one gather per column, so no row passes through Python.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema, Tags

# Later tutorials write `<feature>-list`, the first ones `<feature>-list_seq`.
_SUFFIXES = ("-list_seq", "-list")


@dataclasses.dataclass(frozen=True)
class WantedColumn:
    """One column to read: `high` is the largest id the schema allows, None where it names none."""

    name: str
    dtype: type[np.generic]
    low: int | None = None
    high: int | None = None

    @classmethod
    def of(cls, column: ColumnSchema) -> WantedColumn:
        if column.type == "BYTES":
            raise InputError(
                f"schema: column {column.name!r} holds strings (type BYTES), which no model takes;"
                " encode it as ids in the ETL, or leave it out with schema.remove_by_name"
            )
        if column.type == "FLOAT":
            return cls(column.name, np.float32)
        domain = column.int_domain
        if domain is None or not column.is_categorical:
            return cls(column.name, np.int64)
        return cls(column.name, np.int64, min(int(domain.min), 0), int(domain.max))


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """A row group of a file, or a table: where it is from, its rows, and how to read it."""

    origin: str
    first_row: int
    rows: int
    read: Callable[[list[str]], pa.Table]
    value_counts: dict[str, int]


class SessionTable:
    """Ragged columns of some sessions.

    lengths  (rows,)            int64   items of each session, after the cut
    starts   name -> (rows,)    int64   where a session begins in the column's values
    values   name -> (n + 1,)   int64 or float32; the last value is the 0 that pads
    scalars  name -> (rows,)    int64 or float32

    Columns stored alike share one `starts` array, and with it the index of a batch.
    """

    def __init__(
        self,
        rows: int,
        lengths: np.ndarray,
        starts: dict[str, np.ndarray],
        values: dict[str, np.ndarray],
        scalars: dict[str, np.ndarray],
    ) -> None:
        self.rows = rows
        self.lengths = lengths
        self.starts = starts
        self.values = values
        self.scalars = scalars

    @property
    def sharing(self) -> list[list[str]]:
        """List columns grouped by the `starts` array that they share."""
        groups: dict[int, list[str]] = {}
        for name, starts in self.starts.items():
            groups.setdefault(id(starts), []).append(name)
        return list(groups.values())

    def batch(self, rows: np.ndarray, width: int | None) -> dict[str, np.ndarray]:
        """These rows: list columns (B, width), right-padded with 0, scalar columns (B,).

        `width` None pads to the longest of these rows.
        """
        out = {name: column[rows] for name, column in self.scalars.items()}
        if not self.starts:
            return out
        lengths = self.lengths[rows]
        position = np.arange(int(lengths.max(initial=0)) if width is None else width)
        inside = position < lengths[:, None]  # (B, width)
        for names in self.sharing:
            pad = len(self.values[names[0]]) - 1
            index = np.where(inside, self.starts[names[0]][rows][:, None] + position, pad)
            out.update({name: self.values[name].take(index) for name in names})
        return out

    def take(self, rows: np.ndarray) -> SessionTable:
        """These rows as a table of their own, in this order."""
        lengths = self.lengths[rows]
        ends = np.cumsum(lengths)
        packed = ends - lengths
        starts, values = {}, {}
        for names in self.sharing:
            index = np.repeat(self.starts[names[0]][rows] - packed, lengths)
            index += np.arange(len(index))
            index = np.append(index, len(self.values[names[0]]) - 1)
            for name in names:
                starts[name], values[name] = packed, self.values[name].take(index)
        scalars = {name: column[rows] for name, column in self.scalars.items()}
        return SessionTable(len(rows), lengths, starts, values, scalars)

    @staticmethod
    def concat(tables: Sequence[SessionTable]) -> SessionTable:
        """One table below the other; they hold the same columns."""
        if len(tables) == 1:
            return tables[0]
        starts, values = {}, {}
        # A block may store two columns alike where another does not; keep what all of them share.
        shared: dict[tuple[int, ...], np.ndarray] = {}
        for name in tables[0].starts:
            key = tuple(id(t.starts[name]) for t in tables)
            if key not in shared:
                sizes = [len(t.values[name]) - 1 for t in tables]
                bases = np.cumsum([0, *sizes[:-1]])
                shared[key] = np.concatenate([t.starts[name] + b for t, b in zip(tables, bases)])
            starts[name] = shared[key]
            parts = [t.values[name][:-1] for t in tables[:-1]] + [tables[-1].values[name]]
            values[name] = np.concatenate(parts)
        scalars = {n: np.concatenate([t.scalars[n] for t in tables]) for n in tables[0].scalars}
        lengths = np.concatenate([t.lengths for t in tables])
        return SessionTable(sum(t.rows for t in tables), lengths, starts, values, scalars)


# -- where the rows are ----------------------------------------------------------------------------


def parquet_files(paths: Any) -> list[str]:
    """The parquet files named by a path, a pattern, a folder, or several of these.

    Folders are searched in depth; names that begin with "." or "_" are left out. Raises InputError
    for a path that is not there and for a folder or pattern without files.
    """
    several = isinstance(paths, Iterable) and not isinstance(paths, (str, bytes, os.PathLike))
    named = list(paths) if several else [paths]
    if not named:
        raise InputError("data loader: the list of parquet files is empty; name at least one")
    found: list[str] = []
    for one in named:
        text = os.fspath(one)
        if os.path.isdir(text):
            inside = sorted(Path(text).rglob("*.parquet"))
            new = [str(p) for p in inside if not p.name.startswith((".", "_"))]
        elif os.path.exists(text):
            new = [text]
        else:
            new = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []
        if not new:
            raise InputError(f"data loader: no parquet file at {text}; check the path")
        found += new
    return found


def row_blocks(source: Any) -> list[RowBlock]:
    """The row groups of the files (see parquet_files), or an Arrow or Polars table as one block."""
    if hasattr(source, "to_arrow"):
        source = source.to_arrow()
    if isinstance(source, pa.Table):
        counts = {n: _value_count(source.column(n)) for n in source.column_names}
        return [RowBlock("the table", 0, source.num_rows, source.select, counts)]
    if hasattr(source, "paths"):
        source = source.paths
    blocks: list[RowBlock] = []
    for path in parquet_files(source):
        try:
            metadata = pq.read_metadata(path)
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"data loader: {path} is not a readable parquet file: {e}") from e
        first = 0
        for i in range(metadata.num_row_groups):
            group = metadata.row_group(i)
            counts: dict[str, int] = {}
            for j in range(group.num_columns):
                column = group.column(j)
                top = column.path_in_schema.split(".")[0]
                counts[top] = counts.get(top, 0) + column.num_values
            read = functools.partial(_read_group, path, i)
            blocks.append(RowBlock(path, first, group.num_rows, read, counts))
            first += group.num_rows
    return blocks


def _value_count(column: pa.ChunkedArray) -> int:
    return sum(len(c.flatten()) if _is_list(c.type) else len(c) for c in column.chunks)


def _read_group(path: str, group: int, columns: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read_row_group(group, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"data loader: cannot read {path}, row group {group}: {e}") from e


def stored_name(name: str, stored: Iterable[str], origin: str) -> str:
    """The file's name of a schema column: the same, or with the other `-list` suffix.

    Raises InputError when neither is there, with the names that are.
    """
    stored = list(stored)
    if name in stored:
        return name
    stem = next((name[: -len(s)] for s in _SUFFIXES if name.endswith(s)), None)
    if stem is not None:
        for other in (stem + s for s in _SUFFIXES):
            if other in stored:
                return other
    raise InputError(
        f"data loader: {origin} has no column {name!r}; it has {', '.join(sorted(stored))}."
        " Select the columns that exist with schema.select_by_name, or run the ETL again"
    )


# -- reading one block -----------------------------------------------------------------------------


def wanted_columns(schema: Schema, names: Iterable[str] | None = None) -> list[WantedColumn]:
    """What to read for these columns of the schema (all of them by default)."""
    columns = schema if names is None else [schema[n] for n in names]
    return [WantedColumn.of(c) for c in columns]


def item_id_column(schema: Schema) -> str | None:
    """The column tagged item_id, or None when no column is."""
    return schema.item_id_column_name if schema.select_by_tag(Tags.ITEM_ID).feature else None


def read_block(
    block: RowBlock, wanted: Sequence[WantedColumn], item_id: str | None, longest: int | None,
    keep_last: bool,
) -> tuple[SessionTable, int]:  # fmt: skip
    """The checked sessions of a block, cut to `longest` items, and how many of them were cut."""
    names = {w.name: stored_name(w.name, block.value_counts, block.origin) for w in wanted}
    table = block.read(list(dict.fromkeys(names.values())))
    raw: dict[str, np.ndarray] = {}
    starts: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    scalars: dict[str, np.ndarray] = {}
    for w in wanted:
        array = _combined(table.column(names[w.name]))
        at = f"data loader: {block.origin}, column {names[w.name]!r}"
        if not _is_list(array.type):
            scalars[w.name] = _numbers(array, w, at, np.arange(len(array)) + block.first_row)
            continue
        first, lengths, flat = _ragged(array, at, block.first_row)
        rows = np.repeat(np.arange(len(lengths)) + block.first_row, lengths)
        values[w.name] = np.append(_numbers(flat, w, at, rows), w.dtype(0))
        raw[w.name] = lengths
        same = (n for n in starts if np.array_equal(raw[n], lengths))
        twin = next(same, None)
        starts[w.name] = first if twin is None else starts[twin]
    lengths = _session_lengths(block, raw, values, item_id)
    cut = 0
    if longest is not None and len(lengths):
        cut = int((lengths > longest).sum())
        if cut and keep_last:
            drop = np.maximum(lengths - longest, 0)
            moved = {id(s): s + drop for s in starts.values()}
            starts = {n: moved[id(s)] for n, s in starts.items()}
        lengths = np.minimum(lengths, longest)
    return SessionTable(table.num_rows, lengths, starts, values, scalars), cut


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _combined(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    return array


def _ragged(array: pa.Array, at: str, first_row: int) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Starts, lengths and flat values of a list column."""
    if array.null_count:
        row = first_row + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"{at}, row {row}: the list is null; drop the session or fill the list")
    if pa.types.is_fixed_size_list(array.type):
        lengths = np.full(len(array), array.type.list_size, dtype=np.int64)
    else:
        lengths = np.diff(array.offsets.to_numpy()).astype(np.int64)
    return np.cumsum(lengths) - lengths, lengths, array.flatten()


def _numbers(array: pa.Array, w: WantedColumn, at: str, rows: np.ndarray) -> np.ndarray:
    """The values as int64 or float32; `rows` names the row of each value."""
    kind = array.type
    if pa.types.is_boolean(kind):
        array, kind = array.cast(pa.int8()), pa.int8()
    whole = pa.types.is_integer(kind)
    if not (whole or (w.dtype is np.float32 and pa.types.is_floating(kind))):
        expected = "integers" if w.dtype is np.int64 else "numbers"
        raise InputError(f"{at}: the schema says {expected}, the file holds {kind}; run the ETL")
    if array.null_count:
        row = rows[np.argmax(array.is_null().to_numpy(zero_copy_only=False))]
        raise InputError(
            f"{at}, row {row}: a value is null; fill it (the ETL does) or drop the row"
        )
    numbers = array.to_numpy().astype(w.dtype, copy=False)
    if w.dtype is np.float32:
        bad = ~np.isfinite(numbers)
        if bad.any():
            i = int(np.argmax(bad))
            raise InputError(f"{at}, row {rows[i]}: {numbers[i]} is no finite number; fill it")
    elif w.high is not None and len(numbers):
        _check_ids(numbers, w, at, rows)
    return numbers


def _check_ids(ids: np.ndarray, w: WantedColumn, at: str, rows: np.ndarray) -> None:
    if ids.min() >= w.low and ids.max() <= w.high:
        return
    i = int(np.argmax((ids < w.low) | (ids > w.high)))
    raise InputError(
        f"{at}, row {rows[i]}: id {ids[i]} is outside {w.low}..{w.high}, the range in the schema;"
        " take the schema written with these files, or raise int_domain.max"
    )


def _session_lengths(
    block: RowBlock, raw: dict[str, np.ndarray], values: dict[str, np.ndarray], item_id: str | None
) -> np.ndarray:
    """Items of each session: the item column's list without the zeros at its end."""
    if not raw:
        return np.zeros(block.rows, dtype=np.int64)
    lead = item_id if item_id in raw else next(iter(raw))
    stored = raw[lead]
    lengths = stored
    if item_id in raw:
        lengths = _without_pads(block, item_id, stored, values[item_id][:-1])
    for name, own in raw.items():
        if np.array_equal(own, stored) or np.array_equal(own, lengths):
            continue
        i = int(np.argmax((own != stored) & (own != lengths)))
        raise InputError(
            f"data loader: {block.origin}, row {block.first_row + i}: column {name!r} has {own[i]}"
            f" values and column {lead!r} has {stored[i]}; the lists of a session must be equally"
            " long"
        )
    return lengths


def _without_pads(block: RowBlock, item_id: str, stored: np.ndarray, ids: np.ndarray) -> np.ndarray:
    at = f"data loader: {block.origin}, row "
    real = ids != 0
    row = np.repeat(np.arange(len(stored)), stored)
    count = np.bincount(row[real], minlength=len(stored))
    if len(stored) and not count.all():
        empty = block.first_row + int(np.argmin(count))
        raise InputError(f"{at}{empty}: the session has no items; drop it")
    if real.all():
        return stored
    position = np.arange(len(ids)) - np.repeat(np.cumsum(stored) - stored, stored)
    lengths = np.zeros(len(stored), dtype=np.int64)
    np.maximum.at(lengths, row[real], position[real] + 1)
    if (lengths != count).any():
        i = int(np.argmax(lengths != count))
        raise InputError(
            f"{at}{block.first_row + i}: column {item_id!r} has padding (id 0) before an item; pads"
            " must stand on the right of a session, so move them there"
        )
    return lengths

"""Sessions in memory: parquet row groups to checked ragged columns, and those to padded batches.

A list column stays as Arrow stores it, one flat array of values and the start of each row; a batch
is one gather per column, so no row passes through Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema, Tags
from t4r_fast.train.row_blocks import RowBlock, is_list, stored_name


@dataclasses.dataclass(frozen=True)
class WantedColumn:
    """One column to read: `high` is the largest id the schema allows, None where it names none;
    `pad` is what stands behind the end of a session."""

    name: str
    dtype: type[np.generic]
    low: int | None = None
    high: int | None = None
    pad: int = 0

    @classmethod
    def of(cls, column: ColumnSchema, pad: int = 0) -> WantedColumn:
        if column.type == "BYTES":
            raise InputError(
                f"schema: column {column.name!r} holds strings (type BYTES), which no model takes;"
                " encode it as ids in the ETL, or leave it out with schema.remove_by_name"
            )
        if column.type == "FLOAT":
            return cls(column.name, np.float32)
        domain = column.int_domain
        if domain is None or not column.is_categorical:
            return cls(column.name, np.int64, pad=pad)
        return cls(column.name, np.int64, min(int(domain.min), pad), int(domain.max), pad)


class SessionTable:
    """Ragged columns of some sessions.

    lengths  (rows,)            int64   items of each session, after the cut
    starts   name -> (rows,)    int64   where a session begins in the column's values
    values   name -> (n + 1,)   int64 or float32; the last value is the one that pads
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
        """These rows: list columns (B, width), padded on the right, scalar columns (B,).

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


# -- reading one block -----------------------------------------------------------------------------


def wanted_columns(schema: Schema, pads: Mapping[str, int]) -> list[WantedColumn]:
    """What to read for the columns of the schema; `pads` as padding_ids gives them."""
    return [WantedColumn.of(c, pads.get(c.name, 0)) for c in schema]


def padding_ids(schema: Schema, padding_idx: int | Mapping[str, int]) -> dict[str, int]:
    """Column -> the id that pads it, for every column of ids.

    padding_idx  one id for all columns of ids, or ids by column, where the others have 0

    Raises InputError for ids below 0 and columns that hold no whole numbers.
    """
    by_name = padding_idx if isinstance(padding_idx, Mapping) else {}
    pads = dict.fromkeys((c.name for c in schema if c.is_categorical), 0)
    if not isinstance(padding_idx, Mapping):
        pads = dict.fromkeys(pads, padding_idx)
    for name in by_name:
        if name not in schema or schema[name].type != "INT":
            raise InputError(
                f"ParquetDataLoader: padding_idx names {name!r}, which is no column of whole"
                f" numbers; there are {', '.join(c.name for c in schema if c.type == 'INT')}"
            )
    pads.update(by_name)
    for name, pad in pads.items():
        if isinstance(pad, bool) or not isinstance(pad, (int, np.integer)) or pad < 0:
            raise InputError(
                f"ParquetDataLoader: padding_idx must be ids >= 0; got {pad!r} for column {name!r}"
            )
    return pads


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
        array = combined(table.column(names[w.name]))
        at = f"data loader: {block.origin}, column {names[w.name]!r}"
        if not is_list(array.type):
            scalars[w.name] = _numbers(array, w, at, np.arange(len(array)) + block.first_row)
            continue
        first, lengths, flat = ragged(array, at, block.first_row)
        rows = np.repeat(np.arange(len(lengths)) + block.first_row, lengths)
        if w.high is not None and w.pad > w.high:
            raise InputError(
                f"{at}: padding_idx {w.pad} is outside {w.low}..{w.high}, the ids in the schema;"
                " give padding_idx={column: id} for the columns that have this padding"
            )
        values[w.name] = np.append(_numbers(flat, w, at, rows), w.dtype(w.pad))
        raw[w.name] = lengths
        same = (n for n in starts if np.array_equal(raw[n], lengths))
        twin = next(same, None)
        starts[w.name] = first if twin is None else starts[twin]
    pad = next((w.pad for w in wanted if w.name == item_id), 0)
    lengths = _session_lengths(block, raw, values, item_id, pad)
    cut = 0
    if longest is not None and len(lengths):
        cut = int((lengths > longest).sum())
        if cut and keep_last:
            drop = np.maximum(lengths - longest, 0)
            moved = {id(s): s + drop for s in starts.values()}
            starts = {n: moved[id(s)] for n, s in starts.items()}
        lengths = np.minimum(lengths, longest)
    return SessionTable(table.num_rows, lengths, starts, values, scalars), cut


def combined(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    return array


def ragged(array: pa.Array, at: str, first_row: int) -> tuple[np.ndarray, np.ndarray, pa.Array]:
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
    block: RowBlock,
    raw: dict[str, np.ndarray],
    values: dict[str, np.ndarray],
    item_id: str | None,
    pad: int,
) -> np.ndarray:
    """Items of each session: the item column's list without the pads at its end."""
    if not raw:
        return np.zeros(block.rows, dtype=np.int64)
    lead = item_id if item_id in raw else next(iter(raw))
    stored = raw[lead]
    lengths = stored
    if item_id in raw:
        lengths = _without_pads(block, item_id, stored, values[item_id][:-1], pad)
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


def _without_pads(
    block: RowBlock, item_id: str, stored: np.ndarray, ids: np.ndarray, pad: int
) -> np.ndarray:
    at = f"data loader: {block.origin}, row "
    real = ids != pad
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
            f"{at}{block.first_row + i}: column {item_id!r} has padding (id {pad}) before an item;"
            " pads must stand on the right of a session, so move them there"
        )
    return lengths

"""Where sessions lie: the row groups of parquet files, or a table in memory."""

from __future__ import annotations

import dataclasses
import functools
import glob
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema, Tags

# Later tutorials write `<feature>-list`, the first ones `<feature>-list_seq`.
_SUFFIXES = ("-list_seq", "-list")


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """A row group of a file, or a table: where it is from, its rows, and how to read it."""

    origin: str
    first_row: int
    rows: int
    read: Callable[[list[str]], pa.Table]
    value_counts: dict[str, int]


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


def opened(source: Any) -> Any:
    """The source as what row_blocks takes: parquet files, or an Arrow table.

    A Merlin Dataset is computed and held in memory: its steps may be more than reading files.
    """
    if hasattr(source, "paths"):
        return source.paths
    if hasattr(source, "to_ddf"):
        source = source.to_ddf().compute()
    if hasattr(source, "to_arrow"):
        return source.to_arrow()
    if type(source).__module__.partition(".")[0] == "pandas":
        return pa.Table.from_pandas(source, preserve_index=False)
    return source


def stored_types(source: Any) -> pa.Schema:
    """Names and types of the columns, in the first file if there are several."""
    source = opened(source)
    if isinstance(source, pa.Table):
        return source.schema
    path = parquet_files(source)[0]
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"data loader: {path} is not a readable parquet file: {e}") from e


def stored_schema(source: Any, names: Iterable[str] | None = None) -> Schema:
    """A schema of the stored columns, all or these, with what their types say: INT, FLOAT or BYTES,
    and the tag list.

    Raises InputError for names that are not there.
    """
    types = stored_types(source)
    columns = []
    for name in types.names if names is None else names:
        if name not in types.names:
            raise InputError(
                f"data loader: there is no column {name!r}; there are {', '.join(types.names)}"
            )
        kind, tags = types.field(name).type, []
        if is_list(kind):
            kind, tags = kind.value_type, [Tags.LIST]
        whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
        written = "INT" if whole else "FLOAT" if pa.types.is_floating(kind) else "BYTES"
        columns.append(ColumnSchema(name, written, tags))
    return Schema(columns)


def row_blocks(source: Any) -> list[RowBlock]:
    """The row groups of the files (see parquet_files), or a table in memory as one block."""
    source = opened(source)
    if isinstance(source, pa.Table):
        counts = {n: _value_count(source.column(n)) for n in source.column_names}
        return [RowBlock("the table", 0, source.num_rows, source.select, counts)]
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
    return sum(len(c.flatten()) if is_list(c.type) else len(c) for c in column.chunks)


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


def is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)

"""Event files: finding them, telling their kind, and reading them in batches."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import polars as pl

from t4r_fast.errors import InputError

PARQUET_SUFFIXES = (".parquet", ".pq")
TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")
SAMPLE_ROWS = 10_000
BATCH_ROWS = 250_000

Inputs = str | os.PathLike | Iterable[str | os.PathLike]


def find_files(inputs: Inputs) -> list[Path]:
    """The event files behind one path or several; of a folder, those with a known ending by name.

    Raises InputError on what does not exist, on a folder without event files, on empty files and
    on a file that is given twice.
    """
    paths = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    if not paths:
        raise InputError("etl: no input; give a file or a folder of events")
    files = [file for path in paths for file in _files_at(Path(path))]
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise InputError(f"{file}: this file is given twice; its events would count double")
        seen.add(file.resolve())
        if file.stat().st_size == 0:
            raise InputError(f"{file}: the file is empty; take it out or write it again")
    return files


def _files_at(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    names = sorted(p.name for p in path.iterdir() if p.is_file() and p.name[0] not in "._")
    known = [n for n in names if n.lower().endswith(PARQUET_SUFFIXES + TEXT_SUFFIXES)]
    if not known:
        raise InputError(
            f"{path}: the folder holds no event files ({', '.join(TEXT_SUFFIXES)} or .parquet);"
            f" it holds {', '.join(names[:5]) or 'no files'}"
        )
    return [path / name for name in known]


@dataclasses.dataclass
class EventFile:
    """A readable event file: its columns with their types (text files hold only text)."""

    path: Path
    separator: str | None  # None: parquet
    schema: dict[str, pl.DataType]
    rows: int  # exact for parquet, an estimate for text

    @property
    def is_text(self) -> bool:
        return self.separator is not None

    def scan(self) -> pl.LazyFrame:
        if self.separator is None:
            return pl.scan_parquet(self.path, glob=False)
        # everything as text: the same value must read alike in every file and every batch
        return pl.scan_csv(self.path, glob=False, separator=self.separator, infer_schema=False)

    def batches(self, columns: list[str]) -> Iterator[pl.DataFrame]:
        """The columns in pieces, in order. Raises InputError on damage."""
        # of a text file every column is parsed: with fewer, Polars does not notice rows with too
        # many fields, whose values stand in the wrong columns
        scan = self.scan() if self.is_text else self.scan().select(columns)
        try:
            for batch in scan.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True):
                yield batch.select(columns)
        except (pl.exceptions.PolarsError, OSError) as e:
            raise self._unreadable(e) from e

    def sample(self, columns: list[str]) -> pl.DataFrame:
        """The first rows."""
        try:
            return self.scan().select(columns).head(SAMPLE_ROWS).collect()
        except (pl.exceptions.PolarsError, OSError) as e:
            raise self._unreadable(e) from e

    def _unreadable(self, error: Exception) -> InputError:
        said = str(error).strip().splitlines()[0]
        if not self.is_text:
            return InputError(f"{self.path}: the parquet file is damaged ({said}); copy it again")
        ragged = _first_long_row(self.path, self.separator, len(self.schema))
        if ragged is not None:
            row, fields = ragged
            return InputError(
                f"{self.path}: row {row} has {fields} fields, the header has {len(self.schema)};"
                " quote values that hold the separator, or name it with --separator"
            )
        return InputError(f"{self.path}: the file cannot be read ({said}); is it UTF-8 text?")


def open_file(path: Path, separator: str | None = None) -> EventFile:
    """Look at the head of `path`. `separator` overrides what the header line suggests."""
    with open(path, "rb") as f:
        magic = f.read(4)
    try:
        if magic == b"PAR1" or path.name.lower().endswith(PARQUET_SUFFIXES):
            scan = pl.scan_parquet(path, glob=False)
            schema = dict(scan.collect_schema())
            return EventFile(path, None, schema, int(scan.select(pl.len()).collect().item()))
    except (pl.exceptions.PolarsError, OSError) as e:
        said = str(e).strip().splitlines()[0]
        raise InputError(
            f"{path}: this is no whole parquet file, it may be truncated ({said}); copy it again"
        ) from e
    head = _head(path, magic[:2] == b"\x1f\x8b")
    header = head.split(b"\n", 1)[0].decode("utf-8", "replace").strip("\r\ufeff")
    if not header.strip():
        raise InputError(f"{path}: the first line must name the columns; it is blank")
    if separator is None:
        separator = max("\t,;|", key=header.count)
    file = EventFile(path, separator, {}, _estimate_rows(path, head))
    try:
        file.schema = dict(file.scan().collect_schema())
    except (pl.exceptions.PolarsError, OSError) as e:
        raise file._unreadable(e) from e
    names = next(csv.reader([header], delimiter=separator))
    doubled = sorted({n for n in names if names.count(n) > 1})
    if doubled:
        raise InputError(f"{path}: the header names the column {doubled[0]!r} twice; rename one")
    return file


def _head(path: Path, gzipped: bool) -> bytes:
    try:
        with gzip.open(path) if gzipped else open(path, "rb") as f:
            return f.read(1 << 16)
    except (OSError, EOFError) as e:
        raise InputError(f"{path}: the file is damaged ({e}); copy it again") from e


def _estimate_rows(path: Path, head: bytes) -> int:
    """For progress bars only; compressed text is taken to shrink to a fifth."""
    lines = max(head.count(b"\n"), 1)
    size = path.stat().st_size * (5 if path.name.lower().endswith(".gz") else 1)
    return max(round(size * lines / max(len(head), 1)) - 1, lines - 1, 1)


def _first_long_row(path: Path, separator: str | None, width: int) -> tuple[int, int] | None:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as f:
            for number, fields in enumerate(csv.reader(f, delimiter=separator or ",")):
                if len(fields) > width > 0:
                    return number, len(fields)
    except (OSError, EOFError, UnicodeError, csv.Error):
        return None
    return None

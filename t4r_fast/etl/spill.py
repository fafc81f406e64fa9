"""Folders: buckets of events on disk, and an output that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from t4r_fast.errors import InputError

MARK = "t4r_fast etl"
SUMMARY = "summary.json"
_LOCK = "lock"


class Buckets:
    """Events spread over `count` buckets by session, so that one bucket fits in memory.

    Which bucket a session falls into has no influence on any result.
    """

    def __init__(self, folder: Path, count: int, flush_rows: int = 2_000_000) -> None:
        self.folder, self.count, self._flush_rows = folder, count, flush_rows
        self._pending: list[pl.DataFrame] = []
        self._rows = self._flushes = 0

    def add(self, events: pl.DataFrame) -> None:
        self._pending.append(events)
        self._rows += events.height
        if self._rows >= self._flush_rows:
            self.flush()

    def flush(self) -> None:
        if not self._rows:
            return
        events = pl.concat(self._pending)
        bucket = (pl.col("session").hash(0) % self.count).alias("bucket")
        parts = events.with_columns(bucket).partition_by("bucket", as_dict=True, include_key=False)
        for (number,), part in parts.items():
            folder = self.folder / f"{number:05d}"
            folder.mkdir(parents=True, exist_ok=True)
            part.write_parquet(folder / f"{self._flushes:06d}.parquet", compression="lz4")
        self._flushes += 1
        self._pending, self._rows = [], 0

    def __len__(self) -> int:
        """Buckets that hold events."""
        return sum(1 for _ in self.folder.iterdir()) if self.folder.exists() else 0

    def take(self) -> Iterator[pl.DataFrame]:
        """Each bucket that holds events, in turn; its files are removed once it is read."""
        for folder in sorted(self.folder.iterdir()):
            events = pl.concat([pl.read_parquet(p) for p in sorted(folder.iterdir())])
            shutil.rmtree(folder)
            yield events


def check_replaceable(out: Path, overwrite: bool) -> None:
    """Raise InputError unless `out` is free, empty, or an earlier output that may go."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: there is a file of this name; give another output folder")
    if not any(out.iterdir()):
        return
    try:
        ours = json.loads((out / SUMMARY).read_text(encoding="utf-8")).get("made_by") == MARK
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise InputError(
            f"{out}: the folder holds something else than an output of this command; it is left"
            " alone. Give another output folder"
        )
    if not overwrite:
        raise InputError(f"{out}: there is an earlier output; pass --overwrite to replace it")


@contextlib.contextmanager
def appear_whole(out: Path, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """(result, spill): folders next to `out`. `result` becomes `out` when the block ends well.

    On an error both go. After a kill they stay under a dotted name until the next run with the
    same `out` removes them; a lock tells them from those of a run that is still going.
    """
    prefix = f".{out.name}.partial-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.iterdir():
            if stale.name.startswith(prefix):
                _clear_if_dead(stale, out)
        check_replaceable(out, overwrite)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        with open(work / _LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                result, spill = work / "result", work / "spill"
                result.mkdir()
                spill.mkdir()
                yield result, spill
                check_replaceable(out, overwrite)
                if out.exists():
                    out.rename(work / "replaced")
                result.rename(out)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as e:
        raise InputError(f"{out}: the output cannot be written: {e}") from e


def _clear_if_dead(folder: Path, out: Path) -> None:
    with contextlib.suppress(OSError), open(folder / _LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (folder / "replaced").exists() and not out.exists():
            # killed between the two renames: the earlier output comes back
            (folder / "replaced").rename(out)
        shutil.rmtree(folder, ignore_errors=True)

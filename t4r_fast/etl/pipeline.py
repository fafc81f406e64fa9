"""From event files of any size to sessions by window, a schema and a workflow.

Four passes over buckets of sessions on disk, so memory follows the size of a bucket, the number
of distinct items and the largest window, not the number of events. Replaces the tutorial's
notebooks 01 and 02 (NVTabular).
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from t4r_fast.errors import InputError
from t4r_fast.etl import nvtabular_engine
from t4r_fast.etl.events import EventSource, open_events
from t4r_fast.etl.features import sort_and_drop_repeats
from t4r_fast.etl.files import Inputs
from t4r_fast.etl.spill import MARK, SUMMARY, Buckets, appear_whole
from t4r_fast.etl.times import parse_window
from t4r_fast.etl.workflow import Fitter, SessionRules, Workflow

Progress = Callable[[str, int, int], None]

BUCKET_EVENTS = 2_000_000
# Sessions of windows that are read together when the windows are written.
WINDOW_SESSIONS = 500_000
MAX_WINDOWS = 100_000
ENGINES = ("polars", "nvtabular")
ROW_GROUP_SESSIONS = 65_536


@dataclasses.dataclass
class Window:
    """A written window: its number, its start (ISO, UTC) and the sessions in its three files."""

    number: int
    start: str
    train: int
    valid: int
    test: int


@dataclasses.dataclass
class Summary:
    """What a run did. Every event read is in exactly one of the counts below `events_read`."""

    out: str
    events_read: int = 0
    events_of_other_types: int = 0
    events_without_session: int = 0
    events_repeated: int = 0
    events_in_short_sessions: int = 0
    events_cut: int = 0
    events_kept: int = 0
    sessions: int = 0
    sessions_too_short: int = 0
    sessions_cut: int = 0
    items: int = 0
    categories: int | None = None
    brands: int | None = None
    events_without_item: int = 0
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    roles_left_out: list[str] = dataclasses.field(default_factory=list)
    window: str = ""
    seed: int = 0
    windows: list[Window] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        state = {"made_by": MARK, **dataclasses.asdict(self)}
        path.write_text(json.dumps(state, indent=2), encoding="utf-8")


def run(
    inputs: Inputs,
    out: str | os.PathLike[str],
    *,
    map: Mapping[str, str] | None = None,
    window: str = "day",
    min_length: int = 2,
    max_length: int = 20,
    keep: str = "last",
    suffix: str = "-list_seq",
    seed: int = 0,
    event_types: Iterable[str] = (),
    text: Iterable[str] = (),
    separator: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    engine: str = "polars",
) -> Summary:
    """Turn events into OUT/sessions_by_day/<window>/{train,valid,test}.parquet and a workflow.

    inputs       CSV (also .gz), TSV or parquet: one file, several, or a folder
    map          role -> column, for session, item, time and optionally category, brand, price,
                 event_type; the rest has the REES46 names. An empty column leaves a feature out
    window       "day" or a duration such as "30m", "1h"; aligned to whole multiples since 1970 UTC
    min_length   sessions with fewer events, repeats dropped, are left out; >= 1
    max_length   longer sessions are cut to their `keep` ("last" or "first") events
    suffix       ending of the list columns: "-list_seq" or "-list"
    seed         of the 80/10/10 split; >= 0
    event_types  keep only these values of the event_type column; empty keeps all
    text         roles whose ids are text although they look like numbers
    separator    of text files; default: the most frequent of tab , ; | in the header
    overwrite    replace an earlier output of this function
    progress     called as progress(step, done, total) now and then
    engine       "polars", or "nvtabular" where NVTabular 23.8 is installed: its operators make the
                 same files, and OUT/nvtabular_workflow
    returns      Summary, also in OUT/summary.json

    OUT appears only when everything is written. Numbers of windows count from the window of the
    first session kept; a window without sessions has a number but no folder. The result does not
    depend on the number of threads. Raises InputError on bad input, naming file, column and row.
    """
    began = time.perf_counter()
    rules = SessionRules(min_length, max_length, keep, suffix)
    duration = parse_window(window)
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if engine == "nvtabular":
        nvtabular_engine.check_installed()
    if seed < 0:
        raise InputError(f"seed must not be below 0; got {seed}")
    source = open_events(inputs, map, event_types=event_types, text=text, separator=separator)
    out = Path(out)
    report = progress or (lambda step, done, total: None)
    with appear_whole(out, overwrite) as (result, spill):
        summary = Summary(str(out), window=window, seed=seed, columns=source.roles.columns)
        kind = _NVTabularRun if engine == "nvtabular" else _Run
        work = kind(source, rules, duration, seed, result, spill, summary, report)
        work.read()
        work.clean()
        workflow = work.fit()
        work.write_sessions(workflow)
        workflow.save(result / "workflow")
        workflow.schema().to_proto_text(result / "schema.pbtxt")
        summary.roles_left_out = list(source.roles.absent)
        summary.seconds = round(time.perf_counter() - began, 3)
        summary.save(result / SUMMARY)
    return summary


@dataclasses.dataclass
class _Run:
    source: EventSource
    rules: SessionRules
    duration: int
    seed: int
    result: Path
    spill: Path
    summary: Summary
    report: Progress
    fitter: Fitter = dataclasses.field(init=False)
    clean_files: list[Path] = dataclasses.field(default_factory=list)

    def read(self) -> None:
        """Check every event and put it into the bucket of its session."""
        expected = self.source.rows
        self.buckets = Buckets(self.spill / "raw", max(1, round(expected / BUCKET_EVENTS)))
        for batch in self.source.batches():
            self.buckets.add(batch)
            done = self.source.counts.read
            # an estimate for text files: it must not say that this is the end
            self.report("read events", done, max(expected, done + 1))
        self.buckets.flush()
        counts, summary = self.source.counts, self.summary
        self.report("read events", counts.read, counts.read)
        summary.events_read = counts.read
        summary.events_of_other_types = counts.other_type
        summary.events_without_session = counts.without_session
        self._refuse_nothing_left()

    def _refuse_nothing_left(self) -> None:
        counts, names = self.source.counts, ", ".join(str(f.path) for f in self.source.files)
        if counts.read == 0:
            raise InputError(f"{names}: there is a header and no events")
        if counts.other_type == counts.read:
            types = ", ".join(self.source.event_types)
            raise InputError(f"{names}: none of the {counts.read} events has the type {types}")
        if counts.other_type + counts.without_session == counts.read:
            column = self.source.roles.columns["session"]
            raise InputError(
                f"{names}: no event has a session in column {column!r}; all are missing. Name"
                " another column with --map session=COLUMN"
            )

    def clean(self) -> None:
        """Sort each bucket, drop repeats, count values."""
        self.fitter = Fitter(self.source.roles)
        folder = self.spill / "clean"
        folder.mkdir()
        total = len(self.buckets)
        for events in self.buckets.take():
            clean = sort_and_drop_repeats(events)
            self.summary.events_repeated += events.height - clean.height
            self.count(clean)
            self.clean_files.append(folder / f"{len(self.clean_files):05d}.parquet")
            clean.write_parquet(self.clean_files[-1], compression="lz4")
            self.report("drop repeats, count items", len(self.clean_files), total)

    def count(self, clean: pl.DataFrame) -> None:
        self.fitter.add(clean)

    def fit(self) -> Workflow:
        """Vocabularies, then the statistics that need the first day of every item."""
        self.fitter.make_vocabularies()
        for at, path in enumerate(self.clean_files, 1):
            self.fitter.add_recency(pl.read_parquet(path, columns=["item", "time"]))
            self.report("fit recency", at, len(self.clean_files))
        return self.counted(self.fitter.workflow(self.rules), self.fitter.nulls["item"])

    def counted(self, workflow: Workflow, without_item: int) -> Workflow:
        self.summary.items = workflow.vocabularies["item"].height
        self.summary.events_without_item = without_item
        for role, name in (("category", "categories"), ("brand", "brands")):
            if role in workflow.vocabularies:
                setattr(self.summary, name, workflow.vocabularies[role].height)
        return workflow

    def write_sessions(self, workflow: Workflow) -> None:
        counts: dict[int, int] = {}
        files = []
        folder = self.spill / "sessions"
        folder.mkdir()
        floats = [c + self.rules.suffix for c in workflow.feature_names()]
        for at, path in enumerate(self.clean_files, 1):
            clean = pl.read_parquet(path)
            path.unlink()
            sessions = self.sessions(workflow, clean).with_columns(
                (pl.col("session_start") // self.duration).alias("window")
            )
            self._count(clean, sessions)
            _widen(workflow.ranges, sessions, floats, self.rules.suffix)
            for number, count in sessions["window"].value_counts().iter_rows():
                counts[number] = counts.get(number, 0) + count
            files.append(folder / f"{at:05d}.parquet")
            # row groups much smaller than a bucket let the next step skip most of the file
            sessions.sort("window", maintain_order=True).write_parquet(
                files[-1], compression="lz4", row_group_size=20_000
            )
            self.report("make sessions", at, len(self.clean_files))
        self._check_windows(counts)
        first = min(counts)
        for done, (number, sessions) in enumerate(_windows(files, counts), 1):
            self._write_window(number, first, workflow.output(sessions))
            self.report("write windows", done, len(counts))

    def sessions(self, workflow: Workflow, clean: pl.DataFrame) -> pl.DataFrame:
        return workflow.sessions(clean)

    def _count(self, clean: pl.DataFrame, sessions: pl.DataFrame) -> None:
        s, length = self.summary, sessions["length"]
        s.sessions += sessions.height
        s.sessions_too_short += clean["session"].n_unique() - sessions.height
        s.sessions_cut += int((length > self.rules.max_length).sum())
        kept = int(length.clip(upper_bound=self.rules.max_length).sum())
        s.events_kept += kept
        s.events_cut += int(length.sum()) - kept
        s.events_in_short_sessions += clean.height - int(length.sum())

    def _check_windows(self, counts: dict[int, int]) -> None:
        if not counts:
            raise InputError(
                f"{self.source.files[0].path}: no session has {self.rules.min_length} events or"
                f" more once repeats are dropped; {self.summary.sessions_too_short} are shorter."
                f" Is {self.source.roles.columns['session']!r} the column of the session?"
            )
        span = max(counts) - min(counts) + 1
        if span > MAX_WINDOWS:
            raise InputError(
                f"window {self.summary.window!r} cuts these events into {span} windows, more than"
                f" {MAX_WINDOWS}; choose a longer one"
            )

    def _write_window(self, number: int, first: int, sessions: pl.DataFrame) -> None:
        at = number - first + 1
        folder = self.result / "sessions_by_day" / str(at)
        folder.mkdir(parents=True)
        parts = split(sessions.height, self.seed, number)
        for name, rows in parts.items():
            table = _plain_lists(sessions[rows].to_arrow())
            pq.write_table(table, folder / f"{name}.parquet", row_group_size=ROW_GROUP_SESSIONS)
        start = pl.from_epoch(pl.Series([number * self.duration]), time_unit="us")[0]
        sizes = {name: len(rows) for name, rows in parts.items()}
        self.summary.windows.append(Window(at, start.isoformat() + "Z", **sizes))


class _NVTabularRun(_Run):
    """The same run with statistics and sessions by NVTabular."""

    def count(self, clean: pl.DataFrame) -> None:
        pass  # NVTabular counts when it fits

    def fit(self) -> Workflow:
        scratch = self.spill / "nvtabular"
        self.engine = nvtabular_engine.Engine(self.source.roles, self.rules, scratch)
        self.report("fit", 0, 1)
        workflow = self.engine.fit(self.clean_files)
        self.engine.save(self.result / nvtabular_engine.SAVED)
        self.report("fit", 1, 1)
        return self.counted(workflow, self.engine.nulls["item"])

    def sessions(self, workflow: Workflow, clean: pl.DataFrame) -> pl.DataFrame:
        return self.engine.sessions(clean)


def split(count: int, seed: int, window: int) -> dict[str, np.ndarray]:
    """Rows of train, valid and test among `count` sessions: 80, 10 and 10 percent at random.

    Parts are disjoint, complete and in the order of the sessions; valid and test hold a tenth each,
    rounded, and at least one row when there are 3 or more. With 2 rows one is for testing.
    """
    tenth = max((count + 5) // 10, 1) if count >= 3 else 0
    order = np.random.default_rng([seed, window]).permutation(count)
    test = tenth if count != 2 else 1
    cut = np.split(order, [test, test + tenth])
    return {name: np.sort(rows) for name, rows in zip(("test", "valid", "train"), cut)}


def _windows(files: list[Path], counts: dict[int, int]) -> Iterator[tuple[int, pl.DataFrame]]:
    """Each window with its sessions by start, then by place in the input."""
    numbers = sorted(counts)
    while numbers:
        # as many windows at once as fit, since every read opens all files
        take, size = 1, counts[numbers[0]]
        while take < len(numbers) and size + counts[numbers[take]] <= WINDOW_SESSIONS:
            size += counts[numbers[take]]
            take += 1
        group, numbers = numbers[:take], numbers[take:]
        sessions = (
            pl.scan_parquet(files, glob=False)
            .filter(pl.col("window").is_between(group[0], group[-1]))
            .collect()
            .sort("window", "session_start", "row")
        )
        for (number,), part in sessions.partition_by(
            "window", as_dict=True, maintain_order=True
        ).items():
            yield number, part


def _widen(
    ranges: dict[str, tuple[float, float]], sessions: pl.DataFrame, names: list[str], suffix: str
) -> None:
    """Extend the range of every float feature by these sessions."""
    for name in names:
        values = sessions[name].explode()
        if values.dtype.is_float() and len(values):
            feature = name.removesuffix(suffix)
            low, high = ranges.get(feature, (np.inf, -np.inf))
            ranges[feature] = (min(low, values.min()), max(high, values.max()))


def _plain_lists(table: pa.Table) -> pa.Table:
    """Plain Arrow lists and strings; Polars' 64-bit ones trouble some readers."""
    fields = []
    for field in table.schema:
        kind = field.type
        if pa.types.is_large_list(kind):
            kind = pa.list_(kind.value_type)
        elif not (pa.types.is_integer(kind) or pa.types.is_timestamp(kind)):
            kind = pa.string()
        fields.append(pa.field(field.name, kind))
    return table.cast(pa.schema(fields))

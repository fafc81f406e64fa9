"""The ETL on good input: against a plain recomputation, and on three real data sets."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_etl import naive_sessions

from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow, parse_map, run
from t4r_fast.etl.pipeline import split
from t4r_fast.etl.statistics import Moments
from t4r_fast.etl.times import microseconds, parse_window
from t4r_fast.schema import Schema, Tags

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
BEGIN = 1_569_888_000  # 2019-10-01 00:00:00 UTC, a Tuesday
FEATURES = {
    "product_id": pl.Int64,
    "category_id": pl.Int64,
    "brand": pl.Int64,
    "product_recency_days_log_norm": pl.Float32,
    "et_dayofweek_sin": pl.Float32,
    "et_dayofweek_cos": pl.Float32,
    "price_log_norm": pl.Float32,
    "relative_price_to_avg_categ_id": pl.Float32,
}
REES46 = {
    "session": "user_session",
    "item": "product_id",
    "category": "category_id",
    "brand": "brand",
    "price": "price",
}


def event(session, item, seconds):
    rest = {"category": 1, "brand": "b", "price": 1.0}
    return {"session": session, "item": item, "time": seconds, **rest}


def frame_of(events):
    """Events of `naive_etl` as a frame in the REES46 columns."""
    kinds = {"session": pl.String, "item": pl.Int64, "category": pl.Int64, "brand": pl.String}
    columns = {
        REES46[r]: pl.Series([e[r] for e in events], dtype=kinds.get(r, pl.Float64)) for r in REES46
    }
    stamps = pl.from_epoch(pl.Series([e["time"] for e in events], dtype=pl.Int64), time_unit="s")
    return pl.DataFrame({"event_time": stamps.dt.strftime("%Y-%m-%d %H:%M:%S UTC"), **columns})


def read_windows(out, suffix="-list_seq"):
    """Session -> the same dict that naive_sessions makes (without row), plus its split."""
    found = {}
    for path in sorted(Path(out, "sessions_by_day").glob("*/*.parquet")):
        for row in pl.read_parquet(path).iter_rows(named=True):
            assert row["user_session"] not in found, "a session is in two files"
            found[row["user_session"]] = {
                "window": int(path.parent.name),
                "start": row["session_start"].timestamp(),
                "split": path.stem,
                **{f: row[f + suffix] for f in FEATURES if f + suffix in row},
            }
    return found


def assert_same_sessions(found, expected):
    assert set(found) == set(expected)
    for session, want in expected.items():
        got = found[session]
        for exact in ("window", "start", "product_id", "category_id", "brand"):
            assert got[exact] == want[exact], (session, exact)
        for name, kind in FEATURES.items():
            if kind == pl.Float32:
                np.testing.assert_allclose(
                    got[name], want[name], rtol=2e-6, atol=2e-6, err_msg=f"{session} {name}"
                )


def random_events(rng, count, *, sessions=None, items=12, days=3):
    """Events with ties in time, repeats, nulls, odd brands, in no order."""
    sessions = sessions or max(1, count // 5)

    def pick(values, null_share):
        return None if rng.random() < null_share else values[rng.integers(len(values))]

    brands = ["acme", "Zürich", "🦄 shop", "a,b", 'say "hi"', "x"]
    return [
        {
            "session": pick([f"s{i}" for i in range(sessions)], 0.03),
            "item": pick(list(range(100, 100 + items)), 0.05),
            "time": BEGIN + int(rng.integers(0, days * 144)) * 600,
            "category": pick([11, 22, 33], 0.1),
            "brand": pick(brands, 0.2),
            "price": pick([0.0, 1.5, 20.0, 399.99], 0.1),
        }
        for _ in range(count)
    ]


@contextlib.contextmanager
def small_pieces(scale=1):
    """Many batches, flushes, buckets and groups of windows, even on tiny input."""
    from t4r_fast.etl import files, pipeline, spill

    with (
        mock.patch.object(files, "BATCH_ROWS", 7 * scale),
        mock.patch.object(pipeline, "BUCKET_EVENTS", 9 * scale),
        mock.patch.object(pipeline, "WINDOW_SESSIONS", 3 * scale),
        mock.patch.object(spill.Buckets.__init__, "__defaults__", (16 * scale,)),
    ):
        yield


# -- against the plain recomputation ---------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 100),
    kind=st.sampled_from(["csv", "parquet"]),
    window=st.sampled_from([("day", 86_400), ("6h", 21_600), ("40m", 2_400)]),
    keep=st.sampled_from(["last", "first"]),
    lengths=st.sampled_from([(2, 20), (2, 3), (1, 2), (3, 5)]),
)
def test_matches_plain_recomputation(tmp_path_factory, seed, count, kind, window, keep, lengths):
    events = random_events(np.random.default_rng(seed), count)
    rules = {"keep": keep, "min_length": lengths[0], "max_length": lengths[1]}
    expected, vocabularies = naive_sessions(events, window=window[1], **rules)
    folder = tmp_path_factory.mktemp("etl")
    frame, path = frame_of(events), folder / f"events.{kind}"
    getattr(frame, f"write_{kind}")(path)
    with small_pieces():
        if not expected:
            with pytest.raises(InputError, match=r"no session|no event has a session"):
                run(path, folder / "out", window=window[0], **rules)
            return
        summary = run(path, folder / "out", window=window[0], **rules)
    assert_same_sessions(read_windows(folder / "out"), expected)
    workflow = Workflow.load(folder / "out" / "workflow")
    for role, want in vocabularies.items():
        table = workflow.vocabularies[role]
        assert dict(zip(table["value"].to_list(), table["id"].to_list())) == want
    assert summary.sessions == len(expected)
    assert (
        summary.events_read
        == count
        == sum(
            getattr(summary, f"events_{part}")
            for part in ("without_session", "repeated", "in_short_sessions", "cut", "kept")
        )
    )


def test_several_files_equal_one_file_and_threads_do_not_matter(tmp_path):
    events = random_events(np.random.default_rng(5), 3_000, sessions=400, items=60)
    frame = frame_of(events)
    frame.write_csv(tmp_path / "all.csv")
    parts = tmp_path / "parts"
    parts.mkdir()
    frame[:1000].write_csv(parts / "1.csv")
    with gzip.open(parts / "2.csv.gz", "wb") as f:
        f.write(frame[1000:1700].write_csv().encode())
    frame[1700:].write_csv(parts / "3.tsv", separator="\t")
    (parts / "notes.md").write_text("no events")

    run(tmp_path / "all.csv", tmp_path / "one")
    with small_pieces(scale=40):
        run(parts, tmp_path / "several")
    code = "import sys; from t4r_fast.etl import run; run([sys.argv[1]], sys.argv[2])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "all.csv"), str(tmp_path / "threads")],
        env={**os.environ, "POLARS_MAX_THREADS": "1", "T4R_FAST_BACKEND": "plain"},
        check=True,
    )
    one = {p.relative_to(tmp_path / "one"): p for p in (tmp_path / "one").rglob("*.p*")}
    assert len(one) > 6
    for name, path in one.items():
        # another way through the buckets may change the last bit of a mean, not a session
        assert (tmp_path / "threads" / name).read_bytes() == path.read_bytes(), name
    assert_same_sessions(read_windows(tmp_path / "several"), _with_row(tmp_path / "one"))
    assert {s: v["split"] for s, v in read_windows(tmp_path / "several").items()} == {
        s: v["split"] for s, v in read_windows(tmp_path / "one").items()
    }


def _with_row(out):
    return {s: {**v, "row": 0} for s, v in read_windows(out).items()}


# -- the files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """One run on random events, shared by tests that only read it."""
    folder = tmp_path_factory.mktemp("shop")
    events = random_events(np.random.default_rng(1), 4_000, sessions=700, items=80, days=4)
    frame_of(events).write_parquet(folder / "events.parquet")
    return folder / "out", run(folder / "events.parquet", folder / "out")


def test_layout_and_column_types(shop):
    out, summary = shop
    assert sorted(p.name for p in out.iterdir()) == [
        "schema.pbtxt",
        "sessions_by_day",
        "summary.json",
        "workflow",
    ]
    assert sorted(os.listdir(out / "sessions_by_day")) == [str(w.number) for w in summary.windows]
    train = pq.read_schema(out / "sessions_by_day" / "1" / "train.parquet")
    assert train.names == ["user_session", "session_start", *(f + "-list_seq" for f in FEATURES)]
    kinds = [str(t) for t in train.types]
    assert kinds[:2] == ["string", "timestamp[us, tz=UTC]"]
    assert [k.split(": ")[1].rstrip(">") for k in kinds[2:]] == ["int64"] * 3 + ["float"] * 5
    assert all(k.startswith("list<") for k in kinds[2:])
    assert json.loads((out / "summary.json").read_text())["sessions"] == summary.sessions
    assert not list(out.parent.glob(".*partial*"))


def test_sessions_are_in_order_of_time_and_have_the_allowed_length(shop):
    out, _ = shop
    for path in out.glob("sessions_by_day/*/*.parquet"):
        sessions = pl.read_parquet(path)
        assert sessions["session_start"].is_sorted()
        lengths = sessions["product_id-list_seq"].list.len()
        assert lengths.is_between(2, 20).all()
        assert (lengths == sessions["price_log_norm-list_seq"].list.len()).all()


def test_schema_describes_the_files(shop):
    out, _ = shop
    schema = Schema().from_proto_text(out / "schema.pbtxt")
    assert schema.column_names == [f + "-list_seq" for f in FEATURES]
    assert schema.item_id_column_name == "product_id-list_seq"
    assert schema.select_by_tag(Tags.CONTINUOUS).column_names == [
        f + "-list_seq" for f, k in FEATURES.items() if k == pl.Float32
    ]
    sessions = pl.read_parquet(str(out / "sessions_by_day" / "*" / "*.parquet"))
    for column in schema:
        assert Tags.LIST in column.tags
        assert (column.value_count.min, column.value_count.max) == (2, 20)
        values = sessions[column.name].explode()
        if column.is_categorical:
            vocabulary = {"product_id": "item", "category_id": "category", "brand": "brand"}
            role = vocabulary[column.name.removesuffix("-list_seq")]
            table = pl.read_parquet(out / "workflow" / f"{role}.parquet")
            assert (column.int_domain.min, column.cardinality) == (0, table["id"].max() + 1)
            assert values.min() >= 1
        else:
            domain = column.float_domain
            assert domain.min == pytest.approx(values.min())
            assert domain.max == pytest.approx(values.max())


def test_ids_follow_frequency_then_value(tmp_path):
    items = [7, 7, 7, 5, 5, 9, 9, 1]
    events = [event(f"s{i}", x, BEGIN) for i, x in enumerate(items)]
    workflow = Workflow.fit(frame_of(events))
    assert workflow.item_ids([7, 5, 9, 1]).tolist() == [3, 4, 5, 6]


def test_a_window_without_sessions_keeps_its_number_and_has_no_folder(tmp_path):
    events = [event(f"s{day}", i, BEGIN + day * 86_400 + i) for day in (0, 3) for i in (1, 2)]
    frame_of(events).write_csv(tmp_path / "e.csv")
    summary = run(tmp_path / "e.csv", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out" / "sessions_by_day")) == ["1", "4"]
    assert [(w.number, w.start) for w in summary.windows] == [
        (1, "2019-10-01T00:00:00Z"),
        (4, "2019-10-04T00:00:00Z"),
    ]
    # a window with few sessions has all three files all the same
    assert sorted(os.listdir(tmp_path / "out" / "sessions_by_day" / "4")) == [
        "test.parquet",
        "train.parquet",
        "valid.parquet",
    ]


def test_a_session_of_1000_events_is_cut_to_its_last_or_first_20(tmp_path):
    events = [event("long", i, BEGIN + i) for i in range(1000)]
    frame_of(events).write_csv(tmp_path / "e.csv")
    for keep, items in (("last", range(980, 1000)), ("first", range(20))):
        summary = run(tmp_path / "e.csv", tmp_path / keep, keep=keep)
        (session,) = read_windows(tmp_path / keep).values()
        workflow = Workflow.load(tmp_path / keep / "workflow")
        assert workflow.items(session["product_id"]) == list(items)
        assert session["start"] == BEGIN
        assert (summary.sessions_cut, summary.events_cut) == (1, 980)


def test_suffix_list(tmp_path):
    frame_of(random_events(np.random.default_rng(2), 200)).write_csv(tmp_path / "e.csv")
    run(tmp_path / "e.csv", tmp_path / "out", suffix="-list")
    schema = Schema().from_proto_text(tmp_path / "out" / "schema.pbtxt")
    assert schema.item_id_column_name == "product_id-list"
    assert all("product_id" in v for v in read_windows(tmp_path / "out", "-list").values())


def test_event_types_are_filtered_and_counted(tmp_path):
    frame = frame_of(random_events(np.random.default_rng(3), 400)).with_columns(
        pl.Series("event_type", (["view"] * 3 + ["cart"]) * 100)
    )
    frame.write_csv(tmp_path / "all.csv")
    frame.filter(pl.col("event_type") == "view").write_csv(tmp_path / "views.csv")
    some = run(tmp_path / "all.csv", tmp_path / "some", event_types=["view"])
    run(tmp_path / "views.csv", tmp_path / "views")
    assert (some.events_read, some.events_of_other_types) == (400, 100)
    assert_same_sessions(read_windows(tmp_path / "some"), _with_row(tmp_path / "views"))


def test_side_features_are_optional_and_reported(tmp_path):
    frame = frame_of(random_events(np.random.default_rng(4), 200))
    frame.drop("brand", "price").write_csv(tmp_path / "e.csv")
    summary = run(tmp_path / "e.csv", tmp_path / "out")
    assert summary.roles_left_out == ["brand", "price"]
    assert summary.brands is None
    schema = Schema().from_proto_text(tmp_path / "out" / "schema.pbtxt")
    assert [c.removesuffix("-list_seq") for c in schema.column_names] == [
        "product_id",
        "category_id",
        "product_recency_days_log_norm",
        "et_dayofweek_sin",
        "et_dayofweek_cos",
    ]
    frame.write_csv(tmp_path / "full.csv")
    run(tmp_path / "full.csv", tmp_path / "less", map={"brand": "", "price": ""})
    less = Schema().from_proto_text(tmp_path / "less" / "schema.pbtxt")
    assert less.column_names == schema.column_names


# -- the split -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9, 10, 57, 1000])
def test_split_is_disjoint_complete_and_80_10_10(count):
    parts = split(count, seed=7, window=18_170)
    together = np.concatenate(list(parts.values()))
    assert sorted(together) == list(range(count))
    sizes = {k: len(v) for k, v in parts.items()}
    expected = {0: (0, 0, 0), 1: (1, 0, 0), 2: (1, 0, 1), 3: (1, 1, 1), 9: (7, 1, 1)}
    tenth = (count + 5) // 10
    want = expected.get(count, (count - 2 * tenth, tenth, tenth))
    assert (sizes["train"], sizes["valid"], sizes["test"]) == want


def test_split_depends_on_seed_and_window_only():
    def valid(seed, window):
        return split(500, seed, window)["valid"].tolist()

    assert valid(1, 5) == valid(1, 5)
    assert valid(1, 5) != valid(2, 5)
    assert valid(1, 5) != valid(1, 6)


# -- times and statistics --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "2019-10-01 00:00:00 UTC",
        "2019-10-01 00:00:00",
        "2019-10-01T00:00:00Z",
        "2019-10-01T02:00:00+02:00",
        "2019-10-01 02:00:00 +0200",
        "2019-10-01 00:00:00.000 UTC",
        "2019-10-01",
        " 2019-10-01 00:00 ",
        "1569888000",
        "1569888000.0",
        "1569888000000",
        1_569_888_000,
        1_569_888_000.0,
        1_569_888_000_000,
        1_569_888_000_000_000,
        1_569_888_000_000_000_000,
    ],
)
def test_times_in_all_forms(value):
    # an odd neighbour of the same type must not change how a value is read
    values = pl.Series([value, None, value])
    assert microseconds(values).to_list() == [BEGIN * 10**6, None, BEGIN * 10**6]


def test_times_keep_fractions_and_zones():
    text = pl.Series(["1396437466.94", "2014-04-02T11:17:46.940Z", "2014-04-02 11:17:46.94 UTC"])
    assert microseconds(text).to_list() == [1_396_437_466_940_000] * 3
    noon = pl.Series(["2019-10-01 02:00:00"]).str.to_datetime(time_unit="ms")
    paris = noon.dt.replace_time_zone("Europe/Paris")
    assert microseconds(noon)[0] == (BEGIN + 7200) * 10**6
    assert microseconds(paris)[0] == BEGIN * 10**6


@pytest.mark.parametrize("value", ["soon", "2019-13-01", "20191001", "", "-5", "0", "nan", "1e300"])
def test_what_is_no_time_gives_null(value):
    assert microseconds(pl.Series([value])).to_list() == [None]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("day", 86400), ("1d", 86400), ("30m", 1800), ("90s", 90), ("2w", 1209600)],
)
def test_window_lengths(text, seconds):
    assert parse_window(text) == seconds * 10**6


@pytest.mark.parametrize("text", ["", "0m", "m", "1.5h", "-1d", "1y"])
def test_window_lengths_refused(text):
    with pytest.raises(InputError, match="such as 30m"):
        parse_window(text)


def test_moments_in_parts_equal_moments_at_once():
    # a large common offset, where sums of squares would lose everything
    values = np.random.default_rng(0).normal(1e8, 3.0, 10_001)
    moments = Moments()
    for part in np.array_split(values, 13):
        moments.add(part)
    moments.add(values[:0])
    assert moments.mean == pytest.approx(values.mean(), rel=1e-12)
    assert moments.std == pytest.approx(values.std(ddof=1), rel=1e-9)


def test_parse_map():
    assert parse_map("session=SessionId, item=ItemId,time=Time,brand=") == {
        "session": "SessionId",
        "item": "ItemId",
        "time": "Time",
        "brand": "",
    }


# -- output that appears whole ---------------------------------------------------------------------


def test_an_earlier_output_is_replaced_only_when_asked(tmp_path):
    frame_of(random_events(np.random.default_rng(6), 200)).write_csv(tmp_path / "e.csv")
    out = tmp_path / "out"
    run(tmp_path / "e.csv", out)
    with pytest.raises(InputError, match="--overwrite"):
        run(tmp_path / "e.csv", out)
    assert run(tmp_path / "e.csv", out, overwrite=True, keep="first").out == str(out)
    assert json.loads((out / "workflow" / "workflow.json").read_text())["rules"]["keep"] == "first"

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="left alone"):
        run(tmp_path / "e.csv", foreign, overwrite=True)
    assert (foreign / "thesis.tex").exists()


def test_a_failed_run_leaves_nothing_and_keeps_the_earlier_output(tmp_path):
    frame_of(random_events(np.random.default_rng(6), 200)).write_csv(tmp_path / "e.csv")
    run(tmp_path / "e.csv", tmp_path / "out")
    before = (tmp_path / "out" / "summary.json").read_bytes()

    def stop(step, done, total):
        if step == "write windows":
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        run(tmp_path / "e.csv", tmp_path / "out", overwrite=True, progress=stop)
    assert sorted(os.listdir(tmp_path)) == ["e.csv", "out"]
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


def test_a_killed_run_leaves_no_output_and_the_next_run_cleans_up(tmp_path):
    frame_of(random_events(np.random.default_rng(6), 200)).write_csv(tmp_path / "e.csv")
    code = """
import sys, time
from t4r_fast.etl import run
def stall(step, done, total):
    if step == "write windows":
        print("stalled", flush=True)
        time.sleep(60)
run(sys.argv[1], sys.argv[2], progress=stall)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "e.csv"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        env={**os.environ, "T4R_FAST_BACKEND": "plain"},
    )
    assert process.stdout.readline() == b"stalled\n"
    # while it lives, another run leaves its folder alone
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    run(tmp_path / "e.csv", tmp_path / "other")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob(".out.partial-*"))) == 1
    run(tmp_path / "e.csv", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["e.csv", "other", "out"]


def test_progress_reaches_the_total_of_every_step_once(tmp_path):
    frame_of(random_events(np.random.default_rng(6), 300)).write_csv(tmp_path / "e.csv")
    calls = []
    with small_pieces():
        run(tmp_path / "e.csv", tmp_path / "out", progress=lambda *call: calls.append(call))
    ends = Counter(step for step, done, total in calls if done >= total)
    assert ends == dict.fromkeys(
        [
            "read events",
            "drop repeats, count items",
            "fit recency",
            "make sessions",
            "write windows",
        ],
        1,
    )
    for step in ends:
        done = [d for s, d, _ in calls if s == step]
        assert done == sorted(done)


# -- real events -----------------------------------------------------------------------------------


def real(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the real events are not here: {path}")
    return path


def test_rees46_sample_by_half_hour(tmp_path):
    path = real("rees46-2019-Oct-sample.csv")
    frame = pl.read_csv(path).rename({v: k for k, v in REES46.items()})
    stamps = frame["event_time"].str.to_datetime("%Y-%m-%d %H:%M:%S UTC").dt.epoch("s")
    events = frame.with_columns(stamps.alias("time")).select(
        "session", "item", "time", "category", "brand", "price"
    )
    expected, _ = naive_sessions(list(events.iter_rows(named=True)), window=1800)
    summary = run(path, tmp_path / "out", window="30m")
    assert_same_sessions(read_windows(tmp_path / "out"), expected)
    assert (summary.events_read, summary.items) == (17_435, 6_493)
    assert summary.sessions + summary.sessions_too_short == 5_066
    assert [w.number for w in summary.windows] == [1, 2, 3, 4, 5, 6]


def test_yoochoose_by_day(tmp_path):
    folder = real("rsc15_100k")
    files = [pl.read_csv(p, separator="\t") for p in sorted(folder.glob("*.txt"))]
    # the exact decimal of the file; a float of seconds is good to a microsecond
    rows = pl.concat(files).rename({"SessionId": "session", "ItemId": "item", "Time": "time"})
    counts, sessions = Counter(), {}
    ordered = rows.with_row_index().sort("session", "time", "index")
    last = (None, None)
    for session, item, at in ordered.select("session", "item", "time").iter_rows():
        if (session, item) != last:
            counts[item] += 1
            sessions.setdefault(session, []).append((at, item))
        last = (session, item)
    ids = {x: i for i, x in enumerate(sorted(counts, key=lambda x: (-counts[x], x)), 3)}
    long = {s: v for s, v in sessions.items() if len(v) >= 2}
    first_day = min(v[0][0] // 86400 for v in long.values())

    summary = run(
        folder, tmp_path / "out", map=parse_map("session=SessionId,item=ItemId,time=Time")
    )
    found = read_windows(tmp_path / "out")
    assert set(found) == set(long)
    for session, events in long.items():
        assert found[session]["product_id"] == [ids[x] for _, x in events[-20:]]
        assert found[session]["window"] == events[0][0] // 86400 - first_day + 1
    assert summary.roles_left_out == ["category", "brand", "price"]
    # an item is 0 days old when first seen, and that is the lowest value
    floor = min(min(v["product_recency_days_log_norm"]) for v in found.values())
    workflow = Workflow.load(tmp_path / "out" / "workflow")
    mean, deviation = workflow.moments["recency"]
    assert floor == pytest.approx(-mean / deviation, rel=1e-6)


def test_g1_news_by_hour(tmp_path):
    path = real("g1-news-windows-001-060.parquet")
    columns = {"session": "session_id", "item": "click_article_id", "time": "click_timestamp"}
    began = time.perf_counter()
    summary = run(path, tmp_path / "out", map=columns, window="1h")
    assert time.perf_counter() - began < 60
    raw = pl.read_parquet(path)
    starts = raw.group_by("session_id").agg(pl.col("click_timestamp").min())
    hours = Counter((starts["click_timestamp"] // 3_600_000).to_list())
    first = min(hours)
    found = {w.number: w.train + w.valid + w.test for w in summary.windows}
    # the file holds no repeats and no short sessions
    assert found == {hour - first + 1: count for hour, count in hours.items()}
    counts = (
        raw["click_article_id"]
        .value_counts()
        .sort("count", "click_article_id", descending=[True, False])
    )
    workflow = Workflow.load(tmp_path / "out" / "workflow")
    assert workflow.vocabularies["item"]["value"].to_list() == counts["click_article_id"].to_list()

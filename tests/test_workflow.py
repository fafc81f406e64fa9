"""The fitted workflow on new events: ids of unknown values, files, and the way back to items."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import numpy as np
import polars as pl
import pytest

from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow, features, run

BEGIN = datetime(2019, 10, 1, tzinfo=timezone.utc)


def events(rows):
    """(session, item, seconds, category, brand, price) as a frame."""
    columns = ["user_session", "product_id", "s", "category_id", "brand", "price"]
    frame = pl.DataFrame(rows, schema=columns, orient="row")
    return frame.with_columns(
        event_time=pl.lit(BEGIN) + pl.duration(seconds="s"),
        price=pl.col("price").cast(pl.Float64),
    ).drop("s")


SEEN = events(
    [
        ("a", 10, 0, 1, "acme", 1.0),
        ("a", 20, 60, 1, "acme", 3.0),
        ("b", 10, 86_400, 1, "zeta", 1.0),
        ("b", 30, 86_460, 2, None, 8.0),
        ("c", 20, 200_000, 2, "acme", 3.0),
    ]
)


@pytest.fixture(scope="module")
def fitted():
    return Workflow.fit(SEEN, min_length=2)


def test_training_events_give_the_sessions_of_the_files(tmp_path, fitted):
    SEEN.write_parquet(tmp_path / "e.parquet")
    run(tmp_path / "e.parquet", tmp_path / "out")
    files = pl.concat(
        [pl.read_parquet(p) for p in (tmp_path / "out").glob("sessions_by_day/*/*.parquet")]
    ).sort("session_start")
    loaded = Workflow.load(tmp_path / "out" / "workflow")
    for workflow in (fitted, loaded):
        for source in (SEEN, SEEN.lazy(), tmp_path / "e.parquet"):
            assert workflow.transform(source).equals(files)
    assert files["user_session"].to_list() == ["a", "b"]


def test_unknown_and_missing_values(fitted):
    new = events(
        [
            ("x", 10, 300_000, 1, "acme", 1.0),
            ("x", 99, 300_001, 9, "nobody", 2.0),
            ("x", None, 300_002, None, None, None),
        ]
    )
    (row,) = fitted.transform(new).to_dicts()
    assert row["product_id-list_seq"] == [3, 2, 1]
    assert row["category_id-list_seq"] == [3, 2, 1]
    assert row["brand-list_seq"] == [3, 2, 1]
    mean, deviation = fitted.moments["recency"]
    fresh = -mean / deviation
    days = 300_000 / 86_400
    np.testing.assert_allclose(
        row["product_recency_days_log_norm-list_seq"],
        [(np.log1p(days) - mean) / deviation, fresh, fresh],
        rtol=1e-5,
    )
    # an unknown category has the mean price of all events, 16 / 5
    relative = row["relative_price_to_avg_categ_id-list_seq"]
    np.testing.assert_allclose(relative[1], (2.0 - 3.2) / 3.2, rtol=1e-4)
    assert (row["price_log_norm-list_seq"][2], relative[2]) == (0.0, 0.0)


def test_price_is_relative_to_the_category(fitted):
    (row,) = fitted.transform(SEEN.filter(pl.col("user_session") == "b")).to_dicts()
    # category 1 costs (1 + 3 + 1) / 3 on average, category 2 (8 + 3) / 2
    np.testing.assert_allclose(
        row["relative_price_to_avg_categ_id-list_seq"],
        [(1 - 5 / 3) / (5 / 3), (8 - 5.5) / 5.5],
        rtol=1e-4,
    )


def test_events_without_a_category_have_a_mean_of_their_own():
    rows = [("a", 1, 0, None, "x", 2.0), ("a", 2, 1, None, "x", 4.0), ("a", 3, 2, 5, "x", 90.0)]
    workflow = Workflow.fit(events(rows))
    (row,) = workflow.transform(events(rows)).to_dicts()
    relative = row["relative_price_to_avg_categ_id-list_seq"]
    np.testing.assert_allclose(relative, [-1 / 3, 1 / 3, 0.0], atol=1e-5)


def test_an_item_seen_before_its_first_day_is_new(fitted):
    early = events([("x", 20, -500_000, 1, "acme", 1.0), ("x", 30, -499_000, 1, "acme", 1.0)])
    (row,) = fitted.transform(early).to_dicts()
    mean, deviation = fitted.moments["recency"]
    np.testing.assert_allclose(
        row["product_recency_days_log_norm-list_seq"], [-mean / deviation] * 2, rtol=1e-5
    )


def test_serving_keeps_sessions_of_one_event_and_the_last_items(fitted):
    new = events([("x", 10, 5, 1, "acme", 1.0)] + [("y", i, i, 1, "b", 1.0) for i in range(50)])
    assert fitted.transform(new)["user_session"].to_list() == ["y"]
    both = fitted.transform(new, min_length=1)
    assert dict(zip(both["user_session"], both["product_id-list_seq"].list.len())) == {
        "x": 1,
        "y": 20,
    }
    # of y only items 20 and 30 are known, and 30 is the first of the last 20
    assert both.filter(pl.col("user_session") == "y")["product_id-list_seq"][0].to_list() == (
        [5] + [2] * 19
    )


def test_no_events_give_no_sessions_with_all_columns(fitted):
    empty = fitted.transform(SEEN.clear())
    assert empty.height == 0
    assert empty.schema == fitted.transform(SEEN).schema


def test_a_new_column_of_the_events_is_no_feature(tmp_path):
    plain = Workflow.fit(SEEN.drop("brand", "price"))
    assert plain.transform(SEEN).equals(plain.transform(SEEN.drop("brand", "price")))


def test_a_missing_column_is_refused(fitted):
    with pytest.raises(InputError, match=r"events: there is no column 'brand'"):
        fitted.transform(SEEN.drop("brand"))


def test_ids_of_another_type(tmp_path, fitted):
    new = events([("x", 10, 5, 1, "acme", 1.0), ("x", 20, 9, 1, "acme", 1.0)])
    text = new.with_columns(pl.Series("product_id", ["10", "A-1"]))
    assert fitted.transform(text)["product_id-list_seq"].to_list() == [[3, 2]]
    text.with_columns(pl.col("event_time").dt.epoch("s")).write_csv(tmp_path / "new.csv")
    assert fitted.transform(tmp_path / "new.csv")["product_id-list_seq"].to_list() == [[3, 2]]
    assert fitted.item_ids(["10", "30", "A-1", None]).tolist() == [3, 5, 2, 1]


def test_items_and_ids_both_ways(fitted):
    assert fitted.num_items == 6
    assert fitted.item_ids([10, 20, 30, 40, None]).tolist() == [3, 4, 5, 2, 1]
    assert fitted.items([3, 4, 5]) == [10, 20, 30]
    assert fitted.items(np.array([0, 1, 2])) == [None, None, None]
    for bad in (-1, 6):
        with pytest.raises(InputError, match=f"below 6.*{bad}"):
            fitted.items([3, bad])


def test_saved_and_loaded_workflow_is_the_same(tmp_path, fitted):
    fitted.save(tmp_path / "w")
    again = Workflow.load(tmp_path / "w")
    assert again.transform(SEEN).equals(fitted.transform(SEEN))
    assert (again.columns, again.rules, again.moments) == (
        fitted.columns,
        fitted.rules,
        fitted.moments,
    )
    assert again.schema().to_proto_text() == fitted.schema().to_proto_text()


def test_missing_damaged_or_newer_workflow_is_refused(tmp_path, fitted):
    with pytest.raises(InputError, match="no saved workflow"):
        Workflow.load(tmp_path / "none")
    fitted.save(tmp_path / "w")
    state = tmp_path / "w" / "workflow.json"
    good = json.loads(state.read_text())
    state.write_text(json.dumps({**good, "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        Workflow.load(tmp_path / "w")
    state.write_text(json.dumps({k: v for k, v in good.items() if k != "moments"}))
    with pytest.raises(InputError, match="damaged"):
        Workflow.load(tmp_path / "w")
    state.write_text(json.dumps(good))
    (tmp_path / "w" / "item.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="damaged"):
        Workflow.load(tmp_path / "w")
    state.write_text("{")
    with pytest.raises(InputError, match="no saved workflow"):
        Workflow.load(tmp_path / "w")


@pytest.mark.parametrize("kind", ["int", "text"])
def test_an_index_finds_the_same_ids(kind):
    rng = np.random.default_rng(0)
    numbers = pl.Series("value", rng.permutation(500)[:200] * 3 - 300)
    known = numbers if kind == "int" else "p" + numbers.cast(pl.String)
    vocabulary = pl.DataFrame({"value": known, "id": np.arange(3, 203)})
    asked = rng.integers(-400, 1300, 1000)
    for values in (
        pl.Series(asked),
        pl.Series(asked).cast(pl.String),
        "p" + pl.Series(asked).cast(pl.String),
        pl.Series([None, *known.to_list()[:3], None]),
        pl.Series([None], dtype=pl.String),
        known.head(0),
    ):
        expected = features.encode(values, vocabulary)
        assert features.Index(vocabulary).encode(values).equals(expected)
    assert (features.Index(vocabulary).encode(known) == vocabulary["id"]).all()
    none = features.Index(vocabulary.head(0)).encode(pl.Series([1, None]).cast(known.dtype))
    assert none.to_list() == [2, 1]


def test_an_indexed_workflow_transforms_alike(fitted):
    indexed = Workflow.fit(SEEN, min_length=2)
    indexed.index()
    new = events([("x", 10, 300_000, 1, "new", 1.0), ("x", 99, 300_060, 7, None, None)])
    for frame in (SEEN, new):
        assert indexed.transform(frame, 1).equals(fitted.transform(frame, 1))

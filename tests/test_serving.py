"""Recommender: raw events in, products out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl
import pytest
import torch
from serving_case import ITEM, LENGTH, latest, lists, make_model, shop

from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow
from t4r_fast.serving import Recommender


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return shop(str(tmp_path_factory.mktemp("shop")))


def test_it_is_what_the_model_recommends(case):
    events, workflow = case
    model, new = make_model(workflow), latest(events, 40)
    found = Recommender(model, workflow).recommend(new, 7)
    batch = lists(new, workflow)
    assert (batch[ITEM] == 0).any()
    assert (batch[ITEM] != 0).all(1).any()
    scores, ids = model.recommend(batch, 7, recommend_from=3)
    assert found.sessions == new["user_session"].unique(maintain_order=True).to_list()
    assert np.array_equal(found.ids, ids.numpy())
    assert np.array_equal(found.scores, scores.numpy())
    assert found.items == [workflow.items(row) for row in ids.tolist()]


def test_only_the_columns_that_the_model_reads_are_asked_for(case):
    events, workflow = case
    plain, side = (Recommender(make_model(workflow, side=s), workflow) for s in (False, True))
    assert list(plain.columns) == ["session", "item", "time"]
    assert set(side.columns) == {"session", "item", "time", "category", "brand", "price"}
    plain.recommend(latest(events, 2).select(plain.columns.values()))
    with pytest.raises(InputError, match="there is no column 'category_id'"):
        side.recommend(latest(events, 2).select(plain.columns.values()))


def test_side_features_are_those_of_the_etl(case):
    events, workflow = case
    model, new = make_model(workflow, side=True), latest(events, 20)
    _, inputs = Recommender(model, workflow).encode(new)
    sessions = workflow.transform(new, min_length=1)
    order = new["user_session"].unique(maintain_order=True)
    at = pl.DataFrame({"user_session": order}).join(
        sessions, on="user_session", maintain_order="left"
    )
    for name, column in inputs.items():
        for row, values in zip(column, at[name].to_list()):
            values = values[-LENGTH:]
            assert row[: len(values)].tolist() == torch.tensor(values).to(row.dtype).tolist()
            assert not row[len(values) :].any()


def test_the_order_of_events_does_not_matter(case):
    events, workflow = case
    served, new = Recommender(make_model(workflow), workflow), latest(events, 10)
    shuffled = new.sample(fraction=1.0, shuffle=True, seed=3)
    a, b = served.recommend(new, 5), served.recommend(shuffled, 5)
    assert a.sessions != b.sessions
    assert dict(zip(a.sessions, a.items)) == dict(zip(b.sessions, b.items))


def test_unknown_products_count_and_are_never_recommended(case):
    events, workflow = case
    served = Recommender(make_model(workflow), workflow)
    new = latest(events, 1).with_columns(product_id=pl.lit(77))
    found = served.recommend(new, workflow.num_items - 3)
    scores, ids = served.model.recommend({ITEM: torch.tensor([[2]])}, 5, recommend_from=3)
    assert found.ids[0, :5].tolist() == ids[0].tolist()
    assert np.allclose(found.scores[0, :5], scores.numpy())
    assert sorted(found.items[0]) == sorted(workflow.vocabularies["item"]["value"].to_list())


def test_seen_products_are_left_out_on_request_and_answers_may_be_short(case):
    events, workflow = case
    served, new = Recommender(make_model(workflow), workflow), latest(events, 3)
    everything = workflow.num_items - 3
    found = served.recommend(new, everything, exclude_seen=True)
    for row, seen, ids, scores in zip(
        found.items, lists(new, workflow)[ITEM], found.ids, found.scores
    ):
        own = set(workflow.items(set(seen.tolist()) - {0, 1, 2}))
        assert not own & set(row)
        assert len(row) == everything - len(own)
        assert (ids[len(row) :] == -1).all()
        assert (scores[len(row) :] == -np.inf).all()
        assert np.isfinite(scores[: len(row)]).all()


def test_a_thousand_events_are_the_newest_ones(case):
    events, workflow = case
    served = Recommender(make_model(workflow), workflow)
    start = latest(events, 1).head(1)
    values = workflow.vocabularies["item"]["value"]
    long = pl.concat([start] * 1000).with_columns(
        event_time=pl.Series([f"2024-05-01 10:{n // 60:02d}:{n % 60:02d}" for n in range(1000)]),
        product_id=pl.Series([values[n % len(values)] for n in range(1000)]),
    )
    assert served.recommend(long, 5).items == served.recommend(long.tail(LENGTH), 5).items


def test_bad_events(case):
    events, workflow = case
    served, new = Recommender(make_model(workflow), workflow), latest(events, 2)
    with pytest.raises(InputError, match="there are none; a session needs at least one event"):
        served.recommend(new.head(0))
    with pytest.raises(InputError, match=r"'user_session', row 1 .*: the session is missing"):
        served.recommend(new.with_columns(user_session=pl.lit(None, dtype=pl.String)))
    with pytest.raises(InputError, match="the time 'noon' is no time"):
        served.recommend(new.with_columns(event_time=pl.lit("noon")))
    with pytest.raises(InputError, match=r"top_k must be a whole number from 1 to 128; got 0"):
        served.recommend(new, 0)
    for column in served.columns.values():
        with pytest.raises(InputError, match=f"there is no column '{column}'"):
            served.recommend(new.drop(column))


def test_model_and_workflow_must_be_of_one_run(case):
    events, workflow = case
    other = Workflow.fit(events.head(50))
    with pytest.raises(InputError, match="they are of different ETL runs"):
        Recommender(make_model(workflow), other)
    without = Workflow.fit(events.select("user_session", "product_id", "event_time"))
    with pytest.raises(InputError, match="which the workflow does not make"):
        Recommender(make_model(workflow, side=True), without)


def test_threads_may_share_it(case):
    events, workflow = case
    served = Recommender(make_model(workflow), workflow)
    parts = [latest(events, n) for n in range(1, 9)]
    expected = [served.recommend(part, 5) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: served.recommend(parts[n % 8], 5), range(64)))
    for n, answer in enumerate(found):
        assert answer.items == expected[n % 8].items
        assert np.array_equal(answer.scores, expected[n % 8].scores)

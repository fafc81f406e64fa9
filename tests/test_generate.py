"""Made-up events: their form, and the structure that models of increasing skill can find."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import polars as pl
import pytest

from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow, run
from t4r_fast.generate import World, generate_events

COLUMNS = {
    "event_time": pl.String,
    "event_type": pl.String,
    "product_id": pl.Int64,
    "category_id": pl.Int64,
    "category_code": pl.String,
    "brand": pl.String,
    "price": pl.Float64,
    "user_id": pl.Int64,
    "user_session": pl.String,
}
SIZE = {"sessions_per_day": 4000, "days": 4, "items": 1000, "seed": 3}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    path = tmp_path_factory.mktemp("shop") / "events.parquet"
    made = generate_events(path, **SIZE)
    return made, pl.read_parquet(path)


def test_events_have_the_form_of_rees46(shop):
    made, events = shop
    assert dict(events.schema) == COLUMNS
    assert made.events == events.height
    assert events["event_time"].is_sorted()
    assert events["event_time"].str.contains(r"^2019-10-0[1-5] \d\d:\d\d:\d\d UTC$").all()
    assert events["product_id"].n_unique() == 1000
    assert set(events["event_type"]) == {"view", "cart", "purchase"}
    sessions = events.drop_nulls("user_session")
    assert (
        sessions["user_session"].str.contains(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$").all()
    )
    # a session of one event goes missing with its event's session
    assert 15_990 < sessions["user_session"].n_unique() <= made.sessions == 16_000
    assert sessions.group_by("user_session").agg(pl.col("user_id").n_unique())["user_id"].max() == 1
    assert (events["price"] > 0).all()
    nulls = {c.name: c.null_count() / events.height for c in events if c.null_count()}
    assert set(nulls) == {"category_code", "brand", "user_session"}
    # an item has one category and one brand
    per_item = events.group_by("product_id").agg(pl.col("category_id", "brand").n_unique())
    assert per_item.select(pl.max("category_id", "brand")).row(0) == (1, 1)


def test_lengths_repeats_and_single_sessions_follow_the_world(shop):
    _, events = shop
    world = World()
    sessions = events.drop_nulls("user_session").sort(
        "user_session", "event_time", maintain_order=True
    )
    same = (pl.col("product_id") == pl.col("product_id").shift(1)) & (
        pl.col("user_session") == pl.col("user_session").shift(1)
    )
    clean = sessions.filter(~same.fill_null(False))
    lengths = clean.group_by("user_session").len()["len"]
    assert abs((lengths == 1).mean() - world.single_share) < 0.01
    assert abs(lengths.filter(lengths > 1).mean() - world.mean_length) < 0.15
    assert abs(1 - clean.height / sessions.height - world.repeat) < 0.01


def test_equal_arguments_give_equal_files_and_seeds_differ(tmp_path):
    size = {"sessions_per_day": 200, "days": 2, "items": 50}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate_events(tmp_path / f"{name}.csv", seed=seed, **size)
    a, b, c = ((tmp_path / f"{n}.csv").read_bytes() for n in "abc")
    assert a == b
    assert a != c
    generate_events(tmp_path / "a.parquet", seed=1, **size)
    assert pl.read_csv(tmp_path / "a.csv").equals(pl.read_parquet(tmp_path / "a.parquet"))


def test_new_items_appear_over_the_days_and_are_popular_at_first(shop):
    _, events = shop
    day = pl.col("event_time").str.slice(8, 2).cast(pl.Int64)
    views = events.with_columns(day=day).group_by("product_id", "day").len()
    born = views.group_by("product_id").agg(pl.col("day").min().alias("born"))
    for at in (2, 3, 4):
        new = born.filter(pl.col("born") == at)["product_id"]
        assert 50 < len(new) < 200
        today = views.filter(pl.col("day") == at)
        fresh = today["product_id"].is_in(new.implode())
        # a share several times that of their number
        assert today.filter(fresh)["len"].mean() > 1.3 * today.filter(~fresh)["len"].mean()


# -- what can be learned ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sessions(tmp_path_factory, shop):
    """Sessions of the first three days, and of the last one to be predicted."""
    folder = tmp_path_factory.mktemp("etl")
    shop[1].write_parquet(folder / "events.parquet")
    run(folder / "events.parquet", folder / "out")
    days = [
        pl.concat([pl.read_parquet(p) for p in (folder / "out/sessions_by_day" / str(d)).iterdir()])
        for d in (1, 2, 3, 4)
    ]
    return pl.concat(days[:3]), days[3].head(2000), Workflow.load(folder / "out" / "workflow")


def ndcg20(scores, targets):
    """Mean NDCG@20 of one target a session; equal scores count as the mean of their ranks."""
    own = scores[np.arange(len(targets)), targets][:, None]
    rank = (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
    return float(np.where(rank < 20, 1 / np.log2(rank + 2), 0).mean())


def test_memory_and_categories_tell_more_than_the_current_item(sessions):
    train, test, workflow = sessions
    lists = train["product_id-list_seq"].to_list()
    popularity = np.bincount(np.concatenate(lists), minlength=workflow.num_items) / 1e6
    after, after_two = defaultdict(Counter), defaultdict(Counter)
    for s in lists:
        for before, at, then in zip([0, *s], s, s[1:]):
            after[at][then] += 1
            after_two[before, at][then] += 1
    category = np.zeros(workflow.num_items, np.int64)
    category[np.concatenate(lists)] = np.concatenate(train["category_id-list_seq"].to_list())
    truth = test["product_id-list_seq"].to_list()

    def judge(first=0.0, second=0.0, skip=0.0, in_category=0.0):
        scores = np.tile(popularity, (len(truth), 1))
        for row, s in zip(scores, truth):
            at, before = s[-2], ([0, *s])[-3]
            used = ((first, after[at]), (second, after_two[before, at]), (skip, after[before]))
            for weight, counts in used:
                for item, count in counts.items():
                    row[item] += weight * count / (sum(counts.values()) + 2)
            mode = Counter(category[s[:-1]]).most_common(1)[0][0]
            row += in_category * (category == mode)
        return ndcg20(scores, np.array([s[-1] for s in truth]))

    popular = judge()
    current = judge(first=1)
    assert popular < 0.03
    assert current > 5 * popular
    print(
        "J",
        popular,
        current,
        judge(1, 1),
        judge(1, 2),
        judge(1, 4),
        judge(1, 1, 0.5),
        judge(1, 2, 0.5),
        judge(1, 2, 1),
        judge(1, 2, 0.5, 0.02),
        judge(1, 0, 0, 0.02),
    )
    # where the walk stood before the current item, which may be a detour
    assert judge(first=1, second=2, skip=0.5) > 1.15 * current
    # the category of most of the session, not only of the current item
    assert judge(first=1, in_category=0.02) > 1.05 * current


def test_the_price_shown_tells_how_a_session_goes_on(shop):
    _, events = shop
    usual = events.group_by("product_id").agg(pl.col("price").max().alias("usual"))
    views = events.join(usual, on="product_id").drop_nulls(["user_session", "brand"])
    views = views.sort("user_session", "event_time", maintain_order=True).with_columns(
        then=pl.col("brand").shift(-1).over("user_session"),
        then_item=pl.col("product_id").shift(-1).over("user_session"),
        then_category=pl.col("category_id").shift(-1).over("user_session"),
        cheap=pl.col("price") < 0.9 * pl.col("usual"),
    )
    onward = views.filter(
        (pl.col("then_category") == pl.col("category_id"))
        & (pl.col("then_item") != pl.col("product_id"))
    )
    same = onward.group_by("cheap").agg((pl.col("then") == pl.col("brand")).mean())
    stays = dict(same.iter_rows())
    assert 0.4 < views["cheap"].mean() < 0.6
    assert stays[False] > 0.8
    assert stays[True] < 0.7


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"items": 0}, "items"),
        ({"days": 0}, "days"),
        ({"sessions_per_day": 0}, "sessions_per_day"),
        ({"seed": -1}, "seed"),
        ({"start": "October"}, "2019-10-01"),
    ],
)
def test_arguments_out_of_range(tmp_path, change, part):
    arguments = {"sessions_per_day": 5, "days": 1, "items": 5, **change}
    with pytest.raises(InputError, match=part):
        generate_events(tmp_path / "e.csv", **arguments)
    assert not list(tmp_path.iterdir())


def test_files_are_not_replaced_unasked_and_need_a_known_ending(tmp_path):
    size = {"sessions_per_day": 5, "days": 1, "items": 5}
    generate_events(tmp_path / "e.csv", **size)
    with pytest.raises(InputError, match="--overwrite"):
        generate_events(tmp_path / "e.csv", **size)
    generate_events(tmp_path / "e.csv", overwrite=True, **size)
    with pytest.raises(InputError, match=r"\.csv or \.parquet"):
        generate_events(tmp_path / "e.xlsx", **size)
    assert [p.name for p in tmp_path.iterdir()] == ["e.csv"]


def test_a_stopped_run_leaves_no_file(tmp_path):
    def stop(step, done, total):
        raise RuntimeError("stop here")

    for name in ("e.csv", "e.parquet"):
        with pytest.raises(RuntimeError, match="stop here"):
            generate_events(tmp_path / name, sessions_per_day=5, days=2, items=5, progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("items", [1, 2, 7])
def test_very_small_shops(tmp_path, items):
    made = generate_events(tmp_path / "e.csv", sessions_per_day=3, days=3, items=items, seed=1)
    assert made.events == pl.read_csv(tmp_path / "e.csv").height


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"detour": 0.9, "jump": 0.2}, "detour"),
        ({"repeat": 1.0}, "repeat"),
        ({"initial_share": 1.5}, "initial_share"),
        ({"mean_length": 1.0}, "mean_length"),
        ({"price_noise": -0.1}, "price_noise"),
        ({"price_levels": 0}, "price level"),
    ],
)
def test_worlds_that_cannot_be(change, part):
    with pytest.raises(InputError, match=part):
        World(**change)

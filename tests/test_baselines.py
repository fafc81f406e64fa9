"""The baselines against naive Python, and their edge cases by hand."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from session_files import write_windows

from t4r_fast.errors import InputError
from t4r_fast.tutorial.baselines import (
    ItemCounts,
    evaluate_baselines,
    last_item_task,
    metrics_from_ranks,
)
from t4r_fast.tutorial.sessions import SessionData


def random_sessions(seed, sessions, items):
    rng = random.Random(seed)
    out = []
    for _ in range(sessions):
        # squared, so that counts differ much, and still tie often among the rare ids
        out.append([3 + int((items - 3) * rng.random() ** 2) for _ in range(rng.randint(1, 9))])
    return out


def naive_orders(sessions, items):
    """popularity order and, per item, the Markov order, by plain sorting."""
    counts = Counter(i for s in sessions for i in s)
    by_popularity = sorted(range(1, items), key=lambda i: (-counts[i], i))
    followed = defaultdict(Counter)
    for session in sessions:
        for a, b in pairwise(session):
            followed[a][b] += 1
    markov = {}
    for a in range(1, items):
        head = sorted(followed[a], key=lambda b: (-followed[a][b], b))
        markov[a] = head + [b for b in by_popularity if b not in followed[a]]
    return by_popularity, markov


@pytest.mark.parametrize(("seed", "sessions", "items"), [(0, 200, 30), (1, 60, 90), (2, 3, 12)])
def test_ranks_equal_naive_sorting(seed, sessions, items):
    train = random_sessions(seed, sessions, items)
    by_popularity, markov = naive_orders(train, items)
    counts = ItemCounts(items)
    half = len(train) // 2
    counts.add(pl.Series(train[:half], dtype=pl.List(pl.Int64)))
    counts.add(pl.Series(train[half:], dtype=pl.List(pl.Int64)))
    rng = np.random.default_rng(seed)
    current = rng.integers(1, items, 400)
    target = rng.integers(1, items, 400)
    want = [by_popularity.index(t) for t in target]
    assert counts.popularity_ranks(target).tolist() == want
    want = [markov[c].index(t) for c, t in zip(current, target, strict=True)]
    assert counts.markov_ranks(current, target).tolist() == want


def test_every_rank_is_given_once():
    counts = ItemCounts(25)
    counts.add(pl.Series(random_sessions(5, 40, 25), dtype=pl.List(pl.Int64)))
    every = np.arange(1, 25)
    assert sorted(counts.popularity_ranks(every)) == list(range(24))
    for current in (3, 7, 24):
        ranks = counts.markov_ranks(np.full(24, current), every)
        assert sorted(ranks) == list(range(24))


def test_ties_go_to_the_lowest_id():
    counts = ItemCounts(8)
    counts.add(pl.Series([[5, 4], [5, 6], [4, 5]]))
    # counts: 5 three times, 4 twice, 6 once; 1, 2, 3, 7 never
    assert counts.popularity_ranks(np.array([5, 4, 6, 1, 2, 3, 7])).tolist() == list(range(7))
    # 5 was followed once by 4 and once by 6
    ranks = counts.markov_ranks(np.full(4, 5), np.array([4, 6, 5, 1]))
    assert ranks.tolist() == [0, 1, 2, 3]


def test_the_last_item_task_leaves_out_sessions_of_one():
    current, target = last_item_task(pl.Series([[3], [4, 5], [6, 7, 8], []]))
    assert current.tolist() == [4, 7]
    assert target.tolist() == [5, 8]


def test_metrics_of_known_ranks():
    got = metrics_from_ranks(np.array([0, 9, 10, 19, 20]))
    tenth, eleventh, twentieth = (1 / math.log2(r + 2) for r in (9, 10, 19))
    assert got["recall_at_10"] == pytest.approx(2 / 5)
    assert got["recall_at_20"] == pytest.approx(4 / 5)
    assert got["ndcg_at_10"] == pytest.approx((1 + tenth) / 5)
    assert got["ndcg_at_20"] == pytest.approx((1 + tenth + eleventh + twentieth) / 5)
    assert all(math.isnan(v) for v in metrics_from_ranks(np.array([])).values())


def test_counts_grow_with_the_windows(tmp_path):
    """A baseline has seen every training window up to the pair's, not the one it is judged on."""
    folder = write_windows(
        tmp_path,
        {
            1: {"train": [[3, 4], [3, 4]], "valid": [[3, 4]]},
            2: {"train": [[3, 5], [3, 5], [3, 5]], "valid": [[3, 4]]},
            3: {"train": [[3, 6]] * 9, "valid": [[3, 5]]},
        },
        items=40,
    )
    data = SessionData(folder)
    got = evaluate_baselines(data, data.pairs())
    first, second = got["markov"]
    assert (first["train_window"], first["eval_window"]) == (1, 2)
    assert (second["train_window"], second["eval_window"]) == (2, 3)
    assert first["metrics"]["ndcg_at_10"] == 1.0  # 3 -> 4 twice, and nothing else yet
    assert second["metrics"]["ndcg_at_10"] == 1.0  # 3 -> 5 thrice, 3 -> 4 twice
    popular = got["popularity"][1]["metrics"]["ndcg_at_10"]
    assert popular == pytest.approx(1 / math.log2(1 + 2))  # 3 five times, 5 three times


def test_an_id_beyond_the_schema_is_refused():
    with pytest.raises(InputError, match=r"item id 9, but the schema's largest is 7"):
        ItemCounts(8).add(pl.Series([[3, 9]]))

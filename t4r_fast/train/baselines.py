"""Two baselines without learning: most popular items, and first-order Markov counts.

Both are judged on the models' own task: from the items before the last one, rank the last one among
all items. Ties go to the lowest id, so every number is exact and repeatable.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import polars as pl

from t4r_fast.errors import InputError
from t4r_fast.train.sessions import SessionData, WindowPair

BASELINES = {
    "popularity": "Most popular items",
    "markov": "First-order Markov counts",
}
TOP_KS = (10, 20)


def metrics_from_ranks(ranks: np.ndarray, top_ks: tuple[int, ...] = TOP_KS) -> dict[str, float]:
    """Mean NDCG and recall at each k of one relevant item per row.

    ndcg@k = mean(1 / log2(rank + 2) if rank < k else 0), recall@k = mean(rank < k)

    ranks    (N,) int64, 0 = best; N = 0 gives nan
    top_ks   list lengths
    returns  {"ndcg_at_10": ..., "recall_at_10": ...}
    """
    ranks = np.asarray(ranks, dtype=np.int64)
    if ranks.size == 0:
        return {f"{m}_at_{k}": float("nan") for m in ("ndcg", "recall") for k in top_ks}
    gains = 1.0 / np.log2(ranks + 2.0)
    out = {f"ndcg_at_{k}": float(np.where(ranks < k, gains, 0.0).mean()) for k in top_ks}
    out |= {f"recall_at_{k}": float((ranks < k).mean()) for k in top_ks}
    return out


@dataclasses.dataclass
class ItemCounts:
    """Counts over the training sessions seen so far; `add` more, then ask for ranks.

    items  V, rows of the item table; id 0 is padding and is never ranked
    """

    items: int

    def __post_init__(self) -> None:
        self.popularity = np.zeros(self.items, dtype=np.int64)
        self.successors = pl.DataFrame(
            schema={"item": pl.Int64, "next": pl.Int64, "count": pl.Int64}
        )

    def add(self, sessions: pl.Series) -> None:
        """Count the items and the steps from one item to the next of these sessions (lists)."""
        ids = sessions.explode().drop_nulls().cast(pl.Int64).to_numpy()
        if ids.size and int(ids.max()) >= self.items:
            raise InputError(
                f"sessions hold the item id {int(ids.max())}, but the schema's largest is"
                f" {self.items - 1}: the schema and the sessions are of different ETL runs"
            )
        self.popularity += np.bincount(ids, minlength=self.items)
        steps = (
            pl.DataFrame({"session": np.arange(len(sessions)), "item": sessions})
            .explode("item")
            .with_columns(pl.col("item").cast(pl.Int64))
            .with_columns(next=pl.col("item").shift(-1).over("session"))
            .drop_nulls(["item", "next"])
            .group_by("item", "next")
            .agg(count=pl.len().cast(pl.Int64))
        )
        self.successors = (
            pl.concat([self.successors, steps]).group_by("item", "next").agg(pl.col("count").sum())
        )

    def popularity_order(self) -> np.ndarray:
        """Rank of every id by count, ties by lowest id; (V,) int64, the pad's rank is V - 1."""
        order = np.argsort(-self.popularity[1:], kind="stable")
        ranks = np.full(self.items, self.items - 1, dtype=np.int64)
        ranks[order + 1] = np.arange(self.items - 1)
        return ranks

    def popularity_ranks(self, target: np.ndarray) -> np.ndarray:
        """(N,) rank of each target among all items by popularity."""
        return self.popularity_order()[target]

    def markov_ranks(self, current: np.ndarray, target: np.ndarray) -> np.ndarray:
        """(N,) rank of each target: successors of `current` by count, then all by popularity."""
        order = self.popularity_order()
        ordered = self.successors.sort("item", "count", "next", descending=[False, True, False])
        followed = ordered.with_columns(
            place=pl.int_range(pl.len(), dtype=pl.Int64).over("item"),
            popularity=pl.Series(order[ordered["next"].to_numpy()]),
        )
        asked = pl.DataFrame(
            {
                "row": np.arange(len(current)),
                "item": np.asarray(current, dtype=np.int64),
                "next": np.asarray(target, dtype=np.int64),
                "own": order[target],
            }
        )
        hits = asked.join(followed, on=["item", "next"], how="left").select("row", "place", "own")
        # a target that never followed stands behind every successor, then keeps its popularity
        # order among the rest: own rank + successors that are less popular than itself
        behind = (
            asked.join(followed.select("item", "popularity"), on="item", how="inner")
            .group_by("row")
            .agg(behind=(pl.col("popularity") > pl.col("own")).sum().cast(pl.Int64))
        )
        ranks = hits.join(behind, on="row", how="left").sort("row")
        return (
            ranks.select(pl.coalesce("place", pl.col("own") + pl.col("behind").fill_null(0)))
            .to_series()
            .to_numpy()
            .astype(np.int64)
        )


def last_item_task(sessions: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """(last but one item, last item) of each session of at least two items: (N,), (N,) int64."""
    long = sessions.filter(sessions.list.len() >= 2)
    current = long.list.get(-2).cast(pl.Int64).to_numpy()
    return current, long.list.get(-1).cast(pl.Int64).to_numpy()


def evaluate_baselines(data: SessionData, pairs: list[WindowPair]) -> dict[str, list[dict]]:
    """Per baseline one record per pair; counts run over all training windows up to the pair's.

    returns  {"popularity": [{"train_window", "eval_window", "metrics", ...}, ...], "markov": ...}
    """
    counts = ItemCounts(data.items)
    records: dict[str, list[dict]] = {name: [] for name in BASELINES}
    for pair in pairs:
        counts.add(data.lists(pair.train, "train"))
        current, target = last_item_task(data.lists(pair.evaluate, "valid"))
        for name in BASELINES:
            start = time.perf_counter()
            if name == "popularity":
                ranks = counts.popularity_ranks(target)
            else:
                ranks = counts.markov_ranks(current, target)
            records[name].append(
                {
                    "train_window": pair.train,
                    "eval_window": pair.evaluate,
                    "eval_sessions": len(target),
                    "eval_seconds": round(time.perf_counter() - start, 4),
                    "metrics": metrics_from_ranks(ranks),
                }
            )
    return records

"""Counts and moments gathered bucket by bucket, with the same result whatever the thread count."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import polars as pl

# Polars may add floats in another order on another machine; sums of floats here are numpy's.


@dataclasses.dataclass
class Moments:
    """Count, mean and sum of squared deviations of numbers seen in parts (Chan's update)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        if values.size == 0:
            return
        mean = float(values.mean())
        squares = float(((values - mean) ** 2).sum())
        total = self.count + values.size
        delta = mean - self.mean
        self.squares += squares + delta * delta * self.count * values.size / total
        self.mean += delta * values.size / total
        self.count = total

    @property
    def std(self) -> float:
        """Sample deviation, 1 where it is 0 or unknown, so that dividing by it is harmless."""
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return deviation if deviation > 0 else 1.0


class ValueCounts:
    """How often each value occurs, with the earliest time or the sum of prices of each.

    Parts are merged once they outgrow `merge_rows`, so memory follows the distinct values.
    """

    def __init__(self, *, first_seen: bool = False, prices: bool = False, merge_rows=4_000_000):
        self._first_seen, self._prices, self._merge_rows = first_seen, prices, merge_rows
        self._parts: list[pl.DataFrame] = []

    def add(self, values: pl.Series, time: pl.Series, price: pl.Series | None) -> None:
        frame = pl.DataFrame({"value": values, "time": time})
        part = frame.group_by("value", maintain_order=True).agg(
            pl.len().cast(pl.Int64).alias("count"), pl.col("time").min().alias("first_seen")
        )
        if not self._first_seen:
            part = part.drop("first_seen")
        if self._prices:
            part = part.join(price_sums(values, price), on="value", how="left", nulls_equal=True)
        self._parts.append(part)
        if sum(p.height for p in self._parts[1:]) > self._merge_rows:
            self._parts = [self.merged()]

    def merged(self) -> pl.DataFrame:
        """One row per value (null too): value, count, and first_seen or price_sum, price_count."""
        parts = pl.concat(self._parts)
        agg = [pl.col("count").sum()]
        if self._first_seen:
            agg.append(pl.col("first_seen").min())
        out = parts.group_by("value", maintain_order=True).agg(agg)
        if self._prices:
            sums = grouped_sums(parts["value"], parts.select("price_sum", "price_count"))
            out = out.join(sums, on="value", how="left", nulls_equal=True)
        return out


def price_sums(values: pl.Series, price: pl.Series) -> pl.DataFrame:
    known = price.is_not_null()
    columns = {"price_sum": price.fill_null(0.0), "price_count": known.cast(pl.Float64)}
    return grouped_sums(values, pl.DataFrame(columns))


def grouped_sums(values: pl.Series, columns: pl.DataFrame) -> pl.DataFrame:
    """Sums of float columns per value, added in the order of the rows."""
    keys = pl.DataFrame({"value": values.unique(maintain_order=True)}).with_row_index("code")
    codes = (
        pl.DataFrame({"value": values})
        .join(keys, on="value", how="left", nulls_equal=True, maintain_order="left")["code"]
        .to_numpy()
    )
    sums = {
        c.name: np.bincount(codes, weights=c.to_numpy(), minlength=keys.height) for c in columns
    }
    return keys.drop("code").with_columns(pl.Series(n, s) for n, s in sums.items())

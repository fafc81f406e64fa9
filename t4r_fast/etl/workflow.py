"""The fitted workflow: vocabularies and statistics that turn events into sessions of features."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import polars as pl

from t4r_fast.errors import InputError
from t4r_fast.etl import features as f
from t4r_fast.etl.columns import CATEGORICAL, OPTIONAL, SUFFIXES, Roles
from t4r_fast.etl.events import EventSource, open_events
from t4r_fast.etl.files import Inputs
from t4r_fast.etl.statistics import Moments, ValueCounts
from t4r_fast.schema import ColumnSchema, FloatDomain, IntDomain, Schema, ValueCount

FORMAT = 1
_STATE = "workflow.json"


@dataclasses.dataclass(frozen=True)
class SessionRules:
    """How events become sessions.

    min_length  sessions with fewer events are left out; >= 1
    max_length  longer sessions are cut; >= min_length
    keep        "last" or "first": which end of a long session stays
    suffix      ending of the list columns, "-list_seq" or "-list"
    """

    min_length: int = 2
    max_length: int = 20
    keep: str = "last"
    suffix: str = "-list_seq"

    def __post_init__(self) -> None:
        if self.min_length < 1:
            raise InputError(f"min_length must be at least 1; got {self.min_length}")
        if self.max_length < self.min_length:
            raise InputError(
                f"max_length must be at least min_length, {self.min_length}; got {self.max_length}"
            )
        if self.keep not in ("last", "first"):
            raise InputError(f"keep must be 'last' or 'first'; got {self.keep!r}")
        if self.suffix not in SUFFIXES:
            raise InputError(f"suffix must be one of {', '.join(SUFFIXES)}; got {self.suffix!r}")


@dataclasses.dataclass
class Workflow:
    """Vocabularies and statistics of the training events, applied to any events.

    columns       role -> column of the events it was fitted on
    vocabularies  role -> frame value, id (3, 4, ... by falling count), count; items also have
                  first_seen (us since 1970 UTC), categories price_mean
    moments       "recency" and "price" -> (mean, deviation) of the logarithm
    price_means   "all" and "null": mean price of all events and of those without a category
    ranges        feature -> (lowest, highest) value in the written sessions, when known
    """

    columns: dict[str, str]
    rules: SessionRules
    vocabularies: dict[str, pl.DataFrame]
    moments: dict[str, tuple[float, float]]
    price_means: dict[str, float]
    ranges: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    _indices: dict[str, f.Index] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    # -- fitting ---------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        events: Inputs | pl.DataFrame | pl.LazyFrame,
        map: Mapping[str, str] | None = None,
        **rules: object,
    ) -> Workflow:
        """Fit on events that fit in memory; `t4r_fast.etl.run` does it for any size.

        events  files, a folder or a frame in the columns named by `map`
        rules   min_length, max_length, keep, suffix: see SessionRules
        Raises InputError as `t4r_fast.etl.run` does.
        """
        source = open_events(events, map)
        clean = f.sort_and_drop_repeats(_in_memory(source))
        fitter = Fitter(source.roles)
        fitter.add(clean)
        fitter.make_vocabularies()
        fitter.add_recency(clean)
        return fitter.workflow(SessionRules(**rules))  # type: ignore[arg-type]

    def update(self, events: Inputs | pl.DataFrame | pl.LazyFrame) -> Workflow:
        """A workflow that also knows the products, categories and brands of later events.

        events   files, a folder or a frame with the columns that this workflow was fitted on; in
                 memory
        returns  a new Workflow; this one stays as it is

        Old values keep their ids; new ones follow behind them by falling count, equal counts by
        value. Counts are those of all events. What scales the features stays as it was fitted, as a
        model has learned it: means and deviations, old first_seen and price_mean. Ids are then no
        longer in the order of popularity throughout, which sampler="log_uniform" assumes.
        Raises InputError as `t4r_fast.etl.run` does, and on ids of another kind than the old ones.
        """
        source = open_events(events, {**dict.fromkeys(OPTIONAL, ""), **self.columns})
        for role, known in self.vocabularies.items():
            kind = "int" if known["value"].dtype.is_integer() else "text"
            if kind == "int" and source.kinds[role] == "text":
                raise InputError(
                    f"update: column {self.columns[role]!r} holds text, and the workflow was fitted"
                    " on whole numbers"
                )
            source.kinds[role] = kind
        clean = f.sort_and_drop_repeats(_in_memory(source))
        fitter = Fitter(source.roles)
        fitter.add(clean)
        fitter.make_vocabularies()
        merged = {r: _extended(v, fitter.vocabularies[r]) for r, v in self.vocabularies.items()}
        return dataclasses.replace(self, vocabularies=merged, ranges={})

    # -- applying --------------------------------------------------------------------------------

    def transform(
        self, events: Inputs | pl.DataFrame | pl.LazyFrame, min_length: int | None = None
    ) -> pl.DataFrame:
        """Sessions of new events: the columns of the ETL's parquet files, one row per session.

        events      files, a folder or a frame with the columns that the workflow was fitted on
        min_length  1 keeps sessions of a single event, for serving; default: as fitted
        returns     user_session, session_start, then one list per feature; by start of session

        Values that the training events lack get id 2, missing ones id 1; an item never seen, or
        seen first in the future, is 0 days old. A missing price counts as the mean price. Works
        in memory. Raises InputError as `t4r_fast.etl.run` does.
        """
        # an empty name keeps a role out that the new events have and the workflow does not know
        source = open_events(events, {**dict.fromkeys(OPTIONAL, ""), **self.columns})
        if any(file.is_text for file in source.files):
            # an odd new id in a column of numbers is unknown, no error
            source.kinds |= dict.fromkeys(self.vocabularies, "text")
        clean = f.sort_and_drop_repeats(_in_memory(source))
        return self.output(self.sessions(clean, min_length))

    def sessions(self, clean: pl.DataFrame, min_length: int | None = None) -> pl.DataFrame:
        """`transform` of events that are sorted and free of repeats; keeps `row` and `length`."""
        rules = self.rules
        return f.to_sessions(
            clean.select("session", "time", "row").with_columns(self._features(clean)),
            {name: name + rules.suffix for name in self.feature_names()},
            min_length=rules.min_length if min_length is None else min_length,
            max_length=rules.max_length,
            keep=rules.keep,
        )

    def output(self, sessions: pl.DataFrame) -> pl.DataFrame:
        """The columns of the parquet files."""
        start = pl.from_epoch("session_start", time_unit="us").dt.replace_time_zone("UTC")
        lists = [name + self.rules.suffix for name in self.feature_names()]
        return sessions.select("user_session", start, *lists)

    def feature_names(self) -> list[str]:
        """Names of the features without suffix, in the order of the columns."""
        return Roles(self.columns, ()).features()

    def _features(self, clean: pl.DataFrame) -> list[pl.Series]:
        items = self.vocabularies["item"]
        ids = {r: self._encoded(r, clean[r]) for r in self.vocabularies}
        sine, cosine = f.weekday_cycle(clean["time"])
        recency = f.recency_log(clean["time"], f.lookup(ids["item"], items, "first_seen"))
        made = {
            **{name: ids[role] for name, role in CATEGORICAL.items() if role in ids},
            "product_recency_days_log_norm": self._standardised("recency", recency),
            "et_dayofweek_sin": sine,
            "et_dayofweek_cos": cosine,
        }
        if "price" in self.columns:
            made["price_log_norm"] = self._standardised("price", clean["price"].log1p())
            if "category" in self.columns:
                average = self._category_mean(ids["category"])
                made["relative_price_to_avg_categ_id"] = f.relative_price(clean["price"], average)
        names = self.feature_names()
        floats = [n for n in names if n not in CATEGORICAL]
        return [made[n].cast(pl.Float32 if n in floats else pl.Int64).alias(n) for n in names]

    def _encoded(self, role: str, values: pl.Series) -> pl.Series:
        index = self._indices.get(role)
        return f.encode(values, self.vocabularies[role]) if index is None else index.encode(values)

    def _standardised(self, name: str, values: pl.Series) -> pl.Series:
        mean, deviation = self.moments[name]
        return ((values - mean) / deviation).fill_null(0.0)

    def _category_mean(self, ids: pl.Series) -> pl.Series:
        means = f.lookup(ids, self.vocabularies["category"], "price_mean")
        null_mean = self.price_means["null"]
        without = pl.select(
            pl.when(ids == f.NULL).then(null_mean).otherwise(self.price_means["all"])
        ).to_series()
        return pl.select(pl.coalesce(means, without)).to_series()

    def index(self) -> None:
        """Sort the vocabularies once, so that transform() of few events takes a time that hardly
        depends on the number of products. For serving; of many events at once it is slower."""
        self._indices = {role: f.Index(v) for role, v in self.vocabularies.items()}

    # -- ids -------------------------------------------------------------------------------------

    @property
    def num_items(self) -> int:
        """Rows of an item table: the largest item id + 1."""
        return self.vocabularies["item"].height + f.FIRST_ID

    def item_ids(self, values: Iterable[object] | pl.Series) -> np.ndarray:
        """Ids (int64) of item values as they stand in the events; 1 for None, 2 for unknown."""
        values = values if isinstance(values, pl.Series) else pl.Series(list(values), strict=False)
        return f.encode(values, self.vocabularies["item"]).to_numpy()

    def items(self, ids: Iterable[int] | np.ndarray) -> list:
        """Item values of ids; None for 0, 1 and 2, which stand for no item.

        Raises InputError on an id outside 0 <= id < num_items.
        """
        ids = np.asarray(list(ids), dtype=np.int64)
        bad = ids[(ids < 0) | (ids >= self.num_items)]
        if bad.size:
            raise InputError(f"items: ids must be below {self.num_items} and not below 0; {bad[0]}")
        return f.lookup(pl.Series(ids), self.vocabularies["item"], "value").to_list()

    # -- schema ----------------------------------------------------------------------------------

    def schema(self) -> Schema:
        """The schema of the sessions, tagged as in the tutorial."""
        count = ValueCount(self.rules.min_length, self.rules.max_length)
        columns = []
        for feature in self.feature_names():
            name = feature + self.rules.suffix
            column = ColumnSchema(name, value_count=count)
            if feature in CATEGORICAL:
                last = self.vocabularies[CATEGORICAL[feature]].height + f.FIRST_ID - 1
                column.int_domain = IntDomain(name, 0, last, is_categorical=True)
                column.tags = ["item_id"] if feature == "product_id" else []
                column.tags += ["item", "list", "categorical"]
            else:
                column.type = "FLOAT"
                column.float_domain = FloatDomain(name, *self.ranges.get(feature, ()))
                column.tags = ["time" if feature.startswith("et_") else "item"]
                column.tags += ["list", "continuous"]
            columns.append(column)
        return Schema(columns)

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the workflow into the folder `path`: one JSON file, one parquet per vocabulary."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        for role, vocabulary in self.vocabularies.items():
            vocabulary.write_parquet(path / f"{role}.parquet")
        state = {
            "format": FORMAT,
            "columns": self.columns,
            "rules": dataclasses.asdict(self.rules),
            "moments": self.moments,
            "price_means": self.price_means,
            "ranges": self.ranges,
        }
        (path / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Workflow:
        """Read what `save` wrote. Raises InputError on a missing, damaged or newer workflow."""
        path = Path(path)
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise InputError(f"{path}: this is no saved workflow ({e}); run t4r-fast etl") from e
        if state.get("format") != FORMAT:
            raise InputError(
                f"{path}: the workflow has format {state.get('format')}, this release reads"
                f" {FORMAT}; run t4r-fast etl again"
            )
        try:
            roles = [r for r in CATEGORICAL.values() if r in state["columns"]]
            return cls(
                columns=state["columns"],
                rules=SessionRules(**state["rules"]),
                vocabularies={r: pl.read_parquet(path / f"{r}.parquet") for r in roles},
                moments={k: tuple(v) for k, v in state["moments"].items()},
                price_means=state["price_means"],
                ranges={k: tuple(v) for k, v in state["ranges"].items()},
            )
        except (OSError, KeyError, TypeError, pl.exceptions.PolarsError) as e:
            raise InputError(f"{path}: the saved workflow is damaged ({e!r}); run it again") from e


def _extended(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """`old` with the counts of both, then the values that only `new` has."""
    new = new.cast({"value": old.schema["value"]})
    counts = old.select("value").join(
        new.select("value", "count"), on="value", how="left", maintain_order="left"
    )["count"]
    old = old.with_columns(count=old["count"] + counts.fill_null(0))
    added = new.join(old.select("value"), on="value", how="anti", maintain_order="left")
    first = old.height + f.FIRST_ID
    added = added.with_columns(id=pl.int_range(first, first + added.height, dtype=pl.Int64))
    return pl.concat([old, added.select(old.columns).cast(dict(old.schema))])


def _in_memory(source: EventSource) -> pl.DataFrame:
    parts = list(source.batches())
    if not parts:
        raise InputError(f"{source.files[0].path}: the file holds a header and no events")
    return pl.concat(parts)


class Fitter:
    """Gathers a Workflow from clean events, bucket by bucket, in two passes.

    add every bucket; make_vocabularies; add_recency with every bucket; workflow.
    """

    def __init__(self, roles: Roles) -> None:
        self.roles = roles
        has = roles.columns.__contains__
        self._price, self._recency = Moments(), Moments()
        self._counts = {"item": ValueCounts(first_seen=True)}
        if has("category"):
            self._counts["category"] = ValueCounts(prices=has("price"))
        if has("brand"):
            self._counts["brand"] = ValueCounts()
        self._prices_of_all = Moments()
        self.vocabularies: dict[str, pl.DataFrame] = {}
        self._null_price: float | None = None
        self.nulls: dict[str, int] = {}

    def add(self, clean: pl.DataFrame) -> None:
        price = clean["price"] if "price" in clean.columns else None
        for role, counts in self._counts.items():
            counts.add(clean[role], clean["time"], price)
        if price is not None:
            known = price.drop_nulls().to_numpy()
            self._price.add(np.log1p(known))
            self._prices_of_all.add(known)

    def make_vocabularies(self) -> None:
        """Ids from 3 by falling count; equal counts by value."""
        for role, counts in self._counts.items():
            table = counts.merged()
            missing = table.filter(pl.col("value").is_null())
            table = table.drop_nulls("value").sort("count", "value", descending=[True, False])
            table = table.with_row_index("id", offset=f.FIRST_ID).cast({"id": pl.Int64})
            self.nulls[role] = int(missing["count"].sum())
            if "price_sum" in table.columns:
                mean = pl.when(pl.col("price_count") > 0).then(
                    pl.col("price_sum") / pl.col("price_count")
                )
                null_mean = missing.select(mean.alias("m"))["m"].drop_nulls()
                self._null_price = None if null_mean.is_empty() else float(null_mean[0])
                table = table.with_columns(mean.alias("price_mean"))
            named = ("value", "id", "count", "first_seen", "price_mean")
            self.vocabularies[role] = table.select(c for c in named if c in table.columns)

    def add_recency(self, clean: pl.DataFrame) -> None:
        items = self.vocabularies["item"]
        first_seen = f.lookup(f.encode(clean["item"], items), items, "first_seen")
        self._recency.add(f.recency_log(clean["time"], first_seen).to_numpy())

    def workflow(self, rules: SessionRules) -> Workflow:
        moments = {"recency": (self._recency.mean, self._recency.std)}
        means = {}
        if "price" in self.roles.columns:
            moments["price"] = (self._price.mean, self._price.std)
            everywhere = self._prices_of_all.mean
            means = {"all": everywhere}
            means["null"] = everywhere if self._null_price is None else self._null_price
        columns = {r: c for r, c in self.roles.columns.items() if r != "event_type"}
        return Workflow(columns, rules, self.vocabularies, moments, means)

"""The ETL by NVTabular 23.8: its operators find ids, statistics, features and sessions.

Reading, checking, dropping of repeats, windows and the split are those of the Polars engine, and so
are the rules, so that both write the same files. The fitted nvtabular.Workflow is kept beside ours.
Source: notebook 02 of the Transformers4Rec tutorial, which builds its features by these operators.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from t4r_fast.errors import InputError
from t4r_fast.etl import features as f
from t4r_fast.etl.columns import CATEGORICAL, Roles
from t4r_fast.etl.times import DAY
from t4r_fast.etl.workflow import SessionRules, Workflow

# The folder of the saved nvtabular.Workflow in the ETL's output.
SAVED = "nvtabular_workflow"


def check_installed() -> None:
    """Raise InputError where there is no NVTabular."""
    try:
        importlib.metadata.version("nvtabular")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            "engine 'nvtabular' needs NVTabular 23.8, whose old pandas and pyarrow ask for an"
            " environment of its own: make nvtabular-env VENV=.venv-nvtabular"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorFlow and Triton, which are not needed
        importlib.import_module("nvtabular")


def for_pandas(clean: pl.DataFrame, roles: Roles) -> Any:
    """Clean events as the nvtabular.Workflow reads them, a pandas frame. Ids are text there: a
    column of 64-bit numbers some of which are missing would be one of floats."""
    ids = [role for role in CATEGORICAL.values() if role in roles.columns]
    clean = clean.with_columns(pl.col(ids).cast(pl.String))
    if "price" in roles.columns:
        # JoinGroupby divides by all rows of a group, those without a price included
        known = pl.col("price").is_not_null().cast(pl.Float64)
        clean = clean.with_columns(known.alias("priced"))
    return clean.to_pandas()


@dataclasses.dataclass
class Engine:
    """Fits on files of clean events and makes sessions of them.

    scratch  folder for what NVTabular writes while it fits
    nulls    id role -> events without a value, after fit()
    """

    roles: Roles
    rules: SessionRules
    scratch: Path
    nulls: dict[str, int] = dataclasses.field(default_factory=dict)
    _workflow: Any = None

    def __post_init__(self) -> None:
        self.scratch = self.scratch.resolve()  # NVTabular works in another folder

    def fit(self, files: list[Path]) -> Workflow:
        """Our Workflow, with NVTabular's statistics."""
        import nvtabular as nvt

        events = self.scratch / "events"
        events.mkdir(parents=True)
        for i, path in enumerate(files):
            for_pandas(pl.read_parquet(path), self.roles).to_parquet(events / f"{i:05d}.parquet")
        kinds = pl.read_parquet_schema(files[0])
        with _at_work(self.scratch):
            data = nvt.Dataset(sorted(map(str, events.iterdir())), engine="parquet")
            vocabularies = self._vocabularies(data, kinds)
            operators = _Operators.of(self.roles, vocabularies, self.scratch)
            self._workflow = nvt.Workflow(self._graph(operators))
            self._workflow.fit(data)
            return self._ours(operators, vocabularies, kinds)

    def sessions(self, clean: pl.DataFrame) -> pl.DataFrame:
        """What Workflow.sessions makes of them, by the NVTabular workflow."""
        import nvtabular as nvt

        with _at_work(self.scratch):
            data = nvt.Dataset(for_pandas(clean, self.roles), npartitions=1)
            made = self._workflow.transform(data).to_ddf().compute()
        found = {
            "user_session": pl.Series(made["session"].to_numpy()).cast(clean["session"].dtype),
            "session_start": pl.Series(made["time_first"].to_numpy()).cast(pl.Int64),
            "row": pl.Series(made["row_first"].to_numpy()).cast(clean["row"].dtype),
            "length": pl.Series(made["row_count"].to_numpy()).cast(pl.Int64),
        }
        for name in self.roles.features():
            kind = pl.List(pl.Int64 if name in CATEGORICAL else pl.Float32)
            values = [np.asarray(row) for row in made[name]]
            found[name + self.rules.suffix] = pl.Series(values).cast(kind)
        return pl.DataFrame(found).sort("session_start", "row")

    def save(self, folder: Path) -> None:
        """Save the fitted nvtabular.Workflow."""
        folder = folder.resolve()
        with _at_work(self.scratch):
            self._workflow.save(str(folder))

    # -- fitting ---------------------------------------------------------------------------------

    def _vocabularies(self, data: Any, kinds: Any) -> dict[str, pl.DataFrame]:
        """value, id, count of each id role: by falling count, and equal counts by value, where
        Categorify takes any order."""
        import nvtabular as nvt

        roles = [r for r in CATEGORICAL.values() if r in self.roles.columns]
        counting = nvt.ops.Categorify(out_path=str(self.scratch / "counts"))
        nvt.Workflow(roles >> counting).fit(data)
        found = {}
        for role in roles:
            table = pl.read_parquet(counting.categories[role])
            table = table.select(pl.col(role).alias("value"), pl.col(f"{role}_size").alias("count"))
            known = table.drop_nulls("value").cast({"value": kinds[role], "count": pl.Int64})
            total = sum(data.to_ddf()[role].isnull().compute())
            self.nulls[role] = int(total)
            known = known.sort("count", "value", descending=[True, False])
            ids = pl.int_range(f.FIRST_ID, f.FIRST_ID + pl.len(), dtype=pl.Int64).alias("id")
            found[role] = known.select("value", ids, "count")
        return found

    def _graph(self, operators: _Operators) -> Any:
        """From events to sessions: the operators' features, grouped, cut and filtered."""
        from nvtabular import ops

        names = self.roles.features()
        group = ops.Groupby(
            groupby_cols=["session"],
            sort_cols=["session", "time", "row"],
            aggs={**{n: ["list"] for n in names}, "time": ["first"], "row": ["first", "count"]},
        )
        events = operators.features + ["session", "time", "row"]  # noqa: RUF005  (of nodes)
        sessions = events >> group
        rules = self.rules
        cut = (
            ops.ListSlice(-rules.max_length)
            if rules.keep == "last"
            else ops.ListSlice(0, rules.max_length)
        )
        lists = sessions[[f"{n}_list" for n in names]] >> cut
        lists = lists >> ops.Rename(f=lambda name: name.removesuffix("_list"))
        rest = sessions[["session", "time_first", "row_first", "row_count"]]
        least = rules.min_length
        return rest + lists >> ops.Filter(f=lambda frame: frame["row_count"] >= least)

    def _ours(
        self, operators: _Operators, vocabularies: dict[str, pl.DataFrame], kinds: Any
    ) -> Workflow:
        """The statistics of the fitted operators in the form of our Workflow."""
        first = operators.joined("item", kinds).select("value", first_seen=pl.col("time_min"))
        items = vocabularies["item"].join(
            first.cast({"first_seen": pl.Int64}), on="value", how="left", maintain_order="left"
        )
        moments = {"recency": operators.moments("product_recency_days_log_norm")}
        means: dict[str, float] = {}
        vocabularies = {**vocabularies, "item": items}
        if "price" in self.roles.columns:
            moments["price"] = operators.moments("price_log_norm")
            everywhere = operators.moments("price")[0]
            means = {"all": everywhere, "null": everywhere}
        if operators.category_price is not None:
            mean = (pl.col("price_sum") / pl.col("priced_sum")).fill_nan(None).alias("mean")
            prices = operators.joined("category", kinds).with_columns(mean)
            nothing = prices.filter(pl.col("value").is_null())["mean"].drop_nulls()
            means["null"] = float(nothing[0]) if len(nothing) else everywhere
            vocabularies["category"] = vocabularies["category"].join(
                prices.select("value", price_mean=pl.col("mean").cast(pl.Float64)),
                on="value",
                how="left",
                maintain_order="left",
            )
        columns = {r: c for r, c in self.roles.columns.items() if r != "event_type"}
        return Workflow(columns, self.rules, vocabularies, moments, means)


@dataclasses.dataclass
class _Operators:
    """The operators with statistics, and the columns that they and the others make."""

    features: Any
    normalize: dict[str, Any]
    first_seen: Any
    category_price: Any = None

    @classmethod
    def of(cls, roles: Roles, vocabularies: dict[str, pl.DataFrame], scratch: Path) -> _Operators:
        from nvtabular import ops

        names = {role: name for name, role in CATEGORICAL.items() if role in roles.columns}
        words = {r: v["value"].cast(pl.String).to_pandas() for r, v in vocabularies.items()}
        ids = list(names) >> ops.Categorify(vocabs=words, out_path=str(scratch / "categories"))
        made = ids["item"] >> _renamed(names["item"]) >> ops.TagAsItemID()
        others = [role for role in names if role != "item"]
        if others:
            made += ids[others] >> ops.Rename(f=names.get)
        # "count" is not used; without it JoinGroupby fails
        first_seen = ops.JoinGroupby(
            cont_cols=["time"], stats=["count", "min"], out_path=str(scratch / "first_seen")
        )
        joined = ["item"] >> first_seen
        recency = (joined >> ops.LambdaOp(_recency, dependency=["time", "item"]))["item_time_min"]
        name = "product_recency_days_log_norm"
        normalize = {name: ops.Normalize()}
        made += recency >> _renamed(name) >> normalize[name]
        for name, angle in (("et_dayofweek_sin", _sine), ("et_dayofweek_cos", _cosine)):
            made += ["time"] >> _feature(angle) >> _renamed(name)
        out = cls(made, normalize, first_seen)
        if "price" in roles.columns:
            normalize |= {"price_log_norm": ops.Normalize(), "price": ops.Normalize()}
            log = ["price"] >> _feature(_log1p) >> _renamed("price_log_norm")
            out.features += log >> normalize["price_log_norm"] >> ops.FillMissing(0)
            # for its mean alone
            out.features += ["price"] >> normalize["price"]
            if "category" in roles.columns:
                out.category_price = ops.JoinGroupby(
                    cont_cols=["price", "priced"],
                    stats=["count", "sum"],
                    out_path=str(scratch / "prices"),
                )
                sums = ["category"] >> out.category_price
                relative = sums >> ops.LambdaOp(_relative_price, dependency=["price"])
                name = "relative_price_to_avg_categ_id"
                out.features += relative["category_price_sum"] >> _renamed(name)
        return out

    def moments(self, name: str) -> tuple[float, float]:
        """Mean and sample deviation, 1 where that is 0 or unknown."""
        operator = self.normalize[name]
        deviation = operator.stds[name]
        return operator.means[name], deviation if deviation > 0 else 1.0

    def joined(self, role: str, kinds: Any) -> pl.DataFrame:
        """The statistics of a JoinGroupby by value of the role."""
        operator = self.first_seen if role == "item" else self.category_price
        table = pl.read_parquet(operator.categories[role])
        return (
            table.rename(lambda name: name.removeprefix(f"{role}_"))
            .rename({role: "value"})
            .cast({"value": kinds[role]})
        )


# -- row functions ---------------------------------------------------------------------------------


# LambdaOp calls a function with each of its columns, those that it depends on included.


def _feature(function: Any) -> Any:
    from nvtabular import ops

    return ops.LambdaOp(function, dtype=np.float64)


def _renamed(name: str) -> Any:
    from nvtabular import ops

    return ops.Rename(f=lambda _: name)


def _recency(first_seen: Any, events: Any) -> Any:
    if first_seen.name != "item_time_min":
        return first_seen
    days = (events["time"] - first_seen).clip(lower=0) / DAY
    return np.log1p(days.where(events["item"].notna(), 0.0))


def _angle(time: Any) -> Any:
    monday_is_0 = (time // DAY + 3) % 7  # 1970-01-01 was a Thursday
    return (monday_is_0 + 1 + f.DAY_OFFSET) * (2 * np.pi / 7)


def _sine(time: Any) -> Any:
    return np.sin(_angle(time))


def _cosine(time: Any) -> Any:
    return np.cos(_angle(time))


def _log1p(price: Any) -> Any:
    return np.log1p(price)


def _relative_price(total: Any, events: Any) -> Any:
    if total.name != "category_price_sum":
        return total
    mean = total / events["category_priced_sum"]
    return ((events["price"] - mean) / (mean + f.PRICE_OFFSET)).fillna(0.0)


@contextlib.contextmanager
def _at_work(scratch: Path) -> Iterator[None]:
    """NVTabular and dask write folders where they stand and warn of what nobody here can change."""
    before = os.getcwd()
    os.chdir(scratch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before)

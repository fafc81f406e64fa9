"""Raw events of any origin as one checked frame: session, item, time, and what else there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

import polars as pl

from t4r_fast.errors import InputError
from t4r_fast.etl.columns import ID_ROLES, Roles, resolve
from t4r_fast.etl.files import EventFile, Inputs, find_files, open_file
from t4r_fast.etl.times import ACCEPTED, microseconds

# Leading zeros and plus signs carry meaning in an id, so such columns stay text.
_WHOLE_NUMBER = r"^(0|-?[1-9]\d{0,17})$"


@dataclasses.dataclass
class Counts:
    """Events seen, and events left out with the reason."""

    read: int = 0
    other_type: int = 0
    without_session: int = 0


@dataclasses.dataclass
class EventSource:
    """Checked events of several files, or of one frame in memory.

    `kinds` says for each id role whether its values are whole numbers ("int") or "text".
    """

    roles: Roles
    kinds: dict[str, str]
    files: list[EventFile] = dataclasses.field(default_factory=list)
    frame: pl.DataFrame | None = None
    event_types: tuple[str, ...] = ()
    counts: Counts = dataclasses.field(default_factory=Counts)

    @property
    def rows(self) -> int:
        """How many events there are; an estimate for text files."""
        return sum(f.rows for f in self.files) if self.frame is None else self.frame.height

    def batches(self) -> Iterator[pl.DataFrame]:
        """Columns session, item, time (us since 1970 UTC), row (place in the input), and
        category, brand, price where there are such roles. Events without a session are left out.
        Raises InputError on a value that breaks the rules, naming file, column, row and value.
        """
        offset = 0
        for name, batches in self._pieces():
            first = 0
            for batch in batches:
                self.counts.read += batch.height
                yield self._checked(batch, name, first).with_columns(pl.col("row") + offset)
                first += batch.height
            offset += first

    def _pieces(self) -> Iterator[tuple[str, Iterable[pl.DataFrame]]]:
        columns = list(self.roles.columns.values())
        if self.frame is not None:
            yield "events", [self.frame.select(columns)]
        for file in self.files:
            yield str(file.path), file.batches(columns)

    def _checked(self, batch: pl.DataFrame, name: str, first: int) -> pl.DataFrame:
        batch = batch.rename({c: r for r, c in self.roles.columns.items()}).with_columns(
            pl.int_range(first, first + batch.height, dtype=pl.Int64).alias("row")
        )
        if self.event_types:
            kept = batch.filter(pl.col("event_type").cast(pl.String).is_in(self.event_types))
            self.counts.other_type += batch.height - kept.height
            batch = kept.drop("event_type")
        check = _Check(self.roles, name, batch["row"])
        session = check.ids(batch["session"], self.kinds["session"])
        batch = batch.with_columns(session).filter(session.is_not_null())
        self.counts.without_session += session.null_count()

        check = _Check(self.roles, name, batch["row"])
        out = [batch["session"], check.ids(batch["item"], self.kinds["item"])]
        out += [check.times(batch["time"]), batch["row"]]
        out += [check.ids(batch[r], k) for r, k in self.kinds.items() if r in ("category", "brand")]
        if "price" in batch.columns:
            out.append(check.prices(batch["price"]))
        return pl.DataFrame(out)


def open_events(
    events: Inputs | pl.DataFrame | pl.LazyFrame,
    map: Mapping[str, str] | None = None,
    *,
    event_types: Iterable[str] = (),
    text: Iterable[str] = (),
    separator: str | None = None,
) -> EventSource:
    """Find the files, the roles of their columns and the kinds of their ids; read nothing more.

    text  roles whose ids are text even where they look like whole numbers
    Raises InputError on missing files, missing columns and columns of a wrong type.
    """
    text, event_types = tuple(text), tuple(event_types)
    for role in text:
        if role not in ID_ROLES:
            raise InputError(f"text: the role must be one of {', '.join(ID_ROLES)}; got {role!r}")
    if isinstance(events, (pl.DataFrame, pl.LazyFrame)):
        frame = events.lazy().collect()
        schemas = [("events", dict(frame.schema))]
        files: list[EventFile] = []
    else:
        frame, files = None, [open_file(path, separator) for path in find_files(events)]
        schemas = [(str(f.path), f.schema) for f in files]
    roles = resolve(map, [(n, list(s)) for n, s in schemas], bool(event_types))
    kinds = dict.fromkeys((r for r in ID_ROLES if r in roles.columns), "int")
    for role in text:
        kinds[role] = "text"
    for at, (name, schema) in enumerate(schemas):
        _check_types(name, schema, roles, bool(files) and files[at].is_text)
        found = _kinds_of(schema, roles, files[at] if files else None)
        kinds |= {role: "text" for role, kind in found.items() if kind == "text"}
    return EventSource(roles, kinds, files, frame, event_types)


def _check_types(name: str, schema: dict[str, pl.DataType], roles: Roles, is_text: bool) -> None:
    for role, column in roles.columns.items():
        kind = schema[column]
        text = kind in (pl.String, pl.Categorical, pl.Enum, pl.Binary)
        number = kind.is_integer() or kind.is_float() or kind.is_decimal()
        if role == "time":
            good, rule = text or number or kind in (pl.Date, pl.Datetime), "text, numbers or times"
        elif role == "price":
            good, rule = number or is_text, "numbers"
        else:
            good, rule = text or number, "whole numbers or text"
        if not good:
            raise InputError(
                f"{name}: the column {column!r} ({role}) must hold {rule}; it holds {kind}"
            )


def _kinds_of(
    schema: dict[str, pl.DataType], roles: Roles, file: EventFile | None
) -> dict[str, str]:
    columns = {r: c for r, c in roles.columns.items() if r in ID_ROLES}
    if file is None or not file.is_text:
        numeric = {r: schema[c].is_numeric() for r, c in columns.items()}
        return {r: "int" if n else "text" for r, n in numeric.items()}
    sample = file.sample(list(columns.values()))
    kinds = {}
    for role, column in columns.items():
        whole = sample[column].drop_nulls().str.contains(_WHOLE_NUMBER)
        kinds[role] = "int" if len(whole) and whole.all() else "text"
    return kinds


@dataclasses.dataclass
class _Check:
    """Casts of one batch; a bad value raises with its place."""

    roles: Roles
    name: str
    rows: pl.Series

    def _refuse(self, values: pl.Series, bad: pl.Series, rule: str) -> NoReturn:
        at = int(bad.fill_null(False).arg_max())
        column = self.roles.columns[values.name]
        raise InputError(
            f"{self.name}: column {column!r}, row {self.rows[at] + 1} (the first row of data is 1):"
            f" the {values.name} {values[at]!r} {rule}"
        )

    def ids(self, values: pl.Series, kind: str) -> pl.Series:
        """Int64 or String, null where a value is missing: null, not a number, or empty text."""
        if kind == "text":
            if values.dtype.is_float():
                values = self._whole(values)
            out = values.cast(pl.String)
            return pl.select(pl.when(out != "").then(out).alias(values.name)).to_series()
        if values.dtype.is_float() or values.dtype.is_decimal():
            return self._whole(values)
        out = values.cast(pl.Int64, strict=False)
        if out.null_count() > values.null_count():
            self._refuse(
                values,
                out.is_null() & values.is_not_null(),
                "is no whole number of 64 bits, as the first rows are;"
                f" read the column as text with --text {values.name}",
            )
        return out

    def _whole(self, values: pl.Series) -> pl.Series:
        values = values.cast(pl.Float64).fill_nan(None)
        # past 2**53 a float no longer tells neighbouring ids apart
        bad = (values != values.floor()) | (values.abs() > 2**53)
        if bad.any():
            self._refuse(
                values,
                bad,
                f"is no whole number below 2**53; store the ids of {values.name} as integers"
                " or text",
            )
        return values.cast(pl.Int64)

    def times(self, values: pl.Series) -> pl.Series:
        if isinstance(values.dtype, (pl.Categorical, pl.Enum, pl.Binary)):
            values = values.cast(pl.String)
        out = microseconds(values)
        if out.null_count():
            rule = "is missing" if values[int(out.is_null().arg_max())] is None else "is no time"
            self._refuse(values, out.is_null(), f"{rule}; a time may be {ACCEPTED}")
        return out

    def prices(self, values: pl.Series) -> pl.Series:
        """Float64, null where a price is missing."""
        out = values.cast(pl.Float64, strict=False).fill_nan(None)
        missing = values.is_null() | (values.is_nan() if values.dtype.is_float() else False)
        if values.dtype == pl.String:
            missing = missing | values.str.to_lowercase().is_in(["nan", ""])
        if (out.is_null() & ~missing).any():
            self._refuse(values, out.is_null() & ~missing, "is no number; use a point for decimals")
        bad = (out < 0) | out.is_infinite()
        if bad.any():
            self._refuse(values, bad, "must be finite and not below 0")
        return out

"""Times of events, in any of the usual forms, as microseconds since 1970-01-01 UTC."""

from __future__ import annotations

import re

import polars as pl

from t4r_fast.errors import InputError

SECOND, DAY = 1_000_000, 86_400_000_000

# Numbers are epoch seconds, milli-, micro- or nanoseconds. Between these two days the four ranges
# do not overlap, so the size of a number says its unit.
_EARLIEST_S, _LATEST_S = 315_532_800, 7_258_118_400  # 1980-01-01, 2200-01-01
EARLIEST, LATEST = _EARLIEST_S * SECOND, _LATEST_S * SECOND

_FORMATS = (
    "%Y-%m-%d %H:%M:%S UTC",
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M:%S%.fZ",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%d %H:%M:%S%.f UTC",
    "%Y-%m-%d %H:%M:%S%.fZ",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%d %H:%M:%S%.f %#z",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%d %H:%M",
)
ACCEPTED = (
    "2019-10-01 00:00:00 UTC, 2019-10-01T00:00:00.5+02:00, 2019-10-01, epoch seconds, milli-,"
    " micro- or nanoseconds between the years 1980 and 2200"
)

_WINDOW = re.compile(r"(\d+)\s*(s|m|h|d|w)")
_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def microseconds(values: pl.Series) -> pl.Series:
    """Int64 microseconds since 1970 UTC; null where a value is null or no time.

    Strings may be ISO dates with or without "UTC", "Z" or an offset, or numbers. Numbers are epoch
    seconds (fractions allowed), milli-, micro- or nanoseconds, told apart by their size. Times
    without a zone are UTC. Anything before 1980 or after 2200 gives null.
    """
    kind = values.dtype
    if kind == pl.String:
        out = _from_text(values)
    elif kind.is_integer() or kind.is_float() or kind.is_decimal():
        out = _from_numbers(values)
    elif kind == pl.Date:
        out = values.cast(pl.Datetime("us")).cast(pl.Int64)
    elif isinstance(kind, pl.Datetime):
        # the physical value of a zoned datetime is UTC already
        out = values.dt.cast_time_unit("us").cast(pl.Int64)
    else:
        raise TypeError(f"a time column must hold text, numbers or datetimes; got {kind}")
    inside = out.is_between(EARLIEST, LATEST, closed="left")
    return pl.select(pl.when(inside).then(out)).to_series().rename(values.name)


def _from_numbers(values: pl.Series) -> pl.Series:
    # whole numbers stay whole: float64 cannot hold today's nanoseconds
    whole = values.dtype.is_integer()
    x = pl.col("x").cast(pl.Int64 if whole else pl.Float64, strict=False)
    size = x.cast(pl.Float64).abs()
    out = (
        pl.when(size < _LATEST_S)
        .then(x * SECOND)
        .when(size < _LATEST_S * 10**3)
        .then(x * 1000)
        .when(size < _LATEST_S * 10**6)
        .then(x)
        .otherwise(x // 1000 if whole else x / 1000)
    )
    if not whole:
        out = out.round()
    return values.to_frame("x").select(out.cast(pl.Int64, strict=False)).to_series()


def _from_text(values: pl.Series) -> pl.Series:
    out = _parse(values, _FORMATS[0])
    for step in (_numbers_in_text, *_FORMATS[1:], _dates_in_text):
        missing = (out.is_null() & values.is_not_null()).arg_true()
        if missing.is_empty():
            break
        rest = values.gather(missing).str.strip_chars()
        found = _parse(rest, step) if isinstance(step, str) else step(rest)
        out = out.scatter(missing, found)
    return out


def _parse(values: pl.Series, form: str) -> pl.Series:
    times = values.str.to_datetime(form, time_unit="us", strict=False, cache=False)
    return times.cast(pl.Int64)


def _numbers_in_text(values: pl.Series) -> pl.Series:
    whole = values.cast(pl.Int64, strict=False)
    if whole.null_count() == 0:
        return _from_numbers(whole)
    fractions = _from_numbers(values.cast(pl.Float64, strict=False))
    return pl.select(pl.coalesce(_from_numbers(whole), fractions)).to_series()


def _dates_in_text(values: pl.Series) -> pl.Series:
    return values.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us")).cast(pl.Int64)


def parse_window(text: str) -> int:
    """Microseconds in a window: "day" or a number with s, m, h, d or w, such as "30m" or "1d"."""
    text = {"day": "1d", "hour": "1h", "week": "1w"}.get(text.strip().lower(), text.strip().lower())
    match = _WINDOW.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise InputError(
            "window must be 'day' or a whole number above 0 with a unit s, m, h, d or w, such as"
            f" 30m, 1h or 1d; got {text!r}"
        )
    return int(match[1]) * _UNIT[match[2]] * SECOND

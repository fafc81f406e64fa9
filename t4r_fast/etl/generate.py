"""Made-up shop events in the REES46 columns, at any size, with structure that models can learn.

A shop sells items in categories; an item has a brand and a price level. A session has an intent
that lasts: one category, walked either along a brand or along a price level, up or down. What a
model needs to predict well, from least to most:

- popularity tells little: items are nearly equally popular, apart from new ones;
- the current item leaves a few candidates, one per kind of walk;
- the item before tells which walk it is, and after a detour to some other item only an item
  further back tells where the walk goes on: this takes memory;
- bargain hunters, who walk along a price level, see lower prices, and new items are known by
  their brand, category and price before their ids are trained: this takes side information.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from t4r_fast.errors import InputError

_DAY_SECONDS = 86_400
_SYLLABLES = (
    "ka",
    "lo",
    "mi",
    "ne",
    "ru",
    "sa",
    "ti",
    "vo",
    "xe",
    "zu",
    "ber",
    "dor",
    "fin",
    "gal",
)
_SECTIONS = ("appliances", "apparel", "auto", "computers", "electronics", "furniture", "kids")


@dataclasses.dataclass(frozen=True)
class World:
    """The constants of the made-up shop. Shares and probabilities lie between 0 and 1.

    Catalogue
    items_per_category     mean number of items in a category
    brands_per_category    brands among the items of one category
    price_levels           price levels in a category
    price_level_ratio      price of a level relative to the one below
    price_spread           deviation of the log price within a level
    popularity_exponent    item popularity ~ rank ** -exponent; 0 makes all items equal
    no_brand_share         items without a brand
    no_code_share          categories without a category_code
    Novelty
    initial_share          items on sale on the first day; the others appear evenly over the days
    novelty_boost          popularity of an item on its first day is 1 + boost times the usual
    novelty_days           days until the boost has fallen to 1/e
    Sessions
    mean_length            mean number of different views in a session of two or more
    max_length             longest session
    single_share           sessions of one event
    bargain_share          sessions that walk along a price level; the others walk along a brand
    bargain_discount       how much less bargain hunters pay
    backwards_share        sessions that walk from dear to cheap
    detour                 probability that an event shows some item of the whole shop
    jump                   probability that a walk goes on at another item of its brand or level
    Events
    repeat                 probability that an event is followed by a repeat of itself
    cart, purchase         share of events with that event_type; the others are views
    no_session_share       events without a session
    price_noise            deviation of the log price from event to event
    mean_gap               mean seconds between events of a session
    """

    items_per_category: int = 30
    brands_per_category: int = 5
    price_levels: int = 3
    price_level_ratio: float = 1.7
    price_spread: float = 0.04
    popularity_exponent: float = 0.3
    no_brand_share: float = 0.05
    no_code_share: float = 0.3
    initial_share: float = 0.7
    novelty_boost: float = 4.0
    novelty_days: float = 1.5
    mean_length: float = 5.8
    max_length: int = 60
    single_share: float = 0.15
    bargain_share: float = 0.5
    bargain_discount: float = 0.25
    backwards_share: float = 0.0
    detour: float = 0.3
    jump: float = 0.08
    repeat: float = 0.2
    cart: float = 0.03
    purchase: float = 0.015
    no_session_share: float = 1e-4
    price_noise: float = 0.005
    mean_gap: float = 45.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 0:
                raise InputError(f"World: {field.name} must not be below 0; got {value}")
        for name in (
            "detour",
            "jump",
            "repeat",
            "initial_share",
            "single_share",
            "bargain_discount",
        ):
            if getattr(self, name) > 1:
                raise InputError(f"World: {name} must be at most 1; got {getattr(self, name)}")
        if self.detour + self.jump > 1 or self.repeat >= 1 or self.cart + self.purchase > 1:
            raise InputError("World: detour + jump, cart + purchase and repeat must stay below 1")
        if min(self.items_per_category, self.brands_per_category, self.price_levels) < 1:
            raise InputError("World: categories need at least 1 item, 1 brand and 1 price level")
        if not 2 <= self.mean_length <= self.max_length:
            raise InputError("World: 2 <= mean_length <= max_length must hold")


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was written."""

    path: Path
    events: int
    sessions: int
    items: int
    days: int


def generate_events(
    path: str | os.PathLike[str],
    *,
    sessions_per_day: int,
    days: int,
    items: int,
    seed: int = 0,
    world: World | None = None,
    start: str = "2019-10-01",
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Generated:
    """Write made-up events to `path` (.csv or .parquet), ordered by time.

    sessions_per_day  > 0, those of one event included
    days, items       > 0
    seed              >= 0; equal arguments give equal files
    world             constants of the shop
    start             first day, YYYY-MM-DD, from 1980 on
    progress          called as progress(step, done, total) after every day

    Columns event_time ("2019-10-01 00:00:00 UTC"), event_type, product_id, category_id,
    category_code, brand, price, user_id, user_session. Memory holds one day. Sessions that begin
    before midnight may end on the next day. The file appears when it is complete.
    Raises InputError on an argument out of range, another ending, or an existing file.
    """
    for name, value in (("sessions_per_day", sessions_per_day), ("days", days), ("items", items)):
        if value < 1:
            raise InputError(f"generate: {name} must be at least 1; got {value}")
    if seed < 0:
        raise InputError(f"generate: seed must not be below 0; got {seed}")
    try:
        first = date.fromisoformat(start)
    except ValueError as e:
        raise InputError(f"generate: start must be a day such as 2019-10-01; got {start!r}") from e
    path = Path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise InputError(f"{path}: the name must end in .csv or .parquet")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: the file exists; pass --overwrite to replace it")
    shop = _Shop(world or World(), items, days, seed)
    count = 0
    with _Writer(path) as writer:
        for done, frame in enumerate(_days(shop, first, days, sessions_per_day), 1):
            writer.write(frame)
            count += frame.height
            if progress is not None:
                progress("generate days", min(done, days), days)
    return Generated(path, count, sessions_per_day * days, items, days)


def _days(shop: _Shop, first: date, days: int, sessions: int) -> Iterator[pl.DataFrame]:
    """Events day by day in order of time; what runs past midnight waits for the next day."""
    midnight = datetime(first.year, first.month, first.day, tzinfo=timezone.utc)
    late: pl.DataFrame | None = None
    for day in range(days):
        events = shop.day(day, sessions, int((midnight + timedelta(days=day)).timestamp()))
        if late is not None:
            events = pl.concat([late, events])
        events = events.sort("event_time", maintain_order=True)
        end = int((midnight + timedelta(days=day + 1)).timestamp())
        last = day == days - 1
        late = None if last else events.filter(pl.col("event_time") >= end)
        events = events if last else events.filter(pl.col("event_time") < end)
        stamp = pl.from_epoch("event_time", time_unit="s").dt.strftime("%Y-%m-%d %H:%M:%S UTC")
        yield events.with_columns(stamp.alias("event_time"))


class _Writer:
    """CSV or parquet, day by day, under a temporary name until the end."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> _Writer:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{self._path.stem}.partial-", suffix=self._path.suffix, dir=self._path.parent
        )
        self._partial = Path(name)
        # mkstemp makes private files; the result follows the umask
        umask = os.umask(0)
        os.umask(umask)
        os.fchmod(handle, 0o666 & ~umask)
        self._file = os.fdopen(handle, "wb")
        self._parquet: pq.ParquetWriter | None = None
        self._is_first = True
        return self

    def write(self, frame: pl.DataFrame) -> None:
        if self._path.suffix == ".csv":
            frame.write_csv(self._file, include_header=self._is_first)
        else:
            strings = {pa.large_string(): pa.string(), pa.string_view(): pa.string()}
            table = frame.to_arrow()
            fields = [pa.field(f.name, strings.get(f.type, f.type)) for f in table.schema]
            table = table.cast(pa.schema(fields))
            if self._parquet is None:
                self._parquet = pq.ParquetWriter(self._file, table.schema, compression="zstd")
            self._parquet.write_table(table, row_group_size=1 << 18)
        self._is_first = False

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._parquet is not None:
            self._parquet.close()
        self._file.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)


class _Shop:
    """The catalogue of a World and the sessions of its customers."""

    def __init__(self, world: World, items: int, days: int, seed: int) -> None:
        self.world, self.seed, self.items = world, seed, items
        # the stream of the catalogue must differ from those of the days, which are [seed, day]
        rng = np.random.default_rng([seed, 0xCA7A106])
        categories = max(1, round(items / world.items_per_category))
        self.category = rng.permutation(np.arange(items) % categories)
        in_category = rng.integers(0, world.brands_per_category, items)
        # neighbouring categories share brands, as real ones do
        brands = max(world.brands_per_category, categories * world.brands_per_category // 2)
        self.brand = (self.category * 3 + in_category) % brands
        self.level = rng.integers(0, world.price_levels, items)
        base = np.exp(rng.normal(4.0, 0.8, categories))[self.category]
        spread = np.exp(rng.normal(0.0, world.price_spread, items))
        self.price = base * world.price_level_ratio**self.level * spread
        self.weight = (1.0 + rng.permutation(items)) ** -world.popularity_exponent
        born = rng.random(items) * days
        self.born = np.where(rng.random(items) < world.initial_share, -10.0, np.floor(born))
        # day 0 must have something to sell in small worlds too
        self.born[0] = -10.0
        self._name(rng, categories, brands)

    def _name(self, rng: np.random.Generator, categories: int, brands: int) -> None:
        world = self.world
        self.product_id = rng.choice(max(60_000_000, 4 * self.items), self.items, replace=False)
        self.product_id += 1_000_000
        ids = 2_053_013_552_000_000_000 + rng.choice(10**9, categories, replace=False)
        self.category_id = ids[self.category]
        sections = rng.integers(0, len(_SECTIONS), categories)
        codes = [f"{_SECTIONS[s]}.{_word(c)}" for c, s in enumerate(sections)]
        coded = rng.random(categories) >= world.no_code_share
        codes_or_null = pl.Series([c if k else None for c, k in zip(codes, coded)], dtype=pl.String)
        self.category_code = codes_or_null.gather(self.category)
        branded = rng.random(self.items) >= world.no_brand_share
        names = pl.Series([_word(b) for b in range(brands)])
        self.brand_name = names.gather(
            pl.Series(np.where(branded, self.brand, -1)).replace(-1, None)
        )

    def day(self, day: int, sessions: int, midnight: int) -> pl.DataFrame:
        """Events of the sessions that begin on `day`, session by session, times in seconds."""
        rng = np.random.default_rng([self.seed, day])
        lengths = self._lengths(rng, sessions)
        bargain = rng.random(sessions) < self.world.bargain_share
        views = _Walks(self, day, rng).views(lengths, bargain)  # (sessions, longest)
        shown = np.arange(views.shape[1])[None, :] < lengths[:, None]
        item, session = views[shown], np.repeat(np.arange(sessions), lengths)

        # failures before the first success: 0, 1, 2, ... repeats
        times_shown = rng.geometric(1.0 - self.world.repeat, item.size)
        item, session = np.repeat(item, times_shown), np.repeat(session, times_shown)
        return self._frame(rng, item, session, bargain[session], midnight)

    def _lengths(self, rng: np.random.Generator, sessions: int) -> np.ndarray:
        lengths = 1 + rng.geometric(1.0 / (self.world.mean_length - 1.0), sessions)
        single = rng.random(sessions) < self.world.single_share
        return np.where(single, 1, np.minimum(lengths, self.world.max_length))

    def _frame(
        self,
        rng: np.random.Generator,
        item: np.ndarray,
        session: np.ndarray,
        bargain: np.ndarray,
        midnight: int,
    ) -> pl.DataFrame:
        world, events, sessions = self.world, item.size, int(session[-1]) + 1
        factor = np.where(bargain, 1.0 - world.bargain_discount, 1.0)
        noise = np.exp(rng.normal(0.0, world.price_noise, events))
        kind = rng.random(events)
        kinds = np.where(kind < world.cart, 1, np.where(kind < world.cart + world.purchase, 2, 0))
        names = pl.Series(["view", "cart", "purchase"])
        users = rng.integers(0, max(1, sessions * 3 // 2), sessions) + 512_000_000
        ids = pl.Series(_session_ids(rng, sessions)).gather(session)
        lost = rng.random(events) < world.no_session_share
        ids = ids.scatter(np.flatnonzero(lost), None) if lost.any() else ids
        return pl.DataFrame(
            {
                "event_time": midnight + self._seconds(rng, session),
                "event_type": names.gather(kinds),
                "product_id": self.product_id[item],
                "category_id": self.category_id[item],
                "category_code": self.category_code.gather(item),
                "brand": self.brand_name.gather(item),
                "price": np.round(self.price[item] * factor * noise, 2),
                "user_id": users[session],
                "user_session": ids,
            }
        )

    def _seconds(self, rng: np.random.Generator, session: np.ndarray) -> np.ndarray:
        """Whole seconds since midnight; shops are busiest in the afternoon."""
        sessions = int(session[-1]) + 1
        hours = np.arange(24)
        busy = 1.2 - np.cos((hours - 3) * 2 * np.pi / 24)
        begin = rng.choice(24, sessions, p=busy / busy.sum()) * 3600 + rng.random(sessions) * 3600
        gaps = rng.exponential(self.world.mean_gap, session.size)
        since = np.cumsum(gaps)
        starts = np.searchsorted(session, np.arange(sessions))
        since -= since[starts][session]
        return np.floor(begin[session] + since).astype(np.int64)


class _Walks:
    """The items on sale on one day, and how sessions move among them."""

    def __init__(self, shop: _Shop, day: int, rng: np.random.Generator) -> None:
        self.shop, self.rng = shop, rng
        world = shop.world
        age = day - shop.born
        self.sold = np.flatnonzero(age >= 0)
        novelty = world.novelty_boost * np.exp(-age / max(world.novelty_days, 1e-9))
        self.weight = np.where(age >= 0, shop.weight * (1.0 + novelty), 0.0)
        self.everything = _Groups(np.zeros(shop.items, np.int64), self.weight, self.sold)
        # along a brand from cheap to dear; along a price level from brand to brand
        # numbered without gaps, since arrays below have a place for every group
        by_brand = shop.category * (shop.brand.max() + 1) + shop.brand
        by_brand = np.unique(by_brand, return_inverse=True)[1]
        by_level = shop.category * world.price_levels + shop.level
        self.kinds = (
            _Groups(by_brand, self.weight, self.sold, order=shop.price),
            _Groups(by_level, self.weight, self.sold, order=shop.brand + shop.price / 1e9),
        )

    def views(self, lengths: np.ndarray, bargain: np.ndarray) -> np.ndarray:
        """Item of every event, (sessions, longest); no item twice in a row where avoidable."""
        rng, world, count = self.rng, self.shop.world, lengths.size
        backwards = rng.random(count) < world.backwards_share
        out = np.zeros((count, int(lengths.max())), dtype=np.int64)
        anchor = self.everything.draw(rng, np.zeros(count, np.int64))
        out[:, 0] = anchor
        for step in range(1, out.shape[1]):
            live = np.flatnonzero(lengths > step)
            at, what = anchor[live], rng.random(live.size)
            move = np.empty_like(at)
            for kind, groups in enumerate(self.kinds):
                mine = bargain[live] == bool(kind)
                onward = groups.neighbour(at[mine], backwards[live][mine])
                jumped = groups.draw_beside(rng, at[mine])
                jumps = (what[mine] >= world.detour) & (what[mine] < world.detour + world.jump)
                move[mine] = np.where(jumps, jumped, onward)
            detour = what < world.detour
            elsewhere = self.everything.draw(rng, np.zeros(live.size, np.int64))
            seen = np.where(detour, elsewhere, move)
            # alone in its group, an item has no neighbour: the customer looks elsewhere
            seen = np.where(seen == out[live, step - 1], elsewhere, seen)
            out[live, step] = seen
            # a detour leaves the walk where it was
            anchor[live] = np.where(detour | (seen != move), at, move)
        return out


class _Groups:
    """Items on sale in groups, each a ring in a fixed order, drawn by weight."""

    def __init__(
        self,
        group: np.ndarray,
        weight: np.ndarray,
        sold: np.ndarray,
        order: np.ndarray | None = None,
    ) -> None:
        self.group = group
        keys = (np.zeros(sold.size) if order is None else order[sold], group[sold])
        self.members = sold[np.lexsort(keys)]
        of_member = group[self.members]
        self.cumulated = np.concatenate([[0.0], np.cumsum(weight[self.members])])
        numbers = np.arange(int(group.max()) + 1)
        self.first = np.searchsorted(of_member, numbers)
        self.end = np.searchsorted(of_member, numbers, side="right")
        self.place = np.zeros(group.size, dtype=np.int64)
        self.place[self.members] = np.arange(self.members.size)

    def draw(self, rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
        low, high = self.cumulated[self.first[group]], self.cumulated[self.end[group]]
        at = low + rng.random(group.size) * (high - low)
        place = np.searchsorted(self.cumulated, at, side="right") - 1
        return self.members[np.clip(place, self.first[group], self.end[group] - 1)]

    def draw_beside(self, rng: np.random.Generator, item: np.ndarray) -> np.ndarray:
        return self.draw(rng, self.group[item])

    def neighbour(self, item: np.ndarray, backwards: np.ndarray) -> np.ndarray:
        group, step = self.group[item], np.where(backwards, -1, 1)
        first, end = self.first[group], self.end[group]
        return self.members[first + (self.place[item] - first + step) % (end - first)]


def _word(number: int) -> str:
    """A pronounceable name, different for every number."""
    syllables = []
    number += len(_SYLLABLES)
    while number:
        number, at = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[at])
    return "".join(syllables)


def _session_ids(rng: np.random.Generator, count: int) -> list[str]:
    digits = rng.bytes(16 * count).hex()
    cuts = (0, 8, 12, 16, 20, 32)
    return [
        "-".join(digits[32 * i + a : 32 * i + b] for a, b in itertools.pairwise(cuts))
        for i in range(count)
    ]

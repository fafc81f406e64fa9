"""Which column of the events plays which role, and the names of the features made from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from t4r_fast.errors import InputError

REQUIRED = ("session", "item", "time")
OPTIONAL = ("category", "brand", "price")
ROLES = (*REQUIRED, *OPTIONAL, "event_type")
ID_ROLES = ("session", "item", "category", "brand")

# The columns of the REES46 event files.
DEFAULT_MAP = {
    "session": "user_session",
    "item": "product_id",
    "time": "event_time",
    "category": "category_id",
    "brand": "brand",
    "price": "price",
    "event_type": "event_type",
}

# The features of the sessions, in the order of the output columns, with the roles they need.
# The names are the tutorial's and do not depend on the names of the event columns.
CATEGORICAL = {"product_id": "item", "category_id": "category", "brand": "brand"}
CONTINUOUS = {
    "product_recency_days_log_norm": (),
    "et_dayofweek_sin": (),
    "et_dayofweek_cos": (),
    "price_log_norm": ("price",),
    "relative_price_to_avg_categ_id": ("price", "category"),
}
SUFFIXES = ("-list_seq", "-list")


def parse_map(text: str) -> dict[str, str]:
    """{"session": "SessionId", ...} from "session=SessionId,item=ItemId,time=Time".

    An empty column ("brand=") leaves the feature out. Raises InputError on anything else.
    """
    pairs: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        role, equals, column = (s.strip() for s in part.partition("="))
        if not equals:
            raise InputError(f"map: {part!r} must be ROLE=COLUMN, such as item=ItemId")
        if role in pairs:
            raise InputError(f"map: the role {role!r} is given twice")
        pairs[role] = column
    check_map(pairs)
    return pairs


def check_map(pairs: Mapping[str, str]) -> None:
    """Raise InputError on roles that do not exist or needed roles without a column."""
    for role, column in pairs.items():
        if role not in ROLES:
            raise InputError(f"map: the role must be one of {', '.join(ROLES)}; got {role!r}")
        if not column and role in REQUIRED:
            raise InputError(f"map: the role {role!r} needs a column; got nothing after '='")


@dataclasses.dataclass(frozen=True)
class Roles:
    """The column of each role that the events have; `absent` are optional roles without one."""

    columns: dict[str, str]
    absent: tuple[str, ...]

    def features(self) -> list[str]:
        """Names of the features, without suffix, that these roles allow."""
        categorical = [f for f, role in CATEGORICAL.items() if role in self.columns]
        continuous = [f for f, needs in CONTINUOUS.items() if set(needs) <= set(self.columns)]
        return categorical + continuous


def resolve(
    pairs: Mapping[str, str] | None, files: Iterable[tuple[str, list[str]]], with_event_type: bool
) -> Roles:
    """The roles of `files`, given as (name, columns).

    A column named in `pairs` must be in every file; without `pairs` the REES46 names hold, and
    optional ones that no file has are left out. Raises InputError naming file and column.
    """
    check_map(pairs or {})
    wanted = {**DEFAULT_MAP, **(pairs or {})}
    if not with_event_type:
        del wanted["event_type"]
    files = list(files)
    columns: dict[str, str] = {}
    for role, column in wanted.items():
        have = [column in there for _, there in files]
        must = role in REQUIRED or role == "event_type" or role in (pairs or {})
        if not column or not (must or any(have)):
            continue
        if not all(have):
            name, there = files[have.index(False)]
            raise InputError(
                f"{name}: there is no column {column!r} for the role {role!r}; its columns are"
                f" {', '.join(there)}. Name the right one with --map {role}=COLUMN"
                + ("" if role in REQUIRED else f", or leave it out with --map {role}=")
            )
        columns[role] = column
    doubled = [c for c in columns.values() if list(columns.values()).count(c) > 1]
    if doubled:
        roles = [r for r, c in columns.items() if c == doubled[0]]
        raise InputError(f"map: the column {doubled[0]!r} plays two roles: {', '.join(roles)}")
    return Roles(columns, tuple(r for r in OPTIONAL if r not in columns))

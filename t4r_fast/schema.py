"""The feature schema: names, types, ranges and tags of the columns, as TensorFlow-metadata text.

Reads and writes the text form of the `Schema` protocol buffer without protobuf: the tutorial's
`schema.pbtxt`, or what merlin-core writes. Replaces merlin_standard_lib.Schema.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from t4r_fast.errors import InputError


class Tags(str, Enum):
    """The tags that wire features to blocks. A column may carry any other string as well."""

    ITEM_ID = "item_id"
    ITEM = "item"
    USER_ID = "user_id"
    USER = "user"
    SESSION = "session"
    SESSION_ID = "session_id"
    CATEGORICAL = "categorical"
    CONTINUOUS = "continuous"
    LIST = "list"
    SEQUENCE = "sequence"
    EMBEDDING = "embedding"
    TIME = "time"
    TEXT = "text"
    TOKENIZED = "tokenized"
    TEXT_TOKENIZED = "text_tokenized"
    ID = "id"
    CONTEXT = "context"
    TARGET = "target"
    TARGETS = "target"
    BINARY = "binary"
    CLASSIFICATION = "classification"
    MULTI_CLASS = "multi_class"
    BINARY_CLASSIFICATION = "binary_classification"
    MULTI_CLASS_CLASSIFICATION = "multi_class_classification"
    REGRESSION = "regression"

    def __str__(self) -> str:
        return self.value


# Older names of the same enumeration.
Tag = Tags


def _tag(tag: str | Tags) -> str:
    return (tag.value if isinstance(tag, Enum) else str(tag)).lower()


@dataclasses.dataclass(frozen=True)
class IntDomain:
    """Range of an integer column; `is_categorical` says that the numbers are ids."""

    name: str = ""
    min: int = 0
    max: int = 0
    is_categorical: bool = False


@dataclasses.dataclass(frozen=True)
class FloatDomain:
    """Range of a float column, in the column's own unit.

    disallow_nan, disallow_inf  what the file's author promises. Our loaders refuse both anyway
    is_embedding                the column holds vectors
    """

    name: str = ""
    min: float = -math.inf
    max: float = math.inf
    disallow_nan: bool = False
    disallow_inf: bool = False
    is_embedding: bool = False


@dataclasses.dataclass(frozen=True)
class ValueCount:
    """How many values a list column holds per row."""

    min: int = 0
    max: int = 0


@dataclasses.dataclass
class ColumnSchema:
    """One column: `type` is "INT", "FLOAT" or "BYTES"; domains are None when unknown."""

    name: str
    type: str = "INT"
    tags: list[str] = dataclasses.field(default_factory=list)
    int_domain: IntDomain | None = None
    float_domain: FloatDomain | None = None
    value_count: ValueCount | None = None
    properties: dict[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tags = [_tag(t) for t in self.tags]

    @classmethod
    def create_categorical(
        cls,
        name: str,
        num_items: int,
        shape: tuple[int, ...] | None = None,
        value_count: ValueCount | None = None,
        min_index: int = 0,
        tags: Iterable[str | Tags] | None = None,
    ) -> ColumnSchema:
        """An id column with ids from `min_index` to `num_items` (both included)."""
        domain = IntDomain(name=name, min=min_index, max=num_items, is_categorical=True)
        tags = list(tags or ())
        if Tags.CATEGORICAL not in {_tag(t) for t in tags}:
            tags.append(Tags.CATEGORICAL)
        properties = {"shape": tuple(shape)} if shape else {}
        return cls(name, "INT", tags, domain, None, value_count, properties)

    @classmethod
    def create_continuous(
        cls,
        name: str,
        is_float: bool = True,
        min_value: float | None = None,
        max_value: float | None = None,
        disallow_nan: bool = False,
        disallow_inf: bool = False,
        is_embedding: bool = False,
        shape: tuple[int, ...] | None = None,
        value_count: ValueCount | None = None,
        tags: Iterable[str | Tags] | None = None,
    ) -> ColumnSchema:
        """A number column, float unless `is_float` is False.

        disallow_nan, disallow_inf  written into the schema file, for other readers of it
        is_embedding                the column holds vectors, of the width that `shape` ends in
        """
        tags = list(tags or ())
        kind = Tags.EMBEDDING if is_embedding else Tags.CONTINUOUS
        if kind not in {_tag(t) for t in tags}:
            tags.append(kind)
        properties = {"shape": tuple(shape)} if shape else {}
        low = -math.inf if min_value is None else min_value
        high = math.inf if max_value is None else max_value
        if is_float:
            domain = FloatDomain(name, low, high, disallow_nan, disallow_inf, is_embedding)
            return cls(name, "FLOAT", tags, None, domain, value_count, properties)
        domain = None
        if min_value is not None or max_value is not None:
            domain = IntDomain(name, int(min_value or 0), int(max_value or 0), False)
        return cls(name, "INT", tags, domain, None, value_count, properties)

    @property
    def is_list(self) -> bool:
        return self.value_count is not None or Tags.LIST in self.tags

    @property
    def is_categorical(self) -> bool:
        domain_says = self.int_domain is not None and self.int_domain.is_categorical
        return domain_says or Tags.CATEGORICAL in self.tags

    @property
    def cardinality(self) -> int:
        """Rows an embedding table needs: the largest id + 1.

        Raises InputError when the column has no int_domain.
        """
        if self.int_domain is None:
            raise InputError(
                f"schema: column {self.name!r} has no int_domain, so its number of ids is unknown;"
                " add int_domain { min max is_categorical } to the schema file"
            )
        return int(self.int_domain.max) + 1

    def copy(self, **changes: object) -> ColumnSchema:
        """A column of its own, with some fields changed."""
        fields = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return ColumnSchema(**{**fields, **changes})

    def with_name(self, name: str) -> ColumnSchema:
        return self.copy(name=name)

    def with_tags(self, tags: Iterable[str | Tags]) -> ColumnSchema:
        """A copy that carries these tags too."""
        return self.copy(tags=list(dict.fromkeys([*self.tags, *(_tag(t) for t in tags)])))

    def with_properties(self, properties: dict[str, object]) -> ColumnSchema:
        """A copy that has these properties too."""
        return self.copy(properties={**self.properties, **properties})

    def with_tags_based_on_properties(
        self, using_value_count: bool = True, using_domain: bool = True
    ) -> ColumnSchema:
        """A copy tagged list, where it has a value_count, and categorical or continuous by its
        domain."""
        tags = [Tags.LIST] if using_value_count and self.value_count is not None else []
        if using_domain and self.int_domain is not None:
            ids = self.int_domain.is_categorical
            tags.append(Tags.CATEGORICAL if ids else Tags.CONTINUOUS)
        if using_domain and self.float_domain is not None:
            tags.append(Tags.CONTINUOUS)
        return self.with_tags(tags)

    def to_proto_text(self) -> str:
        """The text form of the column alone: what stands in `feature { }` of a schema's."""
        return "".join(f"{line}\n" for line in _column_lines(self))

    def has_tags(self, tags: Iterable[str | Tags]) -> bool:
        return {_tag(t) for t in tags} <= set(self.tags)


class Schema:
    """An ordered collection of columns.

    Schema().from_proto_text(path_or_proto_text) returns a new schema; `select_by_*` and
    `remove_by_*` return new schemas too. Selecting by several tags keeps the columns that carry
    all of them.
    """

    def __init__(self, feature: Iterable[ColumnSchema] = ()) -> None:
        self.feature: list[ColumnSchema] = list(feature)
        names = [c.name for c in self.feature]
        doubled = sorted({n for n in names if names.count(n) > 1})
        if doubled:
            raise InputError(f"schema: column names must be unique; {doubled} appear twice")

    @classmethod
    def create(
        cls,
        column_schemas: Iterable[ColumnSchema | str] | dict[str, ColumnSchema | str] | None = None,
    ) -> Schema:
        """A schema of columns, or of names of columns of which nothing else is known."""
        given = column_schemas or ()
        given = given.values() if isinstance(given, dict) else given
        return cls(ColumnSchema(c) if isinstance(c, str) else c for c in given)

    # -- text ------------------------------------------------------------------------------------

    def from_proto_text(self, path_or_proto_text: str | os.PathLike[str]) -> Schema:
        """The schema in a pbtxt file, or in the text itself.

        Raises InputError when the file is missing or the text is no schema, naming the line.
        """
        text = str(path_or_proto_text)
        origin = "schema text"
        if "{" not in text:
            origin = text
            try:
                text = Path(text).read_text(encoding="utf-8")
            except OSError as e:
                raise InputError(f"schema: cannot read {origin}: {e.strerror or e}") from e
        return Schema(_column_from_message(m, origin) for m in _parse(text, origin))

    def to_proto_text(self, path: str | os.PathLike[str] | None = None) -> str:
        """The text form; also written to `path` when given."""
        text = "".join(_column_to_text(c) for c in self.feature)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    # -- JSON ------------------------------------------------------------------------------------

    def from_json(self, value: str | bytes | os.PathLike[str]) -> Schema:
        """The schema in a JSON file, or in the JSON text itself, as TensorFlow Metadata writes it.

        Raises InputError when the file is missing or the text is no schema.
        """
        from t4r_fast.schema_json import columns_from_json

        if isinstance(value, bytes):
            return Schema(columns_from_json(value, "text"))
        text, origin = str(value), "text"
        if "{" not in text:
            origin = text
            try:
                text = Path(text).read_text(encoding="utf-8")
            except OSError as e:
                raise InputError(f"schema: cannot read {origin}: {e.strerror or e}") from e
        return Schema(columns_from_json(text, origin))

    def to_json(self) -> str:
        """The JSON form, which from_json reads."""
        from t4r_fast.schema_json import columns_to_json

        return columns_to_json(self.feature)

    # -- access ----------------------------------------------------------------------------------

    @property
    def column_schemas(self) -> list[ColumnSchema]:
        return self.feature

    @property
    def column_names(self) -> list[str]:
        return [c.name for c in self.feature]

    @property
    def item_id_column_name(self) -> str:
        """The column tagged item_id. Raises InputError when there is none or more than one."""
        found = self.select_by_tag(Tags.ITEM_ID).column_names
        if len(found) != 1:
            raise InputError(
                f"schema: exactly one column must carry the tag item_id; found {found or 'none'}"
                f" among {self.column_names}"
            )
        return found[0]

    def __iter__(self) -> Iterator[ColumnSchema]:
        return iter(self.feature)

    def __len__(self) -> int:
        return len(self.feature)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, name: object) -> bool:
        return name in self.column_names

    def __getitem__(self, name: str) -> ColumnSchema:
        for column in self.feature:
            if column.name == name:
                return column
        raise KeyError(f"schema: no column {name!r}; there are {self.column_names}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schema) and self.feature == other.feature

    __hash__ = None  # type: ignore[assignment]  # mutable

    def add(
        self, other: Schema | str | Iterable[ColumnSchema | str], allow_overlap: bool = True
    ) -> Schema:
        """Both sets of columns; a name in both keeps the left column and gains the right's tags.

        other          a schema, the name of one column, or columns and names
        allow_overlap  False: a name in both raises InputError
        """
        if isinstance(other, str):
            other = [other]
        if isinstance(other, ColumnSchema) or not isinstance(other, Iterable):
            raise TypeError(
                "Schema.add: other must be a schema, a name, or a list of columns; got a"
                f" {type(other).__name__}"
            )
        other = other if isinstance(other, Schema) else Schema.create(other)
        both = [n for n in other.column_names if n in self]
        if both and not allow_overlap:
            raise InputError(
                f"Schema.add: {both} are columns of both schemas; leave allow_overlap=True to keep"
                " the left ones with the tags of both"
            )
        merged = [copy.deepcopy(c) for c in self.feature]
        by_name = {c.name: c for c in merged}
        for column in other:
            if column.name in by_name:
                mine = by_name[column.name]
                mine.tags += [t for t in column.tags if t not in mine.tags]
            else:
                merged.append(copy.deepcopy(column))
        return Schema(merged)

    def __add__(self, other: Schema | str | Iterable[ColumnSchema | str]) -> Schema:
        return self.add(other)

    __radd__ = __add__  # the columns of the schema come first, as in the reference

    def __sub__(self, other: Schema | None) -> Schema:
        return self if other is None else self.remove_by_name(other.column_names)

    def __repr__(self) -> str:
        return f"Schema({', '.join(self.column_names)})"

    def copy(self) -> Schema:
        return Schema(copy.deepcopy(self.feature))

    # -- selection -------------------------------------------------------------------------------

    def select(self, keep: Callable[[ColumnSchema], bool]) -> Schema:
        return Schema(c for c in self.feature if keep(c))

    def filter_column_schemas(
        self, filter_fn: Callable[[ColumnSchema], bool], negate: bool = False
    ) -> Schema:
        """The columns for which filter_fn holds, or does not with `negate`."""
        return self.select(lambda c: bool(filter_fn(c)) != negate)

    def map_column_schemas(self, map_fn: Callable[[ColumnSchema], ColumnSchema]) -> Schema:
        return Schema(map_fn(c) for c in self.feature)

    def select_by_name(self, to_select: str | Iterable[str] | Callable[[str], bool]) -> Schema:
        """The columns with these names, in the order of the schema; unknown names are an error."""
        if callable(to_select):
            return self.select(lambda c: to_select(c.name))
        wanted = [to_select] if isinstance(to_select, str) else list(to_select)
        missing = [n for n in wanted if n not in self]
        if missing:
            raise InputError(f"schema: no column {missing}; there are {self.column_names}")
        return self.select(lambda c: c.name in wanted)

    def remove_by_name(self, to_remove: str | Iterable[str] | Callable[[str], bool]) -> Schema:
        if callable(to_remove):
            return self.select(lambda c: not to_remove(c.name))
        dropped = {to_remove} if isinstance(to_remove, str) else set(to_remove)
        return self.select(lambda c: c.name not in dropped)

    def select_by_tag(
        self, to_select: str | Tags | Iterable[str | Tags] | Callable[[list[str]], bool]
    ) -> Schema:
        if callable(to_select) and not isinstance(to_select, (str, Enum)):
            return self.select(lambda c: to_select(c.tags))
        wanted = [to_select] if isinstance(to_select, (str, Enum)) else list(to_select)
        return self.select(lambda c: c.has_tags(wanted))

    def remove_by_tag(
        self, to_remove: str | Tags | Iterable[str | Tags] | Callable[[list[str]], bool]
    ) -> Schema:
        return self - self.select_by_tag(to_remove)

    def select_by_type(self, to_select: str | Iterable[str]) -> Schema:
        wanted = {to_select} if isinstance(to_select, str) else set(to_select)
        return self.select(lambda c: c.type in wanted)

    def remove_by_type(self, to_remove: str | Iterable[str]) -> Schema:
        return self - self.select_by_type(to_remove)

    def apply(self, selector: Any) -> Schema:
        """The columns that a selector of Merlin names; all of them without one."""
        names = getattr(selector, "names", None)
        return self.select_by_name(names) if names else self

    def apply_inverse(self, selector: Any) -> Schema:
        """The columns that a selector of Merlin does not name."""
        return self.remove_by_name(selector.names) if selector else self

    def filter_columns_from_dict(self, input_dict: dict[str, Any]) -> dict[str, Any]:
        """The entries for columns of the schema."""
        return {name: value for name, value in input_dict.items() if name in self}

    def with_tags_based_on_properties(
        self, using_value_count: bool = True, using_domain: bool = True
    ) -> Schema:
        """All columns tagged as ColumnSchema.with_tags_based_on_properties does."""
        return self.map_column_schemas(
            lambda c: c.with_tags_based_on_properties(using_value_count, using_domain)
        )

    def categorical_cardinalities(self) -> dict[str, int]:
        """Largest id + 1 of every categorical column."""
        return {c.name: c.cardinality for c in self.feature if c.is_categorical}


def categorical_cardinalities(schema: Schema) -> dict[str, int]:
    """Largest id + 1 of every categorical column of the schema."""
    return schema.categorical_cardinalities()


def get_embedding_size_from_cardinality(cardinality: int, multiplier: float = 2.0) -> int:
    """ceil(cardinality ** 0.25 * multiplier), the reference's rule."""
    return math.ceil(cardinality**0.25 * multiplier)


def embedding_sizes(schema: Schema, multiplier: float = 2.0) -> dict[str, int]:
    """get_embedding_size_from_cardinality for each categorical column."""
    return {
        name: get_embedding_size_from_cardinality(cardinality, multiplier)
        for name, cardinality in schema.categorical_cardinalities().items()
    }


get_embedding_sizes_from_schema = embedding_sizes  # the reference's name


# -- the text form of protocol buffers, as far as schemas use it -----------------------------------

#: Fields of a FloatDomain that are written where they are true.
FLOAT_FLAGS = ("disallow_nan", "disallow_inf", "is_embedding")

_TOKEN = re.compile(
    r"""(?P<space>[\s,;]+|\#[^\n]*) | (?P<punct>[{}\[\]<>:])
      | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<word>[^\s{}\[\]<>:,;"'\#]+)""",
    re.VERBOSE,
)


def _tokens(text: str, origin: str) -> list[tuple[str, int]]:
    out, at = [], 0
    while at < len(text):
        m = _TOKEN.match(text, at)
        if m is None:
            line = text.count("\n", 0, at) + 1
            raise InputError(f"schema: {origin}, line {line}: cannot read {text[at : at + 20]!r}")
        if m.lastgroup != "space":
            out.append((m.group(), text.count("\n", 0, at) + 1))
        at = m.end()
    return out


def _value(token: str) -> object:
    if token[0] in "\"'":
        # backslash escapes are octal bytes of UTF-8 in protobuf's own writer
        body = token[1:-1]
        if "\\" not in body:
            return body
        raw = body.encode("latin-1", "backslashreplace").decode("unicode_escape")
        try:
            return raw.encode("latin-1").decode("utf-8")
        except UnicodeError:
            return raw
    if token in ("true", "false"):
        return token == "true"
    for number in (int, float):
        try:
            return number(token)
        except ValueError:
            continue
    return token


class _Reader:
    """Recursive descent over the tokens; a message is a dict from name to the list of values."""

    def __init__(self, text: str, origin: str) -> None:
        self.tokens, self.origin, self.at = _tokens(text, origin), origin, 0

    def _fail(self, what: str) -> InputError:
        line = self.tokens[min(self.at, len(self.tokens) - 1)][1] if self.tokens else 1
        return InputError(f"schema: {self.origin}, line {line}: {what}")

    def _next(self) -> str:
        if self.at >= len(self.tokens):
            raise self._fail("the text ends in the middle of a message: a '}' is missing")
        self.at += 1
        return self.tokens[self.at - 1][0]

    def message(self, end: str | None) -> dict[str, list[object]]:
        fields: dict[str, list[object]] = {}
        while True:
            if self.at >= len(self.tokens) and end is None:
                return fields
            name = self._next()
            if name == end:
                return fields
            if name == "[":  # extension or Any: [type.url/Name]
                name = ""
                while (part := self._next()) != "]":
                    name += part
            elif not re.fullmatch(r"[A-Za-z_]\w*", name):
                self.at -= 1
                raise self._fail(f"a field name must stand here; got {name!r}")
            fields.setdefault(name, []).extend(self._values())

    def _values(self) -> list[object]:
        token = self._next()
        if token == ":":
            token = self._next()
        if token == "{":
            return [self.message("}")]
        if token == "<":
            return [self.message(">")]
        if token == "[":
            values: list[object] = []
            while (part := self._next()) != "]":
                values.append(self.message("}") if part == "{" else _value(part))
            return values
        if token in "}]>:":
            self.at -= 1
            raise self._fail(f"a value must stand here; got {token!r}")
        return [_value(token)]


def _parse(text: str, origin: str) -> list[dict[str, list[object]]]:
    features = _Reader(text, origin).message(None).get("feature", [])
    if not features:
        raise InputError(f"schema: {origin} holds no `feature {{ ... }}`; is it a schema file?")
    return features  # type: ignore[return-value]


def _one(message: dict, name: str, default: object = None) -> object:
    values = message.get(name)
    return values[-1] if values else default


def _column_from_message(message: dict, origin: str) -> ColumnSchema:
    name = _one(message, "name")
    if name is None:
        raise InputError(f"schema: {origin}: a feature has no name")
    column = ColumnSchema(str(name), str(_one(message, "type", "INT")))
    if (m := _one(message, "int_domain")) is not None:
        column.int_domain = IntDomain(
            str(_one(m, "name", "")),
            int(_one(m, "min", 0)),
            int(_one(m, "max", 0)),
            bool(_one(m, "is_categorical", False)),
        )
    if (m := _one(message, "float_domain")) is not None:
        column.float_domain = FloatDomain(
            str(_one(m, "name", "")),
            float(_one(m, "min", -math.inf)),
            float(_one(m, "max", math.inf)),
            *(bool(_one(m, flag, False)) for flag in FLOAT_FLAGS),
        )
    if (m := _one(message, "value_count")) is not None:
        column.value_count = ValueCount(int(_one(m, "min", 0)), int(_one(m, "max", 0)))
    if (m := _one(message, "shape")) is not None:
        sizes = [int(_one(d, "size", 0)) for d in m.get("dim", [])]
        if all(sizes):
            column.properties["shape"] = tuple(sizes)
    if (m := _one(message, "annotation")) is not None:
        column.tags = [_tag(t) for t in m.get("tag", [])]
        if "id" in column.tags:  # merlin-core writes the tag item_id as two, item and id
            both = [f"{t}_id" for t in column.tags if t in ("item", "user", "session")]
            column.tags += [t for t in both if t not in column.tags]
        for extra in m.get("extra_metadata", []):
            column.properties.update({k: v[-1] for k, v in extra.items()})
    return column


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return '"' + "".join(c if c.isascii() else _octal(c) for c in escaped) + '"'


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8"))


def _column_to_text(c: ColumnSchema) -> str:
    return "\n".join(["feature {", *(f"  {line}" for line in _column_lines(c)), "}", ""])


def _column_lines(c: ColumnSchema) -> list[str]:
    lines = [f"name: {_quoted(c.name)}"]
    if c.value_count is not None:
        lines += _message("value_count", f"min: {c.value_count.min}", f"max: {c.value_count.max}")
    if shape := c.properties.get("shape"):
        lines += _message("shape", *(f"dim {{ size: {n} }}" for n in shape))
    lines.append(f"type: {c.type}")
    if (d := c.int_domain) is not None:
        ids = str(d.is_categorical).lower()
        lines += _message(
            "int_domain",
            f"name: {_quoted(d.name)}",
            f"min: {d.min}",
            f"max: {d.max}",
            f"is_categorical: {ids}",
        )
    if (f := c.float_domain) is not None:
        bounds = [f"{k}: {v!r}" for k, v in (("min", f.min), ("max", f.max)) if math.isfinite(v)]
        flags = [f"{flag}: true" for flag in FLOAT_FLAGS if getattr(f, flag)]
        lines += _message("float_domain", f"name: {_quoted(f.name)}", *bounds, *flags)
    if c.tags:
        lines += _message("annotation", *(f"tag: {_quoted(t)}" for t in c.tags))
    return lines


def _message(name: str, *fields: str) -> list[str]:
    return [f"{name} {{", *(f"  {field}" for field in fields), "}"]

"""`merlin_standard_lib.schema`: the names of its modules `schema` and `tag`."""

from t4r_fast.schema import (
    ColumnSchema,
    FloatDomain,
    IntDomain,
    Schema,
    Tag,
    ValueCount,
    categorical_cardinalities,
)

__all__ = [
    "ColumnSchema",
    "FloatDomain",
    "IntDomain",
    "Schema",
    "Tag",
    "ValueCount",
    "categorical_cardinalities",
]

"""The root of the package `merlin_standard_lib`."""

from t4r_fast.compat.dropin.merlin_standard_lib import schema
from t4r_fast.schema import ColumnSchema, Schema, Tag, categorical_cardinalities

__all__ = ["ColumnSchema", "Schema", "Tag", "categorical_cardinalities", "schema"]

"""Schemas as JSON: the form that TensorFlow Metadata gives its protocol buffers."""

from __future__ import annotations

import json
from typing import Any

from t4r_fast.errors import InputError
from t4r_fast.schema import FLOAT_FLAGS, ColumnSchema, FloatDomain, IntDomain, ValueCount


def columns_from_json(text: str | bytes, origin: str) -> list[ColumnSchema]:
    """The columns of a schema. Raises InputError naming `origin` when the text is none."""
    try:
        features = json.loads(text)["feature"]
        return [_column(feature) for feature in features]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"schema: {origin} is no schema in JSON, {{'feature': [...]}}: {e!r}"
        ) from e


def columns_to_json(columns: list[ColumnSchema]) -> str:
    """The JSON form, as from_json reads it; 64-bit integers are strings, as protobuf writes."""
    return json.dumps({"feature": [_feature(c) for c in columns]}, indent=1)


def _column(feature: dict[str, Any]) -> ColumnSchema:
    # protobuf leaves out what is 0; the reference reads a column of unknown type as float
    column = ColumnSchema(str(feature["name"]), str(feature.get("type", "FLOAT")))
    if column.type == "TYPE_UNKNOWN":
        column.type = "FLOAT"
    annotation = feature.get("annotation", {})
    column.tags = ColumnSchema("", tags=annotation.get("tag", [])).tags
    if (m := feature.get("intDomain")) is not None:
        column.int_domain = IntDomain(
            str(m.get("name", "")),
            int(m.get("min", 0)),
            int(m.get("max", 0)),
            bool(m.get("isCategorical", False)),
        )
    if (m := feature.get("floatDomain")) is not None:
        column.float_domain = FloatDomain(
            str(m.get("name", "")),
            float(m.get("min", 0)),
            float(m.get("max", 0)),
            *(bool(m.get(_in_json(flag), False)) for flag in FLOAT_FLAGS),
        )
    if (m := feature.get("valueCount")) is not None:
        column.value_count = ValueCount(int(m.get("min", 0)), int(m.get("max", 0)))
    if (m := feature.get("shape")) is not None:
        sizes = [int(d.get("size", 0)) for d in m.get("dim", [])]
        if sizes and all(sizes):
            column.properties["shape"] = tuple(sizes)
    return column


def _feature(c: ColumnSchema) -> dict[str, Any]:
    feature: dict[str, Any] = {"name": c.name, "type": c.type}
    if c.value_count is not None:
        feature["valueCount"] = {"min": str(c.value_count.min), "max": str(c.value_count.max)}
    if shape := c.properties.get("shape"):
        feature["shape"] = {"dim": [{"size": str(n)} for n in shape]}
    if (d := c.int_domain) is not None:
        feature["intDomain"] = {
            "name": d.name,
            "min": str(d.min),
            "max": str(d.max),
            "isCategorical": d.is_categorical,
        }
    if (f := c.float_domain) is not None:
        # protobuf's JSON spells infinities so
        bounds = {"min": f.min, "max": f.max}
        spelled = {
            n: v if abs(v) != float("inf") else ("Infinity" if v > 0 else "-Infinity")
            for n, v in bounds.items()
        }
        flags = {_in_json(flag): True for flag in FLOAT_FLAGS if getattr(f, flag)}
        feature["floatDomain"] = {"name": f.name, **spelled, **flags}
    if c.tags:
        feature["annotation"] = {"tag": list(c.tags)}
    return feature


def _in_json(field: str) -> str:
    """disallow_nan -> disallowNan"""
    first, *rest = field.split("_")
    return first + "".join(part.capitalize() for part in rest)

"""Schema: the text form and the selections."""

from __future__ import annotations

import math

import pytest

from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema, Tags, ValueCount, embedding_sizes

SEED_HEAD = """
feature {
  name: "user_session"
  type: INT
  int_domain { name: "user_session" min: 1 max: 1877365 is_categorical: false }
  annotation { tag: "groupby_col" }
}
feature {
  name: "category_id-list_seq"
  value_count { min: 2 max: 20 }
  type: INT
  int_domain { name: "category_id-list_seq" min: 1 max: 566 is_categorical: true }
  annotation { tag: "list" tag: "categorical" tag: "item" }
}
"""


def test_reads_the_tutorials_schema():
    schema = Schema().from_proto_text(SEED_HEAD)
    assert schema.column_names == ["user_session", "category_id-list_seq"]
    column = schema["category_id-list_seq"]
    assert column.cardinality == 567
    assert column.value_count == ValueCount(2, 20)
    assert column.tags == ["list", "categorical", "item"]
    assert schema.categorical_cardinalities() == {"category_id-list_seq": 567}


def test_text_round_trip(tmp_path):
    schema = Schema(
        [
            ColumnSchema.create_categorical(
                "id", 118334, value_count=ValueCount(2, 20), tags=[Tags.ITEM_ID, Tags.LIST]
            ),
            ColumnSchema.create_continuous('prix "é" \\ ☕', min_value=0.5, tags=["list"]),
            ColumnSchema("text", "BYTES"),
        ]
    )
    path = tmp_path / "schema.pbtxt"
    text = schema.to_proto_text(path)
    assert text.isascii()
    assert Schema().from_proto_text(path) == schema
    assert Schema().from_proto_text(text) == schema
    assert schema['prix "é" \\ ☕'].float_domain.max == math.inf


def test_reads_other_spellings_of_the_format():
    text = """# a comment
    feature: < name: 'a', type: FLOAT; shape { dim { size: 3 } }
      annotation: { tag: ["X", "y"] extra_metadata { [type.googleapis.com/S] { value: 1 } } } >
    """
    column = Schema().from_proto_text(text)["a"]
    assert column.type == "FLOAT"
    assert column.tags == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('feature { name: "a"\n type: }', "line 2: a value must stand here"),
        ('feature { name: "a"\n', "'}' is missing"),
        ("other { }", "holds no `feature"),
        ("feature { type: INT }", "a feature has no name"),
        ('feature { name: "a" } feature { name: "a" }', "must be unique"),
        ("feature { 12: 3 }", "a field name must stand here; got '12'"),
    ],
)
def test_bad_text_is_refused_with_its_place(text, said):
    with pytest.raises(InputError, match=said):
        Schema().from_proto_text(text)


def test_missing_file_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.pbtxt"):
        Schema().from_proto_text(tmp_path / "nowhere.pbtxt")


def test_selection():
    schema = Schema(
        [
            ColumnSchema.create_categorical("item", 9, tags=["item_id", "list"]),
            ColumnSchema.create_categorical("user", 4),
            ColumnSchema.create_continuous("price", tags=["list"]),
        ]
    )
    assert schema.select_by_tag(["list", "categorical"]).column_names == ["item"]
    assert schema.remove_by_tag("list").column_names == ["user"]
    assert schema.select_by_name(["price", "item"]).column_names == ["item", "price"]
    assert schema.select_by_type("FLOAT").column_names == ["price"]
    assert schema.item_id_column_name == "item"
    assert (schema.select_by_name("item") + schema).column_names == ["item", "user", "price"]
    with pytest.raises(InputError, match=r"no column \['prize'\]; there are"):
        schema.select_by_name(["prize"])
    with pytest.raises(InputError, match="exactly one column must carry the tag item_id"):
        _ = schema.remove_by_name("item").item_id_column_name


def test_cardinality_needs_a_domain():
    with pytest.raises(InputError, match="'x' has no int_domain"):
        _ = ColumnSchema("x", tags=["categorical"]).cardinality


def test_embedding_sizes():
    schema = Schema([ColumnSchema.create_categorical("a", 9999)])
    assert embedding_sizes(schema) == {"a": 20}


def test_item_and_id_tags_of_merlin_core_are_the_item_id():
    text = """
    feature { name: "sku" type: INT int_domain { max: 9 is_categorical: true }
              annotation { tag: "categorical" tag: "item" tag: "id" } }
    feature { name: "shop" type: INT annotation { tag: "item" tag: "categorical" } }
    """
    assert Schema().from_proto_text(text).item_id_column_name == "sku"


# What ColumnSchema.to_proto_text of merlin_standard_lib gives for two columns.
OF_THE_REFERENCE = [
    """
    name: "sku" value_count { min: 1 max: 4 } type: INT
    int_domain { name: "sku" max: 10 is_categorical: true }
    annotation { tag: "item" tag: "categorical" tag: "id" }
    """,
    """
    name: "v" type: FLOAT
    float_domain { name: "v" min: 0.5 max: 2.5 disallow_nan: true is_embedding: true }
    annotation { tag: "continuous" } shape { dim { size: 3 } }
    """,
]


def test_a_column_alone_is_written_as_text():
    item = ColumnSchema.create_categorical(
        "sku", 10, value_count=ValueCount(1, 4), tags=["item", "id", "item_id"]
    )
    vector = ColumnSchema.create_continuous(
        "v", True, 0.5, 2.5, True, False, is_embedding=True, shape=(3,), tags=["continuous"]
    )
    vector.tags.remove("embedding")  # ours alone
    for column, text in zip((item, vector), OF_THE_REFERENCE, strict=True):
        written = column.to_proto_text()
        assert written.startswith(f'name: "{column.name}"\n')
        theirs, ours = (
            Schema().from_proto_text(f"feature {{ {t} }}").feature[0] for t in (text, written)
        )
        assert sorted(theirs.tags) == sorted(ours.tags)
        assert theirs.copy(tags=[]) == ours.copy(tags=[]) == column.copy(tags=[])


def test_what_a_float_domain_disallows_is_kept(tmp_path):
    schema = Schema(
        [
            ColumnSchema.create_continuous("a", disallow_nan=True),
            ColumnSchema.create_continuous("b", disallow_inf=True, min_value=0.0),
        ]
    )
    assert "disallow_nan: true" in schema.to_proto_text()
    assert '"disallowInf": true' in schema.to_json()
    for read in (
        Schema().from_proto_text(schema.to_proto_text()),
        Schema().from_json(schema.to_json()),
    ):
        assert read == schema
        domain = read["b"].float_domain
        assert (domain.disallow_nan, domain.disallow_inf, domain.is_embedding) == (0, 1, 0)


def test_schemas_are_added():
    a, b = ColumnSchema("a", tags=["x"]), ColumnSchema("b")
    schema = Schema([a, b])
    assert schema.add("c").column_names == ["a", "b", "c"]
    before = ["c"]
    assert schema.add([ColumnSchema("c"), "d"]).column_names == ["a", "b", "c", "d"]
    assert (schema + "c").column_names == (before + schema).column_names == ["a", "b", "c"]
    assert schema - None == schema
    both = schema.add(Schema([ColumnSchema("a", "FLOAT", ["y"])]))
    assert (both["a"].type, both["a"].tags) == ("INT", ["x", "y"])
    assert schema["a"].tags == ["x"]
    assert schema.add("c", allow_overlap=False).column_names == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"\['b'\] are columns of both schemas"):
        schema.add(Schema([b]), allow_overlap=False)
    for other in (None, 3, b):
        with pytest.raises(TypeError, match=f"got a {type(other).__name__}"):
            schema.add(other)

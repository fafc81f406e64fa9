"""docs/compatibility.md lists every public name of Transformers4Rec 23.12, and it is true.

tests/parity/names.json was written by tests/parity/record_names.py beside the real package.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest

import t4r_fast.torch as tr
from t4r_fast.schema import ColumnSchema, Schema, Tags, ValueCount

sys.path.insert(0, str(Path(__file__).parent / "parity"))
import names

ROWS = names.compare()


def test_nothing_differs_without_a_reason():
    assert [row for row in ROWS if row[1] == "differs"] == []
    assert len(ROWS) > 140
    count = {kind: sum(row[1] == kind for row in ROWS) for kind in ("same", "better")}
    assert count["same"] > 80
    assert count["better"] >= 15


def test_the_document_says_what_is_there():
    text = names.DOCUMENT.read_text()
    assert names.rewritten(text) == text, "run python tests/parity/names.py"


def test_reasons_are_of_names_that_are_there():
    listed = {full for full, *_ in ROWS}
    for full in (*names.BETTER, *names.IN_PART, *names.WHY_NOT):
        assert full in listed, full


def test_every_name_that_the_reference_exports_is_exported():
    assert [n for n in names.RECORDED["exported"] if not hasattr(tr, n)] == []


def test_a_difference_is_found():
    def call(a, b=2, *, c=(1,), d=None): ...

    assert names.unlike({"a": {}, "b": 2, "c": [1], "d": {"object": "BCELoss"}}, call) == []
    assert names.unlike({"a": 1, "b": 3, "e": {}, "**kwargs": {}}, call) == [
        "a={'object': '_empty'}",
        "b=2",
        "e",
    ]
    assert names.unlike({"e": {}}, lambda **kwargs: None) == []
    assert names.unlike({"d": None}, lambda d=0: None) == ["d=0"]
    status = names.judged("m.f", {"b": 3}, call)
    assert status == ("differs", "b=2")
    assert names.judged("m.f", {}, None) == ("not yet", "")


@pytest.mark.parametrize("row", [r for r in ROWS if r[1] == "not yet"], ids=lambda r: r[0])
def test_what_is_not_yet_there_is_left_out_whole(row):
    full, _, _ = row
    module = next(m for m in sorted(names.RECORDED["modules"], key=len)[::-1] if full.startswith(m))
    target = names.ours(module)
    if target is None:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"t4r_fast.{module.partition('.')[2]}")
        return
    owner = target
    *path, last = full[len(module) + 1 :].split(".")
    for part in path:
        owner = getattr(owner, part)
    assert not hasattr(owner, last)


def test_training_arguments_take_every_field_of_the_reference_at_its_default(recwarn):
    module = names.RECORDED["modules"]["transformers4rec.config.trainer"]
    fields = module["T4RecTrainingArguments"]["arguments"]
    assert len(fields) > 110
    plain = {n: v for n, v in fields.items() if not isinstance(v, dict) and n != "output_dir"}
    # what transformers 4 chose for them is gone
    for gone in ("optim", "save_safetensors", "gradient_checkpointing"):
        tr.T4RecTrainingArguments(output_dir="x", **{gone: plain.pop(gone)})
    recwarn.clear()
    arguments = tr.T4RecTrainingArguments(output_dir="x", **plain)
    assert [str(w.message) for w in recwarn] == []
    of_reference = ("shuffle_buffer_size", "eval_steps_on_train_set", "predict_top_k")
    for name in (*of_reference, "compute_metrics_each_n_steps", "log_predictions"):
        assert getattr(arguments, name) == plain[name]


def test_modules_give_names_that_stand_elsewhere():
    from t4r_fast.torch.features import embedding
    from t4r_fast.torch.ranking_metric import ranking_metrics_registry

    assert embedding.SoftEmbedding is tr.SoftEmbedding
    assert ranking_metrics_registry.parse("map").__name__ == "AvgPrecisionAt"
    with pytest.raises(AttributeError, match="no attribute 'SoftTable'"):
        _ = embedding.SoftTable
    assert inspect.signature(tr.data.T4RecDataLoader.parse).parameters.keys() == {"class_or_str"}


# -- schema methods of merlin_standard_lib ---------------------------------------------------------

SCHEMA = Schema(
    [
        ColumnSchema.create_categorical("a", 3, value_count=ValueCount(1, 2)),
        ColumnSchema("b", "FLOAT", ["x"]),
    ]
)


def test_columns_are_copied_with_changes():
    column = SCHEMA["a"].with_tags([Tags.LIST, "categorical"]).with_properties({"p": 1})
    assert column.tags == ["categorical", "list"]
    assert column.with_name("c").properties == {"p": 1}
    assert SCHEMA["a"].tags == ["categorical"]
    assert SCHEMA["a"].properties == {}
    found = ColumnSchema.create_continuous("n").with_tags([]).with_tags_based_on_properties()
    assert found.tags == ["continuous"]


def test_schemas_are_selected_mapped_and_created():
    assert Schema.create(["x", SCHEMA["a"]]).column_names == ["x", "a"]
    assert Schema.create({"k": "y"}).column_names == ["y"]
    assert SCHEMA.remove_by_type("FLOAT").column_names == ["a"]
    assert SCHEMA.filter_column_schemas(lambda c: c.name == "a", negate=True).column_names == ["b"]
    upper = SCHEMA.map_column_schemas(lambda c: c.with_name(c.name.upper()))
    assert upper.column_names == ["A", "B"]
    assert SCHEMA.filter_columns_from_dict({"a": 1, "z": 2}) == {"a": 1}
    selector = type("Selector", (), {"names": ["b"]})()
    assert SCHEMA.apply(selector).column_names == ["b"]
    assert SCHEMA.apply_inverse(selector).column_names == ["a"]
    assert SCHEMA.apply(None).column_names == ["a", "b"]
    assert SCHEMA.with_tags_based_on_properties()["a"].tags == ["categorical", "list"]

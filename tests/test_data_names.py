"""Names of the reference around data: YooChoose, merlin-core's schema, what is installed."""

from __future__ import annotations

import datetime
import json
import sys
import types

import numpy as np
import polars as pl
import pytest

from t4r_fast.data import dataset, dependencies, yoochoose
from t4r_fast.errors import InputError
from t4r_fast.merlin_schema import to_core_schema
from t4r_fast.schema import ColumnSchema, Schema


@pytest.fixture
def without(monkeypatch):
    """Make packages fail to import, whether they are installed or not."""

    def hide(*roots):
        for name in [n for n in sys.modules if n.partition(".")[0] in roots]:
            monkeypatch.delitem(sys.modules, name)
        for root in roots:  # None stops an import
            monkeypatch.setitem(sys.modules, root, None)

    return hide


# -- YooChoose -------------------------------------------------------------------------------------

CLICKS = """\
2,2014-04-02T10:00:00.000Z,7,0
1,2014-04-01T10:00:05.250Z,8,S
1,2014-04-01T10:00:00.000Z,7,0
1,2014-04-01T10:00:07.000Z,8,3
2,2014-04-02T10:01:00.000Z,7,0
1,2014-04-01T10:00:09.000Z,7,0
"""


def test_clicks_are_ordered_and_repeats_dropped(tmp_path):
    file = tmp_path / "yoochoose-clicks.dat"
    file.write_text(CLICKS)
    clicks = yoochoose.process_clicks(str(file))
    assert clicks.columns == ["session_id", "timestamp", "item_id", "category", "item_ts_first"]
    assert clicks.select("session_id", "item_id", "category").rows() == [
        (1, 7, "0"), (1, 8, "S"), (1, 7, "0"), (2, 7, "0"),
    ]  # fmt: skip
    assert clicks["timestamp"].dtype == pl.Datetime("ns", "UTC")
    first = datetime.datetime(2014, 4, 1, 10, tzinfo=datetime.timezone.utc)
    later = first + datetime.timedelta(seconds=5.25)
    assert clicks["item_ts_first"].to_list() == [first, later, first, first]


def test_what_is_no_click_is_refused(tmp_path):
    file = tmp_path / "clicks.dat"
    with pytest.raises(InputError, match=r"cannot read .*clicks\.dat as clicks"):
        yoochoose.process_clicks(file)
    for line in ("1,yesterday,7,0\n", "1,2014-04-01T10:00:00.000Z,seven,0\n"):
        file.write_text(CLICKS + line)
        with pytest.raises(InputError, match=r"cannot read .*clicks\.dat as clicks"):
            yoochoose.process_clicks(file)


def test_download_asks_kaggle(monkeypatch, tmp_path):
    calls = []
    api = types.SimpleNamespace(
        authenticate=lambda: calls.append("authenticate"),
        dataset_download_files=lambda *args, **options: calls.append((*args, options)),
    )
    monkeypatch.setitem(sys.modules, "kaggle", types.SimpleNamespace(api=api))
    assert yoochoose.download(str(tmp_path)) == str(tmp_path)
    options = {"path": str(tmp_path), "unzip": True}
    assert calls == ["authenticate", ("chadgostopp/recsys-challenge-2015", options)]


def test_download_without_kaggle_says_what_to_do(without):
    without("kaggle")
    with pytest.raises(RuntimeError, match="pip install kaggle"):
        yoochoose.download("here")


# -- merlin-core -----------------------------------------------------------------------------------

SCHEMA = Schema(
    [
        ColumnSchema.create_categorical("item", 9, tags=["item_id"]),
        ColumnSchema.create_continuous("price"),
        ColumnSchema.create_continuous("age", min_value=0.0, max_value=99.0),
    ]
)


def test_a_core_schema_is_made_by_merlin_core(monkeypatch, tmp_path):
    """With merlin-core's reader in place; tests/nvtabular/merlin_case.py runs the real one."""

    class TensorflowMetadata:
        def __init__(self, text):
            self.text = text

        @classmethod
        def from_json(cls, text):
            return cls(text)

        def to_merlin_schema(self):
            return json.loads(self.text)["feature"]

    reader = types.SimpleNamespace(TensorflowMetadata=TensorflowMetadata)
    monkeypatch.setitem(sys.modules, "merlin.schema.io.tensorflow_metadata", reader)
    for parent in ("merlin", "merlin.schema", "merlin.schema.io"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    item, price, age = to_core_schema(SCHEMA)
    assert item["intDomain"]["max"] == "9"
    assert "floatDomain" not in price  # merlin-core would keep the text "-Infinity"
    assert age["floatDomain"]["max"] == 99.0
    assert SCHEMA["price"].float_domain is not None
    (tmp_path / "schema.json").write_text(SCHEMA.to_json())
    assert dataset.ParquetDataset(tmp_path).merlin_schema == [item, price, age]


def test_a_core_schema_needs_merlin_core(without):
    without("merlin")
    with pytest.raises(RuntimeError, match="merlin-core is not installed"):
        to_core_schema(SCHEMA)


# -- what is installed -----------------------------------------------------------------------------


def test_packages_are_found_or_not(monkeypatch, without):
    assert dependencies.is_pyarrow_available()
    without("cudf", "cupy", "merlin")
    assert not dependencies.is_gpu_dataloader_available()
    assert not dependencies.is_merlin_dataloader_available()
    for name in ("cudf", "merlin", "merlin.dataloader"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert dependencies.is_merlin_dataloader_available()
    assert not dependencies.is_gpu_dataloader_available()
    monkeypatch.setitem(sys.modules, "cupy", np)
    assert dependencies.is_gpu_dataloader_available()

"""Sessions by NVTabular 23.8: the same as by Polars, and as they are for our Trainer.

What NVTabular wrote is recorded (tests/nvtabular/record.py). The tests that run it take the Python
that T4R_NVTABULAR_PYTHON names, as `make nvtabular-env` makes one.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from training_case import make_trainer

import t4r_fast.torch as tr
from t4r_fast import etl
from t4r_fast.errors import InputError

HERE = Path(__file__).parent / "nvtabular"
RECORDED = HERE / "recorded"
SAMPLE = Path(__file__).parents[2] / "shared" / "data" / "rees46-2019-Oct-sample.csv"


def assert_same_output(ours: Path, theirs: Path) -> None:
    """Sessions, ids and counts equal, statistics and features up to rounding."""
    files = sorted(p.relative_to(ours) for p in ours.glob("sessions_by_day/*/*.parquet"))
    assert files == sorted(
        p.relative_to(theirs) for p in theirs.glob("sessions_by_day/*/*.parquet")
    )
    assert len(files) >= 3
    for file in files:
        a, b = pl.read_parquet(ours / file), pl.read_parquet(theirs / file)
        assert a.schema == b.schema
        for name in a.columns:
            assert_same_column(a[name], b[name])
    for role in ("item", "category", "brand"):
        a, b = (pl.read_parquet(d / "workflow" / f"{role}.parquet") for d in (ours, theirs))
        assert a.schema == b.schema
        for name in a.columns:
            assert_same_column(a[name], b[name])
    a, b = (json.loads((d / "workflow" / "workflow.json").read_text()) for d in (ours, theirs))
    assert a["columns"] == b["columns"]
    assert a["rules"] == b["rules"]
    for name in a["moments"]:
        assert b["moments"][name] == pytest.approx(a["moments"][name], rel=1e-9)
    assert b["price_means"] == pytest.approx(a["price_means"], rel=1e-9)
    schemas = [tr.Schema().from_proto_text(d / "schema.pbtxt") for d in (ours, theirs)]
    assert [(c.name, c.type, c.int_domain, c.tags) for c in schemas[0]] == [
        (c.name, c.type, c.int_domain, c.tags) for c in schemas[1]
    ]


def assert_same_column(a: pl.Series, b: pl.Series) -> None:
    flat = a
    if a.dtype == pl.List:
        assert a.list.len().equals(b.list.len()), a.name
        flat, b = a.explode(), b.explode()
    if flat.dtype.is_float():
        np.testing.assert_allclose(b.to_numpy(), flat.to_numpy(), rtol=1e-6, atol=1e-6)
    else:
        assert flat.equals(b), a.name


def test_both_engines_make_the_same_sessions_ids_and_statistics(tmp_path):
    etl.run(RECORDED / "events.csv", tmp_path / "ours", seed=5)
    assert_same_output(tmp_path / "ours", RECORDED / "etl")


def test_sessions_and_schema_of_nvtabular_work_as_they_are(tmp_path):
    schema = tr.Schema().from_proto_text(RECORDED / "sessions_by_day" / "schema.pbtxt")
    assert schema.item_id_column_name == "product_id"
    names = ["product_id", "category_id", "price_log_norm"]
    schema = schema.select_by_name(names)
    items = pl.read_parquet(RECORDED / "etl" / "workflow" / "item.parquet").height
    assert schema["product_id"].cardinality == items + 3
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, max_sequence_length=20, d_output=16, masking="mlm", aggregation="concat"
    )
    assert set(inputs.schema.column_names) == set(names)
    config = tr.XLNetConfig.build(16, 2, 1, 20)
    block = tr.TransformerBlock(config, masking=inputs.masking, attend_padding=False)
    task = tr.NextItemPredictionTask(weight_tying=True)
    model = tr.Model(tr.Head(tr.SequentialBlock(inputs, block), task, inputs=inputs))
    day = RECORDED / "sessions_by_day"
    trainer = make_trainer(
        tmp_path,
        str(day / "1" / "train.parquet"),
        model,
        num_train_epochs=8,
        max_sequence_length=20,
        save_strategy="no",
    )
    trainer.schema = schema
    before = trainer.evaluate()["eval_/loss"]
    trainer.train()
    assert trainer.evaluate()["eval_/loss"] < before - 0.1
    trainer.eval_dataset_or_path = str(day / "2" / "valid.parquet")
    assert 0 < trainer.evaluate()["eval_/next-item/recall_at_20"] <= 1


def test_without_nvtabular_the_engine_says_where_it_is(tmp_path, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(InputError, match="make nvtabular-env"):
        etl.run(RECORDED / "events.csv", tmp_path / "out", engine="nvtabular")
    with pytest.raises(InputError, match="engine must be one of polars, nvtabular; got 'cudf'"):
        etl.run(RECORDED / "events.csv", tmp_path / "out", engine="cudf")


# -- where NVTabular is ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    python = os.environ.get("T4R_NVTABULAR_PYTHON")
    if python is None:
        pytest.skip("T4R_NVTABULAR_PYTHON names no Python with NVTabular; see make nvtabular-env")
    if not SAMPLE.is_file():
        pytest.skip(f"{SAMPLE.name} is not beside the repository")
    out = tmp_path_factory.mktemp("nvtabular")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("T4R_FAST_")},
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    run = subprocess.run(
        [python, str(HERE / "merlin_case.py"), str(SAMPLE), "."],
        cwd=out,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return out


def test_both_engines_agree_on_real_events(out):
    assert_same_output(out / "polars", out / "nvtabular")


def test_merlins_loader_feeds_the_trainer(out):
    found = json.loads((out / "found.json").read_text())
    assert found["merlin"] == pytest.approx(found["ours"], rel=1e-6)
    assert found["merlin"]["eval_/loss"] < found["first"]["eval_/loss"]


def test_merlin_core_takes_our_schema(out):
    item, price = json.loads((out / "found.json").read_text())["core"]
    assert item[:4] == [
        "product_id-list_seq", "int64", True, ["categorical", "id", "item", "list"],
    ]  # fmt: skip
    assert item[4]["value_count"] == {"min": 2, "max": 20}
    assert price[:3] == ["price_log_norm-list_seq", "float64", True]
    assert price[4]["domain"]["min"] < price[4]["domain"]["max"]


def test_a_merlin_dataset_is_read(out):
    alike = json.loads((out / "found.json").read_text())["alike"]
    assert len(alike) > 10
    assert all(alike)


def test_the_nvtabular_workflow_is_kept(out):
    found = json.loads((out / "found.json").read_text())
    assert {"product_id", "brand", "price_log_norm", "session"} <= set(found["columns"])
    assert found["sessions"] > 1000

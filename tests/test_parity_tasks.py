"""Prediction tasks give what the real Transformers4Rec 23.12 gives.

tests/parity/tasks.json was written by tests/parity/record_tasks.py beside the real package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import test_parity_surface as blocks

import t4r_fast.torch as tr
from t4r_fast.schema import ColumnSchema, Schema

HERE = Path(__file__).parent / "parity"
sys.path.insert(0, str(HERE))
import tasks  # noqa: E402  # shared with the recording side

ALL = json.loads((HERE / "tasks.json").read_text())
RECORDED = ALL["models"]


def schema(names):
    if "price" not in names:
        return blocks.schema(names)
    return Schema(
        [
            ColumnSchema.create_categorical("bought", 1, tags=["binary_classification"]),
            ColumnSchema.create_continuous("price", tags=["regression"]),
        ]
    )


@pytest.mark.parametrize("name", tasks.MODELS)
def test_tasks(name, monkeypatch):
    for module in ("block.transformer", "model.task"):
        monkeypatch.setattr(f"t4r_fast.torch.{module}.warn_once", lambda *_: None)
    recorded = RECORDED[name]
    found = tasks.measure(tasks.model(tr, schema, name))
    assert found["parameters"] == recorded["parameters"]
    assert found["eval_loss"] == pytest.approx(recorded["eval_loss"], rel=1e-5)
    assert found["metrics"] == pytest.approx(recorded["metrics"], rel=1e-5)
    assert found["nested"] == recorded["nested"]
    for what in ("predictions", "inference"):
        assert list(found[what]) == list(recorded[what])
        for task, values in found[what].items():
            blocks.assert_close(values, recorded[what][task], (what, task))
    blocks.assert_gradients(found["gradients"], recorded["gradients"])
    assert found["training_losses"][0] == pytest.approx(recorded["training_losses"][0], rel=1e-5)
    # twenty AdamW steps later
    assert found["training_losses"] == pytest.approx(recorded["training_losses"], rel=1e-3)


@pytest.mark.parametrize("name", tasks.SAMPLED)
def test_sampled_softmax_draws_as_theirs_does(name, monkeypatch):
    """Other random numbers, the same distribution: the mean loss over many draws."""
    for module in ("block.transformer", "model.prediction_task"):
        monkeypatch.setattr(f"t4r_fast.torch.{module}.warn_once", lambda *_: None)
    found = tasks.measure_sampled(tasks.sampled(tr, schema, tasks.SAMPLED[name]), 1000)
    recorded = ALL["sampled"][name]
    error = (found["error"] ** 2 + recorded["error"] ** 2) ** 0.5
    assert abs(found["mean"] - recorded["mean"]) < 4 * error, (found, recorded)
    assert found["keys"] == recorded["keys"]
    for key, table in recorded["tables"].items():
        assert found["tables"][key] == pytest.approx(table, rel=1e-5)

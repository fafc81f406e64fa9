"""The scoring model by torch.export and as ONNX gives the model's scores."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from serving_case import LENGTH, latest, make_model, shop

from t4r_fast.errors import InputError
from t4r_fast.serving import Recommender, export_onnx, export_program

SIDE = pytest.mark.parametrize("side", [False, True], ids=["items", "side"])


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return shop(str(tmp_path_factory.mktemp("shop")))


def batches(model, events, workflow):
    """Batches of one session, of two and of twenty, and their scores."""
    served = Recommender(model, workflow)
    for sessions in (1, 2, 20):
        _, inputs = served.encode(latest(events, sessions))
        yield inputs, served.scores(inputs)


def close(found, expected):
    # of scores of size 10, from sums in another order
    assert np.abs(found - expected).max() < 1e-4
    assert (found.argmax(1) == expected.argmax(1)).all()


@SIDE
def test_torch_export(case, side, tmp_path):
    events, workflow = case
    model = make_model(workflow, side=side)
    model.top_k = 5
    program = export_program(model.train())
    assert model.training
    assert model.top_k == 5
    namespaces = {
        str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"
    }
    assert "t4r_fast" not in namespaces
    assert "aten" in namespaces
    torch.export.save(program, tmp_path / "scores.pt2")
    again = torch.export.load(tmp_path / "scores.pt2").module()
    for inputs, expected in batches(model.eval(), events, workflow):
        close(again(*inputs.values()).detach().numpy(), expected)
    with pytest.raises(InputError, match="length must be at least 1; got 0"):
        export_program(model, 0)


@SIDE
def test_onnxruntime_agrees(case, side, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="not installed; `make test-serving` has it")
    runtime = pytest.importorskip("onnxruntime", reason="not installed; `make test-serving` has it")
    events, workflow = case
    model = make_model(workflow, side=side)
    path = export_onnx(model, tmp_path / "scores.onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == model.input_schema.column_names
    assert [i.shape[1] for i in session.get_inputs()] == [LENGTH] * len(model.input_schema)
    for inputs, expected in batches(model, events, workflow):
        (found,) = session.run(["scores"], {n: x.numpy() for n, x in inputs.items()})
        close(found, expected)


def test_without_onnx_the_error_says_what_to_install(case, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="onnx is missing; pip install onnx onnxscript"):
        export_onnx(make_model(case[1]), tmp_path / "scores.onnx")
    assert list(tmp_path.iterdir()) == []

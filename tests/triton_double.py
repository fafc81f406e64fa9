"""What Triton's Python backend gives a model, without the server: enough to drive model.py."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    def __init__(self, message: str) -> None:
        self._message = message

    def message(self) -> str:
        return self._message


class Request:
    """inputs: name -> array as the server hands it on; outputs: None for all of the config."""

    def __init__(self, inputs, outputs, **parameters) -> None:
        self.inputs, self._outputs, self._parameters = inputs, outputs, parameters

    def requested_output_names(self) -> list[str]:
        return list(self._outputs)

    def parameters(self) -> str:
        return json.dumps(self._parameters)


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None) -> None:
        self.outputs = {t.name(): t.as_numpy() for t in output_tensors}
        self.error = error and error.message()


def get_input_tensor_by_name(request: Request, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None


def load(folder: Path, monkeypatch, version: int = 1):
    """The initialized model of a repository's folder."""
    module = types.ModuleType("triton_python_backend_utils")
    for thing in (Tensor, TritonError, InferenceResponse, get_input_tensor_by_name):
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("served", folder / str(version) / "model.py")
    served = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(served)
    model = served.TritonPythonModel()
    model.initialize({"model_repository": str(folder), "model_version": str(version)})
    return model


def column(values, kind: str) -> np.ndarray:
    """(n, 1) of a column of events, as a client sends it."""
    if kind == "STRING":
        texts = [b"" if v is None else str(v).encode() for v in values]
        return np.array(texts, dtype=np.object_).reshape(-1, 1)
    types_ = {"INT64": np.int64, "FP64": np.float64, "FP32": np.float32}
    return np.asarray(values, dtype=types_[kind]).reshape(-1, 1)

"""The scoring model as a graph for other runtimes: torch.export, and ONNX."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path

import torch
from torch import nn

from t4r_fast import backend
from t4r_fast.compat.torch.model.base import Model
from t4r_fast.compat.torch.model.prediction_task import Asked
from t4r_fast.compat.torch.model.recommending import next_item_task
from t4r_fast.errors import InputError
from t4r_fast.serve.recommender import read_schema, served_length

MAX_SESSIONS = 65_536  # of a batch


class _Scores(nn.Module):
    """The model with its columns as positional arguments."""

    def __init__(self, model: Model, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *columns: torch.Tensor) -> torch.Tensor:
        found = self.model(dict(zip(self.names, columns, strict=True)), asked=Asked())
        return found[next_item_task(self.model).task_name] if isinstance(found, dict) else found


def export_program(model: Model, length: int | None = None) -> torch.export.ExportedProgram:
    """The model's scores of all items as a graph of PyTorch's own operators.

    length   positions of the padded columns; see t4r_fast.serve.Recommender
    returns  a program: one argument (B, length) per column of model.input_schema, in its order,
             int64 ids or float32 numbers, B from 1 to 65536; result (B, V) float32

    torch.export.save writes it. The program forms all scores; `model.recommend` does not.
    Not beside other calls: while it works, all threads compute by PyTorch's own operators.
    Raises InputError where the model's input block has no schema.
    """
    schema = read_schema(model)
    length = served_length(model, None) if length is None else length
    if length < 1:
        raise InputError(f"export_program: length must be at least 1; got {length}")
    columns = tuple(
        torch.ones(3, length, dtype=torch.float32 if c.type == "FLOAT" else torch.int64)
        for c in schema
    )
    sessions = torch.export.Dim("sessions", min=1, max=MAX_SESSIONS)
    scores = _Scores(model, schema.column_names)
    training = model.training
    model.eval()
    try:
        # its operators are PyTorch's, so that other runtimes know them
        with torch.no_grad(), backend.use("plain"):
            return torch.export.export(
                scores, columns, dynamic_shapes=(tuple({0: sessions} for _ in columns),)
            )
    finally:
        model.train(training)


def export_onnx(model: Model, path: str | os.PathLike[str], length: int | None = None) -> Path:
    """Write the model's scores of all items as ONNX: inputs by the names of the columns, `scores`.

    Arguments as for export_program. Weights past 2 GB go to a file beside it. Needs the packages
    onnx and onnxscript; raises InputError where they are missing.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"export_onnx: {package} is missing; pip install onnx onnxscript")
    program = export_program(model, length)
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its steps
        written = torch.onnx.export(
            program,
            dynamo=True,
            input_names=read_schema(model).column_names,
            output_names=["scores"],
        )
        written.save(path)  # type: ignore[union-attr]  # dynamo=True gives a program
    return Path(path)

"""A model repository for NVIDIA Triton Inference Server, served by its Python backend.

<path>/<name>/config.pbtxt           names, types and shapes of the tensors, batching, warm-up
<path>/<name>/warmup/input_<i>       data of the warm-up request
<path>/<name>/<version>/model.py     imports t4r_fast.serve.triton_model
<path>/<name>/<version>/serving.json what it serves: form of the sessions, types, defaults
<path>/<name>/<version>/model/       the model, as Model.save writes it
<path>/<name>/<version>/workflow/    the fitted workflow, as Workflow.save writes it
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from t4r_fast.compat import warn_once
from t4r_fast.compat.torch.model.base import Model
from t4r_fast.compat.torch.model.recommending import next_item_task, recommend, tables
from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow
from t4r_fast.ops.item_topk import MAX_K
from t4r_fast.serve.config_pbtxt import Column, render
from t4r_fast.serve.recommender import Recommender, check_top_k, read_schema, served_length
from t4r_fast.version import __version__

FORMAT = "t4r_fast serving 1"
FORMS = ("events", "ragged", "padded")
# What a tensor of the events may hold; the first is the default, but ids follow their vocabulary.
_KINDS = {"time": ("STRING", "INT64", "FP64"), "price": ("FP64", "FP32")}
_ID_KINDS = ("STRING", "INT64")
_MODEL_PY = '''"""Served by t4r_fast, which the server's Python must have, or PYTHONPATH name."""

import os
import sys

# The backend's interpreter leaves PYTHONPATH out.
paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
sys.path[:0] = [path for path in paths if path and path not in sys.path]

from t4r_fast.serve.triton_model import TritonPythonModel  # noqa: E402, found by the path above

__all__ = ["TritonPythonModel"]
'''


def export(
    model: Model,
    workflow: Workflow | None,
    path: str | os.PathLike[str],
    name: str = "t4r_fast",
    *,
    sessions: str = "events",
    top_k: int = 20,
    exclude_seen: bool = False,
    all_scores: bool = False,
    types: Mapping[str, str] | None = None,
    length: int | None = None,
    max_batch_size: int | None = None,
    queue_delay_us: int = 1000,
    instances: int = 1,
    version: int = 1,
    overwrite: bool = False,
) -> Path:
    """Write <path>/<name>, a model of a Triton model repository; nothing in it is pickled.

    workflow      the fitted ETL workflow of the training data; None only where `sessions` are
                  encoded already: answers are then ids of the model's table
    sessions      "events": raw events, one tensor of shape (n, 1) per column of the workflow that
                  the model needs; "ragged": encoded sessions, `x__values` (n,) and `x__offsets`
                  (B + 1,) per column; "padded": encoded, (B, L) per column
    top_k         products per session, 1 to 128; the request parameter top_k overrides it
    exclude_seen  leave a session's own products out; the request parameter exclude_seen overrides
    all_scores    also an output `output`, (B, V): the scores of all items
    types         column of the events -> STRING, INT64 (ids, time), FP64 (time, price) or FP32
                  (price). Default: products, categories and brands as they were when the workflow
                  was fitted, FP64 prices, and text for session and time; a time as text may be
                  a number
    length        see Recommender
    max_batch_size  of the requests that the server joins: events, or padded sessions; default 65536
                  events or 1024 sessions. Ragged requests are not joined
    queue_delay_us  how long a request may wait for others, microseconds
    instances     processes that serve the model
    overwrite     replace <path>/<name>
    returns       <path>/<name>

    Outputs, a row per session: `session` (events alone), `items` and `scores`; without a workflow
    `item_ids` and `item_id_scores`. Padding, missing and unknown products are never among them;
    where fewer are left, items are "" or -1 and scores -inf.
    Raises InputError on arguments that do not fit, and when model and workflow do not.
    Replaces nvtabular.inference.triton.export_pytorch_ensemble.
    """
    target = _checked(path, name, sessions, workflow, top_k, version, instances, overwrite)
    default = {"events": 65536, "padded": 1024, "ragged": 0}[sessions]
    if max_batch_size is None:
        max_batch_size = default
    elif max_batch_size < 1 or sessions == "ragged":
        raise InputError(
            "export: max_batch_size must be at least 1, and ragged sessions cannot be joined: leave"
            f" it out there; got {max_batch_size}"
        )
    served = None if workflow is None else Recommender(model, workflow, length)
    if length is None:
        length = served_length(model, workflow) if served is None else served.length
    if sessions == "events" and served is not None:
        inputs = _event_columns(served.fitted, dict(types or {}))
    elif types:
        raise InputError("export: types are of the events; encoded sessions have the model's")
    else:
        inputs = _encoded_columns(model, ragged=sessions == "ragged")
    outputs = _outputs(served, sessions, bool(max_batch_size), all_scores)
    settings = {
        "format": FORMAT,
        "t4r_fast": __version__,
        "sessions": sessions,
        "length": length,
        "top_k": top_k,
        "exclude_seen": exclude_seen,
        "inputs": {c.name: c.kind for c in inputs},
        "outputs": {c.name: c.kind for c in outputs},
        "join": not _mixes_sessions(model, length),
    }
    partial = target.with_name(f".{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    at = partial / str(version)
    at.mkdir(parents=True)
    model.save(at / "model")
    if served is not None:
        served.fitted.save(at / "workflow")
    (at / "model.py").write_text(_MODEL_PY, encoding="utf-8")
    (at / "serving.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    warmup = _write_warmup(partial, inputs, _warm_data(served, model, inputs, sessions))
    text = render(
        name,
        inputs,
        outputs,
        max_batch_size=max_batch_size,
        queue_delay_us=queue_delay_us,
        instances=instances,
        warmup=warmup,
    )
    (partial / "config.pbtxt").write_text(text, encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    return target


def _checked(
    path: str | os.PathLike[str],
    name: str,
    sessions: str,
    workflow: Workflow | None,
    top_k: int,
    version: int,
    instances: int,
    overwrite: bool,
) -> Path:
    if sessions not in FORMS:
        raise InputError(f"export: sessions must be one of {', '.join(FORMS)}; got {sessions!r}")
    if workflow is None and sessions == "events":
        raise InputError(
            "export: raw events need a workflow; give it, or sessions='ragged' or 'padded'"
        )
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise InputError(f"export: name must be letters, digits, '_', '-' and '.'; got {name!r}")
    for what, value in (("version", version), ("instances", instances)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"export: {what} must be a whole number from 1; got {value!r}")
    check_top_k(top_k, "export: ")
    target = Path(path) / name
    if target.exists() and not overwrite:
        raise InputError(f"export: {target} is there already; give overwrite=True, or another name")
    return target


def _event_columns(workflow: Workflow, types: dict[str, str]) -> list[Column]:
    columns = []
    for role, column in workflow.columns.items():
        kinds = _KINDS.get(role, _ID_KINDS)
        kind = kinds[0]
        if (
            role in workflow.vocabularies
            and workflow.vocabularies[role]["value"].dtype.is_integer()
        ):
            kind = "INT64"
        kind = types.pop(column, kind)
        if kind not in kinds:
            raise InputError(
                f"export: types: column {column!r} ({role}) must be one of {', '.join(kinds)};"
                f" got {kind!r}"
            )
        columns.append(Column(column, kind, (1,)))
    if types:
        names = ", ".join(workflow.columns.values())
        raise InputError(f"export: types: {sorted(types)} are no columns; the model reads {names}")
    return columns


def _encoded_columns(model: Model, ragged: bool) -> list[Column]:
    columns = []
    for column in read_schema(model):
        kind = "FP32" if column.type == "FLOAT" else "INT64"
        if ragged:
            columns.append(Column(f"{column.name}__values", kind, (-1,)))
            columns.append(Column(f"{column.name}__offsets", "INT32", (-1,)))
        else:
            columns.append(Column(column.name, kind, (-1,), of_any_length=True))
    return columns


def _outputs(
    served: Recommender | None, sessions: str, batched: bool, all_scores: bool
) -> list[Column]:
    dims = (-1,) if batched else (-1, -1)
    if served is None:
        columns = [Column("item_ids", "INT64", dims), Column("item_id_scores", "FP32", dims)]
    else:
        whole = served.fitted.vocabularies["item"]["value"].dtype.is_integer()
        columns = [Column("items", "INT64" if whole else "STRING", dims)]
        columns.append(Column("scores", "FP32", dims))
    if sessions == "events":
        columns.insert(0, Column("session", "STRING", (1,)))
    return [*columns, Column("output", "FP32", dims)] if all_scores else columns


def _mixes_sessions(model: Model, length: int) -> bool:
    """Whether a session's answer depends on the others of its batch, as the printed GRU's does."""
    rows = dict(tables(model))
    draw = torch.Generator().manual_seed(0)

    def column(name: str, is_float: bool) -> torch.Tensor:
        if is_float:
            return torch.rand(3, length, generator=draw)
        return torch.randint(1, rows[name].weight.shape[0], (3, length), generator=draw)

    batch = {c.name: column(c.name, c.type == "FLOAT") for c in read_schema(model)}
    k = min(MAX_K, len(next_item_task(model).next_item.items))
    together = recommend(model, batch, k, None, None)[0][-1]
    alone = recommend(model, {n: v[-1:] for n, v in batch.items()}, k, None, None)[0][0]
    finite = torch.isfinite(together) & torch.isfinite(alone)
    scale = together[finite].abs().max() if finite.any() else 1.0
    mixes = bool((together - alone)[finite].abs().max() > 1e-3 * scale) if finite.any() else False
    if mixes:
        warn_once(
            "export: join requests",
            "a session's scores depend on the other sessions of its batch, as in the tutorial's"
            " printed GRU; the server answers each request by itself",
        )
    return mixes


def _warm_data(
    served: Recommender | None, model: Model, inputs: list[Column], sessions: str
) -> dict[str, np.ndarray]:
    """A request of one session: one event, or two places of encoded columns."""
    values: dict[str, np.ndarray] = {}
    if sessions != "events" or served is None:
        for column in inputs:
            if column.name.endswith("__offsets") and sessions == "ragged":
                values[column.name] = np.array([0, 2])
            else:
                values[column.name] = np.ones(2)
        return values
    roles = {column: role for role, column in served.columns.items()}
    numbers = {"session": 1, "time": 1_569_888_000, "price": 1.0}
    for column in inputs:
        role = roles[column.name]
        if role in numbers:
            values[column.name] = np.array([numbers[role]])
        else:
            values[column.name] = served.fitted.vocabularies[role]["value"].head(1).to_numpy()
    return values


def _write_warmup(
    folder: Path, inputs: list[Column], values: dict[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """Write the request's data; returns the dims of each input."""
    (folder / "warmup").mkdir()
    dims: dict[str, tuple[int, ...]] = {}
    for place, column in enumerate(inputs):
        data = values[column.name]
        if column.kind == "STRING":
            texts = [str(value).encode() for value in data.tolist()]
            raw = b"".join(len(t).to_bytes(4, "little") + t for t in texts)
        else:
            kinds = {"INT64": "<i8", "INT32": "<i4", "FP32": "<f4", "FP64": "<f8"}
            raw = data.astype(kinds[column.kind]).tobytes()
        (folder / "warmup" / f"input_{place}").write_bytes(raw)
        dims[column.name] = (len(data),)
    return dims

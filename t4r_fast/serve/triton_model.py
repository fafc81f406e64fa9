"""What a model repository of t4r_fast.serve.export runs inside Triton's Python backend."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from t4r_fast.compat.torch.model.recommending import check_inputs
from t4r_fast.compat.torch.padding import model_padding, pad_batch
from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow
from t4r_fast.model.store import load_model
from t4r_fast.serve.recommender import Recommender, check_top_k

LOG = logging.getLogger("t4r_fast")
_DTYPES = {"INT64": np.int64, "FP32": np.float32}


class TritonPythonModel:
    """The interface that the Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the model and the workflow of the version's folder."""
        # Only the server's processes have this module.
        import triton_python_backend_utils as backend

        self._backend = backend
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((folder / "serving.json").read_text(encoding="utf-8"))
        self._form, self._join = settings["sessions"], settings["join"]
        self._inputs, self._outputs = settings["inputs"], settings["outputs"]
        self._top_k, self._exclude_seen = settings["top_k"], settings["exclude_seen"]
        workflow = folder / "workflow"
        self._recommender = Recommender(
            load_model(folder / "model"),
            Workflow.load(workflow) if workflow.is_dir() else None,
            settings["length"],
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests that the server joined; a bad one gets an error of its own."""
        responses: list[Any] = [None] * len(requests)
        batches: dict[Any, list[tuple[int, list | None, dict[str, torch.Tensor], int]]] = {}
        for place, request in enumerate(requests):
            try:
                top_k, exclude_seen = self._parameters(request)
                keys, inputs = self._sessions(request)
                check_inputs(self._recommender.model, inputs)
            except Exception as e:
                responses[place] = self._error(e)
                continue
            batch = exclude_seen if self._join else (exclude_seen, place)
            batches.setdefault(batch, []).append((place, keys, inputs, top_k))
        for batch, parts in batches.items():
            exclude_seen = batch if self._join else batch[0]
            try:
                answers = self._answered(requests, parts, exclude_seen)
            except Exception as e:
                answers = {place: self._error(e) for place, *_ in parts}
            for place, answer in answers.items():
                responses[place] = answer
        return responses

    def _error(self, error: Exception) -> Any:
        if isinstance(error, (InputError, ValueError, TypeError)):
            text = str(error)
        else:
            LOG.exception("t4r_fast: a request failed")
            text = f"{type(error).__name__}: {error}"
        return self._backend.InferenceResponse(error=self._backend.TritonError(text))

    def _parameters(self, request: Any) -> tuple[int, bool]:
        given = json.loads(request.parameters() or "{}")
        top_k = given.get("top_k", self._top_k)
        check_top_k(top_k)
        exclude_seen = given.get("exclude_seen", self._exclude_seen)
        if not isinstance(exclude_seen, bool):
            raise InputError(f"exclude_seen must be true or false; got {exclude_seen!r}")
        return top_k, exclude_seen

    # -- what came -------------------------------------------------------------------------------

    def _sessions(self, request: Any) -> tuple[list | None, dict[str, torch.Tensor]]:
        arrays = {}
        for name in self._inputs:
            tensor = self._backend.get_input_tensor_by_name(request, name)
            if tensor is None:
                raise InputError(f"the request has no input {name!r}")
            arrays[name] = tensor.as_numpy()
        if self._form == "events":
            return self._recommender.encode(self._events(arrays))
        if self._form == "ragged":
            return None, self._ragged(arrays)
        return None, self._padded(arrays)

    def _events(self, arrays: dict[str, np.ndarray]) -> pl.DataFrame:
        columns = []
        for name, kind in self._inputs.items():
            values = arrays[name].reshape(-1)
            if kind == "STRING":
                columns.append(pl.Series(name, _texts(name, values), dtype=pl.String))
            else:
                columns.append(pl.Series(name, values))
        return pl.DataFrame(columns)

    def _ragged(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        first = None
        inputs = {}
        for column in self._recommender.schema.column_names:
            values = arrays[f"{column}__values"].reshape(-1)
            offsets = arrays[f"{column}__offsets"].reshape(-1).astype(np.int64)
            if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(values):
                raise InputError(
                    f"{column}__offsets must begin with 0 and end with the number of values,"
                    f" {len(values)}; got {offsets[:8].tolist()}"
                )
            if (np.diff(offsets) < 0).any():
                raise InputError(f"{column}__offsets must not fall; got {offsets[:8].tolist()}")
            first = offsets if first is None else first
            if not np.array_equal(first, offsets):
                raise InputError(f"{column}__offsets differ from those of the first column")
            inputs[f"{column}__values"] = torch.from_numpy(values.copy())
            inputs[f"{column}__offsets"] = torch.from_numpy(offsets)
        return self._at_length(inputs)

    def _padded(self, arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Sessions of any width; the newest `length` items of each stay."""
        item = self._recommender.schema.item_id_column_name
        pad = model_padding(self._recommender.model).get(item, 0)
        present = arrays[item] != pad
        counts = present.sum(1)
        if (present[:, 1:] & ~present[:, :-1]).any():
            raise InputError(f"{item}: pads ({pad}) must stand behind the items of a session")
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        inputs = {}
        for column, values in arrays.items():
            if values.shape != present.shape:
                raise InputError(
                    f"{column} must have the shape of {item}, {present.shape}; got {values.shape}"
                )
            inputs[f"{column}__values"] = torch.from_numpy(values[present])
            inputs[f"{column}__offsets"] = offsets
        return self._at_length(inputs)

    def _at_length(self, ragged: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        served = self._recommender
        lengths = dict.fromkeys(served.schema.column_names, served.length)
        return pad_batch(ragged, lengths, True, model_padding(served.model))

    # -- what goes -------------------------------------------------------------------------------

    def _answered(
        self, requests: list[Any], parts: list[tuple], exclude_seen: bool
    ) -> dict[int, Any]:
        """Place -> response of requests with the same options, by one call of the model."""
        names = parts[0][2]
        inputs = {n: torch.cat([part[2][n] for part in parts]) for n in names}
        most = max(top_k for *_, top_k in parts)
        scores, ids = self._recommender.answer(inputs, most, exclude_seen)
        every = None
        wanted = [set(requests[place].requested_output_names()) for place, *_ in parts]
        if "output" in self._outputs and any("output" in names for names in wanted):
            every = self._recommender.scores(inputs)
        answers, start = {}, 0
        for (place, keys, part, top_k), names in zip(parts, wanted):
            end = start + len(next(iter(part.values())))
            found = {"session": keys, "ids": ids[start:end, :top_k]}
            found["scores"] = scores[start:end, :top_k]
            found["output"] = None if every is None else every[start:end]
            tensors = [
                self._backend.Tensor(name, self._array(name, found))
                for name in self._outputs
                if name in names
            ]
            answers[place] = self._backend.InferenceResponse(output_tensors=tensors)
            start = end
        return answers

    def _array(self, name: str, found: dict[str, Any]) -> np.ndarray:
        if name == "session":
            return _bytes([[str(key)] for key in found["session"]])
        if name == "output":
            return found["output"]
        if name == "item_ids":
            return found["ids"]
        if name != "items":
            return np.ascontiguousarray(found["scores"])
        rows = self._recommender.products(found["ids"])
        width = found["ids"].shape[1]
        whole = self._outputs["items"] == "INT64"
        full = [row + [-1 if whole else ""] * (width - len(row)) for row in rows]
        return np.array(full, dtype=np.int64).reshape(-1, width) if whole else _bytes(full)


def _texts(name: str, values: np.ndarray) -> list[str]:
    try:
        return [v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist()]
    except UnicodeDecodeError as e:
        raise InputError(f"input {name!r} must be text in UTF-8: {e}") from e


def _bytes(rows: list[list[str]]) -> np.ndarray:
    return np.array([[value.encode() for value in row] for row in rows], dtype=np.object_)

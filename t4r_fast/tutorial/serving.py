"""What to do with a saved model: judge it on a window, or recommend items."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from t4r_fast.compat import compat_level
from t4r_fast.errors import InputError
from t4r_fast.tutorial.saved_model import SavedModel
from t4r_fast.tutorial.sessions import SPLITS, SessionData

# ids 0, 1 and 2 stand for padding, a missing item and an unknown item: nothing to recommend
FIRST_ITEM = 3
MAX_K = 128  # of item_topk


def evaluate(
    saved: SavedModel,
    data: SessionData,
    window: int,
    split: str = "valid",
    batch_size: int = 32,
) -> dict:
    """Loss and metrics of a saved model on the last items of one file's sessions.

    returns  {"loss", "metrics": {"ndcg_at_10", ...}, "sessions", "seconds"}
    """
    from t4r_fast.config.trainer import T4RecTrainingArguments
    from t4r_fast.torch import Trainer

    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    _same_items(saved, data)
    path, rows = data.file(window, split), data.rows(window, split)
    if not rows:
        raise InputError(f"{path}: holds no sessions")
    with compat_level(saved.config["compat"]):
        arguments = T4RecTrainingArguments(
            output_dir=str(data.folder),
            max_sequence_length=saved.max_sequence_length,
            data_loader_engine="parquet",
            per_device_eval_batch_size=batch_size,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(
            model=saved.model,
            args=arguments,
            schema=saved.schema,
            eval_dataset_or_path=str(path),
            compute_metrics=True,
        )
        from transformers import PrinterCallback

        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        found = trainer.evaluate(metric_key_prefix="eval")
        seconds = time.perf_counter() - start
    return {
        "loss": float(next(v for k, v in found.items() if k.endswith("/loss"))),
        "metrics": {k.split("/")[-1]: float(v) for k, v in saved.model.compute_metrics().items()},
        "sessions": rows,
        "seconds": seconds,
    }


def _same_items(saved: SavedModel, data: SessionData) -> None:
    item = saved.schema.item_id_column_name
    mine = saved.schema[item].cardinality
    if item != data.item_column or mine != data.items:
        raise InputError(
            f"the model was trained on {mine} ids in {item!r} and {data.schema_path} has"
            f" {data.items} in {data.item_column!r}: they are of different ETL runs"
        )


def recommend(
    saved: SavedModel,
    sessions: pl.DataFrame,
    k: int = 10,
    *,
    exclude_seen: bool = False,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best next items of each session.

    sessions      a list column per feature of the model, in the ETL's encoding
    k             >= 1; with what may have to be skipped (3 ids, and with exclude_seen the session)
                  at most 128
    exclude_seen  leave out the items of the session itself
    returns       ids (B, k) int64 and scores (B, k) float32, best first, ties by lowest id; a
                  catalogue with fewer than k items left fills up with id 0 and score -inf

    Padding, missing and unknown items are never recommended.
    Raises InputError on a missing column or an empty session.
    """
    import torch

    length = saved.max_sequence_length
    extra = FIRST_ITEM + (length if exclude_seen else 0)
    if not 1 <= k <= MAX_K - extra:
        raise InputError(f"k must lie between 1 and {MAX_K - extra}; got {k}")
    columns = {c.name: c for c in saved.schema}
    missing = [name for name in columns if name not in sessions.columns]
    if missing:
        raise InputError(f"sessions lack the columns {missing}, which the model reads")
    item = saved.schema.item_id_column_name
    empty = np.flatnonzero(sessions[item].list.len().fill_null(0).to_numpy() == 0)
    if empty.size:
        raise InputError(f"session {empty[0]} (counted from 0) has no items")
    vocabulary = columns[item].cardinality
    saved.model.top_k = min(k + extra, vocabulary)
    ids, scores = [], []
    for start in range(0, sessions.height, batch_size):
        part = sessions.slice(start, batch_size)
        inputs = {
            name: torch.from_numpy(padded(part[name], length, column.type == "FLOAT"))
            for name, column in columns.items()
        }
        with torch.no_grad():
            found_scores, found_ids = saved.model(inputs)
        seen = inputs[item].numpy() if exclude_seen else None
        best = _allowed(found_ids.numpy(), found_scores.float().numpy(), seen, k)
        ids.append(best[0])
        scores.append(best[1])
    return np.concatenate(ids), np.concatenate(scores)


def _allowed(
    ids: np.ndarray, scores: np.ndarray, seen: np.ndarray | None, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k columns that are items, and not seen, in the order they came."""
    allowed = ids >= FIRST_ITEM
    if seen is not None:
        allowed &= ~(ids[:, :, None] == seen[:, None, :]).any(-1)
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(allowed, order, 1)
    ids = np.where(kept, np.take_along_axis(ids, order, 1), 0)
    scores = np.where(kept, np.take_along_axis(scores, order, 1), -np.inf)
    short = k - ids.shape[1]
    if short > 0:
        ids = np.pad(ids, ((0, 0), (0, short)))
        scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
    return ids, scores


def padded(lists: pl.Series, length: int, is_float: bool) -> np.ndarray:
    """(B, length) of a list column: the last `length` values of each, pads at the right."""
    tails = lists.list.tail(length)
    counts = tails.list.len().fill_null(0).to_numpy().astype(np.int64)
    kind = np.float32 if is_float else np.int64
    out = np.zeros((len(lists), length), dtype=kind)
    values = tails.explode(empty_as_null=False, keep_nulls=False).to_numpy()
    out[np.arange(length)[None, :] < counts[:, None]] = values.astype(kind)
    return out


def sessions_of_items(saved: SavedModel, workflow, values: Sequence[str]) -> pl.DataFrame:
    """One session of these item values, for a model that reads nothing but items.

    Raises InputError when the model needs side features, or knows none of the items.
    """
    item = saved.schema.item_id_column_name
    others = [c for c in saved.schema.column_names if c != item]
    if others:
        raise InputError(
            f"model {saved.name} also reads {', '.join(others)}: give whole events with --sessions"
        )
    ids = workflow.item_ids(values)
    if not (ids >= FIRST_ITEM).any():
        raise InputError(
            f"the workflow knows none of the items {', '.join(map(str, values))}; items are"
            f" named as in the events' column {workflow.columns['item']!r}"
        )
    return pl.DataFrame({item: pl.Series([ids.tolist()], dtype=pl.List(pl.Int64))})


def sessions_of_file(saved: SavedModel, workflow, path: str | os.PathLike[str]) -> pl.DataFrame:
    """Sessions of a parquet file of the ETL as they are, or of events through the workflow."""
    item = saved.schema.item_id_column_name
    if Path(path).suffix == ".parquet" and Path(path).is_file():
        try:
            columns = pl.read_parquet_schema(path)
        except pl.exceptions.PolarsError as e:
            raise InputError(f"{path}: not a readable parquet file ({e})") from e
        if item in columns:
            return pl.read_parquet(path)
    return workflow.transform(path, min_length=1)

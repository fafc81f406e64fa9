"""What a saved model is asked: the sessions of a window, of some items, of a file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from t4r_fast.compat import compat_level
from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow
from t4r_fast.etl.features import FIRST_ID
from t4r_fast.train.saved_model import SavedModel
from t4r_fast.train.sessions import SPLITS, SessionData


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
    from t4r_fast.compat.config.trainer import T4RecTrainingArguments
    from t4r_fast.compat.torch import Trainer
    from t4r_fast.compat.torch.model.recommending import next_item_task

    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    next_item_task(saved.model, "evaluate")
    if len(saved.model.prediction_tasks) > 1:
        raise InputError(
            "evaluate: the model has several tasks, and files of sessions the target of one, the"
            " next item; Model.evaluate takes batches with the targets of all"
        )
    _same_items(saved, data)
    path, rows = data.file(window, split), data.rows(window, split)
    if not rows:
        raise InputError(f"{path}: holds no sessions")
    with compat_level(saved.compat):
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


def sessions_of_items(saved: SavedModel, workflow: Workflow, values: Sequence[str]) -> pl.DataFrame:
    """One session of these item values, for a model that reads nothing but items.

    Raises InputError when the model needs side features, or knows none of the items.
    """
    item = saved.schema.item_id_column_name
    others = [c for c in saved.schema.column_names if c != item]
    if others:
        raise InputError(
            f"the model also reads {', '.join(others)}: give whole events with --sessions"
        )
    ids = workflow.item_ids(values)
    if not (ids >= FIRST_ID).any():
        raise InputError(
            f"the workflow knows none of the items {', '.join(map(str, values))}; items are"
            f" named as in the events' column {workflow.columns['item']!r}"
        )
    return pl.DataFrame({item: pl.Series([ids.tolist()], dtype=pl.List(pl.Int64))})


def sessions_of_file(
    saved: SavedModel, workflow: Workflow, path: str | os.PathLike[str]
) -> pl.DataFrame:
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

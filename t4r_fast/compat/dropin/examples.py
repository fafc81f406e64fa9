"""What the reference's examples share: the loop over days, and printing."""

from __future__ import annotations

import gc
import glob
import os
from pathlib import Path
from typing import Any

import torch

from t4r_fast.errors import InputError


def fit_and_evaluate(
    trainer: Any, start_time_index: int, end_time_index: int, input_dir: str | os.PathLike[str]
) -> dict[str, list[float]]:
    """Train on each window, evaluate on the one after it.

    trainer     a Trainer; keeps its model and optimizer from window to window
    start_time_index, end_time_index   first and last window to train on, both included
    input_dir   holds <window>/train.parquet and <window>/valid.parquet
    returns     "indexed_by_time_<metric>" -> its value for each window, in order; "_at_" is "@"

    Raises InputError when a window's file is not there.
    Replaces transformers4rec.torch.utils.examples_utils.fit_and_evaluate.
    """
    by_window: dict[str, list[float]] = {}
    for window in range(start_time_index, end_time_index + 1):
        trainer.train_dataset_or_path = _files(input_dir, window, "train")
        trainer.eval_dataset_or_path = _files(input_dir, window + 1, "valid")
        print(f"\n***** Launch training for day {window}: *****")
        trainer.reset_lr_scheduler()
        trainer.train()
        found = trainer.evaluate(metric_key_prefix="eval")
        print(f"\n***** Evaluation results for day {window + 1}:*****\n")
        for key in sorted(k for k in found if "at_" in k):
            name = key.replace("_at_", "@")
            print(f" {name} = {found[key]}")
            by_window.setdefault(f"indexed_by_time_{name}", []).append(found[key])
        wipe_memory()
    return by_window


def _files(folder: str | os.PathLike[str], window: int, part: str) -> list[str]:
    pattern = os.path.join(folder, str(window), f"{part}.parquet")
    found = glob.glob(pattern)
    if not found:
        raise InputError(f"fit_and_evaluate: there is no {pattern}; check the range of windows")
    return found


def wipe_memory() -> None:
    """Collect garbage and give cached GPU memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def list_files(startpath: str | os.PathLike[str]) -> None:
    """Print the tree of folders and files below a folder."""
    start = Path(startpath)
    for folder, folders, files in os.walk(start):
        folders.sort()
        depth = len(Path(folder).relative_to(start).parts)
        print(f"{' ' * 4 * depth}{Path(folder).name}/")
        for file in sorted(files):
            print(f"{' ' * 4 * (depth + 1)}{file}")


def visualize_response(
    batch: Any, response: Any, top_k: int, session_col: str = "session_id"
) -> None:
    """Print the best items of each session of a served batch, best first.

    batch     the events that were sent, a data frame with the column session_col
    response  what Triton gave; as_numpy("output") are the scores, (sessions, items)
    top_k     how many items to print, at most as many as there are

    Sessions stand in the order of their first event. The reference prints the items in any order.
    Replaces transformers4rec.torch.utils.examples_utils.visualize_response.
    """
    scores = torch.as_tensor(response.as_numpy("output"))
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    for session, items in zip(dict.fromkeys(batch[session_col].to_list()), best.tolist()):
        print(
            f"- Top-{top_k} predictions for session `{session}`: {' || '.join(map(str, items))}\n"
        )

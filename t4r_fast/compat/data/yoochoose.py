"""The clicks of the YooChoose challenge (RecSys 2015): session, time, item, category."""

from __future__ import annotations

import os

import polars as pl

from t4r_fast.compat.data.preprocessing import (
    add_item_first_seen_col_to_df,
    remove_consecutive_interactions,
)
from t4r_fast.errors import InputError

_COLUMNS = {
    "session_id": pl.Int64,
    "timestamp": pl.String,
    "item_id": pl.Int64,
    "category": pl.String,
}


def download(output_path: str) -> str:
    """Fetch the data set from Kaggle into a folder and unpack it there; returns the folder.

    Needs the package `kaggle` and your own key for it (~/.kaggle/kaggle.json); Kaggle's terms for
    the data set hold. Raises RuntimeError where the package is missing.
    Replaces transformers4rec.data.yoochoose.download.
    """
    try:
        from kaggle import api
    except ImportError as e:
        raise RuntimeError(
            "yoochoose.download: the package kaggle is not installed; pip install kaggle, or fetch"
            " yoochoose-clicks.dat by hand"
        ) from e
    api.authenticate()
    api.dataset_download_files("chadgostopp/recsys-challenge-2015", path=output_path, unzip=True)
    return output_path


def process_clicks(data_path: str | os.PathLike[str], device: str = "gpu") -> pl.DataFrame:
    """The clicks in order of session and time, without an item that is clicked twice in a row.

    data_path  yoochoose-clicks.dat: lines of session, time in ISO 8601, item, category; no header
    device     no effect: this runs on the CPU
    returns    session_id and item_id int64; timestamp and item_ts_first, when the item was first
               clicked, in nanoseconds, UTC; category a string, "0" where it is unknown

    A Polars frame; its to_pandas() is what the reference gives with device="cpu", but for
    categories, which are numbers there as long as all of them are. Raises InputError when the file
    is missing or a line is no click. Replaces transformers4rec.data.yoochoose.process_clicks.
    """
    try:
        clicks = pl.read_csv(data_path, has_header=False, schema=_COLUMNS).with_columns(
            pl.col("timestamp").str.to_datetime(time_unit="ns", time_zone="UTC")
        )
    except (OSError, pl.exceptions.PolarsError) as e:
        raise InputError(f"process_clicks: cannot read {data_path} as clicks: {e}") from e
    return add_item_first_seen_col_to_df(remove_consecutive_interactions(clicks))

"""The part of NVTabular that the tutorial uses: where its parquet files are, and its workflow."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from t4r_fast.compat import warn_once
from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow
from t4r_fast.train.row_blocks import parquet_files

__all__ = ["Dataset", "Workflow"]

# They steer how Dask splits the data.
_WITHOUT_EFFECT = {"client", "cpu", "npartitions", "part_mem_fraction", "part_size"}


class Dataset:
    """Parquet files of sessions, for TorchAsyncItr or for trainer.train_dataset_or_path.

    path_or_source  a path, a pattern, a folder, or several of these
    engine          "parquet", or None for the same
    options         NVTabular's of the size of partitions: no effect, with a warning

    Raises InputError for paths that are not there and for another engine, TypeError for tables and
    other options. Takes the place of nvtabular.Dataset where NVTabular is not installed.
    """

    def __init__(self, path_or_source: Any, engine: str | None = None, **options: Any) -> None:
        if engine not in (None, "parquet"):
            raise InputError(
                f"nvtabular.Dataset: engine must be 'parquet'; got {engine!r}. t4r-fast etl makes"
                " parquet files of CSV"
            )
        for name in options:
            if name not in _WITHOUT_EFFECT:
                raise TypeError(
                    f"nvtabular.Dataset: {name} is not supported by t4r_fast; install NVTabular"
                    " for it"
                )
            warn_once(f"nvtabular.Dataset {name}", f"{name} has no effect")
        if isinstance(path_or_source, pa.Table) or hasattr(path_or_source, "columns"):
            raise TypeError(
                "nvtabular.Dataset: give parquet files;"
                f" got a {type(path_or_source).__name__}. t4r_fast.torch.ParquetDataLoader takes"
                " Arrow and Polars tables"
            )
        self.paths = parquet_files(path_or_source)

    @property
    def num_rows(self) -> int:
        """Sessions in the files."""
        return sum(pq.read_metadata(path).num_rows for path in self.paths)


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"t4r_fast.dropin answers Dataset and Workflow of nvtabular, not {name!r};"
        " install NVTabular for it"
    )

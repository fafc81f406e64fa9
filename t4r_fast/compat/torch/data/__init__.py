"""Data loaders of the drop-in layer, by the engine names of the reference."""

from __future__ import annotations

from t4r_fast.compat.data import (
    music_streaming_testing_data,
    tabular_sequence_testing_data,
    tabular_testing_data,
)
from t4r_fast.compat.torch.data.engines import DLDataLoader, T4RecDataLoader, dataloader_registry
from t4r_fast.compat.torch.data.merlin_loader import MerlinDataLoader, NVTabularDataLoader
from t4r_fast.compat.torch.data.pyarrow_loader import (
    ParquetDataset,
    PyarrowDataLoader,
    ShuffleDataset,
)
from t4r_fast.merlin_schema import to_core_schema
from t4r_fast.train.loader import ParquetDataLoader, SessionBatches

__all__ = [
    "DLDataLoader",
    "MerlinDataLoader",
    "NVTabularDataLoader",
    "ParquetDataLoader",
    "ParquetDataset",
    "PyarrowDataLoader",
    "SessionBatches",
    "ShuffleDataset",
    "T4RecDataLoader",
    "dataloader_registry",
    "music_streaming_testing_data",
    "tabular_sequence_testing_data",
    "tabular_testing_data",
    "to_core_schema",
]

dataloader_registry.register("parquet")(ParquetDataLoader)

"""Data loaders of the drop-in layer, by the engine names of the reference."""

from __future__ import annotations

from t4r_fast.data import (
    music_streaming_testing_data,
    tabular_sequence_testing_data,
    tabular_testing_data,
)
from t4r_fast.errors import InputError
from t4r_fast.torch.data.loader import ParquetDataLoader, SessionBatches

__all__ = [
    "DATA_LOADER_ENGINES",
    "MerlinDataLoader",
    "NVTabularDataLoader",
    "ParquetDataLoader",
    "PyarrowDataLoader",
    "SessionBatches",
    "T4RecDataLoader",
    "music_streaming_testing_data",
    "tabular_sequence_testing_data",
    "tabular_testing_data",
]

# One loader answers every name of the reference's: none of its engines is needed.
DATA_LOADER_ENGINES: dict[str, type[ParquetDataLoader]] = dict.fromkeys(
    (
        "parquet",
        "merlin",
        "merlin_dataloader",
        "nvtabular",
        "nvtabular_dataloader",
        "pyarrow",
        "pyarrow_builder",
    ),
    ParquetDataLoader,
)

MerlinDataLoader = NVTabularDataLoader = PyarrowDataLoader = ParquetDataLoader


class T4RecDataLoader:
    """Finds a data loader by the name of its engine."""

    @classmethod
    def parse(cls, class_or_str: str | type) -> type:
        """The loader class of an engine: "parquet" or a name of the reference's engines.

        A class is returned as it is. Raises InputError for a name that is not known.
        """
        if not isinstance(class_or_str, str):
            return class_or_str
        if class_or_str not in DATA_LOADER_ENGINES:
            raise InputError(
                f"data_loader_engine must be one of {', '.join(DATA_LOADER_ENGINES)};"
                f" got {class_or_str!r}"
            )
        return DATA_LOADER_ENGINES[class_or_str]

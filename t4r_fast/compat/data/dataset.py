"""A schema, and a parquet file beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from t4r_fast.compat.data.random_data import random_data_from_schema
from t4r_fast.merlin_schema import to_core_schema
from t4r_fast.schema import Schema


class Dataset:
    """Random batches for the schema in a file.

    schema_path  .pb or .pbtxt for the text form of protocol buffers, else JSON
    """

    def __init__(self, schema_path: str | os.PathLike[str]) -> None:
        self.schema_path = str(schema_path)
        as_text = self.schema_path.endswith((".pb", ".pbtxt"))
        read = Schema().from_proto_text if as_text else Schema().from_json
        self._schema = read(Path(schema_path))

    @property
    def schema(self) -> Schema:
        return self._schema

    @property
    def merlin_schema(self) -> Any:
        """The schema as merlin-core's; see to_core_schema."""
        return to_core_schema(self.schema)

    def torch_synthetic_data(
        self,
        num_rows: int = 100,
        min_session_length: int = 5,
        max_session_length: int = 20,
        device: torch.device | str | None = None,
        ragged: bool = False,
    ) -> dict[str, torch.Tensor]:
        """A batch of random values; see random_data_from_schema."""
        return random_data_from_schema(
            self.schema,
            num_rows=num_rows,
            min_session_length=min_session_length,
            max_session_length=max_session_length,
            device=device,
            ragged=ragged,
        )


class ParquetDataset(Dataset):
    """A folder with data and their schema; `path` is the data file.

    schema_path  in place of schema_file_name in the folder
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        parquet_file_name: str = "data.parquet",
        schema_file_name: str = "schema.json",
        schema_path: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(schema_path or os.path.join(dir, schema_file_name))
        self.path = os.path.join(dir, parquet_file_name)

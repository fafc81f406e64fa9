"""Data loaders by the names of their engines; users register their own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from t4r_fast.registry import Registry
from t4r_fast.schema import Schema

dataloader_registry = Registry("data_loader_engine")


class T4RecDataLoader:
    """A loader that the Trainer can make: it calls `from_schema`.

    @dataloader_registry.register("mine")
    class Mine(T4RecDataLoader): ...

    makes T4RecTrainingArguments(data_loader_engine="mine") take it. Batches are (inputs, targets),
    or inputs alone; `_batch_size` says how many sessions, `dataset` has a length.
    """

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        paths_or_dataset: Any,
        batch_size: int,
        max_sequence_length: int | None,
        **kwargs: Any,
    ) -> Any:
        """A loader of the schema's columns.

        kwargs  from the Trainer: drop_last, shuffle, shuffle_buffer_size, global_size and
                global_rank (numbers where this process reads its part alone, else None), device
        """
        raise NotImplementedError(f"{cls.__name__} does not say how: override from_schema")

    def set_dataset(self, paths_or_dataset: Any) -> None:
        """Set self.dataset, from paths or from a data set."""
        raise NotImplementedError(f"{type(self).__name__} does not say how: override set_dataset")

    @classmethod
    def parse(cls, class_or_str: str | type) -> type:
        """The loader class of an engine's name; a class as it is.

        Raises ValueError for a name that nobody registered.
        """
        return dataloader_registry.parse(class_or_str)


class DLDataLoader(DataLoader):
    """A DataLoader over something that gives whole batches itself.

    DLDataLoader(batches, batch_size=64, collate_fn=lambda samples: samples[0])

    batch_size  sessions in a batch, for the Trainer; the DataLoader takes one batch at a time
    args, options  those of torch's DataLoader

    `len` is that of the data set, the number of its batches. Raises TypeError without batch_size.
    Replaces transformers4rec.torch.utils.data_utils.DLDataLoader.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        if "batch_size" not in options:
            raise TypeError(
                "DLDataLoader: batch_size is missing; give the sessions of a batch by this name"
            )
        self._batch_size = options.pop("batch_size")
        super().__init__(*args, **options)

    @property
    def device(self) -> torch.device:
        """A GPU, where there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def __len__(self) -> int:
        return len(self.dataset)

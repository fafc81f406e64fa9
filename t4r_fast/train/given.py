"""Data loaders that a user brings, in the form the training loop of transformers takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset


def resumable(loader: Any) -> DataLoader:
    """The loader as a DataLoader, which the training loop can set to a batch inside an epoch."""
    return loader if isinstance(loader, DataLoader) else GivenLoader(loader)


class _GivenBatches(IterableDataset):
    def __init__(self, loader: Any) -> None:
        self.loader = loader
        if hasattr(loader, "set_epoch"):
            self.set_epoch = loader.set_epoch

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class GivenLoader(DataLoader):
    """A user's iterable of batches."""

    def __init__(self, loader: Any) -> None:
        super().__init__(_GivenBatches(loader), batch_size=None)
        self.loader = loader
        if hasattr(loader, "set_epoch"):
            self.set_epoch = loader.set_epoch

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

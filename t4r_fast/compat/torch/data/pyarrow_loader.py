"""The parquet loader under the name and with the arguments of the pyarrow one, and what that one
was made of: a data set of single sessions, and a buffer that shuffles any data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from t4r_fast.compat import get_compat, warn_once
from t4r_fast.compat.torch.data.engines import T4RecDataLoader, dataloader_registry
from t4r_fast.errors import InputError
from t4r_fast.schema import Schema, Tags
from t4r_fast.train.loader import TRUNCATE, ParquetDataLoader, with_effect
from t4r_fast.train.row_blocks import is_list, row_blocks, stored_schema
from t4r_fast.train.session_table import combined, ragged


class ParquetDataset(Dataset):
    """Sessions one by one: (inputs, targets), dicts of what stands in the columns.

    parquet_file               files, see ParquetDataLoader, or a table
    cols_to_read               columns, targets among them
    target_names               which of them are targets
    seq_features_len_pad_trim  length of every list: shorter ones are padded with 0
    truncate                   of longer ones "last": the newest items stay, "first": the oldest.
                               None: "last", at compat 0.1 "first"

    Lists are (L,) int64 or float32, other values NumPy scalars as stored. All is held in memory.
    Raises InputError for columns that are not there and target_names that are not read.
    Replaces transformers4rec.torch.utils.data_utils.ParquetDataset.
    """

    def __init__(
        self,
        parquet_file: Any,
        cols_to_read: list[str],
        target_names: list[str],
        seq_features_len_pad_trim: int,
        truncate: str | None = None,
    ) -> None:
        unread = [n for n in target_names if n not in cols_to_read]
        if unread:
            raise InputError(f"ParquetDataset: target_names {unread} must be in cols_to_read, too")
        if truncate not in (None, *TRUNCATE):
            raise InputError(
                f"ParquetDataset: truncate must be one of {TRUNCATE}; got {truncate!r}"
            )
        self.cols_to_read, self.target_names = list(cols_to_read), list(target_names)
        self.seq_features_len_pad_trim = seq_features_len_pad_trim
        newest = get_compat() != "0.1" if truncate is None else truncate == "last"
        self._newest = newest
        stored_schema(parquet_file, cols_to_read)
        self.data: pa.Table = pa.concat_tables(
            [b.read(self.cols_to_read) for b in row_blocks(parquet_file)]
        ).combine_chunks()
        self._columns = {n: _rows(self.data.column(n), n) for n in self.cols_to_read}

    def __len__(self) -> int:
        return self.data.num_rows

    def __getitem__(self, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"ParquetDataset: there are {len(self)} sessions; got index {index}")
        row = {
            n: self.pad_seq_column_if_needed(column(index % len(self)))
            for n, column in self._columns.items()
        }
        targets = {n: row.pop(n) for n in self.target_names}
        return row, targets

    def pad_seq_column_if_needed(self, values: Any) -> Any:
        """An array at the length of the lists, as int64 or float32; anything else as it is."""
        if not isinstance(values, np.ndarray):
            return values
        length = self.seq_features_len_pad_trim
        kept = values[-length:] if self._newest else values[:length]
        padded = np.zeros(length, np.float32 if values.dtype.kind == "f" else np.int64)
        padded[: len(kept)] = kept
        return padded


def _rows(column: pa.ChunkedArray, name: str) -> Callable[[int], Any]:
    """From the number of a row to its value: an array, or a scalar."""
    array = combined(column)
    if not is_list(array.type):
        scalars = array.to_numpy(zero_copy_only=False)
        return lambda row: scalars[row]
    starts, lengths, flat = ragged(array, f"ParquetDataset: column {name!r}", 0)
    values = flat.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "iufb":
        raise InputError(f"ParquetDataset: column {name!r} holds {array.type}, no lists of numbers")
    return lambda row: values[starts[row] : starts[row] + lengths[row]]


class ShuffleDataset(IterableDataset):
    """The samples of another data set in a random order, through a buffer.

    dataset      with indices and a length, or an iterable, the same in every worker
    buffer_size  samples held at a time, >= 1; as many as there are: any order is equally likely
    seed         with the number of the pass it fixes the order; PyTorch's random state is not used

    Each worker of a DataLoader gives its own part of the samples.
    Replaces transformers4rec.torch.utils.data_utils.ShuffleDataset, which gives nothing.
    """

    def __init__(self, dataset: Any, buffer_size: int, seed: int = 0) -> None:
        if buffer_size < 1:
            raise InputError(f"ShuffleDataset: buffer_size must be >= 1; got {buffer_size}")
        super().__init__()
        self.dataset, self.buffer_size, self.seed = dataset, buffer_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is the `epoch`-th."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Any]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        return self._shuffled(np.random.default_rng([self.seed, epoch]))

    def _shuffled(self, rng: np.random.Generator) -> Iterator[Any]:
        held: list[Any] = []
        for sample in self._own():
            if len(held) < self.buffer_size:
                held.append(sample)
                continue
            at = int(rng.integers(self.buffer_size))
            yield held[at]
            held[at] = sample
        for at in rng.permutation(len(held)):
            yield held[at]

    def _own(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        by_index = hasattr(self.dataset, "__getitem__")
        if by_index and not isinstance(self.dataset, IterableDataset):
            return (self.dataset[i] for i in range(first, len(self.dataset), step))
        return (sample for n, sample in enumerate(self.dataset) if n % step == first)


@dataloader_registry.register_with_multiple_names("pyarrow", "pyarrow_builder")
class PyarrowDataLoader(T4RecDataLoader, ParquetDataLoader):
    """A ParquetDataLoader that is told its columns by name and gives targets as a dict.

    paths_or_dataset     parquet files, see ParquetDataLoader, or a ParquetDataset
    batch_size           sessions per batch
    max_sequence_length  width of every batch
    cols_to_read         columns, targets among them. None: all that are stored
    target_names         columns given as targets
    shuffle              a new order each epoch, also without a buffer
    shuffle_buffer_size  see ParquetDataLoader
    drop_last            leave out the last batch where it is not full
    schema               ranges of the ids, which are checked. None: the stored types alone
    options              further ones of ParquetDataLoader: truncate, padding_idx, prefetch, ...

    Batches are (inputs, targets), two dicts; at compat 0.1 inputs with the targets in it. Numbers
    are float32, also those that the reference gives as float64. num_workers and pin_memory have no
    effect. Unknown options raise TypeError, columns that are not there InputError.
    Replaces transformers4rec.torch.utils.data_utils.PyarrowDataLoader.
    """

    def __init__(
        self,
        paths_or_dataset: Any,
        batch_size: int,
        max_sequence_length: int,
        cols_to_read: list[str] | None = None,
        target_names: list[str] | None = None,
        shuffle: bool = False,
        shuffle_buffer_size: int = 0,
        num_workers: int = 1,
        pin_memory: bool = True,
        drop_last: bool = False,
        schema: Schema | None = None,
        **options: Any,
    ) -> None:
        for name, given, nothing in (
            ("num_workers", num_workers, 1),
            ("pin_memory", pin_memory, True),
        ):
            if given != nothing:
                warn_once(
                    f"PyarrowDataLoader {name}", f"{name} has no effect on the parquet loader"
                )
        self.paths_or_dataset = paths_or_dataset
        self.schema = schema
        self.set_dataset(cols_to_read, target_names)
        ParquetDataLoader.__init__(
            self,
            self.dataset,
            self.schema,
            batch_size,
            max_sequence_length,
            shuffle=shuffle,
            shuffle_buffer_size=shuffle_buffer_size,
            drop_last=drop_last,
            targets=self.target_names,
            **with_effect(options),
        )
        if self.dataset.pairs:
            self.dataset.collate = self._with_dict

    def set_dataset(self, cols_to_read: list[str] | None, target_names: list[str] | None) -> None:
        """Set self.dataset, what is read, from self.paths_or_dataset.

        The constructor calls it. A loader that is made keeps its data: a later call raises
        ValueError.
        """
        source = self.paths_or_dataset
        self.dataset = source.data if isinstance(source, ParquetDataset) else source
        known, names = self.schema, cols_to_read
        if known is not None and names is None:
            names = known.column_names
        stored = stored_schema(self.dataset, names) if known is None else known
        self.schema = stored if names is None else stored.select_by_name(list(names))
        self.target_names = list(target_names or ())

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        paths_or_dataset: Any,
        batch_size: int,
        max_sequence_length: int | None = None,
        continuous_features: list[str] | None = None,
        categorical_features: list[str] | None = None,
        targets: list[str] | None = None,
        shuffle: bool = False,
        shuffle_buffer_size: int = 0,
        num_workers: int = 1,
        pin_memory: bool = True,
        **options: Any,
    ) -> PyarrowDataLoader:
        """A loader of the columns of the schema that are tagged categorical or continuous, with
        those tagged target as targets, or of those named in their place.

        options  those of the class
        """
        cats = categorical_features or schema.select_by_tag(Tags.CATEGORICAL).column_names
        conts = continuous_features or schema.select_by_tag(Tags.CONTINUOUS).column_names
        labels = targets or schema.select_by_tag(Tags.TARGET).column_names
        return cls(
            paths_or_dataset,
            batch_size,
            max_sequence_length,
            [*cats, *conts, *labels],
            labels,
            shuffle=shuffle,
            shuffle_buffer_size=shuffle_buffer_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            schema=schema,
            **options,
        )

    def _with_dict(self, batch: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        inputs, targets = batch
        if not isinstance(targets, dict):
            targets = {} if targets is None else {self.target_names[0]: targets}
        return inputs, targets

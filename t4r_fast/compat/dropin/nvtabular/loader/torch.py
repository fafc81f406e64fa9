"""NVTabular's loaders for PyTorch, on the parquet reader of t4r_fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from t4r_fast.compat import warn_once
from t4r_fast.compat.dropin.nvtabular import Dataset
from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema
from t4r_fast.train.loader import SessionBatches
from t4r_fast.train.row_blocks import stored_name

Batch = tuple[dict[str, torch.Tensor], Any]


class TorchAsyncItr(IterableDataset):
    """Batches of the columns of a Dataset, read ahead in a thread.

    dataset          Dataset
    cats, conts      columns of the batches: ids (int64) and numbers (float32)
    labels           columns of the targets, int64 or float32 as stored
    batch_size       sessions in a batch
    shuffle          a new order each pass
    seed_fn          gives the seed of a pass; None: fixed seeds, other ones for each pass
    device           a GPU's number or a torch.device: where batches go; None: they stay on the CPU
    global_size      processes that divide each step's global_size x batch_size sessions
    global_rank      which of them this one is
    drop_last        leave out the last batch where it is not full
    sparse_names     the list columns
    sparse_max       their width: longer sessions are cut, with a warning, and shorter ones padded
                     on the right with 0
    sparse_as_dense  must be True when there are list columns

    Gives (features, targets): dicts of tensors, list columns (B, L), others (B,); targets are None
    without labels, a tensor for one, a dict for several. `len` counts batches.

    Raises InputError on columns that are missing or have no width, on widths that differ, and on
    more than one worker process. Takes the place of nvtabular.loader.torch.TorchAsyncItr
    where NVTabular is not installed.
    """

    def __init__(
        self,
        dataset: Dataset,
        cats: Sequence[str] | None = None,
        conts: Sequence[str] | None = None,
        labels: Sequence[str] | str | None = None,
        batch_size: int = 1,
        shuffle: bool = False,
        seed_fn: Callable[[], int] | None = None,
        parts_per_chunk: int = 1,
        device: int | str | torch.device | None = None,
        global_size: int | None = None,
        global_rank: int | None = None,
        drop_last: bool = False,
        sparse_names: Sequence[str] | None = None,
        sparse_max: Mapping[str, int] | None = None,
        sparse_as_dense: bool = False,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"TorchAsyncItr: dataset must be an nvtabular.Dataset; got {type(dataset).__name__}"
            )
        if parts_per_chunk != 1:
            warn_once("TorchAsyncItr parts_per_chunk", "parts_per_chunk has no effect")
        labels = [labels] if isinstance(labels, str) else list(labels or ())
        self.dataset = dataset
        self.batch_size = batch_size
        self.global_size = global_size or 1
        self.seed_fn = seed_fn
        self.device = _device(device)
        names = [*(cats or ()), *(conts or ())]
        if not names:
            raise InputError("TorchAsyncItr: name at least one column, in cats or conts")
        stored = pq.read_schema(dataset.paths[0])
        kinds = {n: stored.field(stored_name(n, stored.names, dataset.paths[0])).type
                 for n in [*names, *labels]}  # fmt: skip
        numbers = [n for n in labels if pa.types.is_floating(_value_type(kinds[n]))]
        ids = set(cats or ())
        columns = dict.fromkeys([*(cats or ()), *labels], "INT")
        columns |= dict.fromkeys([*(conts or ()), *numbers], "FLOAT")
        self._batches = SessionBatches(
            Schema(
                [
                    ColumnSchema(n, t, ["categorical"] if n in ids else [])
                    for n, t in columns.items()
                ]
            ),
            dataset.paths,
            batch_size,
            _width(kinds, sparse_names or (), sparse_max or {}, sparse_as_dense),
            shuffle,
            drop_last,
            shuffle_buffer_size=0,
            seed=0,
            truncate=None,
            targets=labels,
            prefetch=4,
            memory_limit=1 << 30,
            global_size=global_size or 1,
            global_rank=global_rank or 0,
        )
        self._batches.pairs = True
        self.padding_ids = self._batches.padding_ids

    def set_epoch(self, epoch: int) -> None:
        """The next pass is the `epoch`-th; it fixes the order of the sessions."""
        self._batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise InputError(
                f"DLDataLoader: num_workers must be 0; got {worker.num_workers}. Each worker would"
                " give all batches, and one thread reads ahead as it is"
            )
        if self.seed_fn is not None:
            self._batches.seed = int(self.seed_fn())
        for features, targets in self._batches:
            if self.device.type != "cpu":
                features, targets = _moved(features, self.device), _moved(targets, self.device)
            yield features, targets

    def __len__(self) -> int:
        return self._batches.num_batches


class DLDataLoader(DataLoader):
    """A DataLoader around TorchAsyncItr, whose batches it gives to collate_fn in a list of one.

    `len` counts batches. Takes the place of nvtabular.loader.torch.DLDataLoader.
    """

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def global_size(self) -> int:
        """Processes that divide the data."""
        return self.dataset.global_size

    def set_epoch(self, epoch: int) -> None:
        """The next pass is the `epoch`-th."""
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_nested(kind) else kind


def _device(device: int | str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cpu")
    wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if wanted.type == "cuda" and not torch.cuda.is_available():
        warn_once(
            "TorchAsyncItr device",
            f"there is no GPU: batches stay on the CPU, not on device {device!r}",
        )
        return torch.device("cpu")
    return wanted


def _width(
    kinds: Mapping[str, pa.DataType],
    sparse_names: Sequence[str],
    sparse_max: Mapping[str, int],
    sparse_as_dense: bool,
) -> int | None:
    """The common width of the list columns; None where there are none."""
    lists = [name for name, kind in kinds.items() if pa.types.is_nested(kind)]
    if not lists:
        return None
    if not sparse_as_dense:
        raise InputError(
            "TorchAsyncItr: sparse_as_dense must be True: models take list columns padded to a"
            f" width; got {sparse_as_dense!r}"
        )
    missing = [name for name in lists if name not in sparse_names or name not in sparse_max]
    if missing:
        raise InputError(
            f"TorchAsyncItr: sparse_names and sparse_max must hold all list columns;"
            f" {', '.join(missing)} is missing"
        )
    widths = {name: sparse_max[name] for name in lists}
    if len(set(widths.values())) > 1:
        raise InputError(
            f"TorchAsyncItr: sparse_max must be one width for all list columns; got {widths}"
        )
    return next(iter(widths.values()))


def _moved(tensors: Any, device: torch.device) -> Any:
    if isinstance(tensors, dict):
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    return None if tensors is None else tensors.to(device)

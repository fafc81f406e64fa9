"""The parquet data loader: shuffles, pads and prefetches batches of sessions.

Data that fit in memory are read once and permuted whole. Larger data are read row group by row
group, in an order drawn anew each epoch, through a pool of rows that is permuted in its turn. The
order depends on the seed and the epoch alone, never on PyTorch's random state.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, IterableDataset

from t4r_fast.compat import get_compat, warn_once
from t4r_fast.errors import InputError
from t4r_fast.schema import Schema, Tags
from t4r_fast.train.row_blocks import RowBlock, row_blocks, stored_name
from t4r_fast.train.session_table import (
    SessionTable,
    item_id_column,
    padding_ids,
    read_block,
    wanted_columns,
)

TRUNCATE = ("last", "first")

# Options of the reference's loaders that steer machinery this loader does not have.
_WITHOUT_EFFECT = {
    "num_workers", "pin_memory", "device", "parts_per_chunk", "row_groups_per_part", "buffer_size",
    "engine", "use_env_rmm", "persistent_workers", "prefetch_factor", "collate_fn",
    "reader_kwargs",
}  # fmt: skip


class SessionBatches(IterableDataset):
    """The batches of one or more parquet files; see ParquetDataLoader for the arguments.

    Iterating gives whole batches; `len` is the number of sessions.
    """

    def __init__(
        self,
        schema: Schema,
        source: Any,
        batch_size: int,
        max_sequence_length: int | None,
        shuffle: bool,
        drop_last: bool,
        shuffle_buffer_size: int,
        seed: int,
        truncate: str | None,
        targets: list[str],
        prefetch: int,
        memory_limit: int,
        global_size: int = 1,
        global_rank: int = 0,
        padding_idx: int | Mapping[str, int] = 0,
    ) -> None:
        _positive("batch_size", batch_size, 1)
        _positive("global_size", global_size, 1)
        if not 0 <= global_rank < global_size:
            raise InputError(
                f"ParquetDataLoader: global_rank must be >= 0 and < {global_size}, the"
                f" global_size; got {global_rank!r}"
            )
        _positive("shuffle_buffer_size", shuffle_buffer_size, 0)
        _positive("prefetch", prefetch, 0)
        if max_sequence_length is not None:
            _positive("max_sequence_length", max_sequence_length, 1)
        if truncate not in (None, *TRUNCATE):
            raise InputError(
                f"ParquetDataLoader: truncate must be one of {TRUNCATE}; got {truncate!r}"
            )
        # Sessions of one step of all processes, each of which takes its part of them.
        self.batch_size = batch_size * global_size
        self.global_size, self.global_rank = global_size, global_rank
        self.max_sequence_length = max_sequence_length
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.prefetch = prefetch
        self.pairs = get_compat() != "0.1"
        self._truncate = truncate or ("first" if get_compat() == "0.1" else "last")
        self._truncate_is_given = truncate is not None
        self._targets = targets
        self.padding_ids = padding_ids(schema, padding_idx)
        self._wanted = wanted_columns(schema, self.padding_ids)
        self._item_id = item_id_column(schema)
        self._blocks = row_blocks(source)
        self._rows = sum(b.rows for b in self._blocks)
        self._check_contents(source)
        row_bytes = max(1, self._bytes() // self._rows)
        self._fits = self._bytes() <= memory_limit
        # a third: the pool, the row group read next and the joined copy are alive together
        self._pool = shuffle_buffer_size or max(self.batch_size, memory_limit // (3 * row_bytes))
        #: called with each batch, in the caller's thread; gives what the loop sees
        self.collate: Callable[[Any], Any] | None = None
        self._held: SessionTable | None = None
        self._epoch = 0

    def _check_contents(self, source: Any) -> None:
        if not self._rows:
            where = "the table" if isinstance(source, pa.Table) else str(source)
            raise InputError(f"data loader: {where} holds no sessions; check the ETL's window")
        for block in self._blocks:
            for w in self._wanted:
                stored_name(w.name, block.value_counts, block.origin)
        if self.drop_last and self._rows < self.batch_size:
            raise InputError(
                f"data loader: {self._rows} sessions make no full batch of {self.batch_size}, and"
                " drop_last drops the rest; lower batch_size or set drop_last=False"
            )
        if self._rows < self.global_size:
            raise InputError(
                f"data loader: {self._rows} sessions cannot be divided among {self.global_size}"
                " processes; start fewer"
            )

    def _bytes(self) -> int:
        """Bytes of the wanted columns in memory."""
        total = 0
        for block in self._blocks:
            for w in self._wanted:
                name = stored_name(w.name, block.value_counts, block.origin)
                total += block.value_counts[name] * np.dtype(w.dtype).itemsize
        return total

    def __len__(self) -> int:
        return self._rows

    @property
    def num_batches(self) -> int:
        whole, rest = divmod(self._rows, self.batch_size)
        return whole + (rest >= self.global_size and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is the `epoch`-th; with the seed it fixes the order of the sessions."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        batches = self._batches(epoch)
        if self.prefetch:
            batches = prefetched(lambda: self._batches(epoch), self.prefetch)
        return batches if self.collate is None else map(self.collate, batches)

    # -- one pass --------------------------------------------------------------------------------

    def _batches(self, epoch: int) -> Iterator[Any]:
        rng = np.random.default_rng([self.seed, epoch])
        if self._fits or len(self._blocks) == 1:
            if self._held is None:
                self._held = SessionTable.concat([self._read(b) for b in self._blocks])
            order = rng.permutation(self._rows) if self.shuffle else np.arange(self._rows)
            yield from self._cut(self._held, order)
            return
        if self.shuffle:
            yield from self._pooled(rng)
        else:
            yield from self._in_order()

    def _read(self, block: RowBlock) -> SessionTable:
        table, cut = read_block(
            block, self._wanted, self._item_id, self.max_sequence_length, self._truncate == "last"
        )
        if cut and self._truncate == "first" and not self._truncate_is_given:
            warn_once(
                "truncate",
                f"{cut} sessions of {block.origin} have more than {self.max_sequence_length} items;"
                " as in the reference the oldest are kept. truncate='last' keeps the newest",
            )
        return table

    def _cut(self, table: SessionTable, order: np.ndarray) -> Iterator[Any]:
        size, parts = self.batch_size, self.global_size
        whole, rest = divmod(len(order), size)
        bounds = [i * size for i in range(whole + 1)]
        if rest and not self.drop_last:
            # Fewer sessions than processes go with the batch before, so that every process has one.
            bounds[-1:] = [whole * size, len(order)] if rest >= parts else [len(order)]
        for start, end in itertools.pairwise(bounds):
            own = order[start:end]
            if parts > 1:
                own = np.array_split(own, parts)[self.global_rank]
            yield self._batch(table, own)

    def _ready(self, rows: int) -> int:
        """How many of the rows held may be given while more are to be read: whole batches.

        Of several processes one batch stays, for a rest too small for all of them to join.
        """
        whole = rows // self.batch_size - (self.global_size > 1)
        return max(0, whole) * self.batch_size

    def _in_order(self) -> Iterator[Any]:
        held: list[SessionTable] = []
        for n, block in enumerate(self._blocks, start=1):
            held = [SessionTable.concat([*held, self._read(block)])]
            rows = held[0].rows
            ready = rows if n == len(self._blocks) else self._ready(rows)
            yield from self._cut(held[0], np.arange(ready))
            held = [held[0].take(np.arange(ready, rows))]

    def _pooled(self, rng: np.random.Generator) -> Iterator[Any]:
        held: list[SessionTable] = []
        last = len(self._blocks)
        for n, i in enumerate(rng.permutation(last), start=1):
            held.append(self._read(self._blocks[i]))
            rows = sum(t.rows for t in held)
            if rows < self._pool and n < last:
                continue
            table = SessionTable.concat(held)
            order = rng.permutation(rows)
            # Half stays, so that rows of this row group also meet those of the next ones.
            half = max(1, rows // 2 // self.batch_size) * self.batch_size
            ready = rows if n == last else min(half, self._ready(rows))
            yield from self._cut(table, order[:ready])
            held = [table.take(order[ready:])]

    def _batch(self, table: SessionTable, rows: np.ndarray) -> Any:
        columns = table.batch(rows, self.max_sequence_length)
        inputs = {name: torch.from_numpy(column) for name, column in columns.items()}
        if not self.pairs:
            return inputs
        targets = {name: inputs.pop(name) for name in self._targets}
        if not targets:
            return inputs, None
        return inputs, next(iter(targets.values())) if len(targets) == 1 else targets


class ParquetDataLoader(DataLoader):
    """Batches of sessions from parquet files, padded on the right, read ahead in a thread.

    source               path, pattern, folder, several of them, a table of Arrow, Polars or pandas,
                         or a Merlin Dataset, which is read into memory
    schema               columns to read; ids outside their int_domain are refused
    batch_size           sessions per batch
    max_sequence_length  width of every batch; None: the longest session of the batch
    truncate             "last": longer sessions keep their newest items, "first": their oldest;
                         default "first" at compat 0.1 (the reference, warned once), else "last"
    shuffle              a new order each epoch, from (seed, epoch) alone
    shuffle_buffer_size  sessions mixed at a time where the data do not fit; 0: what memory_limit
                         holds. Data that fit are permuted whole, whatever the number
    drop_last            leave out the last batch where it is not full
    targets              columns given as targets; default: those tagged "target"
    prefetch             batches read ahead; 0 reads in the caller's thread
    memory_limit         bytes; data up to this size are kept in memory between epochs
    global_size          processes that divide each step's global_size x batch_size sessions, and
    global_rank          which of them this one is. All take equally many steps: up to
                         global_size - 1 sessions left at the end join the last batch
    padding_idx          the id that pads columns of ids, or ids by column, where the others have 0;
                         numbers are padded with 0. The model's own: from_schema(padding_idx=...)

    Gives (inputs, targets), at compat 0.1 inputs with the targets in it. inputs: list columns
    (B, L), others (B,), int64 or float32; targets: None, a tensor, or a dict of several.
    `len` counts batches, `len(loader.dataset)` sessions. Each pass is one epoch; set_epoch goes to
    a given one.

    Raises InputError, naming file, column, row and value: missing files or columns, wrong types,
    nulls, numbers that are not finite, ids out of range, empty sessions, pads on the left, lists of
    unequal length. Contents are checked when they are read, so the error may come from the loop.
    Replaces transformers4rec.torch.utils.data_utils.MerlinDataLoader and PyarrowDataLoader.
    """

    def __init__(
        self,
        source: Any,
        schema: Schema,
        batch_size: int,
        max_sequence_length: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        shuffle_buffer_size: int = 0,
        seed: int = 0,
        truncate: str | None = None,
        targets: str | Iterable[str] | None = None,
        prefetch: int = 4,
        memory_limit: int = 1 << 30,
        global_size: int = 1,
        global_rank: int = 0,
        padding_idx: int | Mapping[str, int] = 0,
    ) -> None:
        if targets is None:
            targets = schema.select_by_tag(Tags.TARGET).column_names
        names = [targets] if isinstance(targets, str) else list(targets)
        schema.select_by_name(names)
        batches = SessionBatches(
            schema, source, batch_size, max_sequence_length, shuffle, drop_last,
            shuffle_buffer_size, seed, truncate, names, prefetch, memory_limit, global_size,
            global_rank, padding_idx,
        )  # fmt: skip
        # batch_size None: the dataset gives whole batches. Being a DataLoader lets the training
        # loop of transformers skip batches when it resumes.
        super().__init__(batches, batch_size=None)
        self._batch_size = batch_size
        self.global_size, self.global_rank = global_size, global_rank
        #: column of ids -> the id that pads it
        self.padding_ids = batches.padding_ids

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        paths_or_dataset: Any,
        batch_size: int,
        max_sequence_length: int | None = None,
        **options: Any,
    ) -> ParquetDataLoader:
        """A loader of the schema's columns; options are those of the class.

        Options of the reference's loaders without a meaning here are accepted and warned about.
        """
        options = with_effect(options)
        return cls(paths_or_dataset, schema, batch_size, max_sequence_length, **options)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is the `epoch`-th."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        # not DataLoader's: that one draws from PyTorch's random state at each pass
        return iter(self.dataset)

    def __len__(self) -> int:
        return self.dataset.num_batches


def with_effect(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those of the reference that have no meaning here, which are warned of."""
    for name in sorted(_WITHOUT_EFFECT & set(options)):
        warn_once(f"ParquetDataLoader {name}", f"{name} has no effect on the parquet loader")
    return {n: v for n, v in options.items() if n not in _WITHOUT_EFFECT}


def _positive(name: str, value: int, least: int) -> None:
    if not isinstance(value, (int, np.integer)) or value < least:
        raise InputError(f"ParquetDataLoader: {name} must be an integer >= {least}; got {value!r}")


# -- reading ahead ---------------------------------------------------------------------------------

_END = object()


def prefetched(make: Callable[[], Iterator[Any]], depth: int) -> Iterator[Any]:
    """The items of make(), computed up to `depth` ahead in a thread.

    An error in the thread is raised here, at its place in the sequence; leaving the loop early
    stops the thread.
    """
    ahead: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                ahead.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in make():
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as e:
            put((_END, e))

    thread = threading.Thread(target=work, name="t4r_fast prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ahead.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stop.set()
        thread.join()

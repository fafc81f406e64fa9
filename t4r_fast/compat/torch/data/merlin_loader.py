"""The parquet loader under the name and with the arguments of Merlin's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from t4r_fast.compat import warn_once
from t4r_fast.compat.torch.data.engines import T4RecDataLoader, dataloader_registry
from t4r_fast.errors import InputError
from t4r_fast.merlin_schema import from_core_schema
from t4r_fast.schema import Schema, Tags
from t4r_fast.train.loader import ParquetDataLoader, with_effect
from t4r_fast.train.row_blocks import opened, stored_schema


@dataloader_registry.register_with_multiple_names(
    "merlin", "merlin_dataloader", "nvtabular", "nvtabular_dataloader"
)
class MerlinDataLoader(T4RecDataLoader, ParquetDataLoader):
    """A ParquetDataLoader that is told its columns as Merlin's loader is.

    paths_or_dataset     parquet files, see ParquetDataLoader, or a Merlin Dataset
    batch_size           sessions per batch
    max_sequence_length  width of every batch; None: the longest session of the batch
    conts, cats, lists   columns of numbers, of ids, of lists: each is read, and tagged so
    labels               columns given as targets
    collate_fn           called with [(inputs, targets)] of each batch; gives what the loop sees
    shuffle              a new order each epoch
    seed_fn              gives the seed of the order, once
    drop_last            leave out the last batch where it is not full
    global_size          processes that divide the sessions, and
    global_rank          which of them this one is
    schema               types of the columns, and ranges of the ids, which are checked. None: the
                         Dataset's, or the types that are stored
    options              further ones of ParquetDataLoader: truncate, padding_idx, prefetch, ...

    Without conts, cats, lists and labels all columns of the schema are read. engine must be None or
    "parquet"; buffer_size, reader_kwargs, parts_per_chunk, device and row_groups_per_part have no
    effect. transforms are refused: collate_fn sees every batch. Unknown options raise TypeError,
    columns that are not there InputError.
    Replaces transformers4rec.torch.utils.data_utils.MerlinDataLoader.
    """

    def __init__(
        self,
        paths_or_dataset: Any,
        batch_size: int,
        max_sequence_length: int | None = None,
        conts: Iterable[str] | None = None,
        cats: Iterable[str] | None = None,
        labels: str | Iterable[str] | None = None,
        lists: Iterable[str] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        engine: str | None = None,
        buffer_size: float = 0.1,
        reader_kwargs: dict[str, Any] | None = None,
        shuffle: bool = False,
        seed_fn: Callable[[], int] | None = None,
        parts_per_chunk: int = 1,
        device: Any = None,
        global_size: int | None = None,
        global_rank: int | None = None,
        drop_last: bool = False,
        schema: Schema | None = None,
        row_groups_per_part: bool = True,
        transforms: list[Any] | None = None,
        **options: Any,
    ) -> None:
        if transforms:
            raise InputError(
                "MerlinDataLoader: transforms are steps of Merlin, which are not run here; give"
                " collate_fn, which is called with [(inputs, targets)] of each batch"
            )
        for name, given, nothing in (
            ("buffer_size", buffer_size, 0.1),
            ("reader_kwargs", reader_kwargs, None),
            ("parts_per_chunk", parts_per_chunk, 1),
            ("device", device, None),
            ("row_groups_per_part", row_groups_per_part, True),
        ):
            if given != nothing:
                warn_once(f"MerlinDataLoader {name}", f"{name} has no effect on the parquet loader")
        self.paths_or_dataset = paths_or_dataset
        self.set_dataset(buffer_size, engine, reader_kwargs, schema=schema)
        targets = [labels] if isinstance(labels, str) else labels and list(labels)
        self.schema = _chosen(self.schema, conts, cats, targets, lists)
        if seed_fn is not None:
            options.setdefault("seed", int(seed_fn()))
        ParquetDataLoader.__init__(
            self,
            self.dataset,
            self.schema,
            batch_size,
            max_sequence_length,
            shuffle=shuffle,
            drop_last=drop_last,
            targets=targets,
            global_size=global_size or 1,
            global_rank=global_rank or 0,
            **with_effect(options),
        )
        if collate_fn is not None:
            self.dataset.collate = lambda batch: collate_fn([batch])

    def set_dataset(
        self,
        buffer_size: float,
        engine: str | None,
        reader_kwargs: dict[str, Any] | None,
        schema: Schema | None = None,
    ) -> None:
        """Set self.dataset, what is read, from self.paths_or_dataset, and self.schema.

        The constructor calls it. Of the arguments engine and schema count. A loader that is made
        keeps its data: a later call raises ValueError.
        """
        if engine not in (None, "parquet"):
            raise InputError(
                f"MerlinDataLoader: engine must be 'parquet' or None; got {engine!r}. Write the"
                " data as parquet"
            )
        self.dataset = opened(self.paths_or_dataset)
        core = getattr(self.paths_or_dataset, "schema", None)
        if schema is None and core is not None and hasattr(self.paths_or_dataset, "to_ddf"):
            schema = core if isinstance(core, Schema) else from_core_schema(core)
        self.schema = stored_schema(self.dataset) if schema is None else schema

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        paths_or_dataset: Any,
        batch_size: int,
        max_sequence_length: int | None = None,
        continuous_features: list[str] | None = None,
        categorical_features: list[str] | None = None,
        list_features: list[str] | None = None,
        targets: list[str] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        shuffle: bool = True,
        **options: Any,
    ) -> MerlinDataLoader:
        """A loader of the columns of the schema that are tagged categorical, continuous or list,
        with those tagged target as targets, or of those named in their place. It shuffles.

        options  those of the class
        """
        conts = continuous_features or schema.select_by_tag(Tags.CONTINUOUS).column_names
        cats = categorical_features or schema.select_by_tag(Tags.CATEGORICAL).column_names
        lists = list_features or schema.select_by_tag(Tags.LIST).column_names
        labels = targets or schema.select_by_tag(Tags.TARGET).column_names
        return cls(
            paths_or_dataset,
            batch_size,
            max_sequence_length,
            conts,
            cats,
            labels,
            lists,
            collate_fn,
            shuffle=shuffle,
            schema=schema,
            **options,
        )

    @property
    def output_schema(self) -> Schema:
        """The columns of the batches, targets among them, in the form that our blocks take."""
        return self.schema


NVTabularDataLoader = MerlinDataLoader  # its name in 0.1


def _chosen(
    schema: Schema,
    conts: Iterable[str] | None,
    cats: Iterable[str] | None,
    labels: Iterable[str] | None,
    lists: Iterable[str] | None,
) -> Schema:
    """The named columns with the tags that say how; the schema as it is where none is named."""
    tagged = {
        Tags.CONTINUOUS: conts,
        Tags.CATEGORICAL: cats,
        Tags.TARGET: labels,
        Tags.LIST: lists,
    }
    tags: dict[str, list[Tags]] = {}
    for tag, names in tagged.items():
        for name in names or ():
            tags.setdefault(name, []).append(tag)
    if not tags:
        return schema
    return schema.select_by_name(tags).map_column_schemas(lambda c: c.with_tags(tags[c.name]))

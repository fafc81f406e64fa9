"""Embedding tables of id features, and the tables that stay fixed to what they are given."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from t4r_fast.compat.torch.features.base import InputBlock
from t4r_fast.compat.torch.features.continuous import column
from t4r_fast.compat.torch.tabular.base import (
    FilterFeatures,
    Sizes,
    TabularAggregationType,
    TabularData,
    TabularTransformationsType,
    column_sizes,
)
from t4r_fast.ops.sequence_embedding import sequence_embedding
from t4r_fast.schema import Schema, Tags, embedding_sizes

Initializer = Callable[[torch.Tensor], object]
COMBINERS = ("mean", "sum", "sqrtn")


class TableConfig:
    """Rows and width of an embedding table, and how it is filled.

    vocabulary_size  rows, >= 1
    dim              width, >= 1
    initializer      fills a (vocabulary_size, dim) tensor in place; None: N(0, 0.05^2), the padding
                     row included
    combiner         how the ids of a multi-hot feature join: "mean" or "sum". The reference also
                     takes "sqrtn", for which it has no table either
    name             of the table

    Raises ValueError on values out of range.
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int,
        initializer: Initializer | None = None,
        combiner: str = "mean",
        name: str | None = None,
    ) -> None:
        for what, number in (("vocabulary_size", vocabulary_size), ("dim", dim)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"TableConfig: {what} must be an int >= 1; got {number!r}")
        if combiner not in COMBINERS:
            raise ValueError(
                f"TableConfig: combiner must be one of {', '.join(COMBINERS)}; got {combiner!r}"
            )
        if initializer is not None and not callable(initializer):
            raise ValueError(f"TableConfig: initializer must be callable; got {initializer!r}")
        self.vocabulary_size = vocabulary_size
        self.dim = dim
        self.initializer = initializer or partial(nn.init.normal_, mean=0.0, std=0.05)
        self.combiner = combiner
        self.name = name

    def __repr__(self) -> str:
        return (
            f"TableConfig(vocabulary_size={self.vocabulary_size}, dim={self.dim},"
            f" combiner={self.combiner!r}, name={self.name!r})"
        )


class FeatureConfig:
    """The table of a feature. max_sequence_length is kept for the reader's information."""

    def __init__(
        self, table: TableConfig, max_sequence_length: int = 0, name: str | None = None
    ) -> None:
        self.table = table
        self.max_sequence_length = max_sequence_length
        self.name = name

    def __repr__(self) -> str:
        return (
            f"FeatureConfig(table={self.table!r},"
            f" max_sequence_length={self.max_sequence_length}, name={self.name!r})"
        )


class EmbeddingFeatures(InputBlock):
    """One embedding per session and id feature: ids (B,) or (B, L) to (B, D).

    feature_config  feature name -> FeatureConfig
    item_id         the feature that holds the item ids
    share_tables    features whose FeatureConfig holds the same TableConfig share one table. False:
                    each has its own, as in the reference, whose documentation promises one
    pre, post, aggregation, schema  see TabularBlock

    The ids of a list are joined by the table's combiner, padding included, as in the reference.
    A ragged list may be given as (values, offsets). Keeps the batch's item ids in `item_seq`.
    """

    def __init__(
        self,
        feature_config: Mapping[str, FeatureConfig],
        item_id: str | None = None,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        schema: Schema | None = None,
        share_tables: bool = False,
    ) -> None:
        super().__init__(pre=pre, post=post, aggregation=aggregation, schema=schema)
        self.feature_config = dict(feature_config)
        self.item_id = item_id
        self.share_tables = share_tables
        self.item_seq: torch.Tensor | None = None
        self.filter_features = FilterFeatures(self.feature_config)
        # A module dict refuses names with a dot, and so does a checkpoint key.
        dotted = [n for n in self.feature_config if "." in n]
        if dotted:
            raise ValueError(f"{type(self).__name__}: feature names hold a dot: {dotted}")
        self.embedding_tables = nn.ModuleDict()
        made: dict[int, nn.Module] = {}
        for name, config in self.feature_config.items():
            table = made.get(id(config.table)) if share_tables else None
            table = self.table_to_embedding_module(config.table) if table is None else table
            made[id(config.table)] = self.embedding_tables[name] = table

    def table_to_embedding_module(self, table: TableConfig) -> nn.Module:
        """The module of a table; subclasses may make another."""
        if table.combiner == "sqrtn":
            raise ValueError(
                f"{type(self).__name__}: combiner must be 'mean' or 'sum' for a table of"
                " torch.nn.EmbeddingBag; got 'sqrtn'"
            )
        bag = EmbeddingBagWrapper(table.vocabulary_size, table.dim, mode=table.combiner)
        return _initialized(bag, table.initializer)

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        embedding_dims: Mapping[str, int] | None = None,
        embedding_dim_default: int = 64,
        infer_embedding_sizes: bool = False,
        infer_embedding_sizes_multiplier: float = 2.0,
        embeddings_initializers: Mapping[str, Initializer] | None = None,
        combiner: str = "mean",
        tags: object = None,
        item_id: str | None = None,
        automatic_build: bool = True,
        max_sequence_length: int | None = None,
        aggregation: TabularAggregationType | None = None,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        **options: object,
    ) -> EmbeddingFeatures | None:
        """Tables for the schema's id columns with these tags, or None when it has none.

        Widths: embedding_dims, else ceil(multiplier * cardinality ** 0.25) when
        infer_embedding_sizes, else embedding_dim_default. item_id: None for the column tagged so.
        Further options are those of the class. Raises ValueError when embedding_dims or
        embeddings_initializers name no id column.
        """
        initializers = dict(embeddings_initializers or {})
        columns = {c.name: c for c in schema if c.is_categorical}
        unknown = sorted(set(embedding_dims or ()) - set(columns))
        unknown += sorted(set(initializers) - set(schema.column_names))
        if unknown:
            raise ValueError(
                f"{cls.__name__}: embedding_dims and embeddings_initializers must name id features,"
                f" {sorted(columns)}; got {unknown}"
            )
        if tags:
            schema = schema.select_by_tag(tags)
        if item_id is None and len(schema.select_by_tag(Tags.ITEM_ID)):
            item_id = schema.item_id_column_name
        dims = {}
        if infer_embedding_sizes:
            dims.update(embedding_sizes(schema, infer_embedding_sizes_multiplier))
        dims.update(embedding_dims or {})
        config = {}
        for c in schema:
            if c.is_categorical:
                width = dims.get(c.name, embedding_dim_default)
                table = TableConfig(
                    c.cardinality, width, initializers.get(c.name), combiner, c.name
                )
                config[c.name] = FeatureConfig(table, name=c.name)
        if not config:
            return None
        block = cls(config, item_id=item_id, pre=pre, post=post, aggregation=aggregation, **options)
        if automatic_build:
            block.build(column_sizes(schema, max_sequence_length), schema=schema)
        return block

    @property
    def item_embedding_table(self) -> nn.Module:
        if self.item_id is None:
            raise ValueError(f"{type(self).__name__}: no feature carries the tag item_id")
        return self.embedding_tables[self.item_id]

    def item_ids(self, inputs: TabularData) -> torch.Tensor:
        return column(inputs, self.item_id)

    def __call__(self, inputs: TabularData, *args: object, **kwargs: object):
        outputs = super().__call__(inputs, *args, **kwargs)
        pre = kwargs.get("pre", self.pre)
        if self.item_id is not None and pre is not None and keeps_targets(pre):
            self.item_seq = self.item_ids(inputs)
        return outputs

    def forward(self, inputs: TabularData, **_: object) -> TabularData:
        if self.item_id is not None:
            self.item_seq = self.item_ids(inputs)
        return {
            name: self.embed(column(inputs, name), table)
            for name, table in self.embedding_tables.items()
        }

    def embed(self, ids: torch.Tensor, table: nn.Module) -> torch.Tensor:
        """The vectors of one column."""
        if isinstance(ids, tuple):
            values, offsets = ids
            return table(values.reshape(-1), offsets.reshape(len(offsets), -1)[:, 0])
        return table(ids)

    def forward_output_size(self, input_size: Sizes) -> Sizes:
        batch = next(iter(input_size.values()))[0]
        return {name: (batch, c.table.dim) for name, c in self.feature_config.items()}


class EmbeddingBagWrapper(nn.EmbeddingBag):
    """EmbeddingBag that takes one id per session, (B,), as well; its arguments are those of
    torch.nn.EmbeddingBag."""

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if input.dim() == 1 and offsets is None:
            input = input.unsqueeze(-1)
            if per_sample_weights is not None:
                per_sample_weights = per_sample_weights.unsqueeze(-1)
        return super().forward(input, offsets, per_sample_weights)


def _initialized(table: nn.Module, initializer: Initializer) -> nn.Module:
    with torch.no_grad():
        initializer(table.weight)
    return table


def keeps_targets(transformations: object) -> bool:
    """Whether the items to predict are read before these transformations of the inputs."""
    found = (
        transformations if isinstance(transformations, (nn.Sequential, list)) else [transformations]
    )
    return all(getattr(t, "noise_targets", True) is False for t in found)


class SequenceEmbeddingFeatures(EmbeddingFeatures):
    """One embedding per position: ids (B, L) to (B, L, D), and (B,) to (B, D).

    padding_idx       the id of padding: its row is initialised and read like any other, the lookup
                      does not train it, the softmax over all items does, as in the reference
    zero_padding_row  fill the padding row with 0, as torch.nn.Embedding does by itself; False: the
                      initializer fills it, as in the reference

    The other arguments are those of EmbeddingFeatures. TabularSequenceFeatures looks up all
    features in one pass.
    """

    def __init__(
        self,
        feature_config: Mapping[str, FeatureConfig],
        item_id: str | None = None,
        padding_idx: int = 0,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        schema: Schema | None = None,
        share_tables: bool = False,
        zero_padding_row: bool = False,
    ) -> None:
        # used by table_to_embedding_module, which the base class calls
        object.__setattr__(self, "padding_idx", padding_idx)
        object.__setattr__(self, "zero_padding_row", zero_padding_row)
        super().__init__(feature_config, item_id, pre, post, aggregation, schema, share_tables)

    def table_to_embedding_module(self, table: TableConfig) -> nn.Embedding:
        embedding = nn.Embedding(table.vocabulary_size, table.dim, padding_idx=self.padding_idx)
        _initialized(embedding, table.initializer)
        if self.zero_padding_row:
            with torch.no_grad():
                embedding.weight[self.padding_idx] = 0
        return embedding

    def embed(self, ids: torch.Tensor, table: nn.Module) -> torch.Tensor:
        # A table that somebody put here in place of ours does its own lookup.
        if type(table) is not nn.Embedding:
            return table(ids)
        as_list = ids.long() if ids.dim() == 2 else ids.long().unsqueeze(1)
        vectors = sequence_embedding(
            [as_list], [table.weight], padding_idx=self.padding_idx, sparse=table.sparse
        )
        return vectors if ids.dim() == 2 else vectors.squeeze(1)

    def forward_output_size(self, input_size: Sizes) -> Sizes:
        return {n: (*input_size[n], c.table.dim) for n, c in self.feature_config.items()}


class PretrainedEmbeddingsInitializer(nn.Module):
    """Fills an embedding table with given vectors: embeddings_initializers={"item": this}.

    weight_matrix  (rows of the table, width): tensor, array or lists; row 0 belongs to padding
    trainable      whether training changes them
    """

    def __init__(
        self,
        weight_matrix: torch.Tensor | Sequence[Sequence[float]],
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.weight_matrix = torch.as_tensor(weight_matrix, device="cpu").detach().clone()
        self.trainable = trainable

    def forward(self, x: torch.Tensor) -> None:
        if self.weight_matrix.shape != x.shape:
            raise ValueError(
                "PretrainedEmbeddingsInitializer: weight_matrix must have the shape of the table,"
                f" {tuple(x.shape)}; got {tuple(self.weight_matrix.shape)}"
            )
        with torch.no_grad():
            x.copy_(self.weight_matrix)
        x.requires_grad_(self.trainable)


# They are built on this module and stand in files of their own; the reference has them here.
_ELSEWHERE = {
    "PretrainedEmbeddingFeatures": "pretrained",
    "SoftEmbedding": "soft",
    "SoftEmbeddingFeatures": "soft",
}


def __getattr__(name: str) -> object:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        importlib.import_module(f"t4r_fast.compat.torch.features.{_ELSEWHERE[name]}"), name
    )

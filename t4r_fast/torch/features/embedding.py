"""Embedding tables of the id features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import nn

from t4r_fast.schema import Schema, Tags, embedding_sizes

Initializer = Callable[[torch.Tensor], object]


def _normal(weight: torch.Tensor) -> None:
    # The reference's default; it fills the padding row as well.
    nn.init.normal_(weight, mean=0.0, std=0.05)


@dataclasses.dataclass
class TableConfig:
    """Rows and width of an embedding table and how it is initialised (default N(0, 0.05^2))."""

    vocabulary_size: int
    dim: int
    initializer: Initializer = _normal
    name: str = ""


@dataclasses.dataclass
class FeatureConfig:
    """The table of a feature."""

    table: TableConfig
    name: str = ""


class SequenceEmbeddingFeatures(nn.Module):
    """One table per id feature; TabularSequenceFeatures looks them all up in one pass.

    feature_config  feature name -> FeatureConfig
    item_id         the feature that holds the item ids
    padding_idx     the id of padding. As in the reference its row is initialised and read like any
                    other; the lookup does not train it, the softmax over all items does.
    """

    def __init__(
        self,
        feature_config: Mapping[str, FeatureConfig],
        item_id: str | None = None,
        padding_idx: int = 0,
    ) -> None:
        super().__init__()
        self.feature_config = dict(feature_config)
        self.item_id = item_id
        self.padding_idx = padding_idx
        # A module dict refuses names with a dot, and so does a checkpoint key.
        dotted = [n for n in self.feature_config if "." in n]
        if dotted:
            raise ValueError(f"SequenceEmbeddingFeatures: feature names hold a dot: {dotted}")
        self.embedding_tables = nn.ModuleDict()
        for name, config in self.feature_config.items():
            table = nn.Embedding(config.table.vocabulary_size, config.table.dim)
            with torch.no_grad():
                config.table.initializer(table.weight)
            self.embedding_tables[name] = table
        self.item_seq: torch.Tensor | None = None

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        tags: tuple[str, ...] | None = None,
        embedding_dims: Mapping[str, int] | None = None,
        embedding_dim_default: int = 64,
        infer_embedding_sizes: bool = False,
        infer_embedding_sizes_multiplier: float = 2.0,
        embeddings_initializers: Mapping[str, Initializer] | None = None,
        item_id: str | None = None,
        padding_idx: int = 0,
    ) -> SequenceEmbeddingFeatures | None:
        """Tables for the schema's id columns, or None when it has none.

        Widths: embedding_dims, else ceil(2 * cardinality ** 0.25) when infer_embedding_sizes, else
        embedding_dim_default.
        """
        if tags:
            schema = schema.select_by_tag(tags)
        if item_id is None and len(schema.select_by_tag(Tags.ITEM_ID)):
            item_id = schema.item_id_column_name
        dims = (
            dict(embedding_sizes(schema, infer_embedding_sizes_multiplier))
            if (infer_embedding_sizes)
            else {}
        )
        dims.update(embedding_dims or {})
        initializers = dict(embeddings_initializers or {})
        columns = {c.name: c.cardinality for c in schema if c.is_categorical}
        unknown = sorted((set(embedding_dims or ()) | set(initializers)) - set(columns))
        if unknown:
            raise ValueError(
                "SequenceEmbeddingFeatures: embedding_dims and embeddings_initializers must name"
                f" id features, {sorted(columns)}; got {unknown}"
            )
        config = {
            name: FeatureConfig(
                TableConfig(
                    vocabulary_size=rows,
                    dim=dims.get(name, embedding_dim_default),
                    initializer=initializers.get(name, _normal),
                    name=name,
                ),
                name=name,
            )
            for name, rows in columns.items()
        }
        return cls(config, item_id=item_id, padding_idx=padding_idx) if config else None

    @property
    def item_embedding_table(self) -> nn.Embedding:
        if self.item_id is None:
            raise ValueError("SequenceEmbeddingFeatures: no feature carries the tag item_id")
        return self.embedding_tables[self.item_id]

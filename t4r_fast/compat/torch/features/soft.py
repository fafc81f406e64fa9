"""Numbers as mixtures of embeddings (soft one-hot)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from t4r_fast.compat import warn_once
from t4r_fast.compat.torch.features.embedding import (
    EmbeddingFeatures,
    FeatureConfig,
    Initializer,
    TableConfig,
)
from t4r_fast.compat.torch.tabular.base import (
    Sizes,
    TabularAggregationType,
    TabularTransformationsType,
    column_sizes,
)
from t4r_fast.compat.torch.tabular.transformations import TabularLayerNorm
from t4r_fast.schema import Schema


class SoftEmbedding(nn.Module):
    """A number as a mixture of `num_embeddings` vectors, whose weights are learned from it.

    out = softmax(x * w + b) @ table;  x (...) float -> (..., embeddings_dim)

    emb_initializer  fills the (num_embeddings, embeddings_dim) table; None: N(0, 1)

    The (..., num_embeddings, embeddings_dim) products of the reference are not formed.
    Source: "Learning Embeddings for continuous features", arXiv 1708.00065.
    """

    def __init__(
        self,
        num_embeddings: int,
        embeddings_dim: int,
        emb_initializer: Initializer | None = None,
    ) -> None:
        super().__init__()
        if num_embeddings < 1 or embeddings_dim < 1:
            raise ValueError(
                "SoftEmbedding: num_embeddings and embeddings_dim must be >= 1; got"
                f" {num_embeddings} and {embeddings_dim}"
            )
        self.embedding_table = nn.Embedding(num_embeddings, embeddings_dim)
        if emb_initializer is not None:
            with torch.no_grad():
                emb_initializer(self.embedding_table.weight)
        self.projection_layer = nn.Linear(1, num_embeddings)

    def forward(self, input_numeric: torch.Tensor) -> torch.Tensor:
        weight = self.projection_layer.weight
        logits = self.projection_layer(input_numeric.to(weight.dtype).unsqueeze(-1))
        return logits.softmax(-1) @ self.embedding_table.weight


class SoftEmbeddingFeatures(EmbeddingFeatures):
    """A SoftEmbedding for each number feature: (B, L) to (B, L, D).

    layer_norm  normalise each feature's vector
    keep_post   with layer_norm, apply `post` behind it. The reference drops `post` then; so does
                False, with a warning

    The other arguments are those of EmbeddingFeatures.
    """

    def __init__(
        self,
        feature_config: Mapping[str, FeatureConfig],
        layer_norm: bool = True,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        schema: Schema | None = None,
        keep_post: bool = False,
    ) -> None:
        if layer_norm:
            norm = TabularLayerNorm.from_feature_config(feature_config)
            if post is None:
                post = norm
            elif keep_post:
                post = [norm, *(post if isinstance(post, list) else [post])]
            else:
                warn_once(
                    "keep_post",
                    "SoftEmbeddingFeatures drops post because layer_norm is on, as the reference"
                    " does; give keep_post=True or layer_norm=False",
                )
                post = norm
        super().__init__(feature_config, None, pre, post, aggregation, schema)

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        soft_embedding_cardinalities: Mapping[str, int] | None = None,
        soft_embedding_cardinality_default: int = 10,
        soft_embedding_dims: Mapping[str, int] | None = None,
        soft_embedding_dim_default: int = 8,
        embeddings_initializers: Mapping[str, Initializer] | None = None,
        layer_norm: bool = True,
        combiner: str = "mean",
        tags: object = None,
        automatic_build: bool = True,
        max_sequence_length: int | None = None,
        **options: object,
    ) -> SoftEmbeddingFeatures | None:
        """For the schema's number columns with these tags, or None when it has none.

        soft_embedding_cardinalities  vectors to mix, by feature; the default for the others
        soft_embedding_dims           their width, by feature; the default for the others
        Further options are those of the class.
        """
        if tags:
            schema = schema.select_by_tag(tags)
        rows, dims = soft_embedding_cardinalities or {}, soft_embedding_dims or {}
        initializers = embeddings_initializers or {}
        config = {}
        for name in (c.name for c in schema if not c.is_categorical):
            table = TableConfig(
                rows.get(name, soft_embedding_cardinality_default),
                dims.get(name, soft_embedding_dim_default),
                initializers.get(name),
                combiner,
                name,
            )
            config[name] = FeatureConfig(table, name=name)
        if not config:
            return None
        block = cls(config, layer_norm=layer_norm, **options)
        if automatic_build:
            block.build(column_sizes(schema, max_sequence_length))
        return block

    def table_to_embedding_module(self, table: TableConfig) -> SoftEmbedding:
        return SoftEmbedding(table.vocabulary_size, table.dim, table.initializer)

    def embed(self, ids: torch.Tensor, table: nn.Module) -> torch.Tensor:
        return table(ids)

    def forward_output_size(self, input_size: Sizes) -> Sizes:
        return {n: (*input_size[n], c.table.dim) for n, c in self.feature_config.items()}

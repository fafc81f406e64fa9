"""The input block without positions: number, id and given vectors of a session side by side."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from t4r_fast.compat.torch.block.base import SequentialBlock
from t4r_fast.compat.torch.block.mlp import MLPBlock
from t4r_fast.compat.torch.features.continuous import ContinuousFeatures
from t4r_fast.compat.torch.features.embedding import EmbeddingFeatures, SequenceEmbeddingFeatures
from t4r_fast.compat.torch.features.pretrained import PretrainedEmbeddingFeatures
from t4r_fast.compat.torch.features.soft import SoftEmbeddingFeatures
from t4r_fast.compat.torch.tabular.base import (
    AsTabular,
    MergeTabular,
    TabularAggregationType,
    TabularModule,
    TabularTransformationsType,
    column_sizes,
)
from t4r_fast.schema import Schema, Tags

CONTINUOUS_PROJECTION = "continuous_projection"
_NOT_OPTIONS = ("self", "schema", "tags", "features", "feature_config", "aggregation", "options")


class TabularFeatures(MergeTabular):
    """Joins features of a session. Build it by from_schema.

    continuous_module, categorical_module, pretrained_embedding_module  the parts, at least one
    pre, post, aggregation, schema                                      see TabularBlock

    forward: a dict of columns -> a dict of features, or their aggregation.
    Replaces transformers4rec.torch.TabularFeatures.
    """

    CONTINUOUS_MODULE_CLASS: type = ContinuousFeatures
    EMBEDDING_MODULE_CLASS: type = EmbeddingFeatures
    SOFT_EMBEDDING_MODULE_CLASS: type = SoftEmbeddingFeatures
    PRETRAINED_EMBEDDING_MODULE_CLASS: type = PretrainedEmbeddingFeatures

    def __init__(
        self,
        continuous_module: nn.Module | None = None,
        categorical_module: nn.Module | None = None,
        pretrained_embedding_module: nn.Module | None = None,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        schema: Schema | None = None,
    ) -> None:
        modules = {
            "continuous_module": continuous_module,
            "categorical_module": categorical_module,
            "pretrained_embedding_module": pretrained_embedding_module,
        }
        given = {name: module for name, module in modules.items() if module is not None}
        if not given:
            raise ValueError(f"{type(self).__name__}: the schema selects no feature")
        super().__init__(given, pre=pre, post=post, aggregation=aggregation, schema=schema)

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        continuous_tags: object = (Tags.CONTINUOUS,),
        categorical_tags: object = (Tags.CATEGORICAL,),
        pretrained_embeddings_tags: object = (Tags.EMBEDDING,),
        aggregation: TabularAggregationType | None = None,
        automatic_build: bool = True,
        max_sequence_length: int | None = None,
        continuous_projection: int | list[int] | None = None,
        continuous_soft_embeddings: bool = False,
        **kwargs: object,
    ) -> TabularFeatures:
        """The input block for the columns of a schema.

        continuous_tags, categorical_tags, pretrained_embeddings_tags
                                    which columns are numbers, ids, vectors; None for none of them
        aggregation                 see TabularBlock
        automatic_build             find out the sizes; False: call build(sizes) before use
        max_sequence_length         L of the data; used to state the output size
        continuous_projection       width(s) of an MLP over all numbers together; the result is one
                                    feature, "continuous_projection"
        continuous_soft_embeddings  numbers as SoftEmbeddingFeatures instead of themselves
        kwargs                      options of the parts, each given to the parts that know it:
                                    pre, post, embedding_dims, soft_embedding_dims,
                                    pretrained_output_dims, ... (see their classes)

        Raises TypeError for an option that no part knows, ValueError for what contradicts itself
        or the schema.
        """
        batch_size = kwargs.pop("batch_size", -1)
        _check_known(cls, kwargs)
        numbers = (
            cls.SOFT_EMBEDDING_MODULE_CLASS
            if continuous_soft_embeddings
            else cls.CONTINUOUS_MODULE_CLASS
        )
        wanted = {
            "continuous_module": (numbers, continuous_tags),
            "categorical_module": (cls.EMBEDDING_MODULE_CLASS, categorical_tags),
            "pretrained_embedding_module": (
                cls.PRETRAINED_EMBEDDING_MODULE_CLASS,
                pretrained_embeddings_tags,
            ),
        }
        if not automatic_build:
            kwargs["automatic_build"] = False
        modules = {
            name: part.from_schema(schema, tags=tags, **_for(part, kwargs))
            for name, (part, tags) in wanted.items()
            if tags
        }
        block = cls(**modules, aggregation=aggregation, schema=schema)
        if automatic_build:
            block.build(column_sizes(schema, max_sequence_length, batch_size), schema=schema)
        if continuous_projection:
            if not automatic_build:
                raise ValueError(f"{cls.__name__}: continuous_projection needs automatic_build")
            block.project_continuous_features(continuous_projection)
        return block

    # -- parts -----------------------------------------------------------------------------------

    def _part(self, name: str) -> Any:
        # nn.ModuleDict has no get, and torch.compile cannot trace dict(ModuleDict)
        return self.to_merge[name] if name in self.to_merge else None  # noqa: SIM401

    @property
    def continuous_module(self) -> nn.Module | None:
        return self._part("continuous_module")

    @property
    def categorical_module(self) -> nn.Module | None:
        return self._part("categorical_module")

    @property
    def pretrained_module(self) -> nn.Module | None:
        return self._part("pretrained_embedding_module")

    def project_continuous_features(self, mlp_layers_dims: int | list[int]) -> TabularFeatures:
        """Put an MLP over all number features; they become the one feature
        `continuous_projection`."""
        numbers = self.continuous_module
        if not isinstance(numbers, TabularModule):
            raise ValueError(
                f"{type(self).__name__}: continuous_projection needs number columns in the schema"
            )
        numbers.aggregation = "concat"
        self.to_merge["continuous_module"] = SequentialBlock(
            numbers, MLPBlock(mlp_layers_dims), AsTabular(CONTINUOUS_PROJECTION)
        )
        return self


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _options(part: type) -> set[str]:
    """What from_schema of a part takes: its own arguments and those that it hands to the class."""
    names = {*_parameters(part.from_schema), *_parameters(part.__init__)}
    return names - set(_NOT_OPTIONS) - {"kwargs"}


def _for(part: type, kwargs: Mapping[str, object]) -> dict[str, object]:
    names = _options(part)
    return {name: value for name, value in kwargs.items() if name in names}


def _check_known(cls: type, kwargs: Mapping[str, object]) -> None:
    parts = (
        cls.CONTINUOUS_MODULE_CLASS,
        cls.SOFT_EMBEDDING_MODULE_CLASS,
        cls.EMBEDDING_MODULE_CLASS,
        cls.PRETRAINED_EMBEDDING_MODULE_CLASS,
        SequenceEmbeddingFeatures,
    )
    unknown = sorted(set(kwargs).difference(*(_options(part) for part in parts)))
    if unknown:
        raise TypeError(f"{cls.__name__}.from_schema: unknown arguments {unknown}")

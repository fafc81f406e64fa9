"""Vectors that come with the batch: embeddings of text or images, made elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from t4r_fast.compat.torch.features.base import InputBlock
from t4r_fast.compat.torch.features.continuous import column
from t4r_fast.compat.torch.tabular.base import (
    FilterFeatures,
    SequentialTabularTransformations,
    Sizes,
    TabularAggregationType,
    TabularData,
    TabularTransformation,
    TabularTransformationsType,
)
from t4r_fast.schema import Schema

COMBINERS: dict[str, Callable[..., torch.Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "max": torch.amax,
    "min": torch.amin,
}


class PretrainedEmbeddingFeatures(InputBlock):
    """Feature vectors of the batch, (B, L, W) or (B, W), projected, combined and normalised.

    features                names of the columns
    pretrained_output_dims  width of a linear map: an int for all, or by feature name; features
                            that the dict leaves out keep their width
    sequence_combiner       joins the positions of (B, L, W) to (B, W): "mean", "sum", "max", "min",
                            or a callable (values, axis=1)
    normalizer              a transformation behind both, by name or as a module: "layer-norm"
    pre, post, aggregation, schema  see TabularBlock; `post` comes after `normalizer`

    Build it (from_schema of the input block does) before use when there is a linear map.
    Raises ValueError on an unknown combiner.
    """

    def __init__(
        self,
        features: list[str],
        pretrained_output_dims: int | Mapping[str, int] | None = None,
        sequence_combiner: str | nn.Module | Callable[..., torch.Tensor] | None = None,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        normalizer: str | TabularTransformation | None = None,
        schema: Schema | None = None,
    ) -> None:
        if normalizer is not None:
            normalizer = TabularTransformation.parse(normalizer)
            rest = post if isinstance(post, list) else [post]
            post = (
                normalizer if post is None else SequentialTabularTransformations(normalizer, *rest)
            )
        super().__init__(pre=pre, post=post, aggregation=aggregation, schema=schema)
        self.features = list(features)
        self.filter_features = FilterFeatures(features)
        self.pretrained_output_dims = pretrained_output_dims
        self.sequence_combiner = self.parse_combiner(sequence_combiner)

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        tags: object = None,
        **options: object,
    ) -> PretrainedEmbeddingFeatures | None:
        """For the schema's columns with these tags, or None; options are those of the class."""
        if tags:
            schema = schema.select_by_tag(tags)
        return cls(schema.column_names, **options) if len(schema) else None

    @staticmethod
    def parse_combiner(combiner: object) -> Callable[..., torch.Tensor] | None:
        """The function of a name; anything else as it is."""
        if not isinstance(combiner, str):
            return combiner
        if combiner not in COMBINERS:
            raise ValueError(
                "PretrainedEmbeddingFeatures: sequence_combiner must be one of"
                f" {', '.join(COMBINERS)}, or a callable; got {combiner!r}"
            )
        return COMBINERS[combiner]

    def _width(self, name: str) -> int | None:
        dims = self.pretrained_output_dims
        return dims.get(name) if isinstance(dims, Mapping) else dims

    def build(
        self, input_size: Sizes, schema: Schema | None = None, **_: object
    ) -> PretrainedEmbeddingFeatures:
        if self.pretrained_output_dims is not None and "projection" not in self._modules:
            self.projection = nn.ModuleDict(
                {
                    name: nn.Linear(input_size[name][-1], self._width(name))
                    for name in self.features
                    if self._width(name) is not None
                }
            )
        super().build(input_size, schema=schema)
        return self

    def forward(self, inputs: TabularData, **_: object) -> TabularData:
        outputs = {name: column(inputs, name) for name in self.features}
        if self.pretrained_output_dims is not None:
            if "projection" not in self._modules:
                raise RuntimeError(
                    "PretrainedEmbeddingFeatures: pretrained_output_dims needs build(sizes) first,"
                    " because the linear maps depend on the width of the vectors"
                )
            maps = self.projection
            outputs = {n: maps[n](v) if n in maps else v for n, v in outputs.items()}
        if self.sequence_combiner is None:
            return outputs
        combine = self.sequence_combiner
        return {n: combine(v, axis=1) if v.dim() > 2 else v for n, v in outputs.items()}

    def forward_output_size(self, input_size: Sizes) -> Sizes:
        sizes = {}
        for name in self.features:
            *leading, width = input_size[name]
            if self.sequence_combiner is not None:
                leading = leading[:1]
            sizes[name] = (*leading, self._width(name) or width)
        return sizes

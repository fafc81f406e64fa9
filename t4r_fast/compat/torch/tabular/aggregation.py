"""How features become one tensor: side by side, on an axis of their own, or summed.

The input blocks of sequences do concat and the sums in one pass with the lookup, by the op
sequence_embedding; these modules do them wherever the features are there already.
"""

from __future__ import annotations

import torch

from t4r_fast.compat.config.schema import requires_schema
from t4r_fast.compat.torch.tabular.base import (
    Sizes,
    TabularAggregation,
    TabularData,
    tabular_aggregation_registry,
)
from t4r_fast.schema import Schema


# The reference's prose names "sequential-concat"; its code knows "concat" alone.
@tabular_aggregation_registry.register_with_multiple_names("concat", "sequential-concat")
class ConcatFeatures(TabularAggregation):
    """Features side by side in the order of their names: (B, L, sum of D), or (B, sum of D).

    (B, D) features are repeated over the positions of the others. Raises ValueError when the other
    axes differ.
    """

    def forward(self, inputs: TabularData) -> torch.Tensor:
        inputs = self._expand_non_sequential_features(inputs)
        self._check_concat_shapes(inputs)
        return torch.cat([inputs[name] for name in sorted(inputs)], dim=-1)

    def forward_output_size(self, input_size: Sizes) -> tuple[int, ...]:
        return self._get_agg_output_size(input_size, sum(s[-1] for s in input_size.values()))


@tabular_aggregation_registry.register("stack")
class StackFeatures(TabularAggregation):
    """Features of one width on an axis of their own, in the order of their names.

    axis  where it stands in the output: -1 gives (B, L, D, F)

    output_size counts the axis D; the reference's leaves it out.
    """

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, inputs: TabularData) -> torch.Tensor:
        inputs = self._expand_non_sequential_features(inputs)
        _check_one_shape(self, inputs)
        return torch.stack([inputs[name] for name in sorted(inputs)], dim=self.axis)

    def forward_output_size(self, input_size: Sizes) -> tuple[int, ...]:
        size = list(self._get_agg_output_size(input_size, _one_width(self, input_size)))
        axis = self.axis if self.axis >= 0 else len(size) + 1 + self.axis
        size.insert(axis, len(input_size))
        return tuple(size)


class ElementwiseFeatureAggregation(TabularAggregation):
    """What the element-wise aggregations share: features of one width give that width."""

    def forward_output_size(self, input_size: Sizes) -> tuple[int, ...]:
        return self._get_agg_output_size(input_size, _one_width(self, input_size))


@tabular_aggregation_registry.register("element-wise-sum")
class ElementwiseSum(ElementwiseFeatureAggregation):
    """The sum of all features, which must be of one width. Raises ValueError otherwise."""

    def forward(self, inputs: TabularData) -> torch.Tensor:
        inputs = self._expand_non_sequential_features(inputs)
        _check_one_shape(self, inputs)
        return _sum(inputs[name] for name in sorted(inputs))


@tabular_aggregation_registry.register("element-wise-sum-item-multi")
@requires_schema
class ElementwiseSumItemMulti(ElementwiseFeatureAggregation):
    """The item's embedding times the sum of all other features, element by element.

    schema  names the item's column, by the tag item_id; a block built by from_schema gives its own

    Raises ValueError without a schema, or when widths differ.
    """

    def __init__(self, schema: Schema | None = None) -> None:
        super().__init__()
        self.schema = schema

    def forward(self, inputs: TabularData) -> torch.Tensor:
        self.check_schema()
        inputs = self._expand_non_sequential_features(inputs)
        _check_one_shape(self, inputs)
        item = self.schema.item_id_column_name
        others = [inputs[name] for name in sorted(inputs) if name != item]
        if not others:
            raise ValueError(
                f"ElementwiseSumItemMulti: needs a feature beside the item id {item!r}"
            )
        return inputs[item] * _sum(others)


def _sum(features) -> torch.Tensor:
    total, *rest = features
    for feature in rest:
        total = total + feature
    return total


def _check_one_shape(aggregation: TabularAggregation, inputs: TabularData) -> None:
    if len({v.shape for v in inputs.values()}) > 1:
        shapes = {k: tuple(v.shape) for k, v in inputs.items()}
        raise ValueError(
            f"{type(aggregation).__name__}: features must have one shape; got {shapes}"
        )


def _one_width(aggregation: TabularAggregation, sizes: Sizes) -> int:
    widths = {name: size[-1] for name, size in sizes.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"{type(aggregation).__name__}: features must have one width; got {widths}. Give"
            " continuous_projection, or embedding_dims"
        )
    return next(iter(widths.values()))

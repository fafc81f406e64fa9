"""Number features."""

from __future__ import annotations

import torch

from t4r_fast.compat.torch.features.base import InputBlock
from t4r_fast.compat.torch.tabular.base import (
    FilterFeatures,
    Sizes,
    TabularAggregationType,
    TabularData,
    TabularTransformationsType,
)
from t4r_fast.schema import Schema


class ContinuousFeatures(InputBlock):
    """Picks the number columns: (B, L) to (B, L, 1) and (B,) to (B, 1), in float32.

    features                       their names
    pre, post, aggregation, schema see TabularBlock
    """

    def __init__(
        self,
        features: list[str],
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        schema: Schema | None = None,
    ) -> None:
        super().__init__(pre=pre, post=post, aggregation=aggregation, schema=schema)
        self.features = sorted(features)
        self.filter_features = FilterFeatures(features)

    @classmethod
    def from_features(cls, features: list[str], **kwargs: object) -> ContinuousFeatures:
        return cls(features, **kwargs)

    @classmethod
    def from_schema(
        cls, schema: Schema, tags: object = None, **kwargs: object
    ) -> ContinuousFeatures | None:
        """For the schema's number columns with these tags, or None when there are none."""
        if tags:
            schema = schema.select_by_tag(tags)
        names = [c.name for c in schema if not c.is_categorical]
        return cls(names, schema=schema.select_by_name(names), **kwargs) if names else None

    def forward(self, inputs: TabularData, **_: object) -> TabularData:
        return {n: column(inputs, n).to(torch.float32).unsqueeze(-1) for n in self.features}

    def forward_output_size(self, input_size: Sizes) -> Sizes:
        return {name: (*input_size[name], 1) for name in self.features}


def column(inputs: TabularData, name: str) -> torch.Tensor:
    """The column of a batch. Raises KeyError that names what the batch holds."""
    try:
        return inputs[name]
    except KeyError:
        raise KeyError(f"the batch lacks the column {name!r}; it holds {sorted(inputs)}") from None

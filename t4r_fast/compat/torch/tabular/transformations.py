"""Transformations of columns and features: swap noise, layer norm, dropout."""

from __future__ import annotations

import logging

import torch
from torch import nn

from t4r_fast.compat import warn_once
from t4r_fast.compat.torch.tabular.base import (
    Sizes,
    TabularData,
    TabularTransformation,
    tabular_transformation_registry,
)
from t4r_fast.schema import Schema

LOG = logging.getLogger("t4r_fast")


@tabular_transformation_registry.register_with_multiple_names("stochastic-swap-noise", "ssn")
class StochasticSwapNoise(TabularTransformation):
    """In training, puts other values of the same column into some places of a batch.

    Of the places that are no padding each is taken with probability replacement_prob; the taken
    places of a column get different places' values of it, at random over the whole batch.

    schema            names the item column, whose padding counts for all columns. None: the block's
                      schema; without one every place counts, padding too
    pad_token         the id of padding
    replacement_prob  from 0 to 1
    noise_targets     whether the items to predict are read after the swap, so that the model learns
                      to predict noise, as in the reference. None: True, with a warning; False reads
                      them before
    together          False, the reference: each column has places and values of its own. True: one
                      place and one donor for all columns, so that an item keeps its side features

    A column is (B,), (B, L), or vectors (B, L, W), which are swapped whole. Does nothing in eval().
    Raises ValueError when replacement_prob is out of range.
    """

    def __init__(
        self,
        schema: Schema | None = None,
        pad_token: int = 0,
        replacement_prob: float = 0.1,
        noise_targets: bool | None = None,
        together: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= replacement_prob <= 1.0:
            raise ValueError(
                f"StochasticSwapNoise: replacement_prob must be from 0 to 1; got {replacement_prob}"
            )
        if noise_targets is None:
            warn_once(
                "noise_targets",
                "StochasticSwapNoise changes the items that the model must predict as well, as the"
                " reference does; give noise_targets=False to predict the true ones",
            )
        self.schema = schema
        self.pad_token = pad_token
        self.replacement_prob = replacement_prob
        self.noise_targets = noise_targets is not False
        self.together = together

    def forward(
        self,
        inputs: TabularData | torch.Tensor,
        input_mask: torch.Tensor | None = None,
        **_: object,
    ) -> TabularData | torch.Tensor:
        """The swapped dict, or tensor. input_mask (B, L) bool says where an item stands."""
        if not self.training:
            return inputs
        if not isinstance(inputs, dict):
            return self.augment(inputs, input_mask)
        if input_mask is None and self.schema is not None:
            input_mask = self.get_padding_mask_from_item_id(inputs, self.pad_token)
        if not self.together:
            return {name: self.augment(value, input_mask) for name, value in inputs.items()}
        if input_mask is None:
            raise ValueError(
                "StochasticSwapNoise: together=True needs schema or input_mask to know the places"
            )
        source = self._sources(input_mask)
        same = {n: v for n, v in inputs.items() if v.shape[:2] == input_mask.shape}
        return {**inputs, **{name: _taken(value, source) for name, value in same.items()}}

    def augment(self, input_tensor: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """One column with some of its values swapped."""
        if not self.training:
            return input_tensor
        if mask is None:
            mask = torch.ones(input_tensor.shape[:2], dtype=torch.bool, device=input_tensor.device)
        elif input_tensor.dim() == mask.dim() - 1:
            mask = mask[:, 0]
        return _taken(input_tensor, self._sources(mask))

    @torch.no_grad()
    def _sources(self, mask: torch.Tensor) -> torch.Tensor:
        """(B, L) or (B,) int64: for each place the flat place whose value it gets."""
        valid = mask.flatten()
        draws = torch.rand(2, len(valid), device=mask.device)
        swapped = valid & (draws[0] < self.replacement_prob)
        # Valid places in random order, then the others: the k-th swapped place gets the k-th of
        # them. There are at least as many valid places as swapped ones, and no host sync.
        order = torch.where(valid, draws[1], 2.0).argsort()
        donor = order[(swapped.cumsum(0) - 1).clamp(min=0)]
        own = torch.arange(len(valid), device=mask.device)
        return torch.where(swapped, donor, own).view(mask.shape)


def _taken(values: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    flat = values.reshape(source.numel(), *values.shape[source.dim() :])
    return flat[source.flatten()].view(values.shape)


@tabular_transformation_registry.register("layer-norm")
class TabularLayerNorm(TabularTransformation):
    """Layer norm of each feature by itself; features of width 1 stay as they are.

    features_dim  width by feature name; None: from the sizes that the block is built with
    """

    def __init__(self, features_dim: dict[str, int] | None = None) -> None:
        super().__init__()
        self.feature_layer_norm = nn.ModuleDict()
        self._add(features_dim or {})

    @classmethod
    def from_feature_config(cls, feature_config: dict) -> TabularLayerNorm:
        """For the tables of a feature_config."""
        return cls({name: feature.table.dim for name, feature in feature_config.items()})

    def _add(self, features_dim: dict[str, int]) -> None:
        for name, width in features_dim.items():
            if width == 1:
                LOG.warning("TabularLayerNorm: feature %s has width 1 and stays as it is", name)
            elif name not in self.feature_layer_norm:
                self.feature_layer_norm[name] = nn.LayerNorm(width)

    def build(
        self, input_size: Sizes, schema: Schema | None = None, **_: object
    ) -> TabularLayerNorm:
        if input_size is not None:
            self._add({name: size[-1] for name, size in input_size.items()})
        return super().build(input_size, schema=schema)

    def forward(self, inputs: TabularData, **_: object) -> TabularData:
        norms = self.feature_layer_norm
        return {n: norms[n](v) if n in norms else v for n, v in inputs.items()}


@tabular_transformation_registry.register("dropout")
class TabularDropout(TabularTransformation):
    """Dropout of each feature. dropout_rate: probability, 0 when it is given by name."""

    def __init__(self, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, inputs: TabularData, **_: object) -> TabularData:
        return {name: self.dropout(value) for name, value in inputs.items()}

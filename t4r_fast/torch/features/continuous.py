"""Number features."""

from __future__ import annotations

import torch
from torch import nn

from t4r_fast.schema import Schema


class ContinuousFeatures(nn.Module):
    """Picks the number columns (B, L) and stacks them to (B, L, F), sorted by name."""

    def __init__(self, features: list[str]) -> None:
        super().__init__()
        self.features = sorted(features)

    @classmethod
    def from_schema(
        cls, schema: Schema, tags: tuple[str, ...] | None = None
    ) -> ContinuousFeatures | None:
        """For the schema's number columns with these tags, or None when there are none."""
        if tags:
            schema = schema.select_by_tag(tags)
        names = [c.name for c in schema if not c.is_categorical]
        return cls(names) if names else None

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([inputs[name].to(torch.float32) for name in self.features], dim=-1)

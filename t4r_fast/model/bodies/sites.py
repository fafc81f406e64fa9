"""What the packed bodies share: places of dropout with a draw of their own, and rows of items."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# transformers' names of activations -> those of t4r_fast.activation_dropout
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}


class Drops(NamedTuple):
    """Dropout of a pass: `**drops(site)` are the options of one op."""

    probability: float
    seed: Tensor | None

    def __call__(self, site: int) -> dict[str, Any]:
        if self.seed is None or self.probability == 0:
            return {}
        return {"dropout": self.probability, "seed": self.seed, "site": site}


def at_rows(x: Tensor, places: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Vectors (R, D) and places (R,) of the rows; where rows are -1 the place is -1, too."""
    if rows is None:
        return x, places
    there = rows.clamp(min=0)
    return x.index_select(0, there), torch.where(rows < 0, -1, places[there])

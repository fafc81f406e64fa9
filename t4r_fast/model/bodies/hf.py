"""All other bodies of transformers: padded, as they want it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def padded(
    module: nn.Module,
    takes: frozenset[str],
    arguments: Mapping[str, Any],
    attention_mask: Tensor | None,
) -> Any:
    """The module's outputs for padded vectors.

    takes           what its forward accepts; other arguments are left out
    arguments       inputs_embeds (B, L, D) and what a masking gives besides
    attention_mask  (B, L) bool, what may be attended to; None: everything, padding too
    """
    given = dict(arguments)
    if attention_mask is not None:
        # XLNet subtracts it from 1.0, which the exporter to ONNX takes of floats alone
        is_xlnet = getattr(module.config, "model_type", "") == "xlnet"
        given["attention_mask"] = attention_mask.float() if is_xlnet else attention_mask.long()
    return module(**{name: value for name, value in given.items() if name in takes})


def attended(lengths: Tensor, width: int) -> Tensor:
    """(B, L) bool: the items. The first position of an empty session counts, so that no session
    attends to nothing."""
    return torch.arange(width, device=lengths.device) < lengths.clamp(min=1)[:, None]

"""Losses by their names in the reference."""

from __future__ import annotations

from typing import Any

from torch import nn


def LabelSmoothCrossEntropyLoss(  # the reference's name
    smoothing: float = 0.0, reduction: str = "mean", **kwargs: Any
) -> nn.CrossEntropyLoss:
    """torch.nn.CrossEntropyLoss(label_smoothing=smoothing, reduction=reduction, **kwargs).

    smoothing  0 <= smoothing <= 1, the share of the target that is spread over all items

    As `loss` of NextItemPredictionTask it is computed by the fused tied_softmax_loss.
    Replaces transformers4rec.torch.LabelSmoothCrossEntropyLoss.
    """
    return nn.CrossEntropyLoss(label_smoothing=smoothing, reduction=reduction, **kwargs)

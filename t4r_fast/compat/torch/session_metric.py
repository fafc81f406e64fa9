"""Metrics of tasks with one target per session. State is counts in float64: exact over batches."""

from __future__ import annotations

import torch
from torch import nn


class SessionMetric(nn.Module):
    """Sums over batches. Subclasses say what is added and what the sums mean.

    A call counts the batch in and returns the batch's own value; compute() gives the value over all
    batches since reset(), a 0-dim float32.
    """

    def __init__(self, sums: int) -> None:
        super().__init__()
        zeros = torch.zeros(sums, dtype=torch.float64)
        self.register_buffer("sums", zeros, persistent=False)

    def of_batch(self, preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What the batch adds to the sums, (sums,) float64."""
        raise NotImplementedError

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        """The metric, from the sums."""
        raise NotImplementedError

    def forward(self, preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if preds.shape != target.shape:
            raise ValueError(
                f"{type(self).__name__}: target must have the shape of preds,"
                f" {tuple(preds.shape)}; got shape {tuple(target.shape)}"
            )
        batch = self.of_batch(preds.detach(), target)
        self.sums += batch.to(self.sums.device)
        return self.value(batch).to(torch.float32)

    def compute(self) -> torch.Tensor:
        return self.value(self.sums).to(torch.float32)

    def reset(self) -> None:
        self.sums.zero_()


class _Counts(SessionMetric):
    """True and false, positives and negatives; a probability counts as 1 above one half."""

    def __init__(self) -> None:
        super().__init__(4)

    def of_batch(self, preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        said, true = preds > 0.5, target > 0.5
        counts = [said & true, said & ~true, ~said & true, ~said & ~true]
        return torch.stack([c.sum() for c in counts]).double()


class BinaryPrecision(_Counts):
    """Share of the predicted positives that are positive; 0 where none is predicted."""

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[0] / (sums[0] + sums[1]).clamp(min=1)


class BinaryRecall(_Counts):
    """Share of the positives that are predicted; 0 where there is none."""

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[0] / (sums[0] + sums[2]).clamp(min=1)


class BinaryAccuracy(_Counts):
    """Share of right predictions; 0 before the first batch."""

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        return (sums[0] + sums[3]) / sums.sum().clamp(min=1)


class MeanSquaredError(SessionMetric):
    """mean((preds - target)^2); nan before the first batch."""

    def __init__(self) -> None:
        super().__init__(2)

    def of_batch(self, preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        squares = (preds.double() - target.double()) ** 2
        return torch.stack([squares.sum(), squares.new_tensor(squares.numel())])

    def value(self, sums: torch.Tensor) -> torch.Tensor:
        return sums[0] / sums[1]

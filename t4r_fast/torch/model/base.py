"""The model: one head or several behind one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from t4r_fast.schema import Schema
from t4r_fast.torch.model.head import Head


class Model(nn.Module):
    """What the Trainer trains and what serves recommendations.

    head            one Head or several; several give dicts by position
    head_weights    factor of each head's loss, 1 by default
    head_reduction  "mean" or "sum" over the heads' losses
    top_k           inference returns (scores, ids) of the best k items instead of all scores

    forward(inputs, targets=None, training=False, testing=False): inputs is a dict of columns,
    padded on the right with 0. training or testing: dict(loss, labels, predictions); neither: the
    scores of the next item, (B, V), or (scores, ids), (B, top_k), without forming the scores.
    The caller's dict is left as it is. Replaces transformers4rec.torch.Model.
    """

    def __init__(
        self,
        *head: Head,
        head_weights: Sequence[float] | None = None,
        head_reduction: str = "mean",
        name: str | None = None,
        max_sequence_length: int | None = None,
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        if not head or not all(isinstance(h, Head) for h in head):
            raise ValueError("Model: give one Head or several: Model(Head(body, tasks))")
        if head_reduction not in ("mean", "sum"):
            raise ValueError(f"Model: head_reduction must be mean or sum; got {head_reduction!r}")
        weights = [1.0] * len(head) if head_weights is None else list(head_weights)
        if len(weights) != len(head):
            raise ValueError(f"Model: {len(head)} heads need as many head_weights; got {weights}")
        self.heads = nn.ModuleList(head)
        self.head_weights = weights
        self.head_reduction = head_reduction
        self.name = name
        self.max_sequence_length = max_sequence_length
        self.top_k = top_k

    def forward(
        self,
        inputs: dict[str, torch.Tensor],
        targets: torch.Tensor | None = None,
        training: bool = False,
        testing: bool = False,
    ):
        inputs = {
            name: column.float() if column.is_floating_point() else column
            for name, column in inputs.items()
        }
        outputs = [
            head(inputs, targets, training=training, testing=testing, top_k=self.top_k)
            for head in self.heads
        ]
        if len(outputs) == 1:
            return outputs[0]
        if not training and not testing:
            return outputs
        losses = [o["loss"] * w for o, w in zip(outputs, self.head_weights, strict=True)]
        total = torch.stack(losses)
        return {
            "loss": total.mean() if self.head_reduction == "mean" else total.sum(),
            "labels": [o["labels"] for o in outputs],
            "predictions": [o["predictions"] for o in outputs],
        }

    # -- metrics ---------------------------------------------------------------------------------

    def calculate_metrics(self, predictions, targets) -> dict[str, torch.Tensor]:
        """Count the outputs of a batch into the metrics; returns the batch's own values."""
        if len(self.heads) == 1:
            return self.heads[0].calculate_metrics(predictions, targets)
        found = {}
        for head, p, t in zip(self.heads, predictions, targets, strict=True):
            found.update(head.calculate_metrics(p, t))
        return found

    def compute_metrics(self, mode: str | None = None) -> dict[str, torch.Tensor]:
        """The metrics over all batches since reset_metrics(), 0-dim tensors by key."""
        found = {}
        for head in self.heads:
            found.update(head.compute_metrics(mode))
        return found

    def reset_metrics(self) -> None:
        for head in self.heads:
            head.reset_metrics()

    # -- what it is made of ----------------------------------------------------------------------

    @property
    def prediction_tasks(self) -> list[nn.Module]:
        return [task for head in self.heads for task in head.prediction_task_dict.values()]

    @property
    def input_schema(self) -> Schema | None:
        """The columns that the first head's input block reads."""
        inputs = self.heads[0].inputs
        return None if inputs is None else inputs.schema

"""The model: one head or several behind one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from t4r_fast.schema import Schema
from t4r_fast.torch.model.head import Head, reduced
from t4r_fast.torch.model.task import PredictionTask

__all__ = ["Head", "Model", "PredictionTask"]


class Model(nn.Module):
    """What the Trainer trains and what serves recommendations.

    head            one Head or several; their tasks need different names
    head_weights    factor of each head's loss, 1 by default
    head_reduction  "mean" or "sum" over the heads' losses
    top_k           inference returns (scores, ids) of the best k items instead of all scores

    forward(inputs, targets=None, training=False, testing=False): inputs is a dict of columns,
    padded on the right with 0; targets one tensor, or a dict with the target_name of each task.
    training or testing: dict(loss, labels, predictions); neither: the predictions. Of the next-item
    task these are the scores of all items, (B, V), or (scores, ids), (B, top_k), without forming
    the scores. Labels and predictions of several tasks are dicts by task name.
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
        names = [name for h in head for name in h.prediction_task_dict]
        if len(set(names)) != len(names):
            raise ValueError(f"Model: tasks need different names, over all heads; got {names}")
        self.heads = nn.ModuleList(head)
        self.head_weights = weights
        self.head_reduction = head_reduction
        self.name = name
        self.max_sequence_length = max_sequence_length
        self.top_k = top_k

    def forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        targets: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        training: bool = False,
        testing: bool = False,
    ) -> Any:
        inputs = {
            name: column.float() if column.is_floating_point() else column
            for name, column in inputs.items()
        }
        if not training and not testing:
            found: dict[str, Any] = {}
            for head in self.heads:
                found.update(head(inputs, call_body=True, top_k=self.top_k))
            return _one_or_all(found)
        losses: list[torch.Tensor] = []
        labels: dict[str, Any] = {}
        predictions: dict[str, Any] = {}
        for head, weight in zip(self.heads, self.head_weights, strict=True):
            output = head(
                inputs, call_body=True, targets=targets, training=training, testing=testing
            )
            losses.append(output["loss"] * weight)
            labels.update(output["labels"])
            predictions.update(output["predictions"])
        return {
            "loss": reduced(losses, self.head_reduction),
            "labels": _one_or_all(labels),
            "predictions": _one_or_all(predictions),
        }

    # -- metrics ---------------------------------------------------------------------------------

    def calculate_metrics(self, predictions: Any, targets: Any) -> dict[str, torch.Tensor]:
        """Count the outputs of a batch into the metrics; returns the batch's own values."""
        found = {}
        for head in self.heads:
            found.update(head.calculate_metrics(predictions, targets))
        return found

    def compute_metrics(self, mode: str | None = None) -> dict[str, Any]:
        """The metrics over all batches since reset_metrics(), 0-dim tensors by key. A head with
        several tasks gives a dict of them by task name, after `mode` where it is given."""
        found = {}
        for head in self.heads:
            found.update(head.compute_metrics(mode))
        return found

    def reset_metrics(self) -> None:
        for head in self.heads:
            head.reset_metrics()

    # -- what it is made of ----------------------------------------------------------------------

    @property
    def prediction_tasks(self) -> list[PredictionTask]:
        return [task for head in self.heads for task in head.prediction_task_dict.values()]

    @property
    def input_schema(self) -> Schema | None:
        """The columns that the first head's input block reads."""
        inputs = self.heads[0].inputs
        return None if inputs is None else inputs.schema


def _one_or_all(by_task: dict[str, Any]) -> Any:
    return next(iter(by_task.values())) if len(by_task) == 1 else by_task

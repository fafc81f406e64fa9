"""The head: a body and the tasks that read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from t4r_fast.torch.block.base import BlockBase
from t4r_fast.torch.model.prediction_task import NextItemPredictionTask


class Head(nn.Module):
    """Runs the body, then each task, and joins the losses.

    body              SequentialBlock(inputs, ..., transformer or GRU)
    prediction_tasks  a task or several
    task_weights      factor of each task's loss, 1 by default
    loss_reduction    "mean" or "sum" over the weighted losses
    inputs            the input block; None: the first block of the body

    With one task the output is the task's own; with several, `labels` and `predictions` are dicts
    by task name. Replaces transformers4rec.torch.Head.
    """

    def __init__(
        self,
        body: BlockBase,
        prediction_tasks: NextItemPredictionTask | Sequence[NextItemPredictionTask],
        task_weights: Sequence[float] | None = None,
        loss_reduction: str = "mean",
        inputs: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"Head: loss_reduction must be mean or sum; got {loss_reduction!r}")
        tasks = [prediction_tasks] if isinstance(prediction_tasks, nn.Module) else prediction_tasks
        names = [task.task_name for task in tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"Head: tasks need different names; got {names}")
        weights = [1.0] * len(names) if task_weights is None else list(task_weights)
        if len(weights) != len(names):
            raise ValueError(f"Head: {len(names)} tasks need as many task_weights; got {weights}")
        self.body = body
        self.loss_reduction = loss_reduction
        self._task_weights = dict(zip(names, weights, strict=True))
        inputs = getattr(body, "inputs", None) if inputs is None else inputs
        for task in tasks:
            task.build(body, body.output_size(), inputs)
        self.prediction_task_dict = nn.ModuleDict(dict(zip(names, tasks, strict=True)))

    @property
    def inputs(self) -> nn.Module | None:
        return getattr(self.body, "inputs", None)

    def forward(
        self,
        inputs: dict[str, torch.Tensor],
        targets: torch.Tensor | None = None,
        training: bool = False,
        testing: bool = False,
        top_k: int | None = None,
    ):
        hidden = self.body(inputs, training=training, testing=testing)
        outputs = {
            name: task(hidden, targets, training=training, testing=testing, top_k=top_k)
            for name, task in self.prediction_task_dict.items()
        }
        if len(outputs) == 1:
            (name, output), *_ = outputs.items()
            if isinstance(output, dict) and self._task_weights[name] != 1.0:
                output["loss"] = output["loss"] * self._task_weights[name]
            return output
        if not training and not testing:
            return outputs
        losses = torch.stack([o["loss"] * self._task_weights[n] for n, o in outputs.items()])
        return {
            "loss": losses.mean() if self.loss_reduction == "mean" else losses.sum(),
            "labels": {n: o["labels"] for n, o in outputs.items()},
            "predictions": {n: o["predictions"] for n, o in outputs.items()},
        }

    def calculate_metrics(self, predictions, targets) -> dict[str, torch.Tensor]:
        tasks = self.prediction_task_dict
        if len(tasks) == 1:
            return next(iter(tasks.values())).calculate_metrics(predictions, targets)
        found = {}
        for name, task in tasks.items():
            found.update(task.calculate_metrics(predictions[name], targets[name]))
        return found

    def compute_metrics(self, mode: str | None = None) -> dict[str, torch.Tensor]:
        found = {}
        for task in self.prediction_task_dict.values():
            found.update(task.compute_metrics(mode))
        return found

    def reset_metrics(self) -> None:
        for task in self.prediction_task_dict.values():
            task.reset_metrics()

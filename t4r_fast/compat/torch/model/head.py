"""The head: a body and the tasks that read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t4r_fast.compat.torch.block.base import BlockBase, BuildableBlock, size_of
from t4r_fast.compat.torch.mixins import LossMixin, MetricsMixin
from t4r_fast.compat.torch.model import passes
from t4r_fast.compat.torch.model.prediction_task import Asked, NextItemPredictionTask
from t4r_fast.compat.torch.model.session_task import BinaryClassificationTask, RegressionTask
from t4r_fast.compat.torch.model.task import PredictionTask
from t4r_fast.schema import Schema, Tags

if TYPE_CHECKING:
    from t4r_fast.compat.torch.model.base import Model

# A block or a recipe for all tasks, or one for each by task name.
TaskBlocks = BuildableBlock | nn.Module | Mapping[str, BuildableBlock | nn.Module]


class Head(nn.Module, LossMixin, MetricsMixin):
    """Runs the body, then each task, and joins the losses.

    body              SequentialBlock(inputs, ..., transformer or GRU)
    prediction_tasks  a task or several
    task_blocks       what stands between the body and the tasks: a block or recipe for all of them,
                      each with its own weights, or a dict of them by task name. It goes before the
                      task's own task_block
    task_weights      factor of each task's loss, 1 by default
    loss_reduction    "mean" or "sum" over the weighted losses
    inputs            the input block; None: the first block of the body

    forward(body_outputs, training, testing, targets, call_body): training or testing: dict(loss,
    labels, predictions), labels and predictions by task name; neither: predictions by task name.
    call_body=True: body_outputs are the batch's columns, and the body runs first. targets is one
    tensor for all tasks, or a dict with the target_name of each.
    Raises ValueError when two tasks have one name or weights do not fit.
    Replaces transformers4rec.torch.Head.
    """

    def __init__(
        self,
        body: BlockBase,
        prediction_tasks: PredictionTask | Sequence[PredictionTask],
        task_blocks: TaskBlocks | None = None,
        task_weights: Sequence[float] | None = None,
        loss_reduction: str = "mean",
        inputs: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(f"Head: loss_reduction must be mean or sum; got {loss_reduction!r}")
        single = isinstance(prediction_tasks, nn.Module)
        tasks = [prediction_tasks] if single else list(prediction_tasks)
        if not tasks:
            raise ValueError("Head: give at least one prediction task")
        names = [task.task_name for task in tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"Head: tasks need different names; got {names}")
        weights = [1.0] * len(names) if task_weights is None else list(task_weights)
        if len(weights) != len(names):
            raise ValueError(f"Head: {len(names)} tasks need as many task_weights; got {weights}")
        self.body = body
        self.loss_reduction = loss_reduction
        self._task_weights = dict(zip(names, weights, strict=True))
        self.prediction_task_dict = nn.ModuleDict(dict(zip(names, tasks, strict=True)))
        self.build(inputs, task_blocks=task_blocks)

    def build(
        self,
        inputs: nn.Module | None = None,
        device: torch.device | str | None = None,
        task_blocks: TaskBlocks | None = None,
    ) -> None:
        """Make the layers of all tasks for the body's output, with fresh weights; the constructor
        calls this. For the arguments see the class; device is where the head goes.

        Raises ValueError for a body without an output size and blocks of unknown tasks.
        """
        tasks = self.prediction_task_dict
        by_name = isinstance(task_blocks, Mapping)
        if by_name and not set(task_blocks) <= set(tasks):
            raise ValueError(
                f"Head: task_blocks for {sorted(task_blocks)}, the tasks are {list(tasks)}"
            )
        self.input_size = size_of(self.body)
        inputs = getattr(self.body, "inputs", None) if inputs is None else inputs
        if device is not None:
            self.to(device)
        for name, task in tasks.items():
            block = task_blocks.get(name) if by_name else task_blocks
            task.build(self.body, self.input_size, inputs, device=device, task_block=block)

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        body: BlockBase,
        task_blocks: TaskBlocks | None = None,
        task_weight_dict: Mapping[str, float] | None = None,
        loss_reduction: str = "mean",
        inputs: nn.Module | None = None,
    ) -> Head:
        """A head with a task for each target in the schema.

        schema            columns tagged "binary_classification" (or "binary" and "classification")
                          get a BinaryClassificationTask, "regression" a RegressionTask
        task_weight_dict  factor of the loss by column, 1 where none is given

        The other arguments are those of Head. Raises ValueError when no column has such a tag or
        task_weight_dict names another column.
        """
        kinds = [(c.name, BinaryClassificationTask) for c in schema if _is_binary(c.tags)]
        kinds += [(c.name, RegressionTask) for c in schema.select_by_tag(Tags.REGRESSION)]
        if not kinds:
            raise ValueError(
                "Head.from_schema: no column carries a tag of a target, binary_classification or"
                f" regression; the columns are {schema.column_names}"
            )
        weights = dict(task_weight_dict or {})
        unknown = sorted(set(weights) - {name for name, _ in kinds})
        if unknown:
            raise ValueError(
                f"Head.from_schema: task_weight_dict names {unknown}; the targets are"
                f" {[name for name, _ in kinds]}"
            )
        return cls(
            body,
            [kind(name) for name, kind in kinds],
            task_blocks=task_blocks,
            task_weights=[weights.get(name, 1.0) for name, _ in kinds],
            loss_reduction=loss_reduction,
            inputs=inputs,
        )

    @property
    def inputs(self) -> nn.Module | None:
        return getattr(self.body, "inputs", None)

    @property
    def task_blocks(self) -> dict[str, nn.Module | None]:
        return {name: task.task_block for name, task in self.prediction_task_dict.items()}

    def to_model(self, **kwargs: Any) -> Model:
        """Model(this head); kwargs are those of Model."""
        from t4r_fast.compat.torch.model.base import Model

        return Model(self, **kwargs)

    def pop_labels(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Take the targets out of a batch: by task name, those of tasks that have a target_name."""
        tasks = self.prediction_task_dict.items()
        return {n: inputs.pop(t.target_name) for n, t in tasks if t.target_name is not None}

    # -- the pass --------------------------------------------------------------------------------

    def forward(
        self,
        body_outputs: Any,
        training: bool = False,
        testing: bool = False,
        targets: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        call_body: bool = False,
        top_k: int | None = None,
        asked: Asked | None = None,
    ) -> dict[str, Any]:
        tasks = self.prediction_task_dict
        if call_body:
            asked = Asked(top_k) if asked is None else asked
            outputs = passes.outputs(
                self.body, tasks, body_outputs, targets, training, testing, asked
            )
        else:
            outputs = {}
            for name, task in tasks.items():
                target = targets.get(task.target_name) if isinstance(targets, Mapping) else targets
                options = {"top_k": top_k} if isinstance(task, NextItemPredictionTask) else {}
                outputs[name] = task(
                    body_outputs, targets=target, training=training, testing=testing, **options
                )
        if not training and not testing:
            return outputs
        losses = [o["loss"] * self._task_weights[n] for n, o in outputs.items()]
        return {
            "loss": reduced(losses, self.loss_reduction),
            "labels": {n: o["labels"] for n, o in outputs.items()},
            "predictions": {n: o["predictions"] for n, o in outputs.items()},
        }

    # -- metrics ---------------------------------------------------------------------------------

    def calculate_metrics(self, predictions: Any, targets: Any) -> dict[str, torch.Tensor]:
        """Count a batch into the metrics; returns the batch's own values by key."""
        found = {}
        for name, task in self.prediction_task_dict.items():
            found.update(
                task.calculate_metrics(
                    predictions[name] if isinstance(predictions, Mapping) else predictions,
                    targets[name] if isinstance(targets, Mapping) else targets,
                )
            )
        return found

    def compute_metrics(self, mode: str | None = None) -> dict[str, Any]:
        """The metrics over all batches since reset_metrics(), by key. With several tasks: a dict of
        them by task name, after `mode` and an underscore where it is given."""
        found = {name: task.compute_metrics() for name, task in self.prediction_task_dict.items()}
        if len(found) == 1:
            return next(iter(found.values()))
        return {f"{mode}_{name}" if mode else name: values for name, values in found.items()}

    def reset_metrics(self) -> None:
        for task in self.prediction_task_dict.values():
            task.reset_metrics()


def reduced(losses: list[torch.Tensor], reduction: str) -> torch.Tensor:
    """Mean or sum; one loss stays what it is."""
    if len(losses) == 1:
        return losses[0]
    total = torch.stack(losses)
    return total.mean() if reduction == "mean" else total.sum()


def _is_binary(tags: Sequence[str]) -> bool:
    both = {"binary", "classification"} <= set(tags)
    return both or Tags.BINARY_CLASSIFICATION.value in tags

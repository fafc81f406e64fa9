"""The model: one head or several behind one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from t4r_fast.compat import get_compat, warn_once
from t4r_fast.compat.torch.mixins import LossMixin, MetricsMixin
from t4r_fast.compat.torch.model import fitting, growing, lightning, recommending
from t4r_fast.compat.torch.model.head import Head, reduced
from t4r_fast.compat.torch.model.prediction_task import Asked, NextItemPredictionTask
from t4r_fast.compat.torch.model.task import PredictionTask, name_fn
from t4r_fast.compat.torch.padding import is_ragged, model_padding, pad_inputs
from t4r_fast.model import store
from t4r_fast.schema import ColumnSchema, IntDomain, Schema, Tags, ValueCount

__all__ = ["Head", "Model", "PredictionTask", "name_fn"]


class Model(nn.Module, LossMixin, MetricsMixin):
    """What the Trainer trains and what serves recommendations.

    head            one Head or several; their tasks need different names
    head_weights    factor of each head's loss, 1 by default
    head_reduction  "mean" or "sum" over the heads' losses
    optimizer       optimizer class of fit()
    name            what the model is called when printed
    max_sequence_length  to which ragged columns are cut; the newest items stay, at compat 0.1 the
                    oldest
    top_k           inference returns (scores, ids) of the best k items instead of all scores

    forward(inputs, targets=None, training=False, testing=False): inputs is a dict of columns,
    padded on the right, or ragged, `x__values` and `x__offsets`; targets is one tensor, or a
    dict with the target_name of each task. training or testing: dict(loss, labels, predictions);
    neither: the predictions. Of the next-item task these are the scores of all items, (B, V), or
    (scores, ids), (B, top_k), without forming the scores. Labels and predictions of several tasks
    are dicts by task name.
    The caller's dict is left as it is. Replaces transformers4rec.torch.Model.
    """

    _saved_as_set = ("name", "max_sequence_length", "top_k")

    def __init__(
        self,
        *head: Head,
        head_weights: Sequence[float] | None = None,
        head_reduction: str = "mean",
        optimizer: type[torch.optim.Optimizer] = torch.optim.Adam,
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
        self.optimizer = optimizer
        self.name = name
        self.max_sequence_length = max_sequence_length
        self.top_k = top_k
        self._level = get_compat()  # that of its parts, which were built just before

    def forward(
        self,
        inputs: Mapping[str, torch.Tensor],
        targets: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
        training: bool = False,
        testing: bool = False,
        *,
        asked: Asked | None = None,
    ) -> Any:
        pads = model_padding(self) if is_ragged(inputs) else None
        padded = pad_inputs(inputs, self.max_sequence_length, self._level != "0.1", pads)
        inputs = {
            name: column.float() if column.is_floating_point() else column
            for name, column in padded.items()
        }
        if isinstance(targets, Mapping) and not targets:
            targets = None
        if not training and not testing:
            found: dict[str, Any] = {}
            asked = Asked(self.top_k) if asked is None else asked
            for head in self.heads:
                found.update(head(inputs, call_body=True, asked=asked))
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

    def recommend(
        self,
        inputs: Mapping[str, torch.Tensor],
        top_k: int = 20,
        *,
        recommend_from: int | None = None,
        recommend_seen: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best next items of each session, without dropout and gradients.

        inputs          as for forward(): padded columns, or ragged `x__values` and `x__offsets`
        top_k           1 to 128
        recommend_from  the lowest item id to recommend; 3 leaves out padding and the ids of
                        missing and unknown items. None: as the task was built
        recommend_seen  False: no item of the session itself. None: as the task was built
        returns         scores (B, top_k) float32, at compat 0.1 log-probabilities, and ids (B,
                        top_k) int64, best first, equal scores by id; where fewer items are left
                        score -inf and id -1

        Ids outside a table, missing columns, sessions without items and columns of different shapes
        raise InputError with the column's name. Threads may call it at the same time on a model in
        evaluation mode; one in training mode is put in evaluation mode for the call.
        """
        return recommending.recommend(self, inputs, top_k, recommend_from, recommend_seen)

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

    # -- training and evaluation -----------------------------------------------------------------

    def fit(
        self,
        dataloader: Iterable[Any],
        optimizer: type[torch.optim.Optimizer]
        | torch.optim.Optimizer
        | Callable[[Any], Any]
        | None = None,
        eval_dataloader: Iterable[Any] | None = None,
        num_epochs: int = 1,
        amp: bool = False,
        train: bool = True,
        verbose: bool = True,
        compute_metric: bool = True,
    ) -> np.ndarray:
        """Train on batches, inputs or (inputs, targets).

        optimizer        a class or function called with the parameters, or an optimizer. None: the
                         model's own, torch.optim.Adam by default
        eval_dataloader  evaluated after each epoch
        amp              mixed precision: float16 with scaled gradients on a GPU, else bfloat16
        train            False: compute the losses alone
        verbose          progress bars and metrics of each epoch on the console
        compute_metric   count the training batches into the metrics, from the scores of all items
        returns          mean loss of each epoch, (num_epochs,) float64

        Metrics hold the last epoch's batches afterwards, or its evaluation. For schedules,
        checkpoints and logs take the Trainer.
        """
        return fitting.fit(
            self,
            dataloader,
            self.optimizer if optimizer is None else optimizer,
            eval_dataloader,
            num_epochs,
            amp,
            train,
            verbose,
            compute_metric,
        )

    def evaluate(
        self,
        dataloader: Iterable[Any],
        targets: object = None,
        training: bool = False,
        testing: bool = True,
        verbose: bool = True,
        mode: str = "eval",
    ) -> dict[str, Any]:
        """The metrics over all batches, as compute_metrics(mode) gives them.

        Without dropout and gradients; the reference evaluates with both. `targets` has no effect,
        as in the reference: batches bring theirs.
        """
        if targets is not None:
            warn_once("Model.evaluate targets", "targets has no effect: batches bring theirs")
        return fitting.evaluate(self, dataloader, training, testing, verbose, mode)

    def to_lightning(self) -> Any:
        """A LightningModule that trains this model, for the Trainer of PyTorch Lightning.

        The optimizer is the model's own with a learning rate of 1e-3; "train_loss" is logged. Of
        pytorch_lightning, or else of lightning.pytorch. Raises ModuleNotFoundError where neither is
        installed.
        """
        return lightning.as_lightning(self)

    # -- new items -------------------------------------------------------------------------------

    def grow_items(self, items: Schema | int) -> Model:
        """This model with more rows in its tables, for products that came after training.

        items    a schema with the new numbers of every id column, such as that of
                 Workflow.update(...).schema(), or the new number of item ids (rows)
        returns  a new Model; this one stays as it is

        Old ids keep their vectors, so scores of old items do not change. Each component of a new
        row is drawn from a normal distribution with the mean and deviation of the old rows, by
        torch's generator; a new bias is their mean. Give the new model an optimizer or Trainer of
        its own. Raises InputError where a table would shrink, or the model cannot be saved.
        """
        return growing.grow_items(self, items)

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], model_name: str = store.DEFAULT_NAME) -> None:
        """Write <model_name>.json and <model_name>.safetensors to the folder: all of the model.

        Nothing is pickled. `top_k`, `max_sequence_length` and `name` may be set at any time; other
        changes to a built model are found and refused. Raises InputError for a model that holds
        classes which t4r_fast.torch does not know; see t4r_fast.torch.saveable.
        """
        store.save(self, path, model_name)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model_name: str = store.DEFAULT_NAME) -> Model:
        """The model that save() or a training run wrote to the folder; see
        t4r_fast.torch.load_model."""
        return store.load_named(path, model_name)

    # -- what it is made of ----------------------------------------------------------------------

    def _get_name(self) -> str:
        return self.name or super()._get_name()

    @property
    def prediction_tasks(self) -> list[PredictionTask]:
        return [task for head in self.heads for task in head.prediction_task_dict.values()]

    @property
    def input_schema(self) -> Schema | None:
        """The columns that the heads' input blocks read; None where one does not know."""
        found = Schema()
        for head in self.heads:
            schema = getattr(head.inputs, "schema", None)
            if schema is None:
                return None
            found = found + schema
        return found

    @property
    def output_schema(self) -> Schema:
        """The columns of what inference gives: for each task its name, a float column; with top_k
        the next-item task gives item_id_scores and item_ids, lists of top_k. The reference states
        as many entries as there are items."""
        columns = []
        for task in self.prediction_tasks:
            if not isinstance(task, NextItemPredictionTask):
                lists = ValueCount(1, 0) if task.summary_type is None else None
                columns.append(ColumnSchema(task.task_name, "FLOAT", value_count=lists))
            elif self.top_k is None:
                count = ValueCount(task.target_dim, task.target_dim)
                columns.append(ColumnSchema(task.task_name, "FLOAT", value_count=count))
            else:
                count = ValueCount(self.top_k, self.top_k)
                domain = IntDomain("item_ids", 0, task.target_dim - 1, True)
                ids = {"tags": [Tags.CATEGORICAL], "int_domain": domain, "value_count": count}
                columns.append(ColumnSchema("item_id_scores", "FLOAT", value_count=count))
                columns.append(ColumnSchema("item_ids", "INT", **ids))
        return Schema(columns)


def _one_or_all(by_task: dict[str, Any]) -> Any:
    return next(iter(by_task.values())) if len(by_task) == 1 else by_task

"""What all prediction tasks have in common: a summary of the sequence, a loss, metrics, names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t4r_fast.compat import warn_once
from t4r_fast.compat.torch.block.base import BuildableBlock
from t4r_fast.compat.torch.mixins import LossMixin, MetricsMixin

if TYPE_CHECKING:
    from t4r_fast.compat.torch.features.sequence import Encoded

SUMMARIES = ("last", "first", "mean", "cls_index")
# Losses whose targets are class numbers; all others get floats, as in the reference.
_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)


def snake_case(name: str) -> str:
    """BinaryPrecision -> binary_precision, NDCGAt -> ndcg_at: class names in metric keys."""
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
    return re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", parts).lower()


def name_fn(name: str | None, inp: str) -> str | None:
    """ "name/inp", a key of metrics; None without a name."""
    return f"{name}/{inp}" if name else None


def _as_it_is(predictions: torch.Tensor) -> torch.Tensor:
    return predictions


class PredictionTask(nn.Module, LossMixin, MetricsMixin):
    """One prediction of a model with its loss and its metrics.

    loss                      module called as loss(predictions, target=targets)
    metrics                   modules with __call__(predictions, targets), compute() and reset():
                              ours, or torchmetrics'
    target_name               key of its targets where a batch brings a dict of them
    task_name                 prefix of the metric keys. None: target_name/<class name>
    forward_to_prediction_fn  what the metrics get, made of the predictions; the loss gets the
                              predictions
    task_block                what stands between the body and `pre`: a block or a recipe
    pre                       the output layer: a block or a recipe. None: the summary itself
    summary_type              how (B, L, D) becomes (B, D): "last", "first", "mean", or "cls_index"
                              (the last). None: it stays, and targets are (B, L)
    ignore_padding            "last" is the last item and "mean" is over items. False: the last
                              position and all positions, padding included, as in the reference.
                              None: False, with a warning. True needs an input block with item ids

    forward(inputs, targets, training, testing): (B, L, D) or (B, D) -> dict(loss, labels,
    predictions) in training and evaluation, predictions alone for inference.
    Raises ValueError on an unknown summary and on targets that are missing or of another shape.
    Replaces transformers4rec.torch.PredictionTask.
    """

    #: Values of a target, and so the width of the output.
    target_dim: int | None = None

    def __init__(
        self,
        loss: nn.Module,
        metrics: Iterable[nn.Module] | None = None,
        target_name: str | None = None,
        task_name: str | None = None,
        forward_to_prediction_fn: Callable[[torch.Tensor], torch.Tensor] = _as_it_is,
        task_block: BuildableBlock | nn.Module | None = None,
        pre: BuildableBlock | nn.Module | None = None,
        summary_type: str | None = "last",
        ignore_padding: bool | None = None,
    ) -> None:
        super().__init__()
        if summary_type not in (None, *SUMMARIES):
            raise ValueError(
                f"{type(self).__name__}: summary_type must be one of {', '.join(SUMMARIES)} or"
                f" None; got {summary_type!r}"
            )
        if ignore_padding and summary_type not in ("last", "mean", "cls_index"):
            raise ValueError(
                f"{type(self).__name__}: ignore_padding=True goes with summary_type 'last',"
                f" 'cls_index' or 'mean'; got {summary_type!r}"
            )
        self.loss = loss
        self.set_metrics(metrics)
        self.target_name = target_name
        self._task_name = task_name
        self.forward_to_prediction_fn = forward_to_prediction_fn
        self._task_block, self._pre = task_block, pre
        self.task_block: nn.Module | None = None
        self.pre: nn.Module | None = None
        self.summary_type = summary_type
        self.ignore_padding = ignore_padding
        self._item_ids: tuple[nn.Module, ...] = ()  # in a tuple: no submodule of the task

    # -- building --------------------------------------------------------------------------------

    def build(
        self,
        body: nn.Module,
        input_size: tuple[int, ...],
        inputs: nn.Module | None = None,
        device: torch.device | str | None = None,
        task_block: BuildableBlock | nn.Module | None = None,
        pre: BuildableBlock | nn.Module | None = None,
    ) -> None:
        """Make task_block and pre for the body's output; a Head calls this.

        Modules are copied, so that a block given for several tasks is not shared between them.
        """
        self.task_block = built(self._task_block if task_block is None else task_block, input_size)
        size = input_size if self.task_block is None else self.task_block.output_size()
        if self.task_block is None and self.summary_type is not None and len(size) == 3:
            size = (size[0], size[2])
        self.pre = built(self._pre if pre is None else pre, size)
        self._check_padding(input_size, inputs)
        if device is not None:
            self.to(device)

    def _check_padding(self, input_size: tuple[int, ...], inputs: nn.Module | None) -> None:
        summed_up = len(input_size) == 3 and self.summary_type not in (None, "first")
        categorical = getattr(inputs, "categorical_module", None)
        if self.ignore_padding:
            if getattr(inputs, "item_id", None) is None:
                raise ValueError(
                    f"{type(self).__name__}: ignore_padding=True needs an input block with a column"
                    " tagged item_id, which shows where padding begins; give Head(..., inputs=...)"
                )
            self._item_ids = (categorical,)
        elif self.ignore_padding is None and summed_up:
            warn_once(
                "ignore_padding",
                f"summary_type={self.summary_type!r} reads padding like items, as in"
                f" Transformers4Rec; give {type(self).__name__}(..., ignore_padding=True)",
            )

    # -- the pass --------------------------------------------------------------------------------

    def summary(self, inputs: torch.Tensor, item_ids: torch.Tensor | None = None) -> torch.Tensor:
        """(B, L, D) -> (B, D); anything else stays as it is.

        item_ids  (B, L) of this batch; None: those that the input block has noted last
        """
        if inputs.dim() != 3 or self.summary_type is None:
            return inputs
        if self.summary_type == "first":
            return inputs[:, 0]
        if not self.ignore_padding:
            return inputs.mean(dim=1) if self.summary_type == "mean" else inputs[:, -1]
        (categorical,) = self._item_ids
        item_ids = categorical.item_seq if item_ids is None else item_ids
        item = item_ids != getattr(categorical, "padding_idx", 0)  # (B, L)
        count = item.sum(dim=1)
        if self.summary_type == "mean":
            # masked modelling appends a position at inference, which is none of the items
            items = inputs[:, : item.shape[1]]
            total = torch.where(item.unsqueeze(-1), items, 0.0).sum(dim=1)
            return total / count.clamp(min=1).unsqueeze(-1)
        last = (count - 1).clamp(min=0)
        return inputs[torch.arange(len(inputs), device=inputs.device), last]

    def forward(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor, ...],
        targets: torch.Tensor | None = None,
        training: bool = False,
        testing: bool = False,
    ) -> dict[str, torch.Tensor] | torch.Tensor:
        return self.run(inputs, None, targets, training, testing)

    def run(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor, ...],
        batch: Encoded | None,
        targets: torch.Tensor | None = None,
        training: bool = False,
        testing: bool = False,
        **_: object,
    ) -> dict[str, torch.Tensor] | torch.Tensor:
        """forward() on a batch that is given as a value; None: the one that was noted last."""
        if isinstance(inputs, (tuple, list)):  # GRU: (outputs, state)
            inputs = inputs[0]
        x = self.summary(inputs.float(), None if batch is None else batch.item_ids)
        if self.task_block is not None:
            x = self.task_block(x)
        if self.pre is not None:
            x = self.pre(x)
        if not training and not testing:
            return x
        self._check_targets(targets)
        with torch.autocast(x.device.type, enabled=False):  # BCELoss refuses half precision
            x = x.float()
            if not isinstance(self.loss, _OF_CLASSES):
                targets = targets.float()
            loss = self.loss(x, target=targets)
        return {"loss": loss, "labels": targets, "predictions": x}

    def _check_targets(self, targets: torch.Tensor | None) -> None:
        if targets is None:
            named = repr(self.target_name) if self.target_name else "a target"
            raise ValueError(
                f"{type(self).__name__}: the batch brings no {named}; let the data loader give"
                " (inputs, targets), e.g. by the tag 'target' of the column in the schema"
            )
        if self.summary_type is None and targets.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}: with summary_type=None targets must be (sessions,"
                f" positions); got shape {tuple(targets.shape)}"
            )

    # -- metrics ---------------------------------------------------------------------------------

    def set_metrics(self, metrics: Iterable[nn.Module] | None) -> None:
        self.metrics = nn.ModuleList(metrics or ())

    def calculate_metrics(self, predictions: Any, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Count a batch into the metrics; returns the batch's own values by key."""
        found = self.forward_to_prediction_fn(predictions)
        return {self.metric_name(m): m(found, targets) for m in self.metrics}

    def compute_metrics(self) -> dict[str, torch.Tensor]:
        """The metrics over all batches since the last reset, by key, e.g. next-item/ndcg_at_10."""
        return {self.metric_name(m): m.compute() for m in self.metrics}

    def reset_metrics(self) -> None:
        for metric in self.metrics:
            metric.reset()

    # -- names, and what it becomes --------------------------------------------------------------

    @property
    def task_name(self) -> str:
        if self._task_name:
            return self._task_name
        kind = snake_case(type(self).__name__)
        return name_fn(self.target_name, kind) or kind

    def child_name(self, name: str) -> str:
        """task_name/name."""
        return name_fn(self.task_name, name)

    def metric_name(self, metric: nn.Module) -> str:
        return self.child_name(snake_case(type(metric).__name__))

    def to_head(self, body: nn.Module, inputs: nn.Module | None = None, **kwargs: Any):
        """Head(body, this task); kwargs are those of Head."""
        from t4r_fast.compat.torch.model.head import Head

        return Head(body, self, inputs=inputs, **kwargs)

    def to_model(self, body: nn.Module, inputs: nn.Module | None = None, **kwargs: Any):
        """Model(Head(body, this task)); kwargs are those of Model."""
        return self.to_head(body, inputs).to_model(**kwargs)


def built(
    block: BuildableBlock | nn.Module | None, input_size: tuple[int, ...]
) -> nn.Module | None:
    """A copy of a block, what a recipe gives for this size, None for None."""
    if isinstance(block, nn.Module):
        return copy.deepcopy(block)
    return None if block is None else block.build(input_size)

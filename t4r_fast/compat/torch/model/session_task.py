"""Tasks with one target per session (or per position): is it bought, for how much."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn

from t4r_fast.compat.torch.block.base import BuildableBlock, SequentialBlock, Size
from t4r_fast.compat.torch.model.task import PredictionTask
from t4r_fast.compat.torch.session_metric import (
    BinaryAccuracy,
    BinaryPrecision,
    BinaryRecall,
    MeanSquaredError,
)


class _WithoutLastAxis(nn.Module):
    """(..., 1) -> (...)"""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.squeeze(-1)


class BinaryClassificationPrepareBlock(BuildableBlock):
    """Output layer of BinaryClassificationTask: a linear map without bias to one probability."""

    def build(self, input_size: Size) -> SequentialBlock:
        return SequentialBlock(
            nn.Linear(int(input_size[-1]), 1, bias=False),
            nn.Sigmoid(),
            _WithoutLastAxis(),
            output_size=[None],
        )


class RegressionPrepareBlock(BuildableBlock):
    """Output layer of RegressionTask: a linear map to one number."""

    def build(self, input_size: Size) -> SequentialBlock:
        return SequentialBlock(
            nn.Linear(int(input_size[-1]), 1), _WithoutLastAxis(), output_size=[None]
        )


def _rounded(probabilities: torch.Tensor) -> torch.Tensor:
    return torch.round(probabilities).int()


class BinaryClassificationTask(PredictionTask):
    """Predict whether something holds for a session: 0 or 1.

    p = sigmoid(w . summary);  loss = BCE(p, target)

    loss     module on probabilities; None: a copy of DEFAULT_LOSS, torch.nn.BCELoss()
    metrics  modules that get p rounded to 0 and 1 as integers, and integer targets. None:
             precision, recall and accuracy, e.g. buys/binary_classification_task/binary_precision

    The other arguments are those of PredictionTask. predictions are probabilities, (B,).
    Replaces transformers4rec.torch.BinaryClassificationTask.
    """

    DEFAULT_LOSS: ClassVar[nn.Module] = nn.BCELoss()
    target_dim = 1

    def __init__(
        self,
        target_name: str | None = None,
        task_name: str | None = None,
        task_block: BuildableBlock | nn.Module | None = None,
        loss: nn.Module | None = None,
        metrics: Iterable[nn.Module] | None = None,
        summary_type: str | None = "first",
        ignore_padding: bool | None = None,
    ) -> None:
        super().__init__(
            loss=copy.deepcopy(self.DEFAULT_LOSS) if loss is None else loss,
            metrics=_binary_metrics() if metrics is None else metrics,
            target_name=target_name,
            task_name=task_name,
            forward_to_prediction_fn=_rounded,
            task_block=task_block,
            pre=BinaryClassificationPrepareBlock(),
            summary_type=summary_type,
            ignore_padding=ignore_padding,
        )

    def calculate_metrics(
        self, predictions: torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        return super().calculate_metrics(predictions, targets.int())


class RegressionTask(PredictionTask):
    """Predict a number of a session.

    y = w . summary + b;  loss = mean((y - target)^2)

    loss     None: a copy of DEFAULT_LOSS, torch.nn.MSELoss()
    metrics  None: the mean squared error, e.g. price/regression_task/mean_squared_error

    The other arguments are those of PredictionTask. predictions are (B,).
    Replaces transformers4rec.torch.RegressionTask.
    """

    DEFAULT_LOSS: ClassVar[nn.Module] = nn.MSELoss()
    target_dim = 1

    def __init__(
        self,
        target_name: str | None = None,
        task_name: str | None = None,
        task_block: BuildableBlock | nn.Module | None = None,
        loss: nn.Module | None = None,
        metrics: Iterable[nn.Module] | None = None,
        summary_type: str | None = "first",
        ignore_padding: bool | None = None,
    ) -> None:
        super().__init__(
            loss=copy.deepcopy(self.DEFAULT_LOSS) if loss is None else loss,
            metrics=[MeanSquaredError()] if metrics is None else metrics,
            target_name=target_name,
            task_name=task_name,
            task_block=task_block,
            pre=RegressionPrepareBlock(),
            summary_type=summary_type,
            ignore_padding=ignore_padding,
        )


def _binary_metrics() -> list[nn.Module]:
    # Made anew for each task: the reference shares one set between all models of a process.
    return [BinaryPrecision(), BinaryRecall(), BinaryAccuracy()]

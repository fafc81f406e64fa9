"""What the Trainer keeps of an evaluation: a loss sum, and predictions where they are asked for."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from t4r_fast.errors import InputError

LOG = logging.getLogger("t4r_fast")


def target_rows(labels: Any, predictions: Any, sessions: int, device: torch.device) -> torch.Tensor:
    """Rows that a batch's loss is the mean of, () float64: its targets, or else its sessions."""
    padding = getattr(predictions, "padding_idx", None)
    if padding is not None and isinstance(labels, torch.Tensor):
        return (labels != padding).sum().double()
    return torch.tensor(sessions, dtype=torch.float64, device=device)


class LossSum:
    """Mean loss over target rows, summed on the device without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.sum = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sessions = 0

    def add(self, loss: torch.Tensor, labels: Any, predictions: Any, sessions: int) -> None:
        self.sessions += sessions
        rows = target_rows(labels, predictions, sessions, loss.device)
        # a batch without targets has no loss (nan)
        weighted = torch.where(rows > 0, loss.detach().double() * rows, 0.0)
        self.sum += weighted.to(self.sum.device)
        self.count += rows.to(self.count.device)

    def mean(self, description: str) -> float:
        mean = float(self.sum / self.count)
        if math.isnan(mean) and not float(self.count):
            LOG.warning("%s: no session has a target, so the loss is nan", description)
        return mean


@dataclasses.dataclass
class KeptPredictions:
    """The best items of each target row and its label, on the host.

    steps  which batch each entry of the other lists is of
    """

    top_k: int
    steps: list[int] = dataclasses.field(default_factory=list)
    ids: list[np.ndarray] = dataclasses.field(default_factory=list)
    scores: list[np.ndarray] = dataclasses.field(default_factory=list)
    labels: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, predictions: Any, labels: Any, step: int = 0) -> None:
        if not isinstance(labels, torch.Tensor):
            raise InputError("Trainer.predict: a model with one head and one task is needed")
        rows = labels != getattr(predictions, "padding_idx", None)
        if self.top_k == 0:
            dense = getattr(predictions, "dense", None)
            scores = predictions[rows] if dense is None else dense()
            ids = None
        else:
            scores, ids = predictions.best(self.top_k)
            scores, ids = scores[rows], ids[rows]
            self.ids.append(ids.cpu().numpy())
        self.scores.append(scores.detach().float().cpu().numpy())
        self.labels.append(labels[rows].cpu().numpy())
        self.steps.append(step)

    def arrays(self) -> tuple[Any, np.ndarray]:
        scores, labels = np.concatenate(self.scores), np.concatenate(self.labels)
        return (np.concatenate(self.ids), scores) if self.ids else scores, labels


@dataclasses.dataclass
class KeptRecommendations:
    """What inference gives for each batch, on the host.

    steps    which batch each entry of `outputs` is of
    outputs  arrays, or (ids, scores), or a dict of them by task name
    """

    steps: list[int] = dataclasses.field(default_factory=list)
    outputs: list[Any] = dataclasses.field(default_factory=list)

    def add(self, output: Any, step: int) -> None:
        self.outputs.append(_on_host(output))
        self.steps.append(step)

    @property
    def rows(self) -> int:
        """Sessions of all batches."""
        first = [next(iter(o.values())) if isinstance(o, dict) else o for o in self.outputs]
        return sum(len(o[0] if isinstance(o, tuple) else o) for o in first)

    def by_task(self) -> Any:
        """All batches in one; of several tasks a dict by name."""
        if not self.outputs:
            raise InputError("Trainer.predict: the data loader gave no batches")
        return _joined(self.outputs)


def _on_host(output: Any) -> Any:
    if isinstance(output, Mapping):
        return {name: _on_host(o) for name, o in output.items()}
    if isinstance(output, (tuple, list)):
        scores, ids = output
        return _on_host(ids), _on_host(scores)
    output = output.detach().cpu()
    return (output.float() if output.is_floating_point() else output).numpy()


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, dict):
        return {name: _joined([o[name] for o in outputs]) for name in first}
    if isinstance(first, tuple):
        return tuple(np.concatenate(values) for values in zip(*outputs))
    return np.concatenate(outputs)

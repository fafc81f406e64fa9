"""What the Trainer keeps of an evaluation: a loss sum, and predictions where they are asked for."""

from __future__ import annotations

import dataclasses
import logging
import math
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
            scores, ids = predictions.topk(self.top_k)
            scores, ids = scores[rows], ids[rows]
            self.ids.append(ids.cpu().numpy())
        self.scores.append(scores.detach().float().cpu().numpy())
        self.labels.append(labels[rows].cpu().numpy())
        self.steps.append(step)

    def arrays(self) -> tuple[Any, np.ndarray]:
        scores, labels = np.concatenate(self.scores), np.concatenate(self.labels)
        return (np.concatenate(self.ids), scores) if self.ids else scores, labels

"""Training and evaluation in several processes, as torchrun starts them, one per device.

Training: every process takes its part of each batch of `processes x per_device_train_batch_size`
sessions, and the gradient is the mean over the targets of all parts, as if one process had taken
the whole batch. Evaluation: whole batches are dealt out, and sums are added up once at the end, so
processes may have unequally many and none waits for another in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from t4r_fast.compat import warn_once
from t4r_fast.compat.torch.ranking_metric import RankingMetric
from t4r_fast.compat.torch.session_metric import SessionMetric
from t4r_fast.errors import InputError
from t4r_fast.train.evaluation import KeptPredictions, KeptRecommendations, LossSum
from t4r_fast.train.given import GivenLoader, resumable


def weighted_loss(loss: torch.Tensor, targets: torch.Tensor, processes: int) -> torch.Tensor:
    """The loss such that its mean over the processes is the mean over all their targets.

    loss       ()  mean over this process's targets; nan where it has none
    targets    ()  float64, how many these are

    Every process must call it in the same step. A process without targets gives zero gradients.
    """
    all_targets = targets.to(loss.device, copy=True)
    dist.all_reduce(all_targets)
    share = (targets.to(loss.device) * processes / all_targets).to(loss.dtype)
    return torch.where(targets.to(loss.device) > 0, loss * share, 0.0)


def mean_over_processes(value: Any, device: torch.device) -> float:
    """The mean of one number of each process."""
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def part_ways() -> None:
    """Let this process draw other masks and dropout than the others, from here on."""
    seed = int(torch.randint(2**62, ()))
    if dist.get_rank():
        torch.manual_seed(seed + dist.get_rank())


# -- training data ---------------------------------------------------------------------------------


def is_shared_out(loader: Any) -> bool:
    """Does the loader say that it gives this process's part alone, by `global_size`?"""
    return (getattr(loader, "global_size", None) or 1) > 1


def own_part(loader: Any, device: torch.device, shared_out: bool = False) -> DataLoader:
    """This process's part of a loader that the user brings, equally many batches in each process.

    A loader with global_size > 1, or one that is known to be shared_out, gives the part of its
    process; all stop where the shortest ends.
    Any other gives the same batches in the same order in every process, which takes each n-th.
    """
    if not shared_out and not is_shared_out(loader):
        return OwnBatches(loader, dist.get_rank(), dist.get_world_size())
    shortest = torch.tensor(len(loader), device=device)
    dist.all_reduce(shortest, dist.ReduceOp.MIN)
    if int(shortest) == len(loader):
        return resumable(loader)
    return OwnBatches(loader, 0, 1, int(shortest))


class _Own(IterableDataset):
    def __init__(self, loader: Any, first: int, step: int, batches: int) -> None:
        self.loader = loader
        self.first, self.step, self.batches = first, step, batches
        if hasattr(loader, "set_epoch"):
            self.set_epoch = loader.set_epoch

    def __iter__(self) -> Iterator[Any]:
        end = self.batches * self.step
        for i, batch in enumerate(self.loader):
            if i == end:
                return
            if i % self.step == self.first:
                yield batch


class OwnBatches(GivenLoader):
    """Batches first, first + step, ... of a loader; every process gets equally many."""

    def __init__(self, loader: Any, first: int, step: int, batches: int | None = None) -> None:
        batches = len(loader) // step if batches is None else batches
        if not batches:
            raise InputError(
                f"Trainer: the training loader has {len(loader)} batches for {step} processes; make"
                " its batches smaller, or start fewer processes"
            )
        left_out = len(loader) - batches * step
        if left_out:
            warn_once(
                "OwnBatches",
                f"{left_out} of {len(loader)} batches of the training loader are left out of each"
                " epoch, so that all processes take equally many steps. Data given as files are"
                " divided without a rest",
            )
        super().__init__(loader)
        self.own = _Own(loader, first, step, batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.own)

    def __len__(self) -> int:
        return self.own.batches


# -- evaluation ------------------------------------------------------------------------------------


def share_buffers(model: nn.Module) -> None:
    """Take over the buffers of the first process, such as running means of a batch norm."""
    for buffer in model.buffers():
        if buffer.dtype != torch.bool:  # those are constants, and gloo does not send them
            dist.broadcast(buffer, 0)


def add_up(model: nn.Module, loss: LossSum, counting: bool) -> None:
    """Make the loss sum, and the model's metrics where counted, those of all processes."""
    sessions = torch.tensor(loss.sessions, device=loss.sum.device)
    for value in (loss.sum, loss.count, sessions):
        dist.all_reduce(value)
    loss.sessions = int(sessions)
    if counting:
        for metric in model.modules():
            if isinstance(metric, (RankingMetric, SessionMetric)):
                for state in metric.buffers(recurse=False):  # sums and counts
                    dist.all_reduce(state)


def gather(kept: KeptPredictions | KeptRecommendations) -> None:
    """Put together the predictions of all processes, in the order of the batches."""
    lists = {f.name: getattr(kept, f.name) for f in dataclasses.fields(kept) if f.name != "top_k"}
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, lists)
    steps = [s for part in of_all for s in part["steps"]]
    order = sorted(range(len(steps)), key=steps.__getitem__)
    for name in lists:
        values = [v for part in of_all for v in part[name]]
        setattr(kept, name, [values[j] for j in order] if values else [])

"""Model.fit and Model.evaluate: a plain loop over batches, for small data and for tests.

The Trainer does more: schedules, checkpoints, logging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from t4r_fast.compat.torch.nested import nested_detach
from t4r_fast.compat.torch.padding import check_padding

if TYPE_CHECKING:
    from t4r_fast.compat.torch.model.base import Model


def inputs_and_targets(batch: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Inputs and targets of a batch: (inputs, targets), or inputs alone."""
    if isinstance(batch, Mapping):
        return dict(batch), None
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Mapping):
        # the reference's pyarrow loader says {} where there are none
        targets = None if isinstance(batch[1], Mapping) and not batch[1] else batch[1]
        return dict(batch[0]), targets
    raise TypeError(
        "a batch must be a dict of tensors or (dict of tensors, targets); the data loader gave"
        f" {type(batch).__name__}"
    )


def fit(
    model: Model,
    dataloader: Iterable[Any],
    optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer | Callable[[Any], Any],
    eval_dataloader: Iterable[Any] | None,
    num_epochs: int,
    amp: bool,
    train: bool,
    verbose: bool,
    compute_metric: bool,
) -> np.ndarray:
    """See Model.fit."""
    check_padding(model, dataloader, "Model.fit")
    if train and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(model.parameters())
    device = _device_of(model)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=amp and train and half is torch.float16)
    was_training = model.training
    epochs = []
    for _ in range(num_epochs):
        model.train(train)
        model.reset_metrics()
        losses = []
        for inputs, targets in _batches(dataloader, device, verbose):
            with (
                torch.set_grad_enabled(train),
                torch.autocast(device.type, dtype=half, enabled=amp),
            ):
                output = model(inputs, targets=targets, training=True)
            losses.append(output["loss"].detach())
            if compute_metric:
                model.calculate_metrics(nested_detach(output["predictions"]), output["labels"])
            if train:
                optimizer.zero_grad()
                scaler.scale(output["loss"]).backward()
                scaler.step(optimizer)
                scaler.update()
        if not losses:
            raise ValueError("Model.fit: the data loader gave no batches")
        epochs.append(float(torch.stack(losses).double().mean()))
        if verbose and compute_metric:
            print(model.compute_metrics(mode="train"))
        if eval_dataloader is not None:
            found = evaluate(model, eval_dataloader, verbose=False)
            if verbose:
                print(found)
    model.train(was_training)
    return np.array(epochs)


def evaluate(
    model: Model,
    dataloader: Iterable[Any],
    training: bool = False,
    testing: bool = True,
    verbose: bool = True,
    mode: str = "eval",
) -> dict[str, Any]:
    """See Model.evaluate."""
    check_padding(model, dataloader, "Model.evaluate")
    was_training, device = model.training, _device_of(model)
    model.eval()
    model.reset_metrics()
    try:
        with torch.no_grad():
            for inputs, targets in _batches(dataloader, device, verbose):
                output = model(inputs, targets=targets, training=training, testing=testing)
                model.calculate_metrics(output["predictions"], output["labels"])
    finally:
        model.train(was_training)
    return model.compute_metrics(mode=mode)


def _batches(
    dataloader: Iterable[Any], device: torch.device, verbose: bool
) -> Iterator[tuple[dict[str, torch.Tensor], Any]]:
    for batch in tqdm(dataloader, disable=not verbose):
        inputs, targets = inputs_and_targets(batch)
        inputs = {name: column.to(device) for name, column in inputs.items()}
        if isinstance(targets, Mapping):
            targets = {name: column.to(device) for name, column in targets.items()}
        elif targets is not None:
            targets = targets.to(device)
        yield inputs, targets


def _device_of(model: Model) -> torch.device:
    return next(model.parameters()).device

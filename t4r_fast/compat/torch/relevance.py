"""Labels as zeros and ones, and in the order of a ranking."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_inputs(
    ks: Sequence[int], scores: torch.Tensor, labels: torch.Tensor
) -> tuple[Sequence[int], torch.Tensor, torch.Tensor]:
    """The three as they are.

    Raises ValueError unless ks is a list or tuple of at least one cut-off and scores and labels
    are (N, V) alike.
    """
    if not isinstance(ks, (list, tuple)) or not ks:
        raise ValueError(
            f"check_inputs: ks must be a list or tuple of at least one cut-off; got {ks!r}"
        )
    if scores.dim() != 2 or labels.shape != scores.shape:
        raise ValueError(
            "check_inputs: scores and labels must be (rows, items) alike; got shapes"
            f" {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    return ks, scores, labels


def extract_topk(
    ks: Sequence[int], scores: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best max(ks) scores of each row, where they stand, and the labels there.

    ks       cut-offs, 1 <= max(ks) <= V
    scores   (N, V)
    labels   (N, V)
    returns  three of (N, max(ks)), best first; of equal scores the lower id first

    Raises ValueError where there are fewer than max(ks) items.
    """
    k = int(max(ks))
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(
            f"extract_topk: max(ks) must be from 1 to the number of items, {scores.shape[1]}; got"
            f" {k}"
        )
    # A stable sort keeps the lowest id first among equals, where topk promises no order.
    values, order = scores.sort(dim=1, descending=True, stable=True)
    order = order[:, :k]
    return values[:, :k], order, labels.gather(1, order)


def create_output_placeholder(scores: torch.Tensor, ks: Sequence[int]) -> torch.Tensor:
    """Zeros (N, len(ks)) float32 on the device of scores (N, V), for a metric's values."""
    return torch.zeros(scores.shape[0], len(ks), dtype=torch.float32, device=scores.device)


def one_hot_1d(
    labels: torch.Tensor,
    num_classes: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A row of zeros with one 1 for each label.

    labels       (N,) int64, 0 <= label < num_classes
    num_classes  >= 1
    device       of the result; None: that of labels
    returns      (N, num_classes) dtype

    Raises TypeError on labels that are no int64 tensor, ValueError on other shapes and sizes.
    """
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        found = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(f"one_hot_1d: labels must be an int64 tensor; got {found}")
    if labels.dim() != 1:
        raise ValueError(f"one_hot_1d: labels must be (N,); got shape {tuple(labels.shape)}")
    if num_classes < 1:
        raise ValueError(f"one_hot_1d: num_classes must be >= 1; got {num_classes}")
    device = labels.device if device is None else device
    found = torch.zeros(len(labels), num_classes, device=device, dtype=dtype)
    return found.scatter_(1, labels.to(device).unsqueeze(1), 1)


def tranform_label_to_onehot(labels: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """one_hot_1d of labels of any shape and number type, flattened: (labels, vocab_size) float32.

    The name is spelled as in the reference.
    """
    return one_hot_1d(labels.reshape(-1).to(torch.int64), vocab_size)

"""Which items a model must predict and what it may see of them, as values.

A masking is a handful of numbers, and drawing one is a function from sessions to a Mask. Causal and
masked language modelling are here; permutation modelling hides items from each other pair by pair,
which is padded by nature (t4r_fast.mask_permutation), and replacement modelling draws as masked
modelling does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from t4r_fast.model import sessions
from t4r_fast.model.sessions import Sessions, whole_blocks, with_one_more
from t4r_fast.ops._sequence_mask import PackedMask
from t4r_fast.ops.mask_causal import mask_causal
from t4r_fast.ops.mask_mlm import mask_mlm


class Mask(NamedTuple):
    """What a masking decided for a batch of packed sessions.

    replaced  (U,) bool, items whose vectors become the [MASK] vector; None: none
    rows      (R,) int64, items at which a prediction is made, in order, then -1
    targets   (R,) int64, the item to predict at each row, then the id of padding; None at inference
    """

    replaced: Tensor | None
    rows: Tensor
    targets: Tensor | None


class Causal(NamedTuple):
    """Predict the next item from the items before it.

    train_last    learn from the last item of each session alone
    test_last     evaluate on the last item of each session alone, else on every item
    hide_history  with one target per session replace all but the last known item by [MASK]
    """

    padding_idx: int = 0
    train_last: bool = False
    test_last: bool = True
    hide_history: bool = False

    @property
    def one_target(self) -> bool:
        """Whether evaluation predicts once for each session."""
        return self.test_last

    def draw(
        self, batch: Sessions, item: str, training: bool, testing: bool
    ) -> tuple[Sessions, Mask]:
        """The mask of a batch, and the sessions that it is for."""
        if not training and not testing:
            return batch, Mask(None, last_rows(batch.offsets), None)
        last = self.train_last if training else self.test_last
        drawn = mask_causal(
            batch.columns[item],
            offsets=batch.offsets,
            mode=("train_last" if training else "last") if last else "train",
            padding_idx=self.padding_idx,
            hide_history=self.hide_history and last,
        )
        assert isinstance(drawn, PackedMask)  # as it is where offsets are given
        return batch, _cut(drawn, batch.count if last else None, self.padding_idx)


class Masked(NamedTuple):
    """Predict items drawn at random from the items on both sides of them.

    probability  chance of each item to be masked
    test_mode    what evaluation masks: "last", "train" (as in training) or "shifted"; see mask_mlm
    """

    padding_idx: int = 0
    probability: float = 0.15
    test_mode: str = "last"

    @property
    def one_target(self) -> bool:
        """Whether evaluation predicts once for each session."""
        return self.test_mode == "last"

    def draw(
        self, batch: Sessions, item: str, training: bool, testing: bool
    ) -> tuple[Sessions, Mask]:
        """The mask of a batch, and the sessions that it is for: inference puts one [MASK] behind
        the last item of each session and predicts there."""
        if not training and not testing:
            longer, rows = with_one_more(batch)
            length = longer.columns[item].shape[0]
            replaced = torch.zeros(length, dtype=torch.bool, device=rows.device)
            return longer, Mask(replaced.index_fill(0, rows, True), in_blocks(rows), None)
        mode = "train" if training else self.test_mode
        drawn = mask_mlm(
            batch.columns[item],
            offsets=batch.offsets,
            mode=mode,
            padding_idx=self.padding_idx,
            probability=self.probability,
        )
        assert isinstance(drawn, PackedMask)  # as it is where offsets are given
        return batch, _cut(drawn, batch.count if mode == "last" else None, self.padding_idx)


Masking = Causal | Masked


def last_rows(offsets: Tensor) -> Tensor:
    """(B,) the last item of each session, -1 for an empty one; in whole blocks."""
    return in_blocks(torch.where(offsets.diff() > 0, offsets[1:] - 1, -1))


def in_blocks(rows: Tensor) -> Tensor:
    """The rows with -1 behind them to whole blocks."""
    more = whole_blocks(rows.shape[0]) - rows.shape[0]
    return torch.nn.functional.pad(rows, (0, more), value=-1)


def _cut(drawn: PackedMask, at_most: int | None, padding_idx: int) -> Mask:
    return Mask(drawn.replaced, *used(drawn.rows, drawn.targets, at_most, padding_idx))


def used(
    rows: Tensor, targets: Tensor, at_most: int | None, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """Only as many rows and targets as there may be, `at_most`, or on a CPU as there are; in whole
    blocks."""
    if not sessions.fixed_capacity(rows):
        at_most = int((rows >= 0).sum())
    if at_most is not None:
        at_most = whole_blocks(at_most)
        short = max(at_most - rows.shape[0], 0)
        rows = torch.nn.functional.pad(rows[:at_most], (0, short), value=-1)
        targets = torch.nn.functional.pad(targets[:at_most], (0, short), value=padding_idx)
    return rows, targets

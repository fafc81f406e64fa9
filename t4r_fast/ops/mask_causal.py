"""mask_causal: which positions a causal model predicts, and which inputs it does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops._check import checked
from t4r_fast.ops._sequence_mask import (
    PackedMask,
    SequenceMask,
    check_items,
    check_mode,
    check_packed,
    check_padding,
    packed_fake,
)
from t4r_fast.plain import mask_causal as plain

# "train_last" and "last" are one rule for two phases, as in the reference.
MODES = {
    "train": plain.TRAIN,
    "train_last": plain.LAST,
    "last": plain.LAST,
    "next": plain.NEXT,
}


def mask_causal(
    item_ids: Tensor,
    *,
    offsets: Tensor | None = None,
    mode: str = "train",
    padding_idx: int = 0,
    hide_history: bool = False,
) -> SequenceMask | PackedMask:
    """Next-item targets, mask, row list and count, without a host sync.

    mode, with n the number of items of a session and targets[i] = item_ids[i + 1]:
    "train"       at positions 0 to n - 2; all other positions are masked
    "train_last"  only at position n - 2 (train_on_last_item_seq_only); padding is masked
    "last"        evaluation, the same rule: only at position n - 2; padding is masked
    "next"        inference: nothing is labelled, padding is masked, rows are where the prediction
                  is read, position n - 1: one for each session, an empty one at its position 0

    item_ids      (B, L) int64, padding on the right; with offsets (U,) int64 without padding
    offsets       (B + 1,) int64, rising from 0: session b is items offsets[b] to
                  offsets[b + 1] - 1. What lies behind offsets[-1] is never read
    padding_idx   int, the id of padding
    hide_history  "train_last" and "last" only: mask everything but position n - 2, as
                  Transformers4Rec up to 23.05 did
    returns       SequenceMask(targets (B, L), mask (B, L), rows (B * L,), count ()); with offsets
                  PackedMask(replaced (U,), rows (U,), targets (U,), count ()), the mask of padding
                  left out: in "train" the last item of each session is replaced, with hide_history
                  all but item n - 2, else none. An empty session has no row, also in "next"

    Sessions of fewer than two items have no target. Raises ValueError or TypeError on shapes,
    dtypes, options, offsets, padding that is not on the right, or padding within packed sessions;
    on a GPU nobody waits for the answer, and the kernel stops with a message.
    Replaces transformers4rec.torch.masking.CausalLanguageModeling; the zero vector that it puts
    into the last column in training is left to the caller.
    """
    check_mode("mask_causal", mode, tuple(MODES))
    if hide_history and MODES[mode] != plain.LAST:
        raise ValueError(
            "mask_causal: hide_history must be False unless mode is 'train_last' or 'last'; "
            f"got mode {mode!r}"
        )
    check_items("mask_causal", item_ids, offsets)
    name = backend.pick("mask_causal", item_ids)
    if offsets is not None:
        return PackedMask(
            *checked(
                name,
                lambda: check_packed("mask_causal", item_ids, offsets, padding_idx),
                backend.ops(name, plain).mask_causal_packed_fwd,
                *(item_ids, offsets, MODES[mode], padding_idx, bool(hide_history)),
            )
        )
    return SequenceMask(
        *checked(
            name,
            lambda: check_padding("mask_causal", item_ids, padding_idx),
            backend.ops(name, plain).mask_causal_fwd,
            *(item_ids, MODES[mode], padding_idx, bool(hide_history)),
        )
    )


def _fake(
    item_ids: Tensor, mode: int, padding_idx: int, hide_history: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(item_ids, memory_format=torch.contiguous_format),
        torch.empty_like(item_ids, dtype=torch.bool, memory_format=torch.contiguous_format),
        item_ids.new_empty((item_ids.numel(),)),
        item_ids.new_empty(()),
    )


backend.declare(
    "mask_causal",
    "mask_causal_fwd(Tensor item_ids, int mode, int padding_idx, bool hide_history)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
)
backend.declare(
    "mask_causal",
    "mask_causal_packed_fwd(Tensor item_ids, Tensor offsets, int mode, int padding_idx,"
    " bool hide_history) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=packed_fake,
)

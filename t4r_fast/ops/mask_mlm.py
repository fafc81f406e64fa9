"""mask_mlm: which positions a masked language model hides and predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops._check import checked
from t4r_fast.ops._seed import check_seed
from t4r_fast.ops._sequence_mask import (
    PackedMask,
    SequenceMask,
    check_items,
    check_mode,
    check_packed,
    check_padding,
    packed_fake,
)
from t4r_fast.plain import mask_mlm as plain

MODES = ("train", "last", "shifted", "next")  # in the order of the codes in plain/mask_mlm.py


def mask_mlm(
    item_ids: Tensor,
    *,
    offsets: Tensor | None = None,
    probability: float = 0.15,
    mode: str = "train",
    padding_idx: int = 0,
    seed: Tensor | None = None,
) -> SequenceMask | PackedMask:
    """Masked-language-model targets, mask, row list and count, without a host sync.

    mode, with n the number of items of a session:
    "train"    each item is masked with `probability`; then one item at random is masked for
               certain; then, if all n are, one at random is unmasked. n = 1 labels nothing.
    "last"     evaluation: only the last item, position n - 1, is masked
    "shifted"  the reference's evaluation of all positions: targets[i] = item_ids[i + 1], and every
               position with a target is masked
    "next"     inference: all outputs have L + 1 positions; position n is masked, nothing is
               labelled, rows are where the prediction is read: one for each session, also an empty
               one. Not with offsets: append an item to each session and use "last"

    item_ids     (B, L) int64, padding on the right; with offsets (U,) int64 without padding
    offsets      (B + 1,) int64, rising from 0: session b is items offsets[b] to offsets[b + 1] - 1.
                 What lies behind offsets[-1] is never read
    probability  float, 0 to 1; "train" only
    padding_idx  int, the id of padding
    seed         (2,) int64 (key, offset) on the device of item_ids; None draws it from torch's
                 default generator, so that torch.manual_seed and saved generator states govern it.
                 "train" only
    returns      SequenceMask(targets (B, L), mask (B, L), rows (B * L,), count ()); with offsets
                 PackedMask(replaced (U,), rows (U,), targets (U,), count ())

    In all modes but "next" an empty session has no mask and no target. The random numbers are
    Philox4x32-10 of (session, position) compared as integers: every backend gives the same bits for
    a seed, with padding and with offsets. Raises ValueError or TypeError on shapes, dtypes,
    options, offsets, padding that is not on the right, or padding within packed sessions; on a GPU
    nobody waits for the answer, and the kernel stops with a message.
    Replaces transformers4rec.torch.masking.MaskedLanguageModeling.
    """
    check_mode("mask_mlm", mode, MODES)
    if not 0 <= probability <= 1:
        raise ValueError(f"mask_mlm: probability must be from 0 to 1; got {probability}")
    if offsets is not None and mode == "next":
        raise ValueError(
            "mask_mlm: mode must be train, last or shifted with offsets; got 'next' (append an item"
            " to each session first, and use mode 'last')"
        )
    check_items("mask_mlm", item_ids, offsets)
    if mode != "train":
        if seed is not None:
            raise ValueError(f"mask_mlm: seed must be None in mode {mode!r}, which draws nothing")
    else:
        seed = check_seed("mask_mlm", seed, item_ids.device)
    name = backend.pick("mask_mlm", item_ids)
    # probability as an integer of 0 to 2**32: a random word below it masks
    threshold = round(probability * 2**32)
    if offsets is not None:
        return PackedMask(
            *checked(
                name,
                lambda: check_packed("mask_mlm", item_ids, offsets, padding_idx),
                backend.ops(name, plain).mask_mlm_packed_fwd,
                *(item_ids, offsets, seed, threshold, MODES.index(mode), padding_idx),
            )
        )
    return SequenceMask(
        *checked(
            name,
            lambda: check_padding("mask_mlm", item_ids, padding_idx),
            backend.ops(name, plain).mask_mlm_fwd,
            *(item_ids, seed, threshold, MODES.index(mode), padding_idx),
        )
    )


def _fake(
    item_ids: Tensor, seed: Tensor | None, threshold: int, mode: int, padding_idx: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sessions, positions = item_ids.shape
    if mode == plain.NEXT:
        positions = positions + 1
    return (
        item_ids.new_empty((sessions, positions)),
        item_ids.new_empty((sessions, positions), dtype=torch.bool),
        item_ids.new_empty((sessions * positions,)),
        item_ids.new_empty(()),
    )


backend.declare(
    "mask_mlm",
    "mask_mlm_fwd(Tensor item_ids, Tensor? seed, int threshold, int mode, int padding_idx)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
)
backend.declare(
    "mask_mlm",
    "mask_mlm_packed_fwd(Tensor item_ids, Tensor offsets, Tensor? seed, int threshold, int mode,"
    " int padding_idx) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=packed_fake,
)

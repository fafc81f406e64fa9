"""mask_permutation: which items a permutation language model predicts, and in which order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops._check import check_int64, checked
from t4r_fast.ops._seed import check_seed
from t4r_fast.ops._sequence_mask import check_mode, check_padding
from t4r_fast.plain import mask_permutation as plain

MODES = ("train", "last", "next")  # in the order of the codes in plain/mask_permutation.py
# Longer stretches than any session do as well, and products with 32-bit words stay exact.
_MAX_CONTEXT = 2**30


class PermutationMask(NamedTuple):
    """What a permutation language model hides, and who may see whom.

    targets         (B, L) int64, the item to predict at each position, padding_idx where none
    mask            (B, L) bool, positions that are predicted: their input becomes [MASK]
    rows            (B * L,) int64, flat positions b * L + i of them, in order, then -1
    count           () int64, how many
    perm_mask       (B, L, L) float32, 1 where position i may not attend to position j, as
                    transformers' XLNet takes it
    target_mapping  (B, L, L) float32, 1 where i == j: each position predicts itself; a view of one
                    identity matrix
    """

    targets: Tensor
    mask: Tensor
    rows: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which means nothing here
    perm_mask: Tensor
    target_mapping: Tensor


def mask_permutation(
    item_ids: Tensor,
    *,
    probability: float = 1 / 6,
    max_span_length: int = 5,
    permute_all: bool = False,
    mode: str = "train",
    padding_idx: int = 0,
    seed: Tensor | None = None,
) -> PermutationMask:
    """Permutation-language-model targets and attention masks, without a host sync.

    Padded sessions only: perm_mask has an entry for each pair of positions, (B, L, L).

    With n the number of items of a session:
    "train"  spans of items are predicted: from position 0 on, draw a length s of 1 to
             max_span_length, take the next int(s / probability) positions as its stretch, put the
             span anywhere in it, go on behind the stretch. Then, if no item is predicted, one at
             random is; if all are, one at random is not. The predicted items get a random order:
             each sees the items that are not predicted and the predicted ones before it
    "last"   evaluation: the last item is predicted; nobody sees it, nor later positions
    "next"   inference: all outputs have L + 1 positions; position n is predicted from the items
             before it, with nothing labelled: one row for each session, also an empty one

    item_ids         (B, L) int64, padding on the right
    probability      float, > 0 to 1, about the share of items that is predicted; "train" only
    max_span_length  int, >= 1, at most 256 on backend "cuda"; "train" only
    permute_all      predict all items but one instead of spans; "train" only
    mode             str, one of these
    padding_idx      int, the id of padding
    seed             (2,) int64 (key, offset) on the device of item_ids; None draws it from torch's
                     default generator. "train" only
    returns          PermutationMask(targets, mask, rows, count, perm_mask, target_mapping)

    n = 1 predicts nothing in training, an empty session nothing but in "next". The random numbers
    are Philox4x32-10 compared as integers: every backend gives the same bits for a seed. Differs
    from the reference where that is wrong: there inference predicts the last item that is known
    once more, and permute_all leaves target_mapping all zero. Raises ValueError or TypeError on
    shapes, dtypes, options, or padding that is not on the right; on a GPU nobody waits for the
    answer, and the kernel stops with a message.
    Source: Yang et al., "XLNet", arXiv 1906.08237. Replaces
    transformers4rec.torch.masking.PermutationLanguageModeling.
    """
    check_mode("mask_permutation", mode, MODES)
    if not 0 < probability <= 1:
        raise ValueError(
            f"mask_permutation: probability must be > 0 and at most 1; got {probability}"
        )
    if max_span_length < 1:
        raise ValueError(f"mask_permutation: max_span_length must be >= 1; got {max_span_length}")
    check_int64("mask_permutation", "item_ids", item_ids, "(B, L)", 2)
    if mode == "train":
        seed = check_seed("mask_permutation", seed, item_ids.device)
    elif seed is not None:
        raise ValueError(
            f"mask_permutation: seed must be None in mode {mode!r}, which draws nothing"
        )
    # as integers, so that no backend rounds them in its own way
    contexts = [
        int(min(span / probability, max(_MAX_CONTEXT, span)))
        for span in range(1, max_span_length + 1)
    ]
    name = backend.pick("mask_permutation", item_ids)
    targets, mask, rows, count, perm_mask, identity = checked(
        name,
        lambda: check_padding("mask_permutation", item_ids, padding_idx),
        backend.ops(name, plain).mask_permutation_fwd,
        *(item_ids, seed, contexts, permute_all, MODES.index(mode), padding_idx),
    )
    sessions, positions = targets.shape
    identities = identity.expand(sessions, positions, positions)
    return PermutationMask(targets, mask, rows, count, perm_mask, identities)


def _fake(
    item_ids: Tensor,
    seed: Tensor | None,
    contexts: list[int],
    permute_all: bool,
    mode: int,
    padding_idx: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sessions, positions = item_ids.shape
    if mode == plain.NEXT:
        positions = positions + 1
    return (
        item_ids.new_empty((sessions, positions)),
        item_ids.new_empty((sessions, positions), dtype=torch.bool),
        item_ids.new_empty((sessions * positions,)),
        item_ids.new_empty(()),
        item_ids.new_empty((sessions, positions, positions), dtype=torch.float32),
        item_ids.new_empty((positions, positions), dtype=torch.float32),
    )


backend.declare(
    "mask_permutation",
    "mask_permutation_fwd(Tensor item_ids, Tensor? seed, int[] contexts, bool permute_all, "
    "int mode, int padding_idx) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
)

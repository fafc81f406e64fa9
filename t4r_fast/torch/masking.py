"""Which items the model must predict, and what it may see of them.

Causal ("clm") and masked ("mlm") language modelling by the rules of Transformers4Rec, drawn by the
ops mask_causal and mask_mlm. A masking owns the trainable [MASK] vector. It keeps what it drew for
the last batch (`mask_schema`, `masked_targets`, `rows`), because the head reads it there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from t4r_fast.compat import get_compat
from t4r_fast.ops.mask_causal import mask_causal
from t4r_fast.ops.mask_mlm import SequenceMask, mask_mlm


class MaskingInfo(NamedTuple):
    """schema (B, L) bool as the reference keeps it; targets (B, L) int64, padding where none."""

    schema: torch.Tensor
    targets: torch.Tensor


class MaskSequence(nn.Module):
    """What every masking shares: the [MASK] vector and the state of the last batch.

    hidden_size                 width of the vectors that are masked
    padding_idx                 the id of padding; pads stand on the right
    eval_on_last_item_seq_only  evaluate on the last item of a session, or on every item
    """

    def __init__(
        self, hidden_size: int, padding_idx: int = 0, eval_on_last_item_seq_only: bool = True
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.padding_idx = padding_idx
        self.eval_on_last_item_seq_only = eval_on_last_item_seq_only
        self.masked_item_embedding = nn.Parameter(torch.empty(hidden_size))
        nn.init.normal_(self.masked_item_embedding, mean=0.0, std=0.001)
        self.mask_schema: torch.Tensor | None = None
        self.masked_targets: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.replaced: torch.Tensor | None = None

    # -- for subclasses --------------------------------------------------------------------------

    def draw(self, item_ids: torch.Tensor, training: bool, testing: bool) -> SequenceMask:
        """The mask of a batch: see t4r_fast.mask_mlm for its fields."""
        raise NotImplementedError

    def schema_of(self, drawn: SequenceMask) -> torch.Tensor:
        """The reference's `mask_schema` for what was drawn."""
        raise NotImplementedError

    # -- the reference's interface ---------------------------------------------------------------

    @property
    def transformer_arguments(self) -> dict[str, torch.Tensor]:
        """Further arguments that the masking gives the Transformer."""
        return {}

    def compute_masked_targets(
        self, item_ids: torch.Tensor, training: bool = False, testing: bool = False
    ) -> MaskingInfo:
        """Draw the mask of a batch (B, L) and keep it."""
        if item_ids.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}: item ids must be (sessions, positions); got shape"
                f" {tuple(item_ids.shape)}"
            )
        drawn = self.draw(item_ids, training, testing)
        self.replaced, self.rows = drawn.mask, drawn.rows
        self.mask_schema, self.masked_targets = self.schema_of(drawn), drawn.targets
        return MaskingInfo(self.mask_schema, self.masked_targets)

    def apply_mask_to_inputs(
        self, inputs: torch.Tensor, training: bool = False, testing: bool = False
    ) -> torch.Tensor:
        """Put the [MASK] vector where the drawn mask wants it. (B, L, H) -> (B, L, H)"""
        vector = self.masked_item_embedding.to(inputs.dtype)
        return torch.where(self.replaced.unsqueeze(-1), vector, inputs)

    def forward(
        self,
        inputs: torch.Tensor,
        item_ids: torch.Tensor,
        training: bool = False,
        testing: bool = False,
    ) -> torch.Tensor:
        self.compute_masked_targets(item_ids, training, testing)
        return self.apply_mask_to_inputs(inputs, training, testing)


class CausalLanguageModeling(MaskSequence):
    """Predict the next item from the items before it.

    train_on_last_item_seq_only  learn from the last item of each session alone
    hide_history                 in evaluation replace the whole history but the last known item by
                                 [MASK], as releases up to 23.05 did. None: True at compat 0.1,
                                 False at 23.12

    Training: target[i] = item[i + 1]; positions without a target become [MASK].
    """

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        train_on_last_item_seq_only: bool = False,
        hide_history: bool | None = None,
    ) -> None:
        super().__init__(hidden_size, padding_idx, eval_on_last_item_seq_only)
        self.train_on_last_item_seq_only = train_on_last_item_seq_only
        self.hide_history = get_compat() == "0.1" if hide_history is None else hide_history
        self.label_seq_trg_eval = None

    def draw(self, item_ids: torch.Tensor, training: bool, testing: bool) -> SequenceMask:
        if training:
            mode = "train_last" if self.train_on_last_item_seq_only else "train"
        elif testing:
            mode = "last" if self.eval_on_last_item_seq_only else "train"
        else:
            mode = "next"
        hidden = self.hide_history and mode in ("train_last", "last")
        return mask_causal(item_ids, mode=mode, padding_idx=self.padding_idx, hide_history=hidden)

    def schema_of(self, drawn: SequenceMask) -> torch.Tensor:
        return ~drawn.mask  # the reference keeps the positions that stay visible

    def apply_mask_to_inputs(
        self, inputs: torch.Tensor, training: bool = False, testing: bool = False
    ) -> torch.Tensor:
        if training or testing:
            # The reference shifts by dropping the last column and appending a zero vector. It
            # matters in evaluation, where the last column of a full session is not replaced.
            inputs = torch.cat([inputs[:, :-1], torch.zeros_like(inputs[:, -1:])], dim=1)
        return super().apply_mask_to_inputs(inputs, training, testing)


class MaskedLanguageModeling(MaskSequence):
    """Predict items drawn at random from the items on both sides of them.

    mlm_probability  chance of each item to be masked, in (0, 1); at least one item of a session is
                     masked and at least one is not, so a session of one item trains nothing

    Evaluation masks the last item alone; with eval_on_last_item_seq_only=False it masks every
    position and shifts the targets, as the reference does (its metric then means little).
    Inference appends one [MASK] behind the last item and reads the prediction there, also at
    compat 0.1 (0.1.0 itself read it at the last item).
    """

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        mlm_probability: float = 0.15,
    ) -> None:
        super().__init__(hidden_size, padding_idx, eval_on_last_item_seq_only)
        if not 0.0 < mlm_probability < 1.0:
            raise ValueError(
                "MaskedLanguageModeling: mlm_probability must lie between 0 and 1; got"
                f" {mlm_probability}"
            )
        self.mlm_probability = mlm_probability

    def draw(self, item_ids: torch.Tensor, training: bool, testing: bool) -> SequenceMask:
        if training:
            mode = "train"
        elif testing:
            mode = "last" if self.eval_on_last_item_seq_only else "shifted"
        else:
            mode = "next"
        return mask_mlm(
            item_ids,
            probability=self.mlm_probability,
            mode=mode,
            padding_idx=self.padding_idx,
        )

    def schema_of(self, drawn: SequenceMask) -> torch.Tensor:
        return drawn.mask

    def apply_mask_to_inputs(
        self, inputs: torch.Tensor, training: bool = False, testing: bool = False
    ) -> torch.Tensor:
        if not training and not testing:
            inputs = torch.cat([inputs, inputs[:, -1:]], dim=1)
        return super().apply_mask_to_inputs(inputs, training, testing)


masking_registry: dict[str, type[MaskSequence]] = {
    "clm": CausalLanguageModeling,
    "causal": CausalLanguageModeling,
    "mlm": MaskedLanguageModeling,
    "masked": MaskedLanguageModeling,
}


def build_masking(masking: str | MaskSequence | None, **kwargs: object) -> MaskSequence | None:
    """A masking by name, or the one that was given."""
    if masking is None or isinstance(masking, MaskSequence):
        return masking
    if masking not in masking_registry:
        raise ValueError(
            f"masking must be one of {', '.join(sorted(masking_registry))} or a MaskSequence; got"
            f" {masking!r}"
        )
    return masking_registry[masking](**kwargs)

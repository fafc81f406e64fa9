"""Which items the model must predict, and what it may see of them.

Causal ("clm"), masked ("mlm"), permutation ("plm") and replacement ("rtd") language modelling by
the rules of Transformers4Rec, drawn by the ops mask_causal, mask_mlm and mask_permutation. A
masking owns the trainable [MASK] vector. What it draws travels through a pass as a value, Drawn; a
note of the last one stays here for code that reads `masked_targets` and the like.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from t4r_fast.compat import get_compat, warn_once
from t4r_fast.model.bodies.hf import attended
from t4r_fast.ops.mask_causal import mask_causal
from t4r_fast.ops.mask_mlm import SequenceMask, mask_mlm
from t4r_fast.ops.mask_permutation import PermutationMask, mask_permutation
from t4r_fast.plain._sequence_mask import row_list
from t4r_fast.registry import Registry


class MaskingInfo(NamedTuple):
    """schema (B, L) bool as the reference keeps it; targets (B, L) int64, padding where none."""

    schema: torch.Tensor
    targets: torch.Tensor


class Drawn(NamedTuple):
    """What a masking decided for a padded batch.

    item_ids                (B, L) int64
    mask_schema             (B, L') bool as the reference keeps it; L' = L + 1 where it appends
    masked_targets          (B, L') int64, padding where none
    rows                    int64, flat positions whose output is used, then -1
    replaced                (B, L') bool, whose vectors become [MASK]; None: not known
    one_target_per_session  whether the first B rows hold all targets
    target_mapping, perm_mask  of permutation modelling, for the Transformer
    """

    item_ids: torch.Tensor | None = None
    mask_schema: torch.Tensor | None = None
    masked_targets: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    replaced: torch.Tensor | None = None
    one_target_per_session: bool = False
    target_mapping: torch.Tensor | None = None
    perm_mask: torch.Tensor | None = None


def _noted(name: str) -> property:
    """A field of the last Drawn as an attribute, for code that reads or writes it there."""

    def read(self: MaskSequence) -> Any:
        return getattr(self.noted, name)

    def write(self: MaskSequence, value: Any) -> None:
        self._noted = self.noted._replace(**{name: value})

    return property(read, write)


masking_registry = Registry("masking")


class MaskSequence(nn.Module):
    """What every masking shares: the [MASK] vector, and notes of the last batch.

    hidden_size                 width of the vectors that are masked
    padding_idx                 the id of padding; pads stand on the right
    eval_on_last_item_seq_only  evaluate on the last item of a session, or on every item

    A masking of your own defines _compute_masked_targets(item_ids, training, testing) and may
    define apply_mask_to_inputs, transformer_required_arguments (what the Transformer must take) and
    transformer_optional_arguments. Register it with masking_registry to use it by name. Its targets
    may stand anywhere; inference reads the prediction at the last item.
    """

    # Whether inference appends one position, at which the prediction is read.
    appends_at_inference = False

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        **_: object,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.padding_idx = padding_idx
        self.eval_on_last_item_seq_only = eval_on_last_item_seq_only
        self.masked_item_embedding = nn.Parameter(torch.empty(hidden_size))
        nn.init.normal_(self.masked_item_embedding, mean=0.0, std=0.001)
        self._noted: Drawn | Callable[[], Drawn] = Drawn()

    item_ids = _noted("item_ids")
    mask_schema = _noted("mask_schema")
    masked_targets = _noted("masked_targets")
    rows = _noted("rows")
    replaced = _noted("replaced")
    one_target_per_session = _noted("one_target_per_session")
    target_mapping = _noted("target_mapping")
    perm_mask = _noted("perm_mask")

    @property
    def noted(self) -> Drawn:
        """The mask of the last batch. Passes of a model do not read it."""
        noted = self._noted
        return noted if isinstance(noted, Drawn) else noted()

    def note(self, drawn: Drawn | Callable[[], Drawn]) -> None:
        """Keep a mask for code that reads the attributes; a function makes it when it is read."""
        self._noted = drawn

    def forward_output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """The size of the masked vectors: that of the inputs."""
        return input_size

    # -- for subclasses --------------------------------------------------------------------------

    def draw(self, item_ids: torch.Tensor, training: bool, testing: bool) -> SequenceMask:
        """The mask of a batch: see t4r_fast.mask_mlm for its fields."""
        raise NotImplementedError(
            f"{type(self).__name__} must define _compute_masked_targets(item_ids, training,"
            " testing)"
        )

    def schema_of(self, drawn: SequenceMask) -> torch.Tensor:
        """The reference's `mask_schema` for what was drawn."""
        return drawn.mask

    def _compute_masked_targets(
        self, item_ids: torch.Tensor, training: bool = False, testing: bool = False
    ) -> MaskingInfo:
        """The mask and the targets of a batch (B, L); with both flags False, for inference."""
        found = self.draw(item_ids, training, testing)
        drawn = Drawn(item_ids, replaced=found.mask)
        if not self.reads_last_item(training, testing):
            drawn = drawn._replace(rows=found.rows)
        if isinstance(found, PermutationMask):
            drawn = drawn._replace(target_mapping=found.target_mapping, perm_mask=found.perm_mask)
        self.note(drawn)
        return MaskingInfo(self.schema_of(found), found.targets)

    def predict_all(self, item_ids: torch.Tensor) -> MaskingInfo:
        """Targets for all positions: targets[i] = item_ids[i + 1], and where there are any."""
        last = torch.full_like(item_ids[:, :1], self.padding_idx)
        targets = torch.cat([item_ids[:, 1:], last], dim=1)
        return MaskingInfo(targets != self.padding_idx, targets)

    def transformer_required_arguments(self) -> dict[str, torch.Tensor | None]:
        """What the Transformer's forward must take beside inputs_embeds."""
        return {}

    def transformer_optional_arguments(self) -> dict[str, torch.Tensor | None]:
        """What it gets if it takes it."""
        return {}

    # -- the reference's interface ---------------------------------------------------------------

    @property
    def transformer_arguments(self) -> dict[str, torch.Tensor | None]:
        """Further arguments that the masking gives the Transformer."""
        return {**self.transformer_required_arguments(), **self.transformer_optional_arguments()}

    def arguments_of(self, drawn: Drawn | None) -> dict[str, torch.Tensor | None]:
        """transformer_arguments for a mask; a class with arguments of its own reads its notes."""
        return self.transformer_arguments

    def compute_masked_targets(
        self, item_ids: torch.Tensor, training: bool = False, testing: bool = False
    ) -> MaskingInfo:
        """Draw the mask of a batch (B, L) and keep a note of it."""
        drawn = self.drawn(item_ids, training, testing)
        self.note(drawn)
        return MaskingInfo(drawn.mask_schema, drawn.masked_targets)

    def drawn(self, item_ids: torch.Tensor, training: bool = False, testing: bool = False) -> Drawn:
        """The mask of a batch (B, L) as a value."""
        if item_ids.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}: item ids must be (sessions, positions); got shape"
                f" {tuple(item_ids.shape)}"
            )
        if type(self)._compute_masked_targets is not MaskSequence._compute_masked_targets:
            return self._drawn_by_subclass(item_ids, training, testing)
        found = self.draw(item_ids, training, testing)
        return self._completed(
            Drawn(
                item_ids,
                self.schema_of(found),
                found.targets,
                None if self.reads_last_item(training, testing) else found.rows,
                found.mask,
                target_mapping=getattr(found, "target_mapping", None),
                perm_mask=getattr(found, "perm_mask", None),
            ),
            training or testing,
        )

    def reads_last_item(self, training: bool, testing: bool) -> bool:
        """Whether the prediction is read at each session's end and not at the rows of the mask."""
        return False

    def _drawn_by_subclass(self, item_ids: torch.Tensor, training: bool, testing: bool) -> Drawn:
        """Of a class with a _compute_masked_targets of its own, which may read and write notes."""
        self.note(Drawn(item_ids))
        info = self._compute_masked_targets(item_ids, training=training, testing=testing)
        noted = self.noted._replace(mask_schema=info.schema, masked_targets=info.targets)
        return self._completed(noted, training or testing)

    def _completed(self, drawn: Drawn, labelled: bool) -> Drawn:
        one = self.eval_on_last_item_seq_only and drawn.rows is not None
        drawn = drawn._replace(one_target_per_session=one)
        return drawn if drawn.rows is not None else drawn._replace(rows=self._rows(drawn, labelled))

    def _rows(self, drawn: Drawn, labelled: bool) -> torch.Tensor:
        """The flat positions whose output is used: of the targets, or of each session's end."""
        if labelled:
            return row_list(drawn.masked_targets != self.padding_idx)[0]
        n = (drawn.item_ids != self.padding_idx).sum(1)
        sessions, width = drawn.mask_schema.shape
        first = torch.arange(sessions, device=n.device) * width
        return first + (n if self.appends_at_inference else n - 1).clamp(min=0)

    def attention_mask(self, drawn: Drawn | None = None) -> torch.Tensor:
        """(B, L) bool for a batch, the last one by default: what is no padding, and an appended
        position.

        The first position of an empty session counts, so that no session attends to nothing.
        """
        drawn = self.noted if drawn is None else drawn
        n = (drawn.item_ids != self.padding_idx).sum(1)
        width = drawn.mask_schema.shape[1]
        return attended(n + width - drawn.item_ids.shape[1], width)

    @property
    def replaces_inputs_only(self) -> bool:
        """Whether masking in training does no more than put [MASK] at `replaced`."""
        return type(self) in (
            MaskedLanguageModeling,
            PermutationLanguageModeling,
            ReplacementLanguageModeling,
        )

    def apply_mask_to_inputs(
        self,
        inputs: torch.Tensor,
        schema: torch.Tensor,
        training: bool = False,
        testing: bool = False,
    ) -> torch.Tensor:
        """Put the [MASK] vector where the schema says so. (B, L, H) -> (B, L, H)"""
        if not training and not testing:
            return inputs
        vector = self.masked_item_embedding.to(inputs.dtype)
        return torch.where(schema.unsqueeze(-1).bool(), vector, inputs)

    def forward(
        self,
        inputs: torch.Tensor,
        item_ids: torch.Tensor,
        training: bool = False,
        testing: bool = False,
    ) -> torch.Tensor:
        schema, _ = self.compute_masked_targets(item_ids, training=training, testing=testing)
        return self.apply_mask_to_inputs(inputs, schema, training=training, testing=testing)


@masking_registry.register_with_multiple_names("clm", "causal")
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

    @property
    def replaces_inputs_only(self) -> bool:
        # Trained on the last item alone, the last column of a full session is a zero vector.
        return type(self) is CausalLanguageModeling and not self.train_on_last_item_seq_only

    def apply_mask_to_inputs(
        self,
        inputs: torch.Tensor,
        schema: torch.Tensor,
        training: bool = False,
        testing: bool = False,
    ) -> torch.Tensor:
        if training or testing:
            # The reference shifts by dropping the last column and appending a zero vector. It
            # matters in evaluation, where the last column of a full session is not replaced.
            inputs = torch.cat([inputs[:, :-1], torch.zeros_like(inputs[:, -1:])], dim=1)
        vector = self.masked_item_embedding.to(inputs.dtype)
        return torch.where(schema.unsqueeze(-1).bool(), inputs, vector)


@masking_registry.register_with_multiple_names("mlm", "masked")
class MaskedLanguageModeling(MaskSequence):
    """Predict items drawn at random from the items on both sides of them.

    mlm_probability  chance of each item to be masked, in (0, 1); at least one item of a session is
                     masked and at least one is not, so a session of one item trains nothing
    eval_all_items   what eval_on_last_item_seq_only=False evaluates. "shifted": the next item at
                     every position, with every position masked, as the reference does; the metric
                     means nothing. "masked": items drawn and masked as in training. None:
                     "shifted", with a warning

    Evaluation masks the last item alone, unless eval_on_last_item_seq_only is False.
    Inference appends one [MASK] behind the last item and reads the prediction there, also at
    compat 0.1 (0.1.0 itself read it at the last item).
    """

    appends_at_inference = True

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        mlm_probability: float = 0.15,
        eval_all_items: str | None = None,
    ) -> None:
        super().__init__(hidden_size, padding_idx, eval_on_last_item_seq_only)
        if eval_all_items not in (None, "shifted", "masked"):
            raise ValueError(
                f"{type(self).__name__}: eval_all_items must be 'shifted' or 'masked'; got"
                f" {eval_all_items!r}"
            )
        if eval_all_items is None and not eval_on_last_item_seq_only:
            warn_once(
                "eval_all_items",
                "masked language modelling with eval_on_last_item_seq_only=False masks every"
                " position that it evaluates, as the reference does, so its metrics mean nothing;"
                " give eval_all_items='masked'",
            )
        self.eval_all_items = eval_all_items or "shifted"
        if not 0.0 < mlm_probability < 1.0:
            raise ValueError(
                f"{type(self).__name__}: mlm_probability must lie between 0 and 1; got"
                f" {mlm_probability}"
            )
        self.mlm_probability = mlm_probability

    def draw(self, item_ids: torch.Tensor, training: bool, testing: bool) -> SequenceMask:
        every = "train" if self.eval_all_items == "masked" else "shifted"
        if training:
            mode = "train"
        elif testing:
            mode = "last" if self.eval_on_last_item_seq_only else every
        else:
            mode = "next"
        return mask_mlm(
            item_ids,
            probability=self.mlm_probability,
            mode=mode,
            padding_idx=self.padding_idx,
        )

    def apply_mask_to_inputs(
        self,
        inputs: torch.Tensor,
        schema: torch.Tensor,
        training: bool = False,
        testing: bool = False,
    ) -> torch.Tensor:
        if not training and not testing:
            inputs = torch.cat([inputs, inputs[:, -1:]], dim=1)
        return super().apply_mask_to_inputs(inputs, schema, True)


@masking_registry.register_with_multiple_names("plm", "permutation")
class PermutationLanguageModeling(MaskSequence):
    """Predict spans of items in a random order, each from the items that are not hidden from it.

    plm_probability      about the share of items that is predicted, > 0 to 1
    max_span_length      longest span of predicted items, >= 1
    permute_all          predict all items but one
    append_mask          inference appends one [MASK] behind the last item and predicts there.
                         False: it predicts the last item, which is known, once more, as the
                         reference does. None: False, with a warning
    map_permuted         with permute_all, each position predicts itself. False: target_mapping is
                         all zero, as in the reference, so that the Transformer sees nothing. None:
                         False, with a warning

    With eval_on_last_item_seq_only=False evaluation predicts the next item at every position from
    the items up to it; the reference raises an error then.

    For Transformers that take perm_mask and target_mapping, which is XLNet.
    Raises ValueError on values out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        plm_probability: float = 1 / 6,
        max_span_length: int = 5,
        permute_all: bool = False,
        append_mask: bool | None = None,
        map_permuted: bool | None = None,
    ) -> None:
        super().__init__(hidden_size, padding_idx, eval_on_last_item_seq_only)
        if not 0 < plm_probability <= 1:
            raise ValueError(
                "PermutationLanguageModeling: plm_probability must be > 0 and at most 1; got"
                f" {plm_probability}"
            )
        if max_span_length < 1:
            raise ValueError(
                f"PermutationLanguageModeling: max_span_length must be >= 1; got {max_span_length}"
            )
        if append_mask is None:
            warn_once(
                "append_mask",
                "permutation language modelling predicts the last known item at inference, as the"
                " reference does, and not the next one; give append_mask=True",
            )
        if map_permuted is None and permute_all:
            warn_once(
                "map_permuted",
                "permute_all leaves target_mapping all zero, as the reference does, so that nothing"
                " is learned from the session; give map_permuted=True",
            )
        self.plm_probability = plm_probability
        self.max_span_length = max_span_length
        self.permute_all = permute_all
        self.appends_at_inference = bool(append_mask)
        self.map_permuted = bool(map_permuted)

    def draw(self, item_ids: torch.Tensor, training: bool, testing: bool) -> PermutationMask:
        inference = not training and not testing
        if training:
            mode = "train"
        else:
            mode = "next" if inference and self.appends_at_inference else "last"
        drawn = mask_permutation(
            item_ids,
            probability=self.plm_probability,
            max_span_length=self.max_span_length,
            permute_all=self.permute_all,
            mode=mode,
            padding_idx=self.padding_idx,
        )
        if testing and not training and not self.eval_on_last_item_seq_only:
            shifted = mask_mlm(item_ids, mode="shifted", padding_idx=self.padding_idx)
            return PermutationMask(
                shifted.targets,
                torch.zeros_like(shifted.mask),
                shifted.rows,
                shifted.count,
                torch.ones_like(drawn.perm_mask).triu(1),
                drawn.target_mapping,
            )
        if training and self.permute_all and not self.map_permuted:
            return drawn._replace(target_mapping=torch.zeros_like(drawn.target_mapping))
        return drawn

    def reads_last_item(self, training: bool, testing: bool) -> bool:
        # Inference in the reference's way labels the last item; the row is read for every session.
        return not (training or testing or self.appends_at_inference)

    def transformer_required_arguments(self) -> dict[str, torch.Tensor | None]:
        return {"target_mapping": self.target_mapping, "perm_mask": self.perm_mask}

    def arguments_of(self, drawn: Drawn | None) -> dict[str, torch.Tensor | None]:
        if type(self) is not PermutationLanguageModeling or drawn is None:
            return super().arguments_of(drawn)
        return {"target_mapping": drawn.target_mapping, "perm_mask": drawn.perm_mask}

    def apply_mask_to_inputs(
        self,
        inputs: torch.Tensor,
        schema: torch.Tensor,
        training: bool = False,
        testing: bool = False,
    ) -> torch.Tensor:
        if training or testing or not self.appends_at_inference:
            return super().apply_mask_to_inputs(inputs, schema, training, testing)
        inputs = torch.cat([inputs, inputs[:, -1:]], dim=1)
        return super().apply_mask_to_inputs(inputs, schema, True)


@masking_registry.register_with_multiple_names("rtd", "replacement")
class ReplacementLanguageModeling(MaskedLanguageModeling):
    """Masked language modelling whose guesses a second model must tell from the true items.

    sample_from_batch  replace masked items by other masked items of the batch, instead of by any
                       item of the catalogue

    The masking itself is that of MaskedLanguageModeling. tr.ReplacedItemPredictionTask trains both
    models (ELECTRA, arXiv 2003.10555); with NextItemPredictionTask only the first one is trained,
    as in the reference, which never makes use of the second, and you are warned.
    """

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        sample_from_batch: bool = False,
        mlm_probability: float = 0.15,
        eval_all_items: str | None = None,
    ) -> None:
        super().__init__(
            hidden_size, padding_idx, eval_on_last_item_seq_only, mlm_probability, eval_all_items
        )
        self.sample_from_batch = sample_from_batch
        self.has_discriminator = False  # set by the task that trains one

    def draw(self, item_ids: torch.Tensor, training: bool, testing: bool) -> SequenceMask:
        if training:
            self.warn_if_alone()
        return super().draw(item_ids, training, testing)

    def warn_if_alone(self) -> None:
        """Of a task that does not train the detection of replaced items."""
        if not self.has_discriminator:
            warn_once(
                "ReplacedItemPredictionTask",
                "masking 'rtd' with NextItemPredictionTask trains as plain masked language"
                " modelling, as the reference does; use ReplacedItemPredictionTask to train the"
                " detection of replaced items too",
            )

    def get_fake_tokens(
        self, itemid_seq: torch.Tensor, target_flat: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | list]:
        """Sessions with guesses in the place of masked items, and where they are wrong.

        itemid_seq   (B, L) int64
        target_flat  (B * L,) int64, the masked items, padding elsewhere
        logits       (N, V) scores of all items for the N masked ones, in order; with
                     sample_from_batch (N, N), scores of the masked items for each other
        returns      corrupted ids (B, L); bool (B, L), True where another item than the true one
                     stands; with sample_from_batch the sampled indices (N,), else []
        """
        at = (target_flat != self.padding_idx).nonzero().flatten()
        sampled = self.sample_from_softmax(logits).flatten()
        guesses = target_flat[at][sampled] if self.sample_from_batch else sampled
        corrupted, replaced = self.replace_items(itemid_seq, at, guesses)
        return corrupted, replaced, sampled if self.sample_from_batch else []

    def replace_items(
        self, item_ids: torch.Tensor, at: torch.Tensor, guesses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """item_ids (B, L) with guesses (N,) at flat positions (N,); bool (B, L), what changed."""
        corrupted = item_ids.flatten().scatter(0, at, guesses).view_as(item_ids)
        return corrupted, corrupted != item_ids

    def sample_from_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        """One index per row (N, V), drawn with the probabilities softmax(logits): int64 (N,)."""
        return (logits.detach() + gumbel(logits)).argmax(-1)


def gumbel(like: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise in the shape of a tensor: its argmax with scores draws a softmax."""
    return -torch.empty_like(like).exponential_().clamp(min=torch.finfo(like.dtype).tiny).log()


def masking_options(masking: str | MaskSequence | None) -> set[str]:
    """The arguments that from_schema takes for a masking by name: any masking's, and its own."""
    if not isinstance(masking, str):
        return set()
    classes = [masking_registry[name] for name in ("clm", "mlm", "plm", "rtd", masking)]
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    return names - {"self", "hidden_size", "kwargs", "_"}


def build_masking(masking: str | MaskSequence | None, **kwargs: object) -> MaskSequence | None:
    """A masking by name, or the one that was given. Arguments of other maskings are left out."""
    if masking is None or isinstance(masking, MaskSequence):
        return masking
    cls = masking_registry.parse(masking)
    parameters = inspect.signature(cls.__init__).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        kwargs = {name: value for name, value in kwargs.items() if name in parameters}
    return cls(**kwargs)

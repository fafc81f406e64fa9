"""Hugging Face Transformer bodies, fed with the input block's vectors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import transformers
from torch import nn

from t4r_fast.compat import warn_once
from t4r_fast.compat.config.transformer import T4RecConfig, transformer_registry
from t4r_fast.compat.torch.block.base import BlockBase
from t4r_fast.compat.torch.masking import (
    CausalLanguageModeling,
    Drawn,
    MaskedLanguageModeling,
    MaskSequence,
    PermutationLanguageModeling,
    ReplacementLanguageModeling,
)
from t4r_fast.model.bodies.hf import padded

Maskings = list[type[MaskSequence]]
_MLM = [MaskedLanguageModeling, ReplacementLanguageModeling]
_CAUSAL_OR_MLM = [CausalLanguageModeling, *_MLM]
_ALL = [*_CAUSAL_OR_MLM, PermutationLanguageModeling]


class MappingTransformerMasking:
    """The maskings that a body can be trained with, by the class name of its configuration.

    TransformerBlock reads it: assign to it, or add to a list, for bodies of your own. Bodies that
    are not named here go unchecked, and so do maskings that are not in DEFAULT_MASKING.
    """

    DEFAULT_MASKING: ClassVar[Maskings] = list(_ALL)

    BertConfig: ClassVar[Maskings] = list(_MLM)
    ConvBertConfig: ClassVar[Maskings] = list(_MLM)
    DebertaConfig: ClassVar[Maskings] = list(_MLM)
    DistilBertConfig: ClassVar[Maskings] = list(_MLM)
    GPT2Config: ClassVar[Maskings] = [CausalLanguageModeling]
    LongformerConfig: ClassVar[Maskings] = list(_CAUSAL_OR_MLM)
    MegatronBertConfig: ClassVar[Maskings] = list(_MLM)
    MPNetConfig: ClassVar[Maskings] = list(_MLM)
    RobertaConfig: ClassVar[Maskings] = list(_MLM)
    RoFormerConfig: ClassVar[Maskings] = list(_CAUSAL_OR_MLM)
    TransfoXLConfig: ClassVar[Maskings] = [CausalLanguageModeling]
    XLNetConfig: ClassVar[Maskings] = list(_ALL)


_CAUSAL = ("GPT2Config", "TransfoXLConfig")


class TransformerPrepare(nn.Module):
    """Makes the arguments of the Transformer's forward from the vectors that it is fed with.

    Subclasses define forward(inputs_embeds) -> dict of arguments, inputs_embeds among them.
    """

    def __init__(self, transformer: nn.Module, masking: MaskSequence | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.masking = masking

    def forward(self, inputs_embeds: torch.Tensor) -> dict[str, Any]:
        raise NotImplementedError(f"{type(self).__name__} must define forward(inputs_embeds)")


class GPT2Prepare(TransformerPrepare):
    """For GPT-2, which is causal by itself.

    The reference multiplies its causal attention weights by a triangle of ones, which changes
    nothing; transformers 5 no longer takes such a mask.
    """

    def forward(self, inputs_embeds: torch.Tensor) -> dict[str, Any]:
        return {"inputs_embeds": inputs_embeds}


class TransformerBlock(BlockBase):
    """A Transformer between the input block and the head.

    transformer     a config (XLNetConfig.build(...)) or a model that takes `inputs_embeds`
    masking         the input block's masking, which may add arguments of its own
    prepare_module  TransformerPrepare subclass that makes the Transformer's arguments
    output_fn       takes the hidden states out of the Transformer's outputs; the first by default
    attend_padding  whether items attend to the padding behind them, as in the reference, so that a
                    prediction depends on the length to which its session is padded. None: True,
                    with a warning; False passes an attention mask and needs `masking`

    forward: (B, L, D) float -> (B, L, D) float, the last layer's hidden states.

    A bidirectional body under causal masking sees the item it must predict; the block warns once,
    and XLNetConfig.build(..., attn_type="uni") or GPT2Config is the cure.
    Raises TypeError for what is neither a config nor a model, ValueError for a masking that the
    body cannot be trained with.
    Replaces transformers4rec.torch.TransformerBlock.
    """

    TRANSFORMER_TO_PREPARE: ClassVar[dict[type[nn.Module], type[TransformerPrepare]]] = {
        transformers.GPT2Model: GPT2Prepare
    }

    def __init__(
        self,
        transformer: transformers.PretrainedConfig | transformers.PreTrainedModel,
        masking: MaskSequence | None = None,
        prepare_module: type[TransformerPrepare] | None = None,
        output_fn: Callable[[Any], torch.Tensor] | None = None,
        attend_padding: bool | None = None,
    ) -> None:
        super().__init__()
        if isinstance(transformer, (transformers.PretrainedConfig, T4RecConfig)):
            transformer = _model_of(transformer)
        if not isinstance(transformer, nn.Module):
            raise TypeError(
                "TransformerBlock: transformer must be a transformers config or model; got"
                f" {type(transformer).__name__}"
            )
        self._takes = frozenset(inspect.signature(transformer.forward).parameters)
        if masking is not None:
            _check_masking(transformer, masking, self._takes)
        if attend_padding is False and (masking is None or "attention_mask" not in self._takes):
            raise ValueError(
                "TransformerBlock: attend_padding=False needs masking=inputs.masking, which knows"
                " the padding, and a Transformer that takes attention_mask"
            )
        _warn_of_what_it_sees(transformer, masking, attend_padding)
        self.transformer = transformer
        self.masking = masking
        self.attend_padding = attend_padding is not False
        if prepare_module is None:
            prepare_module = self.TRANSFORMER_TO_PREPARE.get(type(transformer))
        self.prepare_module = (
            None if prepare_module is None else prepare_module(transformer, masking)
        )
        self.output_fn = output_fn or _first
        self._width = _width_of(transformer)

    @classmethod
    def from_registry(
        cls,
        transformer: str,
        d_model: int,
        n_head: int,
        n_layer: int,
        total_seq_length: int,
        masking: MaskSequence | None = None,
    ) -> TransformerBlock:
        """By name: albert, bert, electra, gpt2, longformer, reformer, roberta or xlnet."""
        config = transformer_registry.parse(transformer).build(
            d_model=d_model, n_head=n_head, n_layer=n_layer, total_seq_length=total_seq_length
        )
        return cls(config, masking)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return self.run(inputs_embeds, None if self.masking is None else self.masking.noted)

    def run(self, inputs_embeds: torch.Tensor, drawn: Drawn | None) -> torch.Tensor:
        """forward() with the mask of this batch as a value."""
        arguments: dict[str, Any] = {"inputs_embeds": inputs_embeds}
        if self.prepare_module is not None:
            arguments = dict(self.prepare_module(inputs_embeds))
        if self.masking is not None:
            arguments.update(self.masking.arguments_of(drawn))
        # An XLNet that looks back alone never sees the padding, which stands behind the items; its
        # attention takes no mask beside its own.
        looks_back = getattr(self.transformer.config, "attn_type", None) == "uni"
        mask = None
        if not self.attend_padding and not looks_back:
            mask = self.masking.attention_mask(drawn)
        return self.output_fn(padded(self.transformer, self._takes, arguments, mask))

    def output_size(self, input_size: object = None) -> tuple[int, ...]:
        input_size = self.input_size if input_size is None else input_size
        leading = (-1, -1) if input_size is None else tuple(input_size[:2])
        return (*leading, self._width)


def _first(outputs: Any) -> torch.Tensor:
    return outputs[0]


def _model_of(config: Any) -> nn.Module:
    if hasattr(config, "to_huggingface_torch_model"):
        return config.to_huggingface_torch_model()
    return transformers.AutoModel.from_config(config)


def _config_name(transformer: nn.Module) -> str:
    return getattr(getattr(transformer, "config_class", None), "__name__", "")


def _width_of(transformer: nn.Module) -> int:
    config = transformer.config
    width = int(getattr(config, "d_model", None) or config.hidden_size)
    # Reformer's two streams come out side by side. The reference states half of that and fails.
    return 2 * width if _config_name(transformer) == "ReformerConfig" else width


def _check_masking(transformer: nn.Module, masking: MaskSequence, takes: frozenset[str]) -> None:
    name = _config_name(transformer)
    kinds = MappingTransformerMasking
    supported = getattr(kinds, name, kinds.DEFAULT_MASKING)
    if type(masking) in kinds.DEFAULT_MASKING and type(masking) not in supported:
        raise ValueError(
            f"TransformerBlock: {type(masking).__name__} is not supported by {name}; it can be"
            f" trained with {', '.join(kind.__name__ for kind in supported)}"
        )
    missing = set(masking.transformer_required_arguments()) - takes
    if missing:
        raise ValueError(
            f"TransformerBlock: {type(masking).__name__} requires a Transformer that takes"
            f" {', '.join(sorted(missing))}, such as XLNet; {type(transformer).__name__} does not"
        )


def _warn_of_what_it_sees(
    transformer: nn.Module, masking: MaskSequence | None, attend_padding: bool | None
) -> None:
    name = _config_name(transformer)
    attn_type = getattr(transformer.config, "attn_type", None)
    if name in _CAUSAL or attn_type == "uni" or masking is None:
        return
    if isinstance(masking, CausalLanguageModeling):
        body = "XLNet with attn_type='bi'" if attn_type == "bi" else type(transformer).__name__
        warn_once(
            "attn_type",
            f"{body} under causal masking attends to the item that it must predict, so its"
            " evaluation is too good; build an XLNet with attn_type='uni', or a GPT-2",
        )
    if attend_padding is None:
        warn_once(
            "attend_padding",
            "the Transformer attends to padding, as in Transformers4Rec, so that a prediction"
            " changes with the length to which its session is padded; give"
            " TransformerBlock(..., masking=inputs.masking, attend_padding=False)",
        )

"""Hugging Face Transformer bodies, fed with the input block's vectors."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from t4r_fast.compat import warn_once
from t4r_fast.torch.block.base import BlockBase
from t4r_fast.torch.masking import CausalLanguageModeling, MaskSequence


class TransformerBlock(BlockBase):
    """A Transformer between the input block and the head.

    transformer  a config (XLNetConfig.build(...)) or a model that takes `inputs_embeds`
    masking      the input block's masking, which may add arguments of its own

    forward: (B, L, D) float -> (B, L, D) float, the last layer's hidden states.

    As in Transformers4Rec no attention mask is passed: padding is attended. A bidirectional XLNet
    under causal masking sees the item it must predict; the block warns once, and
    XLNetConfig.build(..., attn_type="uni") is the cure.
    Raises TypeError for what is neither a config nor a model.
    Replaces transformers4rec.torch.TransformerBlock.
    """

    def __init__(
        self,
        transformer: transformers.PretrainedConfig | transformers.PreTrainedModel,
        masking: MaskSequence | None = None,
    ) -> None:
        super().__init__()
        if isinstance(transformer, transformers.PretrainedConfig):
            transformer = _model_of(transformer)
        if not isinstance(transformer, nn.Module):
            raise TypeError(
                "TransformerBlock: transformer must be a transformers config or model; got"
                f" {type(transformer).__name__}"
            )
        self.transformer = transformer
        self.masking = masking
        config = transformer.config
        bidirectional = getattr(config, "attn_type", None) == "bi"
        if bidirectional and isinstance(masking, CausalLanguageModeling):
            warn_once(
                "attn_type",
                "XLNet with attn_type='bi' under causal masking attends to the item that it must"
                " predict, so its evaluation is too good; build it with attn_type='uni'",
            )
        self._width = int(getattr(config, "d_model", None) or config.hidden_size)

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
        """By name. "xlnet" is the only one so far."""
        from t4r_fast.config.transformer import XLNetConfig

        registry = {"xlnet": XLNetConfig}
        if transformer not in registry:
            raise ValueError(
                f"TransformerBlock: transformer must be one of {sorted(registry)}; got"
                f" {transformer!r}"
            )
        config = registry[transformer].build(d_model, n_head, n_layer, total_seq_length)
        return cls(config, masking)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        arguments = {} if self.masking is None else self.masking.transformer_arguments
        return self.transformer(inputs_embeds=inputs_embeds, **arguments)[0]

    def output_size(self) -> tuple[int, ...]:
        return (-1, -1, self._width)


def _model_of(config: transformers.PretrainedConfig) -> nn.Module:
    if hasattr(config, "to_huggingface_torch_model"):
        return config.to_huggingface_torch_model()
    return transformers.AutoModel.from_config(config)

"""Configurations of the Transformer bodies, with the builder that Transformers4Rec gives them."""

from __future__ import annotations

import transformers


class XLNetConfig(transformers.XLNetConfig):
    """transformers.XLNetConfig with `build`."""

    @classmethod
    def build(
        cls,
        d_model: int,
        n_head: int,
        n_layer: int,
        total_seq_length: int | None = None,
        attn_type: str = "bi",
        hidden_act: str = "gelu",
        initializer_range: float = 0.01,
        layer_norm_eps: float = 0.03,
        dropout: float = 0.3,
        pad_token: int = 0,
        log_attention_weights: bool = False,
        mem_len: int = 1,
        **kwargs: object,
    ) -> XLNetConfig:
        """An XLNet of this size, fed with vectors instead of token ids.

        d_model           width, a multiple of n_head
        n_head, n_layer   attention heads per layer, layers
        total_seq_length  accepted for the reference's sake; XLNet has no longest sequence
        attn_type         "bi", every position sees every other, or "uni", only itself and the past

        The reference's defaults. Further keywords go to transformers.XLNetConfig.
        Raises ValueError when d_model is no multiple of n_head.
        """
        if d_model % n_head:
            raise ValueError(
                f"XLNetConfig: d_model must be a multiple of n_head, {n_head}; got {d_model}"
            )
        return cls(
            d_model=d_model,
            d_inner=4 * d_model,
            n_layer=n_layer,
            n_head=n_head,
            attn_type=attn_type,
            ff_activation=hidden_act,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            dropout=dropout,
            pad_token_id=pad_token,
            output_attentions=log_attention_weights,
            vocab_size=1,
            mem_len=mem_len,
            **kwargs,
        )

    def to_huggingface_torch_model(self) -> transformers.XLNetModel:
        return transformers.XLNetModel(self)

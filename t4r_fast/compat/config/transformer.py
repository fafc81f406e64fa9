"""Configurations of the Transformer bodies, with the builder that Transformers4Rec gives them."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from t4r_fast.compat import warn_once
from t4r_fast.registry import Registry

transformer_registry = Registry("transformer")


class T4RecConfig:
    """What all bodies share: build(...) makes a configuration, which makes a model.

    build(d_model, n_head, n_layer, total_seq_length, hidden_act="gelu", initializer_range=0.01,
          layer_norm_eps=0.03, dropout=0.3, pad_token=0, log_attention_weights=False, **kwargs)

    d_model                width, a multiple of n_head
    n_head, n_layer        attention heads per layer, layers
    total_seq_length       longest session; position tables get two rows more than that, for the
                           [MASK] that inference appends
    hidden_act             activation of the feed-forward layers
    initializer_range      standard deviation of the initial weights
    layer_norm_eps         epsilon of the layer norms
    dropout                probability
    pad_token              id of padding in the model's own token table, which is not used
    log_attention_weights  the model returns its attention weights too
    kwargs                 further arguments of the transformers configuration

    The defaults are the reference's. Raises ValueError when d_model is no multiple of n_head.
    """

    @classmethod
    def build(cls, *args: object, **kwargs: object) -> T4RecConfig:
        raise NotImplementedError(f"{cls.__name__} must define build")

    @property
    def transformers_config_cls(self) -> type:
        """The class of transformers that this one builds."""
        return type(self).__bases__[1]

    def to_huggingface_torch_model(self) -> nn.Module:
        """A model of transformers with new weights."""
        return transformers.MODEL_MAPPING[self.transformers_config_cls](self)

    def to_torch_model(
        self,
        input_features: nn.Module,
        *prediction_task: nn.Module,
        task_blocks: object = None,
        task_weights: list[float] | None = None,
        loss_reduction: str = "mean",
        **kwargs: object,
    ) -> nn.Module:
        """The tr.Model of an input block, this Transformer and one task or several.

        task_blocks, task_weights, loss_reduction  see tr.Head
        kwargs                                     see tr.Model

        Raises ValueError when input_features is no TabularSequenceFeatures.
        """
        import t4r_fast.compat.torch as tr

        if not isinstance(input_features, tr.TabularSequenceFeatures):
            raise ValueError(
                "to_torch_model: input_features must be a TabularSequenceFeatures; got"
                f" {type(input_features).__name__}"
            )
        body = tr.SequentialBlock(
            input_features, tr.TransformerBlock(self, masking=input_features.masking)
        )
        blocks: dict[str, Any] = {} if task_blocks is None else {"task_blocks": task_blocks}
        head = tr.Head(
            body,
            list(prediction_task),
            task_weights=task_weights,
            loss_reduction=loss_reduction,
            **blocks,
        )
        return tr.Model(head, **kwargs)


def _check_heads(name: str, d_model: int, n_head: int) -> None:
    if d_model % n_head:
        raise ValueError(f"{name}: d_model must be a multiple of n_head, {n_head}; got {d_model}")


@transformer_registry.register("xlnet")
class XLNetConfig(T4RecConfig, transformers.XLNetConfig):
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
        """See T4RecConfig; feed-forward layers of 4 * d_model.

        total_seq_length  accepted for the reference's sake; XLNet has no longest sequence
        attn_type         "bi", every position sees every other, or "uni", only itself and the past
        mem_len           states of earlier calls that are kept; 1, the reference's, uses none
        """
        _check_heads("XLNetConfig", d_model, n_head)
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


# The reference's registry misspells it; both names work here.
@transformer_registry.register_with_multiple_names("gtp2", "gpt2")
class GPT2Config(T4RecConfig, transformers.GPT2Config):
    """transformers.GPT2Config with `build`."""

    @classmethod
    def build(
        cls,
        d_model: int,
        n_head: int,
        n_layer: int,
        total_seq_length: int,
        hidden_act: str = "gelu",
        initializer_range: float = 0.01,
        layer_norm_eps: float = 0.03,
        dropout: float = 0.3,
        pad_token: int = 0,
        log_attention_weights: bool = False,
        **kwargs: object,
    ) -> GPT2Config:
        """See T4RecConfig; feed-forward layers of 4 * d_model, total_seq_length positions.

        As in the reference layer_norm_eps has no effect on GPT-2, whose own name for it is
        layer_norm_epsilon (1e-5, one of kwargs), and pad_token is not handed on.
        """
        _check_heads("GPT2Config", d_model, n_head)
        return cls(
            n_embd=d_model,
            n_inner=4 * d_model,
            n_layer=n_layer,
            n_head=n_head,
            activation_function=hidden_act,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            n_positions=total_seq_length,
            n_ctx=total_seq_length,
            output_attentions=log_attention_weights,
            vocab_size=1,
            **kwargs,
        )


def _bert_like(
    cls: type,
    d_model: int,
    n_head: int,
    n_layer: int,
    hidden_act: str,
    initializer_range: float,
    layer_norm_eps: float,
    dropout: float,
    pad_token: int,
    log_attention_weights: bool,
    apply_dropout: bool | None,
    kwargs: dict[str, object],
) -> Any:
    """BERT, RoBERTa and Longformer: the reference forgets their dropout and feed-forward width."""
    _check_heads(cls.__name__, d_model, n_head)
    if apply_dropout is None and not {"hidden_dropout_prob", "intermediate_size"} & set(kwargs):
        warn_once(
            "apply_dropout",
            f"{cls.__name__}.build leaves dropout at 0.1, whatever is given, and the feed-forward"
            " layers at 3072, whatever d_model is, as the reference does; give apply_dropout=True"
            " and intermediate_size=4 * d_model",
        )
    given = {
        "hidden_size": d_model,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "hidden_act": hidden_act,
        "initializer_range": initializer_range,
        "layer_norm_eps": layer_norm_eps,
        "pad_token_id": pad_token,
        "output_attentions": log_attention_weights,
        "vocab_size": 1,
    }
    if apply_dropout:
        given.update(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return cls(**{**given, **kwargs})


@transformer_registry.register("bert")
class BertConfig(T4RecConfig, transformers.BertConfig):
    """transformers.BertConfig with `build`."""

    @classmethod
    def build(
        cls,
        d_model: int,
        n_head: int,
        n_layer: int,
        total_seq_length: int,
        hidden_act: str = "gelu",
        initializer_range: float = 0.01,
        layer_norm_eps: float = 0.03,
        dropout: float = 0.3,
        pad_token: int = 0,
        log_attention_weights: bool = False,
        apply_dropout: bool | None = None,
        **kwargs: object,
    ) -> BertConfig:
        """See T4RecConfig.

        apply_dropout  whether `dropout` takes effect. None: no, it stays 0.1 as in the reference,
                       with a warning

        intermediate_size, one of kwargs, stays 3072 as in the reference; 4 * d_model is usual.
        """
        kwargs.setdefault("max_position_embeddings", total_seq_length + 2)
        return _bert_like(
            cls, d_model, n_head, n_layer, hidden_act, initializer_range, layer_norm_eps, dropout,
            pad_token, log_attention_weights, apply_dropout, kwargs,
        )  # fmt: skip


@transformer_registry.register("roberta")
class RobertaConfig(T4RecConfig, transformers.RobertaConfig):
    """transformers.RobertaConfig with `build`."""

    @classmethod
    def build(
        cls,
        d_model: int,
        n_head: int,
        n_layer: int,
        total_seq_length: int,
        hidden_act: str = "gelu",
        initializer_range: float = 0.01,
        layer_norm_eps: float = 0.03,
        dropout: float = 0.3,
        pad_token: int = 0,
        log_attention_weights: bool = False,
        apply_dropout: bool | None = None,
        **kwargs: object,
    ) -> RobertaConfig:
        """See T4RecConfig, and BertConfig.build for apply_dropout and intermediate_size."""
        kwargs.setdefault("max_position_embeddings", total_seq_length + 2)
        return _bert_like(
            cls, d_model, n_head, n_layer, hidden_act, initializer_range, layer_norm_eps, dropout,
            pad_token, log_attention_weights, apply_dropout, kwargs,
        )  # fmt: skip


@transformer_registry.register("longformer")
class LongformerConfig(T4RecConfig, transformers.LongformerConfig):
    """transformers.LongformerConfig with `build`."""

    @classmethod
    def build(
        cls,
        d_model: int,
        n_head: int,
        n_layer: int,
        total_seq_length: int,
        hidden_act: str = "gelu",
        initializer_range: float = 0.01,
        layer_norm_eps: float = 0.03,
        dropout: float = 0.3,
        pad_token: int = 0,
        log_attention_weights: bool = False,
        apply_dropout: bool | None = None,
        **kwargs: object,
    ) -> LongformerConfig:
        """See T4RecConfig, and BertConfig.build for apply_dropout and intermediate_size.

        The attention window is total_seq_length + 2, so total_seq_length must be even.
        """
        kwargs.setdefault("attention_window", total_seq_length + 2)
        return _bert_like(
            cls, d_model, n_head, n_layer, hidden_act, initializer_range, layer_norm_eps, dropout,
            pad_token, log_attention_weights, apply_dropout, kwargs,
        )  # fmt: skip


@transformer_registry.register("electra")
class ElectraConfig(T4RecConfig, transformers.ElectraConfig):
    """transformers.ElectraConfig with `build`."""

    @classmethod
    def build(
        cls,
        d_model: int,
        n_head: int,
        n_layer: int,
        total_seq_length: int,
        hidden_act: str = "gelu",
        initializer_range: float = 0.01,
        layer_norm_eps: float = 0.03,
        dropout: float = 0.3,
        pad_token: int = 0,
        log_attention_weights: bool = False,
        **kwargs: object,
    ) -> ElectraConfig:
        """See T4RecConfig; feed-forward layers of 4 * d_model.

        As in the reference dropout of the attention weights stays 0.1;
        attention_probs_dropout_prob, one of kwargs, sets it.
        """
        _check_heads("ElectraConfig", d_model, n_head)
        return cls(
            hidden_size=d_model,
            embedding_size=d_model,
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            intermediate_size=4 * d_model,
            hidden_act=hidden_act,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            hidden_dropout_prob=dropout,
            max_position_embeddings=total_seq_length + 2,
            pad_token_id=pad_token,
            output_attentions=log_attention_weights,
            vocab_size=1,
            **kwargs,
        )


@transformer_registry.register("albert")
class AlbertConfig(T4RecConfig, transformers.AlbertConfig):
    """transformers.AlbertConfig with `build`."""

    @classmethod
    def build(
        cls,
        d_model: int,
        n_head: int,
        n_layer: int,
        total_seq_length: int,
        hidden_act: str = "gelu",
        initializer_range: float = 0.01,
        layer_norm_eps: float = 0.03,
        dropout: float = 0.3,
        pad_token: int = 0,
        log_attention_weights: bool = False,
        **kwargs: object,
    ) -> AlbertConfig:
        """See T4RecConfig; feed-forward layers of 4 * d_model; layers share their weights."""
        _check_heads("AlbertConfig", d_model, n_head)
        # The reference hands pad_token on to no one; the unused token table has a row 0 alone.
        kwargs.setdefault("pad_token_id", pad_token)
        return cls(
            hidden_size=d_model,
            num_attention_heads=n_head,
            num_hidden_layers=n_layer,
            hidden_act=hidden_act,
            intermediate_size=4 * d_model,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            max_position_embeddings=total_seq_length + 2,
            embedding_size=d_model,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            output_attentions=log_attention_weights,
            vocab_size=1,
            **kwargs,
        )


@transformer_registry.register("reformer")
class ReformerConfig(T4RecConfig, transformers.ReformerConfig):
    """transformers.ReformerConfig with `build`."""

    @classmethod
    def build(
        cls,
        d_model: int,
        n_head: int,
        n_layer: int,
        total_seq_length: int,
        hidden_act: str = "gelu",
        initializer_range: float = 0.01,
        layer_norm_eps: float = 0.03,
        dropout: float = 0.3,
        pad_token: int = 0,
        log_attention_weights: bool = False,
        axial_pos_shape_first_dim: int = 4,
        **kwargs: object,
    ) -> ReformerConfig:
        """See T4RecConfig; feed-forward layers of 4 * d_model, outputs of width 2 * d_model.

        axial_pos_shape_first_dim  rows of the axial position table. In training transformers wants
                                   sessions as long as the table: rows * ((total_seq_length + 2) //
                                   rows) positions

        More than two layers alternate local and LSH attention; their number must be even then.
        """
        _check_heads("ReformerConfig", d_model, n_head)
        positions = total_seq_length + 2
        return cls(
            hidden_size=d_model,
            attention_head_size=d_model,
            attn_layers=["local", "lsh"] * (n_layer // 2) if n_layer > 2 else ["local"],
            num_hidden_layers=n_layer,
            feed_forward_size=4 * d_model,
            num_attention_heads=n_head,
            hidden_act=hidden_act,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            hidden_dropout_prob=dropout,
            lsh_attention_probs_dropout_prob=dropout,
            pad_token_id=pad_token,
            output_attentions=log_attention_weights,
            max_position_embeddings=positions,
            axial_pos_embds_dim=[d_model // 2, d_model // 2],
            axial_pos_shape=[axial_pos_shape_first_dim, positions // axial_pos_shape_first_dim],
            vocab_size=1,
            **kwargs,
        )


@transformer_registry.register("transfo-xl")
class TransfoXLConfig(T4RecConfig):
    """The name of a body that transformers 5 no longer has; build says so."""

    @classmethod
    def build(cls, *args: object, **kwargs: object) -> TransfoXLConfig:
        """Raises RuntimeError."""
        raise RuntimeError(
            f"TransfoXLConfig: transformers {transformers.__version__} has no Transformer-XL any"
            " more; XLNetConfig.build(..., attn_type='uni') is its successor"
        )

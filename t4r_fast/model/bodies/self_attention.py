"""GPT-2 and BERT over packed sessions, by the parameters of transformers' modules.

What the modules compute on padded sessions with an attention mask, for the items alone; the last
layer makes queries, output and feed-forward only where a prediction is made.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; Devlin et al.,
"BERT", arXiv 1810.04805.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from t4r_fast.model.bodies.sites import ACTIVATIONS, Drops, at_rows
from t4r_fast.model.sessions import Layout
from t4r_fast.ops.activation_dropout import activation_dropout
from t4r_fast.ops.residual_norm import residual_norm
from t4r_fast.ops.session_attention import session_attention


def why_not_gpt2(config: Any) -> str | None:
    """Why a GPT2Config cannot be run here; None where it can."""
    if config.add_cross_attention or config.reorder_and_upcast_attn:
        return "add_cross_attention or reorder_and_upcast_attn"
    if config.activation_function not in ACTIVATIONS:
        return f"activation_function {config.activation_function!r}"
    return None


def why_not_bert(config: Any) -> str | None:
    """Why a BertConfig cannot be run here; None where it can."""
    if config.is_decoder or config.add_cross_attention:
        return "is_decoder or add_cross_attention"
    # of releases up to transformers 4
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return f"position_embedding_type {config.position_embedding_type!r}"
    if config.hidden_act not in ACTIVATIONS:
        return f"hidden_act {config.hidden_act!r}"
    return None


def gpt2(
    module: Any, x: Tensor, layout: Layout, rows: Tensor | None, seed: Tensor | None
) -> Tensor:
    """The last hidden states at `rows`, or of all items; arguments as for bodies.xlnet.xlnet.

    Raises ValueError for sessions longer than the module's table of positions.
    """
    config = module.config
    _check_length("n_positions", config.n_positions, layout.longest)
    embedding = Drops(config.embd_pdrop, seed)
    attention = Drops(config.attn_pdrop, seed)
    drops = Drops(config.resid_pdrop, seed)
    activation = ACTIVATIONS[config.activation_function]
    x = x + _at_positions(module.wpe.weight, layout)
    x = activation_dropout(x, layout.places, activation="none", **embedding(0))
    width, places, last = x.shape[1], layout.places, len(module.h) - 1
    for number, block in enumerate(module.h):
        part, chosen, site = block.attn, rows if number == last else None, 8 * (number + 1)
        # of Conv1D: weight (in, out)
        weight, bias = part.c_attn.weight, part.c_attn.bias
        before = _norm(x, block.ln_1)
        y, places = at_rows(x, layout.places, chosen)
        found = _attend(
            *(weight, bias, before, _norm(y, block.ln_1), part.num_heads, layout, chosen, True),
            _scale(config, width // part.num_heads, number),
            attention(site),
        )
        y = y + activation_dropout(
            found @ part.c_proj.weight,
            places,
            bias=part.c_proj.bias,
            activation="none",
            **drops(site + 1),
        ).to(y.dtype)
        inner = activation_dropout(
            _norm(y, block.ln_2) @ block.mlp.c_fc.weight,
            places,
            bias=block.mlp.c_fc.bias,
            activation=activation,
        )
        x = y + activation_dropout(
            inner @ block.mlp.c_proj.weight,
            places,
            bias=block.mlp.c_proj.bias,
            activation="none",
            **drops(site + 2),
        ).to(y.dtype)
    return _norm(x, module.ln_f)


def bert(
    module: Any, x: Tensor, layout: Layout, rows: Tensor | None, seed: Tensor | None
) -> Tensor:
    """The last hidden states at `rows`, or of all items; arguments as for bodies.xlnet.xlnet.

    Raises ValueError for sessions longer than the module's table of positions.
    """
    config, embeddings = module.config, module.embeddings
    _check_length("max_position_embeddings", config.max_position_embeddings, layout.longest)
    attention = Drops(config.attention_probs_dropout_prob, seed)
    drops = Drops(config.hidden_dropout_prob, seed)
    activation = ACTIVATIONS[config.hidden_act]
    x = x + embeddings.token_type_embeddings.weight[0]
    x = x + _at_positions(embeddings.position_embeddings.weight, layout)
    x = _norm(x, embeddings.LayerNorm)
    x = activation_dropout(x, layout.places, activation="none", **drops(0))
    places, last = layout.places, len(module.encoder.layer) - 1
    for number, layer in enumerate(module.encoder.layer):
        part, chosen, site = layer.attention, rows if number == last else None, 8 * (number + 1)
        three = (part.self.query, part.self.key, part.self.value)
        weight = torch.cat([linear.weight for linear in three]).T
        bias = torch.cat([linear.bias for linear in three])
        y, places = at_rows(x, layout.places, chosen)
        found = _attend(
            *(weight, bias, x, y, part.self.num_attention_heads, layout, chosen, False),
            part.self.attention_head_size**-0.5,
            attention(site),
        )
        y = _added(part.output, found, y, places, drops(site + 1))
        inner = activation_dropout(
            F.linear(y, layer.intermediate.dense.weight),
            places,
            bias=layer.intermediate.dense.bias,
            activation=activation,
        )
        x = _added(layer.output, inner, y, places, drops(site + 2))
    return x


def _scale(config: Any, width: int, number: int) -> float:
    """Of the scores of GPT-2's layer `number` with heads of this width."""
    scale = width**-0.5 if config.scale_attn_weights else 1.0
    return scale / (number + 1) if config.scale_attn_by_inverse_layer_idx else scale


def _attend(
    weight: Tensor,
    bias: Tensor,
    x: Tensor,
    y: Tensor,
    heads: int,
    layout: Layout,
    rows: Tensor | None,
    causal: bool,
    scale: float,
    drop: dict[str, Any],
) -> Tensor:
    """(R, D): attention of queries made of y over keys and values made of x; weight (D, 3 D)."""
    width = x.shape[1]
    if rows is None:
        made = torch.addmm(bias, x, weight).view(-1, 3, heads, width // heads).unbind(1)
    else:
        keys = torch.addmm(bias[width:], x, weight[:, width:])
        query = torch.addmm(bias[:width], y, weight[:, :width])
        made = (
            query.view(-1, heads, width // heads),
            *keys.view(-1, 2, heads, width // heads).unbind(1),
        )
    q, k, v = made
    found = session_attention(
        q, k, v, layout.offsets, rows=rows, causal=causal, scale=scale, **drop
    )
    return found.flatten(1)


def _added(part: Any, x: Tensor, residual: Tensor, places: Tensor, drop: dict[str, Any]) -> Tensor:
    """BERT's output: linear map, dropout, residual, layer norm."""
    norm = part.LayerNorm
    return residual_norm(
        F.linear(x, part.dense.weight).to(residual.dtype),
        residual,
        norm.weight,
        norm.bias,
        places,
        bias=part.dense.bias,
        eps=norm.eps,
        **drop,
    )


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _at_positions(table: Tensor, layout: Layout) -> Tensor:
    """(U, D), the row of each item's place in its session."""
    return F.embedding((layout.places & 0xFFFFFFFF).clamp(max=table.shape[0] - 1), table)


def _check_length(name: str, rows: int, longest: int) -> None:
    if longest > rows:
        raise ValueError(
            f"the body has {name}={rows} positions, and a session has {longest}; build it with"
            " more, or cut sessions by Model(..., max_sequence_length=...)"
        )

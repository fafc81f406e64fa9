"""XLNet over packed sessions, by the parameters of transformers' XLNetModel.

What the module computes on padded sessions with an attention mask, for the items alone: positions
are projected once per batch and layer, and the last layer makes queries, output and feed-forward
only where a prediction is made. Dropout of the positions is one draw for the whole batch; the
module draws it once for each session.

Source: Yang et al., "XLNet", arXiv 1906.08237; Dai et al., "Transformer-XL", arXiv 1901.02860.
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
from t4r_fast.ops.session_attention import Relative, session_attention


def why_not(config) -> str | None:
    """Why an XLNetConfig cannot be run here; None where it can."""
    if config.bi_data or config.clamp_len > 0 or config.same_length:
        return "bi_data, clamp_len or same_length"
    if config.ff_activation not in ACTIVATIONS:
        return f"ff_activation {config.ff_activation!r}"
    return None


def xlnet(module, x: Tensor, layout: Layout, rows: Tensor | None, seed: Tensor | None) -> Tensor:
    """The last hidden states at `rows`, or of all items.

    module  transformers.XLNetModel that why_not has nothing against
    x       (U, D)  the items' vectors
    rows    (R,)    int64, items at which a prediction is made, then -1; None: all
    seed    (2,)    int64 of the dropout; None without dropout
    returns (R, D), zeros where rows are -1
    """
    drops = Drops(module.dropout.p if seed is not None else 0.0, seed)
    x = activation_dropout(x, layout.places, activation="none", **drops(0))
    positions = _positions(layout.longest, x)
    at = torch.arange(positions.shape[0], device=x.device)
    positions = activation_dropout(positions, at, activation="none", **drops(1))
    places, last = layout.places, len(module.layer) - 1
    causal = module.attn_type == "uni"
    for number, layer in enumerate(module.layer):
        chosen = rows if number == last else None
        y, places = at_rows(x, layout.places, chosen)
        site = 8 * (number + 1)
        found = _attention(layer.rel_attn, x, y, positions, layout, chosen, causal, drops(site))
        norm = layer.rel_attn.layer_norm
        y = residual_norm(found, y, norm.weight, norm.bias, places, eps=norm.eps, **drops(site + 1))
        x = _feed_forward(layer.ff, module.config.ff_activation, y, places, drops, site)
    return activation_dropout(x, places, activation="none", **drops(2))


def _positions(longest: int, like: Tensor) -> Tensor:
    """(2 M, D): row p holds the sinusoids of distance M - p, M a multiple of 16 from `longest`."""
    width = like.shape[1]
    m = -(-max(longest, 1) // 16) * 16
    distance = torch.arange(m, -m, -1, device=like.device).float()
    step = torch.arange(0, width, 2, device=like.device).float() / width
    angle = distance[:, None] * (1 / torch.pow(10000, step))
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(like.dtype)


def _attention(
    part,
    x: Tensor,
    y: Tensor,
    positions: Tensor,
    layout: Layout,
    rows: Tensor | None,
    causal: bool,
    drop: dict[str, Any],
) -> Tensor:
    """(R, D): attention and its output product, for the vectors y at `rows` of x."""
    heads, width = part.n_head, part.d_head
    q, k, v = (w.flatten(1) for w in (part.q, part.k, part.v))
    if rows is None:
        made = (x @ torch.cat([q, k, v], dim=1)).view(-1, 3, heads, width).unbind(1)
    else:
        keys = (x @ torch.cat([k, v], dim=1)).view(-1, 2, heads, width).unbind(1)
        made = ((y @ q).view(-1, heads, width), *keys)
    by_distance = (positions @ part.r.flatten(1)).view(-1, heads, width)
    dtype = made[0].dtype  # half precision under autocast
    found = session_attention(
        made[0],
        made[1],
        made[2],
        layout.offsets,
        rows=rows,
        causal=causal,
        relative=Relative(by_distance, part.r_w_bias.to(dtype), part.r_r_bias.to(dtype)),
        scale=part.scale,
        **drop,
    )
    return F.linear(found.flatten(1), part.o.flatten(1)).to(x.dtype)


def _feed_forward(
    part, activation: str, x: Tensor, places: Tensor, drops: Drops, site: int
) -> Tensor:
    inner = activation_dropout(
        F.linear(x, part.layer_1.weight),
        places,
        bias=part.layer_1.bias,
        activation=ACTIVATIONS[activation],
        **drops(site + 2),
    )
    norm = part.layer_norm
    return residual_norm(
        F.linear(inner, part.layer_2.weight).to(x.dtype),
        x,
        norm.weight,
        norm.bias,
        places,
        bias=part.layer_2.bias,
        eps=norm.eps,
        **drops(site + 3),
    )

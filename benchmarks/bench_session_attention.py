"""session_attention: XLNet's attention on packed sessions, which padding leaves mostly empty."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import t4r_fast
from benchmarks.case import Benchmark, Call, Case, Inputs, Outputs, Provider, Work, normal
from t4r_fast.ops.session_attention import Relative

LONGEST = 20
DROPOUT = 0.3
SEED = torch.tensor([1, 2])

# U: items of all sessions, R: queries, W: the width of a head
SIZES = {"B": 256, "L": LONGEST, "H": 4, "W": 48}
CASES = [
    Case("relative_fwd", SIZES, "quick"),
    Case("relative_fwd+bwd", SIZES, "quick", wide=True, shown=True),
    Case("relative_rows_fwd+bwd", SIZES, shown=True),
    Case("relative_fwd", {**SIZES, "B": 1}, shown=True),
    Case("causal_fwd+bwd", SIZES, shown=True),
    Case("causal_fwd+bwd", {"B": 64, "L": 128, "H": 4, "W": 48}),
    Case("relative_fwd+bwd", {"B": 64, "L": 128, "H": 4, "W": 16}, "full"),
    Case("causal_fwd+bwd", {"B": 8, "L": 300, "H": 1, "W": 64}, "full"),
]


def lengths_of(case: Case) -> Tensor:
    """1 to L items, the mean 0.3 L as in the tutorial's sessions: geometric, cut off."""
    u = torch.rand(case["B"], generator=torch.Generator().manual_seed(1))
    return (1 + (-(0.3 * case["L"] - 1) * u.log()).long()).clamp(max=case["L"])


def rows_of(case: Case, offsets: Tensor) -> Tensor:
    """One target in four items, the last of a session always."""
    u = torch.rand(int(offsets[-1]), generator=torch.Generator().manual_seed(2))
    chosen = u < 0.04
    chosen[offsets[1:] - 1] = True
    return chosen.nonzero()[:, 0]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    lengths = lengths_of(case)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    shape = (case["H"], case["W"])
    packed = normal(int(offsets[-1]), 3, *shape, dtype=dtype)
    rows = rows_of(case, offsets) if "rows" in case.kind else None
    found = {
        "packed": packed,
        "offsets": offsets,
        "lengths": lengths,
        "rows": rows,
        "dout": normal(len(packed) if rows is None else len(rows), *shape, dtype=dtype, seed=1),
    }
    if "relative" in case.kind:
        found["keys"] = normal(2 * case["L"], *shape, dtype=dtype, seed=2)
        found["key_bias"] = normal(*shape, dtype=dtype, seed=3)
        found["position_bias"] = normal(*shape, dtype=dtype, seed=4)
    return found


LEAVES = ("packed", "keys", "key_bias", "position_bias")


def with_gradients(case: Case, function, dropout: float) -> Call:
    """Forward, and the gradients of the packed product and of relative's parts.

    With dropout there is nothing to compare: PyTorch draws in its own way.
    """

    def call(x: Inputs) -> Outputs:
        if not case.kind.endswith("bwd"):
            with torch.no_grad():
                out = function(x)
            return {} if dropout else {"out": out}
        leaves = {name: x[name].detach().requires_grad_() for name in LEAVES if name in x}
        out = function({**x, **leaves})
        grads = torch.autograd.grad(out, list(leaves.values()), x["dout"])
        if dropout:
            return {}
        return {"out": out.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}

    return call


def attend(case: Case, dropout: float) -> Call:
    def function(x: Inputs) -> Tensor:
        q, k, v = x["packed"].unbind(1)
        relative = None
        if "keys" in x:
            relative = Relative(x["keys"], x["key_bias"], x["position_bias"])
        return t4r_fast.session_attention(
            q if x["rows"] is None else q[x["rows"]],
            *(k, v, x["offsets"]),
            rows=x["rows"],
            causal=case.kind.startswith("causal"),
            relative=relative,
            dropout=dropout,
            seed=SEED,
        )

    return with_gradients(case, function, dropout)


def padded(case: Case, dropout: float) -> Call:
    """transformers' XLNetRelativeAttention.rel_attn_core, or F.scaled_dot_product_attention.

    On padded sessions, as such a model has them: making them, and picking what is asked for, is not
    part of what it is timed against (both are a gather of (U, D)).
    """
    scale = case["W"] ** -0.5
    longest = case["L"]

    def function(x: Inputs) -> Tensor:
        there = torch.arange(longest) < x["lengths"][:, None]
        place = there.nonzero(as_tuple=True)
        full = x["packed"].new_zeros(len(there), longest, *x["packed"].shape[1:])
        q, k, v = full.index_put(place, x["packed"]).unbind(2)  # (B, L, H, W)
        if "keys" not in x:
            seen = torch.ones(longest, longest, dtype=torch.bool).tril()
            mask = seen & (there[:, None, None] | torch.eye(longest, dtype=torch.bool))
            out = F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)),
                attn_mask=mask,
                dropout_p=dropout,
            ).transpose(1, 2)
        else:
            items = torch.einsum("bihd,bjhd->bhij", q + x["key_bias"], k)
            places = torch.einsum("bihd,rhd->bhir", q + x["position_bias"], x["keys"])
            size = places.shape
            places = places.reshape(size[0], size[1], size[3], size[2])[:, :, 1:]
            places = places.reshape(size[0], size[1], size[2], size[3] - 1)[..., :longest]
            score = (items + places) * scale - 1e30 * (~there)[:, None, None].to(q.dtype)
            weight = F.dropout(score.softmax(3), dropout)
            out = torch.einsum("bhij,bjhd->bihd", weight, v)
        found = out[place]
        return found if x["rows"] is None else found[x["rows"]]

    return with_gradients(case, function, dropout)


def work(case: Case, size: int) -> Work:
    """Products of queries with items, with places, and of probabilities with values."""
    lengths = lengths_of(case).double()
    pairs = float((lengths * lengths).sum())
    if case.kind.startswith("causal"):
        pairs = float((lengths * (lengths + 1) / 2).sum())
    items = float(lengths.sum())
    if "rows" in case.kind:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.long().cumsum(0)])
        session = torch.searchsorted(offsets, rows_of(case, offsets), right=True) - 1
        pairs = float(lengths[session].sum())
    products = 3 if "relative" in case.kind else 2
    backward = case.kind.endswith("bwd")
    # backward: scores again, dp, dq and dk, dv; with relative dq and dkeys of places
    total = products + (products + 1 + 2 + 1 + 2 * (products - 2) if backward else 0)
    width = case["H"] * case["W"]
    return Work(
        flop=2 * pairs * width * total,
        exp=pairs * case["H"] * (1 + backward),
        read=3 * items * width * size * (1 + backward),
        written=items * width * size * (1 + 3 * backward),
    )


BENCHMARK = Benchmark(
    "session_attention",
    CASES,
    inputs,
    [
        Provider("t4r_fast", lambda case: attend(case, 0.0), ours=True),
        Provider("padded PyTorch", lambda case: padded(case, 0.0)),
        Provider("t4r_fast, dropout", lambda case: attend(case, DROPOUT)),
        Provider("padded PyTorch, dropout", lambda case: padded(case, DROPOUT)),
    ],
    work,
)

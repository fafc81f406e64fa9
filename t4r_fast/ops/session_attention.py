"""session_attention: attention inside each session of a packed batch, XLNet's relative form too."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from t4r_fast import backend
from t4r_fast.ops._check import (
    FLOAT_DTYPES,
    check_device,
    check_int64,
    check_values,
    checked,
    full_precision,
    names,
)
from t4r_fast.ops._seed import check_seed
from t4r_fast.plain import session_attention as plain
from t4r_fast.plain._scores import compute_dtype

_OP = "session_attention"


class Relative(NamedTuple):
    """XLNet's relative positions: what `session_attention(relative=...)` takes.

    keys           (2 M, H, Dh)  row M - d belongs to a query d items after its key, -M <= -d < M
    key_bias       (H, Dh)       added to queries that meet items (r_w_bias)
    position_bias  (H, Dh)       added to queries that meet positions (r_r_bias)
    """

    keys: Tensor
    key_bias: Tensor
    position_bias: Tensor


def session_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    rows: Tensor | None = None,
    causal: bool = False,
    relative: Relative | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """Attention of items to the items of their session; there is no padding and no L x L tensor.

    score(i, j) = scale * q[i] @ k[j]                 i, j places in one session, head by head
    score(i, j) = scale * ((q[i] + key_bias) @ k[j] + (q[i] + position_bias) @ keys[M - (i - j)])
                                                      with relative
    out[i]      = sum of dropped(softmax(score)(i, j)) * v[j] over all j, or j <= i if causal

    q         (R, H, Dh)  float32, float16, bfloat16, float64; a query for each item (R = U), or for
                          each entry of rows
    k, v      (U, H, Dh)  dtype of q; U items, session after session. Any strides of items and
                          heads: parts of one (U, 3 * H * Dh) product are read in place
    offsets   (B + 1,)    int64, ascending from 0: session b is items offsets[b] to offsets[b + 1].
                          U may exceed offsets[-1]: what lies behind is not read
    rows      (R,)        int64, the item at which each query stands, in any order, repeated or not;
                          negative ones are skipped, so that a list may have a fixed capacity
    causal    bool        item i sees items j <= i alone
    relative  Relative    XLNet's relative positions, M >= the longest session
    scale     float       of the scores; None is 1 / sqrt(Dh)
    dropout   float       0 <= p < 1, of the probabilities: those kept are divided by 1 - p
    seed      (2,)        int64 (key, offset), which decides what is dropped; None draws one from
                          torch's default generator
    site      int         0 <= site < 2**32: calls of one seed at different sites drop independently
    returns   (R, H, Dh)  dtype of q; 0 for skipped queries and for items behind offsets[-1]

    What is dropped depends on seed, site, the session's number, head and the two places: on every
    backend the same, and whatever rows there are. Without dropout the C++ kernels give a query the
    same bits in every batch and place, alone or among others.
    Differentiable once in q, k, v and relative; sums are float32 for 16-bit inputs. Saved for
    backward are the inputs and a log-sum-exp for each query and head.
    Raises ValueError or TypeError on shapes, dtypes and options, ValueError on offsets that do not
    ascend from 0 to at most U or a session longer than M, IndexError on a row out of range.
    Source: Dao, "FlashAttention-2", arXiv 2307.08691; Yang et al., "XLNet", arXiv 1906.08237.
    Replaces transformers' XLNetRelativeAttention.rel_attn_core on padded sessions.
    """
    _check(q, k, v, offsets, rows)
    if relative is not None:
        relative = Relative(*relative)
        _check_relative(q, relative)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[2])
    if not 0 <= dropout < 1:
        raise ValueError(f"{_OP}: dropout must be at least 0 and below 1; got {dropout}")
    if not 0 <= site < 2**32:
        raise ValueError(f"{_OP}: site must be at least 0 and below 2**32; got {site}")
    if seed is not None or dropout:
        seed = check_seed(_OP, seed, q.device)
    return checked(
        backend.pick(_OP, q),
        lambda: _check_values(k, offsets, rows, relative),
        _SessionAttention.apply,
        *(q, k, v, *(relative or (None, None, None)), offsets, rows),
        *(causal, float(scale), float(dropout), seed if dropout else None, site),
    )


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, rows: Tensor | None) -> None:
    if q.dim() != 3 or q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"{_OP}: q must have shape (R, H, Dh), H and Dh >= 1; got {(*q.shape,)}")
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{_OP}: q must be {names(FLOAT_DTYPES)}; got {q.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dim() != 3 or tensor.shape[1:] != q.shape[1:]:
            raise ValueError(
                f"{_OP}: {name} must have shape (U, H, Dh) with the H and Dh of q, "
                f"{(*q.shape[1:],)}; got {(*tensor.shape,)}"
            )
    if v.shape != k.shape:
        raise ValueError(f"{_OP}: v must have the shape of k, {(*k.shape,)}; got {(*v.shape,)}")
    _check_dtypes(q, k=k, v=v)
    check_int64(_OP, "offsets", offsets, "(B + 1,)", 1)
    if offsets.shape[0] == 0:
        raise ValueError(f"{_OP}: offsets must have shape (B + 1,), at least one entry; got (0,)")
    if rows is not None:
        check_int64(_OP, "rows", rows, "(R,)", 1)
    expected = k.shape[0] if rows is None else rows.shape[0]
    if q.shape[0] != expected:
        source = "item of k" if rows is None else "entry of rows"
        raise ValueError(
            f"{_OP}: q must have one row per {source}, {expected}; got {q.shape[0]}"
            + (" (rows names the items of fewer queries)" if rows is None else "")
        )
    check_device(_OP, "q", q, k=k, v=v, offsets=offsets, rows=rows)


def _check_relative(q: Tensor, relative: Relative) -> None:
    keys = relative.keys
    if keys.dim() != 3 or keys.shape[1:] != q.shape[1:] or keys.shape[0] % 2:
        raise ValueError(
            f"{_OP}: relative.keys must have shape (2 * M, H, Dh) with the H and Dh of q, "
            f"{(*q.shape[1:],)}; got {(*keys.shape,)}"
        )
    for name in ("key_bias", "position_bias"):
        shape = getattr(relative, name).shape
        if shape != q.shape[1:]:
            raise ValueError(
                f"{_OP}: relative.{name} must have shape (H, Dh), {(*q.shape[1:],)}; "
                f"got {(*shape,)}"
            )
    tensors = {f"relative.{name}": tensor for name, tensor in relative._asdict().items()}
    _check_dtypes(q, **tensors)
    check_device(_OP, "q", q, **tensors)


def _check_dtypes(q: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != q.dtype:
            raise TypeError(
                f"{_OP}: {name} must have the dtype of q, {q.dtype}; got {tensor.dtype} "
                "(convert one of them)"
            )


def _check_values(
    k: Tensor, offsets: Tensor, rows: Tensor | None, relative: Relative | None
) -> None:
    """Values of offsets and rows; on a GPU and under torch.compile by device-side assertions."""
    size = k.shape[0]
    lengths = offsets[1:] - offsets[:-1]
    ends = torch.stack([offsets[0] != 0, offsets[-1] > size])
    rule = f"{_OP}: offsets must ascend from 0 to at most {size} (the items of k)"
    later = torch.compiler.is_compiling() or offsets.device.type != "cpu"
    if later:
        torch._assert_async(~(ends.any() | (lengths < 0).any()), rule)
    elif bool((lengths < 0).any()):
        at = int((lengths < 0).nonzero()[0])
        pair = offsets[at : at + 2].tolist()
        raise ValueError(f"{rule}; got {pair[0]} and then {pair[1]} at entry {at + 1}")
    elif bool(ends.any()):
        raise ValueError(f"{rule}; got {int(offsets[0])} to {int(offsets[-1])}")
    if relative is not None:
        reach = relative.keys.shape[0] // 2
        long = lengths > reach
        rule = f"{_OP}: relative.keys must have 2 * M rows, M >= the longest session"
        if later:
            torch._assert_async(~long.any(), f"{rule}; M is {reach}")
        elif bool(long.any()):
            at = int(long.nonzero()[0])
            raise ValueError(
                f"{rule}; got M = {reach} and session {at} of {int(lengths[at])} items"
            )
    if rows is not None:
        check_values(
            rows >= size,
            rows,
            f"{_OP}: rows must be < {size} (the items of k), or negative to skip",
            "entry",
        )


class _SessionAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor | None,
        key_bias: Tensor | None,
        position_bias: Tensor | None,
        offsets: Tensor,
        rows: Tensor | None,
        causal: bool,
        scale: float,
        dropout: float,
        seed: Tensor | None,
        site: int,
    ) -> Tensor:
        ctx.backend = backend.pick(_OP, q)
        ctx.options = causal, scale, dropout, site
        with full_precision(ctx.backend, q.device):
            out, lse = backend.ops(ctx.backend, plain).session_attention_fwd(
                *(q, k, v, offsets, rows, keys, key_bias, position_bias),
                *(causal, scale, dropout, seed, site),
            )
        ctx.save_for_backward(q, k, v, lse, offsets, rows, keys, key_bias, position_bias, seed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse, offsets, rows, keys, key_bias, position_bias, seed = ctx.saved_tensors
        causal, scale, dropout, site = ctx.options
        with full_precision(ctx.backend, q.device):
            found = backend.ops(ctx.backend, plain).session_attention_bwd(
                *(dout, q, k, v, lse, offsets, rows, keys, key_bias, position_bias),
                *(causal, scale, dropout, seed, site),
            )
        needed = zip(ctx.needs_input_grad[:6], found)
        return *(gradient if need else None for need, gradient in needed), *[None] * 7


def _fake_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    keys: Tensor | None,
    key_bias: Tensor | None,
    position_bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=compute_dtype(q.dtype))


def _fake_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    keys: Tensor | None,
    key_bias: Tensor | None,
    position_bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    site: int,
) -> tuple[Tensor, ...]:
    relative = (keys, key_bias, position_bias)
    return (
        *(q.new_empty(t.shape) for t in (q, k, v)),
        *(q.new_empty(0 if t is None else t.shape) for t in relative),
    )


_RELATIVE = "Tensor? keys, Tensor? key_bias, Tensor? position_bias"
_OPTIONS = "bool causal, float scale, float dropout, Tensor? seed, int site"

# seed is None where nothing is dropped. lse (R, H), of the type of the sums, is 0 where out is not
# computed. The gradients of `relative` are empty without it.
backend.declare(
    _OP,
    "session_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor? rows,"
    f" {_RELATIVE}, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    fake=_fake_fwd,
)
backend.declare(
    _OP,
    "session_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse,"
    f" Tensor offsets, Tensor? rows, {_RELATIVE}, {_OPTIONS})"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dkeys, Tensor dkey_bias, Tensor dposition_bias)",
    fake=_fake_bwd,
)

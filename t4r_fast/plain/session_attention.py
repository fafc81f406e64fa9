"""session_attention in plain PyTorch: blocks of queries against a window of items, masked.

On a CPU a window holds some sessions next to each other, so little of it is masked. On other
devices, and under torch.compile, where sizes are not known on the host, it holds all items. Masked
scores are computed too: a nan in one session can reach others of the same window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from t4r_fast.plain._dropout import kept, key_of, threshold
from t4r_fast.plain._scores import compute_dtype

WINDOW_ITEMS = 64
BLOCK_ELEMENTS = 2**19  # of the widest tensor of a block; drawing has some ten of them, in int64


class _Window(NamedTuple):
    """Queries `first` to `stop` in order, for items `start` to `end`, whose sessions have at most
    `longest` items."""

    first: int
    stop: int
    start: int
    end: int
    longest: int


class _Relative(NamedTuple):
    keys: Tensor
    key_bias: Tensor
    position_bias: Tensor


class _Block:
    """Scores of C queries for the W items of a window.

    index     (C,)        which queries of q
    valid     (C, 1, 1)   the query stands in a session
    keep      (C, W)      item in the query's session, and not after it if causal
    scores    (C, H, W)   -inf where not kept
    by_items, by_places   (C, H, Dh)  scaled queries, biases added
    distance  (C, W)      rows of `keys`, for the scores of places
    factor    (C, H, W)   0 where dropped, else 1 / (1 - dropout); None without
    """

    def __init__(self, call: _Call, window: _Window, index: Tensor) -> None:
        q = call.q[index].to(call.dtype)
        item, session, place = call.item[index], call.session[index], call.place[index]
        part = slice(window.start, window.end)
        self.index, self.part = index, part
        self.k, self.v = call.k[part].to(call.dtype), call.v[part].to(call.dtype)
        items = torch.arange(window.start, window.end, device=q.device)
        self.keep = (call.session_of_item[part] == session[:, None]) & call.valid[index][:, None]
        if call.causal:
            self.keep = self.keep & (items <= item[:, None])
        self.valid = call.valid[index][:, None, None]
        # what lies behind the last session may hold anything, and 0 * nan is nan
        inside = (call.session_of_item[part] >= 0)[:, None, None]
        self.k, self.v = torch.where(inside, self.k, 0.0), torch.where(inside, self.v, 0.0)
        q = torch.where(self.valid, q, 0.0)
        relative = call.relative
        self.by_items = (q if relative is None else q + relative.key_bias) * call.scale
        scores = torch.einsum("chd,whd->chw", self.by_items, self.k)
        of_item = call.place_of_item[part]
        if relative is not None:
            half = relative.keys.shape[0] // 2
            reach = min(half, window.longest)
            self.keys_part = slice(half - reach, half + reach)
            self.by_places = (q + relative.position_bias) * call.scale
            self.keys = relative.keys[self.keys_part]
            places = torch.einsum("chd,rhd->chr", self.by_places, self.keys)
            distance = (reach - (place[:, None] - of_item)).clamp(0, max(2 * reach - 1, 0))
            self.distance = distance[:, None].expand(scores.shape)
            scores = scores + places.gather(2, self.distance)
        self.scores = torch.where(self.keep[:, None], scores, -torch.inf)
        self.factor = None
        if call.key is not None:
            columns = window.longest
            drawn = kept(
                call.key,
                threshold(call.dropout),
                session[:, None],
                place[:, None],
                torch.arange(q.shape[1], device=q.device),
                columns,
            )
            at = of_item.clamp(0, columns - 1).expand(scores.shape)
            self.factor = drawn.gather(2, at).to(call.dtype) / (1 - call.dropout)

    def probabilities(self, lse: Tensor) -> Tensor:
        p = torch.where(self.keep[:, None], (self.scores - lse[..., None]).exp(), 0.0)
        # The last bit of lse is in all of a row's: the sum of dp * p would not be their mean.
        return p / torch.where(self.valid, p.sum(2, keepdim=True), 1.0)

    def dropped(self, values: Tensor) -> Tensor:
        return values if self.factor is None else values * self.factor


class _Call:
    def __init__(
        self,
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
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.offsets, self.causal, self.scale, self.dropout = offsets, causal, scale, dropout
        self.dtype = compute_dtype(q.dtype)
        self.relative = None
        if keys is not None and key_bias is not None and position_bias is not None:
            self.relative = _Relative(*(t.to(self.dtype) for t in (keys, key_bias, position_bias)))
        self.key = key_of(seed, site) if seed is not None and dropout else None
        items = torch.arange(k.shape[0], device=q.device)
        self.item = items if rows is None else rows
        if self.empty:
            return
        self.valid = (self.item >= 0) & (self.item < offsets[-1])
        self.session, self.place = self._of(self.item)
        self.session_of_item, self.place_of_item = self._of(items)
        self.session_of_item = torch.where(items < offsets[-1], self.session_of_item, -1)

    @property
    def empty(self) -> bool:
        return 0 in (self.q.shape[0], self.k.shape[0], self.offsets.shape[0] - 1)

    def _of(self, item: Tensor) -> tuple[Tensor, Tensor]:
        session = torch.searchsorted(self.offsets, item.contiguous(), right=True) - 1
        session = session.clamp(0, self.offsets.shape[0] - 2)
        return session, item - self.offsets[session]

    def _windows(self) -> tuple[Tensor, list[_Window]]:
        """Queries in the order of their items, and the windows of those."""
        size = self.k.shape[0]
        if torch.compiler.is_compiling() or self.q.device.type != "cpu":
            longest = size
            if self.relative is not None:
                longest = min(size, self.relative.keys.shape[0] // 2)
            order = torch.arange(self.q.shape[0], device=self.q.device)
            return order, [_Window(0, self.q.shape[0], 0, size, max(longest, 1))]
        order = torch.argsort(self.item, stable=True)
        order = order[self.valid[order]]
        found, start, first, longest = [], 0, 0, 0
        offsets = self.offsets.tolist()
        stops = torch.searchsorted(self.item[order], self.offsets).tolist()
        for b, end in enumerate(offsets[1:]):
            longest = max(longest, end - offsets[b])
            last = b + 2 == len(offsets)
            # together with the next session it would be too large, or this is the last one
            if not last and offsets[b + 2] - start <= WINDOW_ITEMS:
                continue
            if stops[b + 1] > first:
                found.append(_Window(first, stops[b + 1], start, end, longest))
            start, first, longest = end, stops[b + 1], 0
        return order, found

    def blocks(self) -> Iterator[_Block]:
        if self.empty:
            return
        order, windows = self._windows()
        for window in windows:
            widest = self.q.shape[1] * max(window.end - window.start, 2 * window.longest)
            step = max(1, BLOCK_ELEMENTS // widest)
            for first in range(window.first, window.stop, step):
                yield _Block(self, window, order[first : min(first + step, window.stop)])


def session_attention_fwd(
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
    """out (R, H, Dh) and lse (R, H)."""
    call = _Call(
        *(q, k, v, offsets, rows, keys, key_bias, position_bias),
        *(causal, scale, dropout, seed, site),
    )
    out = q.new_zeros(q.shape)
    lse = q.new_zeros(q.shape[:2], dtype=call.dtype)
    for block in call.blocks():
        found = block.scores.logsumexp(2)
        found = torch.where(block.valid[..., 0], found, 0.0)
        weight = block.dropped(block.probabilities(found))
        lse[block.index] = found
        out[block.index] = torch.einsum("chw,whd->chd", weight, block.v).to(q.dtype)
    return out, lse


def session_attention_bwd(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dkeys, dkey_bias, dposition_bias; the last three empty without keys."""
    call = _Call(
        *(q, k, v, offsets, rows, keys, key_bias, position_bias),
        *(causal, scale, dropout, seed, site),
    )
    dq = q.new_zeros(q.shape)
    dk, dv = k.new_zeros(k.shape, dtype=call.dtype), v.new_zeros(v.shape, dtype=call.dtype)
    of_relative = [
        q.new_zeros(0 if t is None else t.shape, dtype=call.dtype)
        for t in (keys, key_bias, position_bias)
    ]
    dkeys, dkey_bias, dposition_bias = of_relative
    for block in call.blocks():
        given = torch.where(block.valid, dout[block.index].to(call.dtype), 0.0)
        p = block.probabilities(lse[block.index])
        dv[block.part] += torch.einsum("chw,chd->whd", block.dropped(p), given)
        dp = block.dropped(torch.einsum("chd,whd->chw", given, block.v))
        # out @ dout is the same sum, of rounded numbers: it leaves the only item of a session,
        # whose scores have no gradient, with one
        ds = p * (dp - (p * dp).sum(2, keepdim=True))
        dk[block.part] += torch.einsum("chw,chd->whd", ds, block.by_items)
        dquery = torch.einsum("chw,whd->chd", ds, block.k) * scale
        if call.relative is not None:
            places = torch.zeros_like(ds[..., :1]).repeat(1, 1, block.keys.shape[0])
            places = places.scatter_add(2, block.distance, ds)
            dkeys[block.keys_part] += torch.einsum("chr,chd->rhd", places, block.by_places)
            by_places = torch.einsum("chr,rhd->chd", places, block.keys) * scale
            dkey_bias += dquery.sum(0)
            dposition_bias += by_places.sum(0)
            dquery = dquery + by_places
        dq[block.index] = dquery.to(q.dtype)
    return dq, dk.to(q.dtype), dv.to(q.dtype), *(t.to(q.dtype) for t in of_relative)

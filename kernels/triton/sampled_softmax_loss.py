"""sampled_softmax_loss: the online softmax of each row over its set's candidates, as in attention.

Negatives come from counters. A set that rows share is drawn by a small kernel, once, and not by
each block of rows; with scope "row" the kernel of the loss draws while it reads the items, and no
id is stored. The forward pass also gives d loss / d hidden, as it reads the items anyway.
Item gradients are in _sampled_gradients.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels import _tuning
from t4r_fast.kernels._draws import bits, draw_items, expm1, float64_of, log1p
from t4r_fast.kernels._sampled import (
    CONSTANT,
    HIT_CONSTANT,
    HIT_OFFSET,
    HIT_REMOVED,
    HIT_STAYS,
    LOG1P,
    LOGQ,
    OFFSET,
    PLAIN,
    _candidates_kernel,
    candidate_logits,
    gathered,
    offsets,
    split_float64,
)
from t4r_fast.kernels._sampled_gradients import (
    Segments,
    _draw_sums_kernel,
    _entry_sums_kernel,
    _sampled_softmax_loss_bwd_kernel,
    segments,
)
from t4r_fast.kernels._scores import dense_rows, kept_entries, load_rows
from t4r_fast.kernels._tuning import (
    Config,
    Entry,
    Variant,
    config,
    launch,
)
from t4r_fast.plain import sampled_softmax_loss as plain

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _target_products(
    hidden, hidden_ptr, source, kept, items_ptr, wanted, stride_hidden, stride_items,
    D: tl.constexpr, SUM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """hidden . items[wanted] of each row."""
    own = load_rows(items_ptr, wanted, kept, stride_items, 0, D, BLOCK_D).to(SUM)
    product = tl.sum(hidden.to(SUM) * own, 1)
    if D > BLOCK_D:
        for d in range(BLOCK_D, D, BLOCK_D):
            part = load_rows(hidden_ptr, source, kept, stride_hidden, d, D, BLOCK_D).to(SUM)
            own = load_rows(items_ptr, wanted, kept, stride_items, d, D, BLOCK_D).to(SUM)
            product += tl.sum(part * own, 1)
    return product


@triton.jit
def _finish(
    z_target, top, total, mean, own, entry, inside, kept, column, temperature,
    loss_ptr, lse_ptr, unit_ptr,
    D: tl.constexpr, UNIT: tl.constexpr, SUM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store loss, lse and columns of d loss / d hidden.

    top, total  largest logit of the negatives and the sum of exp(z - top)
    mean        sum of exp(z - top) * item
    own         the target's vector
    """
    negatives = top.to(tl.float64) + tl.log(total.to(tl.float64))
    apart = negatives - z_target
    rest = log1p(tl.exp(-tl.abs(apart)))
    # softplus of the difference: exact also where the target has nearly all of the weight
    loss = tl.where(apart > 0, apart, 0.0) + rest
    loss = tl.where(apart == apart, loss, apart)
    lse = tl.where(apart > 0, negatives, z_target) + rest
    if column == 0:
        tl.store(loss_ptr + entry, tl.where(kept, loss, 0.0).to(SUM), mask=inside)
        tl.store(lse_ptr + entry, tl.where(kept, lse, 0.0), mask=inside)
    if UNIT:
        share = (-expm1(-loss) / float64_of(temperature)).to(SUM)
        total = tl.where(total == 0.0, 1.0, total)
        unit = share[:, None] * (mean / total[:, None] - own)
        d = column + tl.arange(0, BLOCK_D)
        tl.store(
            unit_ptr + entry[:, None] * D + d[None, :],
            tl.where(kept[:, None], unit, 0.0),
            mask=inside[:, None] & (d < D)[None, :],
        )


@triton.jit
def _sampled_softmax_loss_fwd_kernel(
    hidden_ptr,
    items_ptr,
    target_ptr,
    bias_ptr,
    rows_ptr,
    cumulative_ptr,
    ids_ptr,
    high_ptr,
    low_ptr,
    hit_high_ptr,
    hit_low_ptr,
    target_offset_ptr,
    loss_ptr,
    lse_ptr,
    unit_ptr,
    M,
    N,
    V,
    K,
    ignore_index,
    low,
    log_size,
    log_count,
    log_range,
    temperature,
    hit_value,
    set_rows,
    stride_hidden,
    stride_items,
    stride_target,
    stride_bias,
    stride_rows,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SAMPLER: tl.constexpr,
    TARGET_KIND: tl.constexpr,
    HIT: tl.constexpr,
    UNIT: tl.constexpr,
    SUM: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of one set, of set_rows entries: a multiple of BLOCK_N, or all entries."""
    first_entry = tl.program_id(0).to(tl.int64) * BLOCK_N
    column = tl.program_id(1) * BLOCK_D
    first = first_entry // set_rows * K
    entry = first_entry + tl.arange(0, BLOCK_N)
    inside = entry < M
    source, kept = kept_entries(rows_ptr, entry, M, N, stride_rows, HAS_ROWS)
    target = tl.load(target_ptr + source * stride_target, mask=kept, other=ignore_index)
    kept = kept & (target != ignore_index)
    wanted = tl.where(kept & (target >= 0) & (target < V), target, 0)
    scale = (1.0 / float64_of(temperature)).to(SUM)
    constant = float64_of(hit_value).to(SUM)

    hidden = load_rows(hidden_ptr, source, kept, stride_hidden, 0, D, BLOCK_D)
    top = tl.full((BLOCK_N,), -float("inf"), SUM)
    total = tl.zeros((BLOCK_N,), SUM)
    mean = tl.zeros((BLOCK_N, BLOCK_D), SUM)
    stop = tl.where(tl.max(kept.to(tl.int32), 0) > 0, K, 0)
    for start in range(0, stop, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = k < K
        ids = tl.load(ids_ptr + first + k, mask=there, other=0)
        high = tl.load(high_ptr + first + k, mask=there, other=float("inf"))
        low_ = tl.load(low_ptr + first + k, mask=there, other=0.0)
        items = load_rows(items_ptr, ids, there, stride_items, 0, D, BLOCK_D)
        product = tl.dot(
            hidden.to(DOT), tl.trans(items.to(DOT)), input_precision=PRECISION, out_dtype=SUM
        )
        if D > BLOCK_D:
            for d in range(BLOCK_D, D, BLOCK_D):
                part = load_rows(hidden_ptr, source, kept, stride_hidden, d, D, BLOCK_D)
                items = load_rows(items_ptr, ids, there, stride_items, d, D, BLOCK_D)
                product = tl.dot(
                    part.to(DOT), tl.trans(items.to(DOT)), product,
                    input_precision=PRECISION, out_dtype=SUM,
                )  # fmt: skip
            items = load_rows(items_ptr, ids, there, stride_items, column, D, BLOCK_D)
        hit = (ids[None, :] == wanted[:, None]) & (high < float("inf"))[None, :]
        hit_high, hit_low = high, low_
        if HIT == OFFSET:
            hit_high = tl.load(hit_high_ptr + first + k, mask=there, other=float("inf"))
            hit_low = tl.load(hit_low_ptr + first + k, mask=there, other=0.0)
        z = candidate_logits(
            product, high[None, :], low_[None, :], hit_high[None, :], hit_low[None, :], hit,
            scale[:, None], constant[:, None], HIT,
        )  # fmt: skip
        above = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(above == -float("inf"), 0.0, above)
        p = tl.exp2((z - shift[:, None]) * _LOG2E)
        fade = tl.exp2((top - shift) * _LOG2E)
        total = total * fade + tl.sum(p, 1)
        top = above
        if UNIT:
            if HIT == CONSTANT:
                p = tl.where(hit, 0.0, p)
            mean = tl.dot(
                p.to(DOT), items.to(DOT), mean * fade[:, None],
                input_precision=PRECISION, out_dtype=SUM,
            )  # fmt: skip

    product = _target_products(
        hidden, hidden_ptr, source, kept, items_ptr, wanted, stride_hidden, stride_items,
        D, SUM, BLOCK_D,
    )  # fmt: skip
    if target_offset_ptr is not None:
        offset = tl.load(target_offset_ptr + entry, mask=kept, other=0.0)
    else:
        offset = offsets(
            wanted, kept, bias_ptr, cumulative_ptr, V, low, log_size, log_count, log_range,
            temperature, stride_bias, HAS_BIAS, SAMPLER, TARGET_KIND,
        )  # fmt: skip
    z_target = product.to(tl.float64) / float64_of(temperature) - offset
    own = load_rows(items_ptr, wanted, kept, stride_items, column, D, BLOCK_D).to(SUM)
    _finish(
        z_target, top, total, mean, own, entry, inside, kept, column, temperature,
        loss_ptr, lse_ptr, unit_ptr, D, UNIT, SUM, BLOCK_D,
    )  # fmt: skip


@_tuning.unfused
@triton.jit
def _sampled_softmax_loss_rows_fwd_kernel(
    hidden_ptr,
    items_ptr,
    target_ptr,
    bias_ptr,
    rows_ptr,
    cumulative_ptr,
    seed_ptr,
    loss_ptr,
    lse_ptr,
    unit_ptr,
    M,
    N,
    V,
    K,
    ignore_index,
    low,
    log_size,
    log_count,
    log_range,
    temperature,
    steps,
    stride_hidden,
    stride_items,
    stride_target,
    stride_bias,
    stride_rows,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    SAMPLER: tl.constexpr,
    KIND: tl.constexpr,
    TARGET_KIND: tl.constexpr,
    HIT: tl.constexpr,
    UNIT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows that each have their own negatives."""
    column = tl.program_id(1) * BLOCK_D
    entry = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = entry < M
    source, kept = kept_entries(rows_ptr, entry, M, N, stride_rows, HAS_ROWS)
    target = tl.load(target_ptr + source * stride_target, mask=kept, other=ignore_index)
    kept = kept & (target != ignore_index)
    wanted = tl.where(kept & (target >= 0) & (target < V), target, 0)
    scale = (1.0 / float64_of(temperature)).to(SUM)

    hidden = load_rows(hidden_ptr, source, kept, stride_hidden, 0, D, BLOCK_D).to(SUM)
    top = tl.full((BLOCK_N,), -float("inf"), SUM)
    total = tl.zeros((BLOCK_N,), SUM)
    mean = tl.zeros((BLOCK_N, BLOCK_D), SUM)
    stop = tl.where(tl.max(kept.to(tl.int32), 0) > 0, K, 0)
    for start in range(0, stop, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        there = kept[:, None] & (k < K)[None, :]
        ids = draw_items(
            seed_ptr, entry[:, None], k[None, :], cumulative_ptr, V, low, log_size, steps, SAMPLER
        )
        offset = offsets(
            ids, there, bias_ptr, cumulative_ptr, V, low, log_size, log_count, log_range,
            temperature, stride_bias, HAS_BIAS, SAMPLER, KIND,
        )  # fmt: skip
        offset = tl.where(there, offset, float("inf"))
        hit = there & (ids == wanted[:, None])
        hit_offset = offset
        if HIT == OFFSET:
            hit_offset = offsets(
                ids, hit, bias_ptr, cumulative_ptr, V, low, log_size, log_count, log_range,
                temperature, stride_bias, HAS_BIAS, SAMPLER, TARGET_KIND,
            )  # fmt: skip
        items = gathered(items_ptr, ids, there, stride_items, 0, D, SUM, BLOCK_D)
        product = tl.sum(hidden[:, None, :] * items, 2)
        if D > BLOCK_D:
            for d in range(BLOCK_D, D, BLOCK_D):
                part = load_rows(hidden_ptr, source, kept, stride_hidden, d, D, BLOCK_D).to(SUM)
                items = gathered(items_ptr, ids, there, stride_items, d, D, SUM, BLOCK_D)
                product += tl.sum(part[:, None, :] * items, 2)
            items = gathered(items_ptr, ids, there, stride_items, column, D, SUM, BLOCK_D)
        high, low_ = split_float64(offset, SUM)
        hit_high, hit_low = split_float64(hit_offset, SUM)
        z = candidate_logits(
            product, high, low_, hit_high, hit_low, hit, scale[:, None], 0.0, HIT
        )  # fmt: skip
        above = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(above == -float("inf"), 0.0, above)
        p = tl.exp2((z - shift[:, None]) * _LOG2E)
        fade = tl.exp2((top - shift) * _LOG2E)
        total = total * fade + tl.sum(p, 1)
        top = above
        if UNIT:
            mean = mean * fade[:, None] + tl.sum(p[:, :, None] * items, 1)

    product = _target_products(
        hidden, hidden_ptr, source, kept, items_ptr, wanted, stride_hidden, stride_items,
        D, SUM, BLOCK_D,
    )  # fmt: skip
    offset = offsets(
        wanted, kept, bias_ptr, cumulative_ptr, V, low, log_size, log_count, log_range,
        temperature, stride_bias, HAS_BIAS, SAMPLER, TARGET_KIND,
    )  # fmt: skip
    z_target = product.to(tl.float64) / float64_of(temperature) - offset
    own = load_rows(items_ptr, wanted, kept, stride_items, column, D, BLOCK_D).to(SUM)
    _finish(
        z_target, top, total, mean, own, entry, inside, kept, column, temperature,
        loss_ptr, lse_ptr, unit_ptr, D, UNIT, SUM, BLOCK_D,
    )  # fmt: skip


_FWD, _ROWS_FWD = "_sampled_softmax_loss_fwd_kernel", "_sampled_softmax_loss_rows_fwd_kernel"
_BWD, _SUMS, _DRAW_SUMS = (
    "_sampled_softmax_loss_bwd_kernel", "_entry_sums_kernel", "_draw_sums_kernel",
)  # fmt: skip


def _interpreted(**blocks: int) -> tuple[Entry, ...]:
    """For the interpreter, where the number of programs and the size of their tiles count."""
    archs = (_tuning.INTERPRETER,)
    return (
        Entry(config(1, 1, **blocks, BLOCK_D=16), archs=archs, most_width=16),
        Entry(config(1, 1, **blocks, BLOCK_D=64), archs=archs),
    )


def _by_width(make: Callable[[int], Config], **limits: Any) -> tuple[Entry, ...]:
    """One entry per D bucket up to 128, which the last one takes in chunks."""
    return tuple(
        Entry(make(width), **limits, most_width=width if width < 128 else _tuning.WIDE)
        for width in (16, 32, 64, 128)
    )


def _fwd(warps: int, stages: int = 2, wide: int = 64, **blocks: int) -> Callable[[int], Config]:
    """Tiles of the forward pass by D bucket: chunks of 64, of `wide` rows, where larger ones
    spill."""

    def make(d: int) -> Config:
        if d == 128:
            return config(4, 2, BLOCK_N=wide, BLOCK_K=32, BLOCK_D=64)
        return config(warps, stages, **blocks, BLOCK_D=d)

    return make


def _fwd_float64(warps: int, candidates: int) -> Callable[[int], Config]:
    return lambda d: config(warps, 1, BLOCK_N=16, BLOCK_K=candidates, BLOCK_D=min(d, 32))


def _bwd(candidates: int) -> Callable[[int], Config]:
    """Tiles of the backward pass by D bucket."""

    def make(d: int) -> Config:
        rows = 32 if d == 128 else 64
        return config(8, 2, BLOCK_N=rows, BLOCK_K=candidates, BLOCK_D=min(d, 64))

    return make


CONFIGS = {
    # A warp has 16 rows of a tile: 8 warps with 64 rows would do everything twice.
    _FWD: (
        *_interpreted(BLOCK_N=32, BLOCK_K=64),
        *_by_width(_fwd(4, BLOCK_N=64, BLOCK_K=64), archs=(90,), itemsizes=(2,)),
        *_by_width(_fwd(4, 2, 32, BLOCK_N=64, BLOCK_K=32), archs=(100,), itemsizes=(2,)),
        *_by_width(_fwd(8, 1, 32, BLOCK_N=128, BLOCK_K=64), archs=(86, 120), itemsizes=(2,)),
        *_by_width(_fwd(8, BLOCK_N=128, BLOCK_K=64), itemsizes=(2,)),
        *_by_width(_fwd_float64(4, 16), archs=(90, 100), itemsizes=(8,)),
        *_by_width(_fwd_float64(8, 32), itemsizes=(8,)),
        *_by_width(
            lambda d: config(4, 1, BLOCK_N=16 if d == 128 else 32, BLOCK_K=32, BLOCK_D=min(d, 64))
        ),
    ),
    _BWD: (
        *_interpreted(BLOCK_N=32, BLOCK_K=64),
        *_by_width(_bwd(64), archs=(100,), itemsizes=(2,)),
        *_by_width(_bwd(128), itemsizes=(2,)),
        *_by_width(
            lambda d: config(8, 1, BLOCK_N=16, BLOCK_K=16, BLOCK_D=min(d, 32)), itemsizes=(8,)
        ),
        *_by_width(
            # 32 and 128: larger ones spill
            lambda d: config(
                8, 1, BLOCK_N=32, BLOCK_K=16 if d in (32, 128) else 32, BLOCK_D=min(d, 64)
            )
        ),
    ),
    _ROWS_FWD: (
        *_interpreted(BLOCK_N=16, BLOCK_K=128),
        *_by_width(lambda d: config(4, 1, BLOCK_N=1, BLOCK_K=16, BLOCK_D=d), itemsizes=(8,)),
        *_by_width(lambda d: config(4, 1, BLOCK_N=1, BLOCK_K=32, BLOCK_D=d)),
    ),
    _SUMS: (
        *_interpreted(BLOCK_H=128, BLOCK_E=16),
        *_by_width(lambda d: config(1, 1, BLOCK_H=1, BLOCK_E=16, BLOCK_D=d), itemsizes=(2,)),
        *_by_width(lambda d: config(1, 1, BLOCK_H=1, BLOCK_E=8 if d == 128 else 16, BLOCK_D=d)),
    ),
    _DRAW_SUMS: (
        *_interpreted(BLOCK_H=128, BLOCK_E=32),
        *_by_width(lambda d: config(1, 1, BLOCK_H=1, BLOCK_E=16, BLOCK_D=d), itemsizes=(2,)),
        *_by_width(lambda d: config(2, 1, BLOCK_H=1, BLOCK_E=8, BLOCK_D=d), itemsizes=(8,)),
        *_by_width(lambda d: config(2 if d == 128 else 1, 1, BLOCK_H=1, BLOCK_E=16, BLOCK_D=d)),
    ),
}
# in the interpreter the number of calls counts, not their size
_CANDIDATES = config(1, 1, BLOCK_K=4096) if _tuning.interpreted() else config(4, 1, BLOCK_K=128)


def _parts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As split_float64."""
    high = x.to(dtype)
    rest = x - high.double()
    return high, torch.where(rest == rest, rest, 0.0).to(dtype)


class _Drawn(NamedTuple):
    """Candidates of sets, each (sets * count,): ids, parts of their offsets, and as targets."""

    ids: Tensor
    high: Tensor | None
    low: Tensor | None
    hit_high: Tensor | None
    hit_low: Tensor | None
    valid: Tensor | None  # None: all

    def pointers(self) -> dict[str, Tensor | None]:
        return {
            "ids_ptr": self.ids,
            "high_ptr": self.high,
            "low_ptr": self.low,
            "hit_high_ptr": self.hit_high,
            "hit_low_ptr": self.hit_low,
        }


class _Call:
    """What forward and backward share: arguments of the kernels, and the candidates of sets."""

    def __init__(
        self,
        hidden: Tensor,
        items: Tensor,
        target: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        cumulative: Tensor | None,
        seed: Tensor,
        options: plain.Options,
    ) -> None:
        self.hidden, self.items = dense_rows(hidden), dense_rows(items)
        self.target, self.bias, self.rows, self.seed = target, bias, rows, seed
        self.cumulative = None if cumulative is None else cumulative.contiguous()
        self.options = o = options
        self.width = hidden.shape[1]
        self.entries = target.shape[0] if rows is None else rows.shape[0]
        self.t4rec = o.sampler == plain.T4REC
        self.count = o.num_negatives * (2 if self.t4rec else 1)  # places of a set
        grows = o.logq and not o.remove_hits and not self.t4rec
        self.kind = LOGQ if o.logq else PLAIN
        self.target_kind = LOG1P if grows else PLAIN
        self.hit = HIT_OFFSET if grows else HIT_REMOVED if o.remove_hits else HIT_STAYS
        if self.t4rec:
            self.hit = HIT_CONSTANT
        self.set_rows = plain.BLOCK_ROWS if o.scope == plain.BLOCK else self.entries
        self.sets = triton.cdiv(self.entries, max(self.set_rows, 1))
        self.input = {
            "SUM": _tuning.sum_type(hidden.dtype),
            "DOT": _tuning.dot_type(hidden.dtype),
            "PRECISION": _tuning.precision(hidden.dtype),
        }

    def config(self, kernel: str, rows: int) -> Config:
        items, width = self.items.shape
        return _tuning.fixed(
            kernel, CONFIGS, _tuning.key(self.hidden, rows=rows, items=items, width=width)
        )

    def chunks(self, chosen: Config) -> int:
        return max(triton.cdiv(self.width, chosen["BLOCK_D"]), 1)

    def weighing(self) -> dict[str, Any]:
        """Arguments from which kernels know how often an item is drawn, and its bias."""
        o, items, bias = self.options, self.items.shape[0], self.bias
        return {
            "bias_ptr": bias,
            "cumulative_ptr": self.cumulative,
            "V": items,
            "low": o.low,
            "log_size": bits(o.log_size),
            "log_count": bits(math.log(o.num_negatives)),
            "log_range": bits(math.log(items - o.low)),
            "temperature": bits(o.temperature),
            "stride_bias": 0 if bias is None else bias.stride(0),
            "HAS_BIAS": bias is not None,
            "SAMPLER": o.sampler,
        }

    def rowwise(self) -> dict[str, Any]:
        """Arguments of the kernels that go by entries."""
        rows = self.rows
        return {
            "hidden_ptr": self.hidden,
            "items_ptr": self.items,
            "target_ptr": self.target,
            "rows_ptr": rows,
            "M": self.entries,
            "N": self.hidden.shape[0],
            "ignore_index": self.options.ignore_index,
            "stride_hidden": self.hidden.stride(0),
            "stride_items": self.items.stride(0),
            "stride_target": self.target.stride(0),
            "stride_rows": 0 if rows is None else rows.stride(0),
            "HAS_ROWS": rows is not None,
            "D": self.width,
        }

    def drawn(self, sets: int, weigh: bool) -> _Drawn:
        """The draws of some sets; with their offsets or without."""
        if self.t4rec:
            return self._drawn_by_t4rec()
        total = sets * self.count
        ids = self.hidden.new_empty((total,), dtype=torch.int64)
        as_target = weigh and self.hit == HIT_OFFSET
        dtype = _tuning.SUMS[self.hidden.dtype]
        parts = [
            self.hidden.new_empty((total,), dtype=dtype) if wanted else None
            for wanted in (weigh, weigh, as_target, as_target)
        ]
        drawn = _Drawn(ids, *parts, None)
        launch(
            _candidates_kernel,
            (triton.cdiv(total, _CANDIDATES["BLOCK_K"]),),
            _CANDIDATES,
            **self.weighing(),
            **drawn.pointers(),
            seed_ptr=self.seed,
            total=total,
            K=self.count,
            steps=self.items.shape[0].bit_length(),
            KIND=self.kind,
            HIT=self.hit if weigh else HIT_STAYS,
        )
        return drawn

    def _drawn_by_t4rec(self) -> _Drawn:
        # For comparison only: twice as many draws, sorted, by PyTorch; shapes are fixed.
        sets = self.target.new_zeros((1,))
        ids, valid = plain._draw(self.options, self.seed, sets, self.items.shape[0], None)
        offset = torch.where(valid[0], self.t4rec_offset(ids[0]), math.inf)
        parts = _parts(offset, _tuning.SUMS[self.hidden.dtype])
        return _Drawn(ids[0].contiguous(), *parts, None, None, valid[0])

    def t4rec_offset(self, ids: Tensor) -> Tensor:
        expected = plain._expected(self.options, ids, self.items.shape[0], None)
        if self.bias is not None:
            expected = expected - self.bias[ids].double()
        return expected / self.options.temperature

    def kept(self) -> tuple[Tensor, Tensor]:
        """The row of hidden of each entry, -1 where it takes no part; its target."""
        count, items = self.hidden.shape[0], self.items.shape[0]
        if self.rows is None:
            source = torch.arange(count, device=self.hidden.device)
        else:
            source = torch.where(self.rows < count, self.rows, -1)
        if count == 0:
            return torch.full_like(source, -1), torch.zeros_like(source)
        wanted = self.target[source.clamp(min=0)]
        kept = (source >= 0) & (wanted != self.options.ignore_index)
        wanted = torch.where(kept & (wanted >= 0) & (wanted < items), wanted, 0)
        return torch.where(kept, source, -1), wanted


def sampled_softmax_loss_fwd(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cumulative: Tensor | None,
    seed: Tensor,
    num_negatives: int,
    sampler: int,
    scope: int,
    low: int,
    log_size: float,
    logq: bool,
    remove_hits: bool,
    temperature: float,
    ignore_index: int,
    needs_unit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and float64 log-sum-exp per row, 0 where a row takes no part; d loss / d hidden."""
    options = plain.Options(
        num_negatives, sampler, scope, low, log_size, logq, remove_hits, temperature, ignore_index
    )
    call = _Call(hidden, items, target, bias, rows, cumulative, seed, options)
    entries, dtype = call.entries, _tuning.SUMS[hidden.dtype]
    loss = hidden.new_empty((entries,), dtype=dtype)
    lse = hidden.new_empty((entries,), dtype=torch.float64)
    unit = hidden.new_empty((entries if needs_unit else 0, call.width), dtype=dtype)
    outputs = {"loss_ptr": loss, "lse_ptr": lse, "unit_ptr": unit, "UNIT": needs_unit}
    by_row = scope == plain.ROW
    chosen = call.config(_ROWS_FWD if by_row else _FWD, entries)
    grid = (triton.cdiv(entries, chosen["BLOCK_N"]), call.chunks(chosen) if needs_unit else 1)
    shared = {
        **call.rowwise(),
        **call.weighing(),
        **outputs,
        "K": call.count,
        "TARGET_KIND": call.target_kind,
        "HIT": call.hit,
    }
    if by_row:
        launch(
            _sampled_softmax_loss_rows_fwd_kernel,
            grid,
            chosen,
            **shared,
            seed_ptr=seed,
            steps=items.shape[0].bit_length(),
            KIND=call.kind,
            SUM=call.input["SUM"],
        )
        return loss, lse, unit
    drawn = call.drawn(call.sets, weigh=True)
    launch(
        _sampled_softmax_loss_fwd_kernel,
        grid,
        chosen,
        **shared,
        **call.input,
        **drawn.pointers(),
        target_offset_ptr=call.t4rec_offset(call.kept()[1]) if call.t4rec else None,
        hit_value=bits(plain.T4REC_HIT / temperature),
        set_rows=max(call.set_rows, 1),
    )
    return loss, lse, unit


def _dhidden(call: _Call, source: Tensor, dloss: Tensor, unit: Tensor) -> Tensor:
    hidden = call.hidden
    if call.rows is None:
        found = torch.where((source >= 0)[:, None], unit * dloss.to(unit.dtype)[:, None], 0.0)
        return found.to(hidden.dtype)
    out = hidden.new_zeros(hidden.shape)
    if hidden.shape[0] and call.entries:  # a row may be named many times
        count = hidden.shape[0]
        found = segments(torch.where(source >= 0, source, count), count)
        _sum_entries(call, found, None, unit, None, dloss.to(unit.dtype), out, None, dense=True)
    return out


def _sum_entries(
    call: _Call,
    found: Segments,
    partial: tuple[Tensor, Tensor] | None,
    matrix: Tensor,
    source: Tensor | None,
    weight: Tensor,
    out: Tensor,
    out_bias: Tensor | None,
    dense: bool,
) -> None:
    heads = found.ids.shape[0]
    chosen = call.config(_SUMS, heads)
    launch(
        _entry_sums_kernel,
        (triton.cdiv(heads, chosen["BLOCK_H"]), call.chunks(chosen)),
        chosen,
        order_ptr=found.order,
        starts_ptr=found.starts,
        sorted_ptr=found.items,
        partial_ptr=None if partial is None else partial[0],
        dbias_ptr=None if partial is None else partial[1],
        matrix_ptr=matrix,
        source_ptr=source,
        weight_ptr=weight.contiguous(),
        out_ptr=out,
        out_bias_ptr=out_bias,
        heads=heads,
        total=0 if partial is None else partial[1].shape[1],
        parts=0 if partial is None else partial[1].shape[0],
        stride_matrix=matrix.stride(0),
        D=call.width,
        DENSE=dense,
        BIAS=out_bias is not None,
        SUM=call.input["SUM"],
    )


class _Rows(NamedTuple):
    """What the item gradients need of each entry."""

    source: Tensor  # row of hidden, -1 where it takes no part
    wanted: Tensor  # target
    lse: tuple[Tensor, Tensor]  # two numbers whose sum it is
    scaled: Tensor  # d loss / temperature
    share: Tensor  # gradient of the target's logit


def _partial_gradients(call: _Call, drawn: _Drawn, rows: _Rows) -> tuple[Tensor, Tensor]:
    """dz.T @ hidden and the sums of dz of every candidate, by parts of its set's rows."""
    chosen = call.config(_BWD, call.entries)
    tiles, total = triton.cdiv(call.count, chosen["BLOCK_K"]), drawn.ids.shape[0]
    chunks = call.chunks(chosen)
    # parts of at least four blocks, so that adding them up stays cheap
    least = chosen["BLOCK_N"] * (1 if _tuning.interpreted() else 4)
    wanted = max(2 * _tuning.processors(call.hidden) // (call.sets * tiles * chunks), 1)
    parts = min(wanted, triton.cdiv(call.set_rows, least))
    part_rows = triton.cdiv(call.set_rows, parts * chosen["BLOCK_N"]) * chosen["BLOCK_N"]
    parts = triton.cdiv(call.set_rows, part_rows)
    dtype = _tuning.SUMS[call.hidden.dtype]
    partial = call.hidden.new_empty((parts, total, call.width), dtype=dtype)
    dbias = call.hidden.new_empty((parts, total), dtype=dtype)
    half = call.hidden.dtype == torch.float16
    launch(
        _sampled_softmax_loss_bwd_kernel,
        (call.sets * tiles, parts, chunks),
        chosen,
        hidden_ptr=call.hidden,
        items_ptr=call.items,
        source_ptr=rows.source,
        wanted_ptr=rows.wanted,
        **drawn.pointers(),
        lse_high_ptr=rows.lse[0],
        lse_low_ptr=rows.lse[1],
        scaled_ptr=rows.scaled,
        partial_ptr=partial,
        dbias_ptr=dbias,
        M=call.entries,
        K=call.count,
        total=total,
        tiles=tiles,
        set_rows=call.set_rows,
        part_rows=part_rows,
        temperature=bits(call.options.temperature),
        hit_value=bits(plain.T4REC_HIT / call.options.temperature),
        stride_hidden=call.hidden.stride(0),
        stride_items=call.items.stride(0),
        D=call.width,
        HIT=call.hit,
        # dz of 1e-8 are 0 in float16; tf32 holds all of a float16 factor
        DZ=tl.float32 if half else call.input["DOT"],
        DZ_PRECISION="tf32" if half else call.input["PRECISION"],
        **call.input,
    )
    return partial, dbias


def _taking_part(call: _Call, drawn: _Drawn, kept: Tensor) -> Tensor:
    """The ids of the draws, V for those of sets without rows."""
    sets = drawn.ids.shape[0] // call.count
    if sets == call.entries and call.options.scope == plain.ROW:
        of_set = kept
    elif sets == 1:
        of_set = kept.any()[None]
    else:
        missing = sets * call.set_rows - call.entries
        of_set = torch.nn.functional.pad(kept, (0, missing)).view(sets, -1).any(1)
    part = of_set[:, None].expand(sets, call.count).reshape(-1)
    if drawn.valid is not None:
        part = part & drawn.valid
    return torch.where(part, drawn.ids, call.items.shape[0])


def _ditems(call: _Call, rows: _Rows, sparse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids, rows of ditems and dbias; all rows, and no ids, if not sparse."""
    items, bias, by_row = call.items, call.bias, call.options.scope == plain.ROW
    drawn = call.drawn(call.entries if by_row else call.sets, weigh=not by_row)
    kept, count = rows.source >= 0, items.shape[0]
    own = torch.where(kept, rows.wanted, count)
    found = segments(torch.cat([_taking_part(call, drawn, kept), own]), count)
    places = found.ids.shape[0]
    out = items.new_empty((places, call.width)) if sparse else items.new_zeros(items.shape)
    out_bias = None
    if bias is not None:
        out_bias = bias.new_empty((places,)) if sparse else bias.new_zeros(bias.shape)
    if by_row:
        chosen = call.config(_DRAW_SUMS, places)
        launch(
            _draw_sums_kernel,
            (triton.cdiv(places, chosen["BLOCK_H"]), call.chunks(chosen)),
            chosen,
            **call.weighing(),
            order_ptr=found.order,
            starts_ptr=found.starts,
            sorted_ptr=found.items,
            hidden_ptr=call.hidden,
            items_ptr=items,
            source_ptr=rows.source,
            wanted_ptr=rows.wanted,
            weight_ptr=rows.share,
            lse_high_ptr=rows.lse[0],
            lse_low_ptr=rows.lse[1],
            scaled_ptr=rows.scaled,
            out_ptr=out,
            out_bias_ptr=out_bias,
            heads=places,
            total=drawn.ids.shape[0],
            K=call.count,
            stride_hidden=call.hidden.stride(0),
            stride_items=items.stride(0),
            D=call.width,
            KIND=call.kind,
            TARGET_KIND=call.target_kind,
            HIT=call.hit,
            DENSE=not sparse,
            SUM=call.input["SUM"],
        )
    else:
        partial = _partial_gradients(call, drawn, rows)
        source = rows.source
        _sum_entries(
            call, found, partial, call.hidden, source, rows.share, out, out_bias, not sparse
        )
    return found.ids if sparse else found.ids[:0], out, out_bias


def sampled_softmax_loss_bwd(
    dloss: Tensor,
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cumulative: Tensor | None,
    seed: Tensor,
    loss: Tensor,
    lse: Tensor,
    unit: Tensor,
    num_negatives: int,
    sampler: int,
    scope: int,
    low: int,
    log_size: float,
    logq: bool,
    remove_hits: bool,
    temperature: float,
    ignore_index: int,
    sparse: bool,
    needs_hidden: bool,
    needs_items: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dhidden; ids, and rows of ditems and dbias; all rows, and no ids, if not sparse.

    A place per draw and target, but no more than items. Ids rise; past the last one it is there
    again, with zeros.
    """
    options = plain.Options(
        num_negatives, sampler, scope, low, log_size, logq, remove_hits, temperature, ignore_index
    )
    call = _Call(hidden, items, target, bias, rows, cumulative, seed, options)
    source, wanted = call.kept()
    dhidden = hidden.new_empty((0, call.width))
    if needs_hidden:
        dhidden = _dhidden(call, source, dloss, unit)
    ids = source.new_empty((0,))
    like_bias = items.new_empty((0,)) if bias is None else bias
    if not needs_items or call.entries == 0:
        size = items.shape[0] if needs_items and not sparse else 0
        dbias = like_bias.new_zeros((0 if bias is None else size,))
        return dhidden, ids, items.new_zeros((size, call.width)), dbias
    scaled = torch.where(source >= 0, dloss.double() / temperature, 0.0)
    share = (torch.expm1(-loss.double()) * scaled).to(loss.dtype)
    entries = _Rows(source, wanted, _parts(lse, loss.dtype), scaled.to(loss.dtype), share)
    ids, ditems, dbias = _ditems(call, entries, sparse)
    return dhidden, ids, ditems, like_bias.new_empty((0,)) if dbias is None else dbias


def _case(dtype: torch.dtype, width: int, everything: bool) -> None:
    """Forward and backward on the meta device, for a shared set and for one per row.

    With everything: a bias, a row list, popularity, hits kept.
    """

    def of(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def whole(*size: int) -> Tensor:
        return of(*size, dtype=torch.int64)

    rows, v, k = 4096, 100_000, 4096
    bias, kept, cumulative, sampler = None, None, None, plain.LOG_UNIFORM
    if everything:
        bias, kept, cumulative = of(v), whole(rows), of(v, dtype=torch.float64)
        sampler = plain.POPULARITY
    tensors = (of(rows, width), of(v, width), whole(rows), bias, kept, cumulative, whole(2))
    low = 0 if everything else 1
    log_size = math.log(v - low + 1)
    for scope in (plain.BLOCK, plain.ROW):
        options = (k, sampler, scope, low, log_size, True, not everything, 1.0, -100)
        found = sampled_softmax_loss_fwd(*tensors, *options, True)
        wide = found[0].dtype
        sampled_softmax_loss_bwd(of(rows, dtype=wide), *tensors, *found, *options, True, True, True)


def variants(arch: int) -> Iterator[Variant]:
    """What the launchers compile on an architecture, by dtype, D and options."""
    for label, dtype, width, everything in _tuning.cases():
        yield from _tuning.recorded(arch, label, functools.partial(_case, dtype, width, everything))

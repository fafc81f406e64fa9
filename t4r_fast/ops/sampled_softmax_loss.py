"""sampled_softmax_loss: next-item cross-entropy over the target and a few drawn negatives."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from t4r_fast import backend
from t4r_fast.ops._check import (
    check_device,
    check_scores,
    check_target,
    check_target_values,
    checked,
    full_precision,
)
from t4r_fast.ops._seed import check_seed
from t4r_fast.ops._table import eagerly, recorded, recorder_of
from t4r_fast.ops.log_uniform_sample import MAX_SIZE
from t4r_fast.plain import sampled_softmax_loss as plain
from t4r_fast.plain._scores import compute_dtype

# In the order of the codes in plain/sampled_softmax_loss.py
SAMPLERS = ("log_uniform", "uniform", "popularity", "t4rec")
SCOPES = ("batch", "block", "row")
REDUCTIONS = ("mean", "sum", "none")
_OP = "sampled_softmax_loss"


class PopularityTable(NamedTuple):
    """What sampler "popularity" draws from: make it once with popularity_table.

    cumulative  (V,) float64, running sum of counts ** alpha
    """

    cumulative: Tensor


def popularity_table(counts: Tensor, alpha: float = 1.0) -> PopularityTable:
    """The table of sampled_softmax_loss(sampler="popularity"): item v with weight counts[v]**alpha.

    counts   (V,) numbers >= 0 of any dtype, not all 0; items of count 0 are never drawn, also with
             alpha = 0
    alpha    float >= 0; 0 draws all items of some count alike
    returns  PopularityTable(cumulative); O(V), so make it once for a catalogue

    Raises ValueError on other shapes, negative or all-zero counts, and a negative alpha.
    """
    if counts.dim() != 1 or counts.shape[0] == 0:
        raise ValueError(
            f"popularity_table: counts must have shape (V,), V >= 1; got {tuple(counts.shape)}"
        )
    if not alpha >= 0:
        raise ValueError(f"popularity_table: alpha must be >= 0; got {alpha}")
    weights = counts.double()
    if not torch.compiler.is_compiling():
        wrong = ~(weights >= 0) | weights.isinf()
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise ValueError(
                "popularity_table: counts must be finite and >= 0; "
                f"got {counts[place].item()} at item {place}"
            )
        if not bool((weights > 0).any()):
            raise ValueError("popularity_table: counts must not all be 0")
    return PopularityTable(torch.where(weights > 0, weights**alpha, 0.0).cumsum(0))


def sampled_softmax_loss(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    num_negatives: int,
    sampler: str = "log_uniform",
    popularity: Tensor | PopularityTable | None = None,
    alpha: float = 1.0,
    scope: str = "batch",
    logq: bool = True,
    remove_accidental_hits: bool = True,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    seed: Tensor | None = None,
    low: int = 0,
    sparse: bool = True,
) -> Tensor:
    """Cross-entropy of the target against num_negatives items drawn inside; no ids are stored.

    c    = num_negatives draws with replacement from low to V - 1, with probability q
    z    = (hidden @ items[c].T + bias[c]) / temperature - log(num_negatives * q[c])
    z_y  = (hidden * items[target]).sum(1) + bias[target]) / temperature
    loss = log(exp(z_y) + exp(z).sum(1)) - z_y                      without c == target

    hidden         (N, D)  float32, float16, bfloat16, float64
    items          (V, D)  dtype of hidden, V >= 1; rows at any stride
    target         (N,)    int64, 0 <= target < V, or ignore_index
    num_negatives  int     >= 1
    sampler        "log_uniform"  q[v] = log((c + 2) / (c + 1)) / log(V - low + 1), c = v - low:
                                  items sorted by falling popularity
                   "uniform"      q[v] = 1 / (V - low)
                   "popularity"   q[v] = counts[v]**alpha / sum
                   "t4rec"        see below
    popularity     (V,) counts for sampler "popularity", or the PopularityTable made of them: counts
                   cost O(V) at each call
    alpha          float   >= 0, with counts; give it to popularity_table otherwise
    scope          who shares negatives: "batch" all rows; "block" each 128 rows (entries of rows),
                   more diverse at nearly the same cost; "row" nobody, many times the cost
    logq           lower each candidate's z by the log of how often a set holds it on average: log(K
                   q) for negatives. The target is there once for certain, so that its correction
                   is log(1) = 0, or log(1 + K q[target]) when accidental hits stay. The sum of
                   exp(z) is then right on average, and gradients and loss tend to those of the full
                   softmax as K grows (where hits stay, a loss higher by that constant). Without
                   logq nothing is subtracted
    remove_accidental_hits  negatives that are the row's target get weight 0
    bias           (V,)    dtype of hidden or float32
    rows           (M,)    int64, which rows of hidden (and target) take part, each as often as it
                           is named; negative entries are skipped
    temperature    float   > 0
    ignore_index   int
    reduction      "mean" over the rows that take part, "sum", or "none"
    seed           (2,)    int64 (key, offset); None draws it from torch's default generator
    low            int     ids below are no negatives: 1 spares padding. 0 with "popularity"
    sparse         gradients of items (and bias) are sparse tensors of the ids that took part, else
                   dense. They are coalesced, but with Triton, where they have a place for every
                   draw and target, so that the size is known without waiting for the GPU: the
                   places left over hold the last id and zeros. Sparse ones are for leaf tensors,
                   as in torch.nn.Embedding, and not for torch.compile; a dense one is V x D
    returns        () or, for "none", (N,) or (M,): float32 (float64 for float64), in nats

    A row that is skipped or ignored has loss 0 and is not counted; the mean of no rows is nan. A
    row whose negatives all are its target has loss 0. Differentiable once in hidden, items, bias.
    Forward and backward draw the same ids, the same on every backend. Memory beyond outputs: O((N
    + K) D); at scope "row" also 40 bytes for each of the N K draws in backward.

    sampler="t4rec" gives the reference's loss, for comparison: 2 K log-uniform draws, the K lowest
    different ids of them (fewer if there are no more); log(p + 1e-16) with p = 1 - (1 + q)**(-2 K),
    which it takes for the chance 1 - (1 - q)**(2 K), subtracted from negatives and target alike,
    before the temperature; accidental hits get the logit -655.04 / temperature. q is that of the
    closed form. The reference takes differences of float32 logarithms for it, whose rounding is 3%
    of q on average at id 100 thousand and 10% at a million. It takes scope "batch", logq and
    remove_accidental_hits.

    Raises ValueError or TypeError on shapes, dtypes and options out of range, IndexError on a
    target or row out of range.
    Source: Jean et al., arXiv 1412.2007; Khrylchenko et al., "Correcting the LogQ Correction",
    RecSys 2025, for the target's correction. Replaces _NextItemPredictionTask.sampled and
    LogUniformSampler of transformers4rec.torch.model.prediction_task.
    """
    check_scores(_OP, hidden, items, bias)
    _check_options(num_negatives, sampler, scope, temperature, reduction)
    _check_range(items, sampler, scope, low, logq, remove_accidental_hits)
    check_target(_OP, hidden, items, target, rows, ignore_index)
    cumulative = _cumulative(items, sampler, popularity, alpha)
    options = plain.Options(
        num_negatives=num_negatives,
        sampler=SAMPLERS.index(sampler),
        scope=SCOPES.index(scope),
        low=low,
        log_size=math.log(items.shape[0] - low + 1),
        logq=logq,
        remove_hits=remove_accidental_hits,
        temperature=float(temperature),
        ignore_index=ignore_index,
    )
    seed = check_seed(_OP, seed, hidden.device)
    tensors = (target, rows, cumulative, seed)
    arguments = (hidden, items, bias, *tensors, options)

    def check() -> None:
        check_target_values(_OP, hidden, items, target, rows, ignore_index)

    if recorder_of(items) is None and (bias is None or recorder_of(bias) is None):
        apply = _SampledSoftmaxLoss.apply
        name = backend.pick(_OP, hidden)
        loss = checked(name, check, apply, *arguments, (sparse, sparse))
    else:
        check()  # the recorder reads them first
        loss = eagerly(_of_managed, sparse, *arguments)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / _count(hidden, target, rows, ignore_index)
    return loss


def _of_managed(
    sparse: bool,
    hidden: Tensor,
    items: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rows: Tensor | None,
    cumulative: Tensor | None,
    seed: Tensor,
    options: plain.Options,
) -> Tensor:
    """With tables of an optimizer of t4r_fast.optim, which gets the rows of their gradients."""
    names = (target, rows, cumulative, seed, options)
    ids = functools.cache(lambda: plain.read_ids(hidden, items, *names))
    managed = [t is not None and recorder_of(t) is not None for t in (items, bias)]
    items = recorded(items, ids) if managed[0] else items
    bias = recorded(bias, ids) if bias is not None and managed[1] else bias
    sparse_for = (sparse or managed[0], sparse or managed[1])
    return _SampledSoftmaxLoss.apply(hidden, items, bias, *names, sparse_for)


def _count(hidden: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int) -> Tensor:
    """How many rows take part."""
    if rows is None:
        return (target != ignore_index).sum()
    if hidden.shape[0] == 0:
        return target.new_zeros(())
    return ((rows >= 0) & (target[rows.clamp(min=0)] != ignore_index)).sum()


def _check_options(
    num_negatives: int, sampler: str, scope: str, temperature: float, reduction: str
) -> None:
    if num_negatives < 1:
        raise ValueError(f"{_OP}: num_negatives must be >= 1; got {num_negatives}")
    if not temperature > 0:
        raise ValueError(f"{_OP}: temperature must be > 0; got {temperature}")
    for name, value, known in (
        ("sampler", sampler, SAMPLERS),
        ("scope", scope, SCOPES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in known:
            raise ValueError(f"{_OP}: {name} must be one of {', '.join(known)}; got {value!r}")


def _check_range(
    items: Tensor, sampler: str, scope: str, low: int, logq: bool, remove_hits: bool
) -> None:
    if not 0 <= low < items.shape[0] <= MAX_SIZE:
        raise ValueError(
            f"{_OP}: low must be 0 <= low < {items.shape[0]} (the rows of items); got {low}"
        )
    if sampler == "popularity" and low:
        raise ValueError(
            f"{_OP}: low must be 0 with sampler 'popularity'; got {low} (set the counts of the "
            "items below it to 0)"
        )
    if sampler == "t4rec" and (scope != "batch" or not logq or not remove_hits):
        raise ValueError(
            f"{_OP}: sampler 't4rec' must have scope 'batch', logq and remove_accidental_hits, as "
            f"the reference has; got {scope!r}, {logq}, {remove_hits}"
        )


def _cumulative(
    items: Tensor, sampler: str, popularity: Tensor | PopularityTable | None, alpha: float
) -> Tensor | None:
    if (popularity is not None) != (sampler == "popularity"):
        raise ValueError(
            f"{_OP}: popularity must be given with sampler 'popularity' and only then; got "
            f"{'none' if popularity is None else 'it'} with sampler {sampler!r}"
        )
    if popularity is None:
        if alpha != 1.0:
            raise ValueError(f"{_OP}: alpha must be 1 without popularity; got {alpha}")
        return None
    if isinstance(popularity, PopularityTable):
        if alpha != 1.0:
            raise ValueError(
                f"{_OP}: alpha must be 1 with a PopularityTable, which holds its own; got {alpha} "
                "(give it to popularity_table)"
            )
        cumulative = popularity.cumulative
    else:
        cumulative = popularity_table(popularity, alpha).cumulative
    if cumulative.shape != items.shape[:1]:
        raise ValueError(
            f"{_OP}: popularity must have shape (V,), ({items.shape[0]},); "
            f"got {tuple(cumulative.shape)}"
        )
    check_device(_OP, "items", items, popularity=cumulative)
    return cumulative


class _SampledSoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        items: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: Tensor | None,
        cumulative: Tensor | None,
        seed: Tensor,
        options: plain.Options,
        sparse_for: tuple[bool, bool],  # items, bias
    ) -> Tensor:
        ctx.backend = backend.pick(_OP, hidden)
        ctx.options = options
        ctx.sparse_for = sparse_for
        functions = backend.ops(ctx.backend, plain)
        inputs = (hidden, items, target, bias, rows, cumulative, seed)
        with full_precision(ctx.backend, hidden.device):
            loss, lse, unit = functions.sampled_softmax_loss_fwd(
                *inputs, *options, ctx.needs_input_grad[0]
            )
        ctx.save_for_backward(*inputs, loss, lse, unit)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        items, bias = saved[1], saved[3]
        needs = ctx.needs_input_grad[:3]
        functions = backend.ops(ctx.backend, plain)
        with full_precision(ctx.backend, dloss.device):
            dhidden, ids, ditems, dbias = functions.sampled_softmax_loss_bwd(
                dloss, *saved, *ctx.options, any(ctx.sparse_for), needs[0], needs[1] or needs[2]
            )
        if any(ctx.sparse_for):
            of_items, of_bias = ctx.sparse_for
            once = ctx.backend != "triton"
            ditems = _placed(ids, ditems, items, of_items, once) if needs[1] else None
            dbias = _placed(ids, dbias, bias, of_bias, once) if needs[2] else None
        return (
            dhidden if needs[0] else None,
            ditems if needs[1] else None,
            dbias if needs[2] else None,
            *[None] * 6,
        )


def _placed(ids: Tensor, values: Tensor, like: Tensor, sparse: bool, once: bool) -> Tensor:
    """A gradient of the shape of `like` with values at ids, which rise.

    once  all ids differ; else the last one comes again and again, with zeros
    """
    if not sparse:
        return torch.zeros_like(like).index_add_(0, ids, values)
    return torch.sparse_coo_tensor(
        ids[None], values, like.shape, is_coalesced=once, check_invariants=False
    )


def _fake_fwd(
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
    size = target.shape[0] if rows is None else rows.shape[0]
    dtype = compute_dtype(hidden.dtype)
    each = hidden.new_empty((size,), dtype=dtype)
    unit = hidden.new_empty((size if needs_unit else 0, hidden.shape[1]), dtype=dtype)
    return each, torch.empty_like(each, dtype=torch.float64), unit


def _fake_bwd(
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
    size: Any = items.shape[0]
    if not needs_items:
        size = 0
    elif sparse:
        size = torch.library.get_ctx().new_dynamic_size()
    like_bias = items if bias is None else bias
    return (
        hidden.new_empty((hidden.shape[0] if needs_hidden else 0, hidden.shape[1])),
        target.new_empty((size if sparse else 0,)),
        items.new_empty((size, items.shape[1])),
        like_bias.new_empty((0 if bias is None else size,)),
    )


_TENSORS = (
    "Tensor hidden, Tensor items, Tensor target, Tensor? bias, Tensor? rows, Tensor? cumulative, "
    "Tensor seed"
)
_OPTIONS = (
    "int num_negatives, int sampler, int scope, int low, float log_size, bool logq, "
    "bool remove_hits, float temperature, int ignore_index"
)
backend.declare(
    _OP,
    f"sampled_softmax_loss_fwd({_TENSORS}, {_OPTIONS}, bool needs_unit)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_fwd,
)
backend.declare(
    _OP,
    f"sampled_softmax_loss_bwd(Tensor dloss, {_TENSORS}, Tensor loss, Tensor lse, Tensor unit, "
    f"{_OPTIONS}, bool sparse, bool needs_hidden, bool needs_items)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_bwd,
)

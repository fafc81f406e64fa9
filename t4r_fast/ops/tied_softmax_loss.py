"""tied_softmax_loss: next-item cross-entropy over the whole catalogue without its logits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops._check import (
    check_scores,
    check_target,
    check_target_values,
    checked,
    full_precision,
)
from t4r_fast.ops._table import (
    Recorder,
    all_up_to_date,
    eagerly,
    may_share_gradient,
    note_formed_gradient,
    recorder_of,
    softmax_rows,
)
from t4r_fast.plain import tied_softmax_loss as plain
from t4r_fast.plain._scores import compute_dtype

REDUCTIONS = ("mean", "sum", "none")


def tied_softmax_loss(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_lse: bool = False,
    workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Next-item cross-entropy over the whole catalogue; the N x V logits are never stored.

    z    = (hidden @ items.T + bias) / temperature;  z = softcap * tanh(z / softcap) if softcap
    lse  = z.logsumexp(1)
    loss = lse - (1 - s) * z[i, target] - s * z.mean(1) + z_loss * lse**2      s = label_smoothing

    hidden           (N, D)  float32, float16, bfloat16, float64
    items            (V, D)  dtype of hidden, V >= 1; the item embedding table when weights are tied
    target           (N,)    int64, 0 <= target < V, or ignore_index
    bias             (V,)    dtype of hidden or float32; -inf takes an item out
    rows             (M,)    int64, which rows of hidden (and target) take part, each as often as it
                             is named; negative entries are skipped, so that a list may have a
                             fixed capacity
    temperature      float   > 0
    softcap          float   >= 0; 0 is off
    label_smoothing  float   0 <= s <= 1
    z_loss           float   >= 0
    workspace_bytes  >= 0; how much memory may keep scores from forward to backward, which makes
                     the others again: N x V numbers save a quarter of the work. 0 keeps none; None
                     chooses by shape, at most 64 MiB. The result is the same. The C++ kernels only
    reduction        "mean" over the rows that take part, "sum", or "none"
    returns          () or, for "none", (N,) or (M,): float32 (float64 for float64), in nats; with
                     return_lse a pair (loss, lse), lse per row

    A row that is skipped or whose target is ignore_index has loss 0 and lse 0 and is not counted.
    The mean of no rows is nan, as in PyTorch. Differentiable once in hidden, items and bias, also
    through lse; sums are float32 for 16-bit inputs. Memory beyond outputs and gradients: O(N D) and
    a few chunks of 16 MiB, or 64 MiB of the C++ kernels; rows of hidden and items whose elements
    are not next to each other are copied. Raises ValueError or TypeError on shapes, dtypes and
    options out of range, IndexError on a target or row out of range.
    Source: Wijmans et al., "Cut Your Losses", arXiv 2411.09009. Replaces
    transformers4rec.torch.model.prediction_task._NextItemPredictionTask + CrossEntropyLoss.
    """
    check_scores("tied_softmax_loss", hidden, items, bias)
    _check_options(temperature, softcap, label_smoothing, z_loss, reduction, workspace_bytes)
    check_target("tied_softmax_loss", hidden, items, target, rows, ignore_index)
    options = (
        float(temperature), float(softcap), float(label_smoothing), float(z_loss), ignore_index
    )  # fmt: skip
    # inside forward every input looks as if it needed a gradient, also under no_grad
    leaves = (hidden, items) if bias is None else (hidden, items, bias)
    grad = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    size = hidden.shape[0] if rows is None else rows.shape[0]
    stash_items = _stash_items(size, items, workspace_bytes) if grad else 0
    all_up_to_date(items, bias)
    recorder = recorder_of(items)
    if recorder is None:
        apply = _TiedSoftmaxLoss.apply
    else:
        apply = functools.partial(eagerly, _TiedSoftmaxLoss.apply)
    loss, lse = checked(
        backend.pick("tied_softmax_loss", hidden),
        lambda: check_target_values("tied_softmax_loss", hidden, items, target, rows, ignore_index),
        apply,
        *(hidden, items, bias, target, rows, options, grad, stash_items, recorder),
    )
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / _count(hidden, target, rows, ignore_index)
    return (loss, lse) if return_lse else loss


def _count(hidden: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int) -> Tensor:
    """How many rows take part."""
    if rows is None:
        return (target != ignore_index).sum()
    if hidden.shape[0] == 0:
        return target.new_zeros(())
    return ((rows >= 0) & (target[rows.clamp(min=0)] != ignore_index)).sum()


def _check_options(
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    workspace_bytes: int | None,
) -> None:
    if not temperature > 0:
        raise ValueError(f"tied_softmax_loss: temperature must be > 0; got {temperature}")
    if not softcap >= 0:
        raise ValueError(f"tied_softmax_loss: softcap must be >= 0 (0 is off); got {softcap}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(
            f"tied_softmax_loss: label_smoothing must be from 0 to 1; got {label_smoothing}"
        )
    if not z_loss >= 0:
        raise ValueError(f"tied_softmax_loss: z_loss must be >= 0 (0 is off); got {z_loss}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"tied_softmax_loss: reduction must be one of {', '.join(REDUCTIONS)}; "
            f"got {reduction!r}"
        )
    if workspace_bytes is not None and workspace_bytes < 0:
        raise ValueError(
            "tied_softmax_loss: workspace_bytes must be >= 0 (0 keeps no scores), or None to "
            f"choose by shape; got {workspace_bytes}"
        )


def _stash_items(size: int, items: Tensor, workspace_bytes: int | None) -> int:
    """Of how many items forward keeps the scores of `size` rows.

    To write a score and to read it again costs as much as 64 to 96 products, to make it again one
    for each of its width: at V = 118k (AVX-512, one thread) all scores kept give 1.25 times the
    speed at width 256, 1.13 at 128, 0.97 at 64. The default keeps them where it is worth 2%.
    """
    count, width = items.shape
    itemsize = compute_dtype(items.dtype).itemsize
    if size < 16:  # rows fill no vector
        return 0
    if workspace_bytes is not None:
        return min(count, workspace_bytes // (size * itemsize))
    # the packed rows and their gradients share these bytes
    fit = (60 * 2**20 - 3 * size * width * itemsize) // (size * itemsize)
    kept = max(0, min(count, fit))
    return kept if width >= 128 and kept * width >= 24 * count else 0


def _hidden_alone(ctx: Any, options: tuple[float, float, float, float, int]) -> bool:
    """Whether C++'s forward makes the gradient of hidden with the scores that it has at hand.

    Without the gradient of items, which an optimizer of t4r_fast.optim makes in its step, backward
    would make all scores again for it: 4 NVD operations instead of 6. Smoothing's share, a sum over
    all items alike, is not in it.
    """
    needs = ctx.needs_input_grad
    return not ((needs[1] and ctx.recorder is None) or needs[2] or options[2])


class _TiedSoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        items: Tensor,
        bias: Tensor | None,
        target: Tensor,
        rows: Tensor | None,
        options: tuple[float, float, float, float, int],
        grad: bool,
        stash_items: int,
        recorder: Recorder | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.recorder = recorder
        ctx.backend = backend.pick("tied_softmax_loss", hidden)
        functions = backend.ops(ctx.backend, plain)
        need_mean = (
            grad
            and ctx.needs_input_grad[0]
            and (ctx.backend == "triton" or (ctx.backend == "cpu" and _hidden_alone(ctx, options)))
        )
        if ctx.backend != "cpu" or need_mean:
            stash_items = 0
        with full_precision(ctx.backend, hidden.device):
            loss, lse, stash, mean = functions.tied_softmax_loss_fwd(
                hidden, items, target, bias, rows, *options, stash_items, need_mean
            )
        ctx.options = options
        ctx.table = items if may_share_gradient(items) else None
        # Native kernels give lse in float64: probabilities are exp(z - lse), and at |lse| = 1e4
        # the last bit of float32 is 1e-3 of all of them.
        ctx.save_for_backward(hidden, items, target, bias, rows, lse, stash, mean)
        return loss, lse.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "tied_softmax_loss: it has first derivatives only, so backward must run without "
                "create_graph=True; for second derivatives use F.cross_entropy on the full logits"
            )
        hidden, items, target, bias, rows, lse, stash, mean = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if ctx.recorder is not None and needs[1]:
            ctx.recorder.add_softmax(
                softmax_rows(
                    dloss, dlse, hidden, items.shape[0], target, bias, rows, lse, *ctx.options
                )
            )
            needs[1] = False
            if not any(needs):
                return (None,) * 9
        functions = backend.ops(ctx.backend, plain)
        with full_precision(ctx.backend, hidden.device):
            dhidden, ditems, dbias = functions.tied_softmax_loss_bwd(
                dloss,
                dlse,
                hidden,
                items,
                target,
                bias,
                rows,
                lse,
                stash,
                mean,
                *ctx.options,
                *needs,
            )
        if needs[1] and ctx.table is not None:
            note_formed_gradient(ctx.table, ditems)
        found = zip(needs, (dhidden, ditems, dbias))
        return *(gradient if needed else None for needed, gradient in found), *[None] * 6


def _fake_fwd(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    stash_items: int,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = hidden.shape[0] if rows is None else rows.shape[0]
    dtype = compute_dtype(hidden.dtype)
    return (
        hidden.new_empty(size, dtype=dtype),
        hidden.new_empty(size, dtype=torch.float64),
        hidden.new_empty((size, stash_items), dtype=dtype),
        hidden.new_empty((size if need_mean else 0, hidden.shape[1]), dtype=dtype),
    )


def _fake_bwd(
    dloss: Tensor,
    dlse: Tensor,
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    lse: Tensor,
    stash: Tensor,
    mean: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = options[-3:]

    def gradient(of: Tensor, needed: bool) -> Tensor:
        return of.new_empty(of.shape if needed else (0,))

    dbias = hidden.new_empty(0) if bias is None else gradient(bias, needs[2])
    return gradient(hidden, needs[0]), gradient(items, needs[1]), dbias


_OPTIONS = "float temperature, float softcap, float label_smoothing, float z_loss, int ignore_index"

# What forward may keep for backward, R rows of the output:
# stash  (R, stash_items)  type of the sums: the scores of that many items, in the order and layout
#                          of the backend that reads them again
# mean   (R, D)            type of the sums; if need_mean, else (0, D): a row's mean of the items
#                          under its softmax, each item times the slope of the softcap; of C++ less
#                          the target's item times its slope
backend.declare(
    "tied_softmax_loss",
    "tied_softmax_loss_fwd(Tensor hidden, Tensor items, Tensor target, Tensor? bias, Tensor? rows,"
    f" {_OPTIONS}, int stash_items, bool need_mean)"
    " -> (Tensor loss, Tensor lse, Tensor stash, Tensor mean)",
    fake=_fake_fwd,
)
# A gradient that is not needed is an empty tensor.
backend.declare(
    "tied_softmax_loss",
    "tied_softmax_loss_bwd(Tensor dloss, Tensor dlse, Tensor hidden, Tensor items, Tensor target,"
    f" Tensor? bias, Tensor? rows, Tensor lse, Tensor stash, Tensor mean, {_OPTIONS},"
    " bool need_hidden, bool need_items, bool need_bias)"
    " -> (Tensor dhidden, Tensor ditems, Tensor dbias)",
    fake=_fake_bwd,
)

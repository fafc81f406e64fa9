"""tied_table_step in plain PyTorch: chunks of items, each with its gradient and its update."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from t4r_fast.plain._scores import chunk_ranges, compute_dtype, scores
from t4r_fast.plain.tied_softmax_loss import _logits

SGD, ADAGRAD, ADAMW, ROWWISE_ADAGRAD, ROWWISE_ADAMW = range(5)
# Steps between two looks at whether an untouched row still moves.
CHECK_EVERY = 8
# All further movement of a row together is lost in rounding below this many eps of its largest
# value.
NEGLIGIBLE = 1.0 / 64


class Rule(NamedTuple):
    """An update rule and its numbers; in the order of the schema."""

    kind: int
    step: int  # this step's number, the first is 1
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    momentum: float
    scale: float  # of the gradient


def _update(
    w: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    g: Tensor,
    rule: Rule,
    lr: Tensor | float,
    step: Tensor | float,
) -> None:
    """One step of the rows w in place, as torch.optim does it; lr and step may be (rows, 1)."""
    if rule.kind in (ADAMW, ROWWISE_ADAMW):
        w.mul_(1.0 - lr * rule.weight_decay)
        first.lerp_(g, 1.0 - rule.beta1)
        if rule.kind == ADAMW:
            second.mul_(rule.beta2).addcmul_(g, g, value=1.0 - rule.beta2)
            spread = second.sqrt()
        else:
            second.mul_(rule.beta2).add_(g.square().mean(1), alpha=1.0 - rule.beta2)
            spread = second.sqrt()[:, None]
        spread = spread / (1.0 - rule.beta2**step) ** 0.5 + rule.eps
        w.sub_(first / spread * (lr / (1.0 - rule.beta1**step)))
        return
    if rule.weight_decay:
        g = g + rule.weight_decay * w
    if rule.kind == SGD:
        if first is not None:
            g = first.mul_(rule.momentum).add_(g)
        w.sub_(g * lr)
        return
    if rule.kind == ADAGRAD:
        spread = first.addcmul_(g, g).sqrt()
    else:
        spread = first.add_(g.square().mean(1)).sqrt()[:, None]
    w.sub_(g / (spread + rule.eps) * lr)


def _gradient(
    items: Tensor,
    start: int,
    stop: int,
    hidden: list[Tensor],
    target: list[Tensor],
    factors: list[Tensor],
    bias: list[Tensor],
    bias_of: list[int],
    options: list[float],
    ids: Tensor | None,
    rows: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """The whole gradient of the items start to stop."""
    dtype = compute_dtype(items.dtype)
    g = items.new_zeros((stop - start, items.shape[1]), dtype=dtype)
    for i, part in enumerate(hidden):
        part = part.to(dtype)
        temperature, softcap = options[2 * i], options[2 * i + 1]
        b = bias[bias_of[i]] if bias_of[i] >= 0 else None
        z = _logits(scores(part, items, b, start, stop), temperature, softcap)
        # at |lse| = 1e4 a float32 lse would be off by 1e-3 of every probability
        shift = factors[i][0].to(dtype)
        weight = (factors[i][1] * (shift.double() - factors[i][0]).exp()).to(dtype)
        constant, share = factors[i][2].to(dtype), factors[i][3].to(dtype)
        slope = 1.0 - (z / softcap) ** 2 if softcap else None
        dz = z.sub_(shift[:, None]).exp_().mul_(weight[:, None]).add_(constant[:, None])
        local = target[i] - start
        inside = (local >= 0) & (local < stop - start)
        share = torch.where(inside, share, share.new_zeros(()))
        dz.scatter_add_(1, local.clamp(0, stop - start - 1)[:, None], share[:, None])
        if slope is not None:
            dz.mul_(slope)
        g.addmm_(dz.T, part)
    if ids is not None and rows is not None:
        first, last = torch.searchsorted(ids, torch.tensor([start, stop], device=ids.device))
        g.index_add_(0, ids[first:last] - start, rows[first:last].to(dtype))
    return g if gradient is None else g.add_(gradient[start:stop])


def _chunks(items: Tensor, hidden: list[Tensor]) -> list[tuple[int, int]]:
    # chunks hold scores (K, chunk) and rows (chunk, D)
    most = max([part.shape[0] for part in hidden] + [items.shape[1]])
    return chunk_ranges(most, items.shape[0], compute_dtype(items.dtype))


def tied_table_step_fwd(
    items: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    hidden: list[Tensor],
    target: list[Tensor],
    factors: list[Tensor],
    bias: list[Tensor],
    bias_of: list[int],
    options: list[float],
    ids: Tensor | None,
    rows: Tensor | None,
    gradient: Tensor | None,
    *rule: int | float,
) -> None:
    """One step of all items, in place."""
    made = Rule(*rule)
    records = (hidden, target, factors, bias, bias_of, options, ids, rows, gradient)
    for start, stop in _chunks(items, hidden):
        g = _gradient(items, start, stop, *records).mul_(made.scale)
        w = items[start:stop].to(g.dtype)
        states = [None if s is None else s[start:stop] for s in (first, second)]
        _update(w, *states, g, made, made.lr, made.step)
        if w.dtype != items.dtype:
            items[start:stop] = w


def tied_table_step_norm(
    items: Tensor,
    hidden: list[Tensor],
    target: list[Tensor],
    factors: list[Tensor],
    bias: list[Tensor],
    bias_of: list[int],
    options: list[float],
    ids: Tensor | None,
    rows: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    """Sum of squares of the gradient that tied_table_step_fwd would take, float64 ()."""
    records = (hidden, target, factors, bias, bias_of, options, ids, rows, gradient)
    total = items.new_zeros((), dtype=torch.float64)
    for start, stop in _chunks(items, hidden):
        total += _gradient(items, start, stop, *records).double().square().sum()
    return total


def tied_table_step_rows(
    items: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    ids: Tensor,
    rows: Tensor,
    *rule: int | float,
) -> None:
    """One step of the rows that ids (sorted) names, in place; all others stay."""
    made = Rule(*rule)
    touched, place = torch.unique_consecutive(ids, return_inverse=True)
    w = items[touched].to(compute_dtype(items.dtype))
    g = torch.zeros_like(w).index_add_(0, place, rows.to(w.dtype)).mul_(made.scale)
    states = [None if s is None else s[touched] for s in (first, second)]
    _update(w, *states, g, made, made.lr, made.step)
    _put_back(items, first, second, touched, w, *states)


def _put_back(
    items: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    touched: Tensor,
    w: Tensor,
    new_first: Tensor | None,
    new_second: Tensor | None,
) -> None:
    items[touched] = w.to(items.dtype)
    if first is not None:
        first[touched] = new_first
    if second is not None:
        second[touched] = new_second


def tied_table_step_catch_up(
    items: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    last: Tensor,
    ids: Tensor | None,
    base: int,
    lrs: Tensor,
    log_decay: Tensor,
    *rule: int | float,
) -> None:
    """Give rows (ids, sorted and different, or all) the steps they missed, without a gradient.

    last       (V,) int32, the step each row is at; or lower than base, which all rows are at least
    lrs        (T,) learning rates of the steps base + 1 to base + T
    log_decay  (T + 1,) sums of log(1 - lr * weight_decay) over the first 0, 1, ... of them
    rule.step is base + T; last of the rows ids becomes that.
    """
    made = Rule(*rule)
    ranges = chunk_ranges(items.shape[1], len(items if ids is None else ids), torch.float64)
    for start, stop in ranges:
        touched = torch.arange(start, stop) if ids is None else ids[start:stop]
        behind = touched[last[touched].clamp(min=base) < made.step]
        w = items[behind].to(compute_dtype(items.dtype))
        states = [None if s is None else s[behind] for s in (first, second)]
        done = last[behind].clamp(min=base).long() - base
        _catch_up(w, *states, done, base, lrs, log_decay, made)
        _put_back(items, first, second, behind, w, *states)
    if ids is not None:
        last[ids] = made.step


def _catch_up(
    w: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    done: Tensor,
    base: int,
    lrs: Tensor,
    log_decay: Tensor,
    rule: Rule,
) -> None:
    adam = rule.kind in (ADAMW, ROWWISE_ADAMW)
    if not adam and not rule.weight_decay and first is None:
        return
    if rule.kind in (ADAGRAD, ROWWISE_ADAGRAD) and not rule.weight_decay:
        return
    steps = lrs.shape[0]
    while bool((done < steps).any()):
        if adam:
            moving = _moves(w, first, second, done, base, lrs, rule) & (done < steps)
        else:
            moving = done < steps
        if not bool(moving.any()):
            break
        for _ in range(CHECK_EVERY):
            now = (moving & (done < steps)).nonzero()[:, 0]
            part = [None if t is None else t[now] for t in (w, first, second)]
            lr = lrs[done[now]].to(w.dtype)[:, None]
            step = (done[now] + base + 1).double()[:, None]
            g = torch.zeros_like(part[0])
            _update(*part, g, rule, lr, step)
            _put_back(w, first, second, now, *part)
            done[now] += 1
    if adam:
        left = (steps - done).double()
        w.mul_((log_decay[steps] - log_decay[done]).exp().to(w.dtype)[:, None])
        first.mul_((rule.beta1**left).to(w.dtype)[:, None])
        factor = (rule.beta2**left).to(w.dtype)
        second.mul_(factor if second.dim() == 1 else factor[:, None])


def _moves(
    w: Tensor, first: Tensor, second: Tensor, done: Tensor, base: int, lrs: Tensor, rule: Rule
) -> Tensor:
    """Which rows the moments may still move by more than rounding, all missed steps together."""
    # The quotient of the moments shrinks at least by this much at each step.
    ratio = rule.beta1 / math.sqrt(rule.beta2) if rule.beta2 > 0 else 1.0
    if ratio >= 1.0:
        return torch.ones_like(done, dtype=torch.bool)
    spread = second.sqrt() + rule.eps
    quotient = first.abs() / (spread if spread.dim() == 2 else spread[:, None])
    correction = 1.0 - rule.beta1 ** (base + done + 1).double()
    reach = quotient.amax(1).double() * (float(lrs.max()) * ratio / (1.0 - ratio)) / correction
    least = NEGLIGIBLE * torch.finfo(w.dtype).eps * w.abs().amax(1).double()
    return ~(reach <= least) & (first != 0).any(1)

"""tied_softmax_loss in plain PyTorch: item chunks, online log-sum-exp, recompute in backward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from t4r_fast.plain._scores import (
    Kept,
    at_column,
    compute_dtype,
    keep_rows,
    score_chunks,
    spread,
)


def _logits(scores: Tensor, temperature: float, softcap: float) -> Tensor:
    """In place: fresh chunks cost more in page faults than the arithmetic on them."""
    if temperature != 1.0:
        scores.div_(temperature)
    return scores.div_(softcap).tanh_().mul_(softcap) if softcap else scores


def _prepare(
    hidden: Tensor, target: Tensor, rows: Tensor | None, ignore_index: int
) -> tuple[Kept, Tensor, Tensor]:
    kept = keep_rows(hidden.shape[0], rows, target, ignore_index, hidden)
    part = hidden[kept.source].to(compute_dtype(hidden.dtype))
    wanted = torch.where(kept.valid, target[kept.source], 0)
    return kept, part, wanted


def tied_softmax_loss_fwd(
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
    """Loss and log-sum-exp per row, both (N,) or (M,), 0 for rows that take no part.

    Backward makes all scores again: nothing is kept for it, whatever stash_items and need_mean.
    """
    kept, part, wanted = _prepare(hidden, target, rows, ignore_index)
    top = part.new_full((part.shape[0],), -math.inf)
    total = part.new_zeros(part.shape[0])
    z_target = part.new_zeros(part.shape[0])
    z_sum = part.new_zeros(part.shape[0])
    for start, _, scores in score_chunks(part, items, bias):
        z = _logits(scores, temperature, softcap)
        higher = torch.maximum(top, z.amax(1))
        # exp(-inf - -inf) is nan: a row of only -inf so far is shifted by 0
        shift = torch.where(higher == -math.inf, 0.0, higher)
        z_target = at_column(z, wanted, start, z_target)
        if label_smoothing:
            z_sum = z_sum + z.sum(1)
        total = total * torch.exp(top - shift) + z.sub_(shift[:, None]).exp_().sum(1)
        top = higher
    lse = torch.where(top == -math.inf, 0.0, top) + torch.log(total)
    loss = lse - z_target
    if label_smoothing:
        uniform = lse - z_sum / items.shape[0]
        loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
    if z_loss:
        loss = loss + z_loss * lse * lse
    loss = spread(loss, kept, 0.0)
    nothing = loss.new_empty((loss.shape[0], 0)), hidden.new_empty((0, hidden.shape[1]))
    return loss, spread(lse, kept, 0.0), *nothing


def tied_softmax_loss_bwd(
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
    temperature: float,
    softcap: float,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    need_hidden: bool,
    need_items: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, items and bias; None where not needed."""
    kept, part, wanted = _prepare(hidden, target, rows, ignore_index)
    lse = lse[kept.slot]
    zero = lse.new_zeros(())
    # every logit's gradient has the factor 1 / temperature: put it into the rows' factors
    dloss = torch.where(kept.valid, dloss[kept.slot], zero) / temperature
    dlse = torch.where(kept.valid, dlse[kept.slot], zero) / temperature
    weight = dloss * (1.0 + 2.0 * z_loss * lse) + dlse  # of the softmax
    dpart = torch.zeros_like(part) if need_hidden else None
    ditems = torch.empty_like(items) if need_items else None
    dbias = torch.empty_like(bias) if bias is not None and need_bias else None
    for start, stop, scores in score_chunks(part, items, bias):
        z = _logits(scores, temperature, softcap)
        slope = 1.0 - (z / softcap) ** 2 if softcap else None  # of the cap
        dz = z.sub_(lse[:, None]).exp_().mul_(weight[:, None])
        if label_smoothing:
            dz.sub_((dloss * (label_smoothing / items.shape[0]))[:, None])
        local = wanted - start
        inside = (local >= 0) & (local < stop - start)
        share = torch.where(inside, dloss * (label_smoothing - 1.0), zero)
        dz.scatter_add_(1, local.clamp(0, stop - start - 1)[:, None], share[:, None])
        if slope is not None:
            dz.mul_(slope)
        if dpart is not None:
            dpart.addmm_(dz, items[start:stop].to(dz.dtype))
        if ditems is not None:
            ditems[start:stop] = dz.T @ part
        if dbias is not None:
            dbias[start:stop] = dz.sum(0)
    dhidden = None
    if dpart is not None:
        # rows may name a row twice: add, and round to a 16-bit dtype once
        dhidden = hidden.new_zeros(hidden.shape, dtype=part.dtype)
        dhidden = dhidden.index_add(0, kept.source, dpart).to(hidden.dtype)
    return dhidden, ditems, dbias

"""sampled_softmax_loss in plain PyTorch: negatives drawn again in backward, chunks of rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from t4r_fast.plain import _scores
from t4r_fast.plain._draws import (
    NEGATIVE,
    log_uniform,
    log_uniform_log_q,
    uniform,
    unit_draws,
)
from t4r_fast.plain._scores import Kept, compute_dtype, keep_rows, spread

LOG_UNIFORM, UNIFORM, POPULARITY, T4REC = range(4)
BATCH, BLOCK, ROW = range(3)
BLOCK_ROWS = 128
# Transformers4Rec's logit of a negative that is the target, and its guard against log(0)
T4REC_HIT = torch.finfo(torch.float16).min / 100.0
T4REC_EPSILON = 1e-16


class Options(NamedTuple):
    """How negatives are drawn and weighed; in the order of the schema."""

    num_negatives: int
    sampler: int
    scope: int
    low: int
    log_size: float  # log(size + 1), size the number of ids that can be drawn
    logq: bool
    remove_hits: bool
    temperature: float
    ignore_index: int


class Group(NamedTuple):
    """Rows start to stop of the kept ones, and their negatives: (K,), or (rows, K) at scope row.

    valid  negatives that take part, or None for all; sampler t4rec has fewer than it has places
    """

    start: int
    stop: int
    ids: Tensor
    valid: Tensor | None


def _draw(
    options: Options, seed: Tensor, sets: Tensor, items: int, cumulative: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """ids and valid of the sets: (S, K)."""
    size, count = items - options.low, options.num_negatives
    if options.sampler == T4REC:
        u = unit_draws(seed, NEGATIVE, sets, 0, 2 * count)
        ids = log_uniform(u, size, options.log_size).sort(1).values + options.low
        new = torch.ones_like(ids, dtype=torch.bool)
        new[:, 1:] = ids[:, 1:] != ids[:, :-1]
        return ids, new & (new.cumsum(1) <= count)
    u = unit_draws(seed, NEGATIVE, sets, 0, count)
    if options.sampler == LOG_UNIFORM:
        return log_uniform(u, size, options.log_size) + options.low, None
    if options.sampler == UNIFORM or cumulative is None:
        return uniform(u, size) + options.low, None
    found = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    return found.clamp(max=items - 1), None


def log_q(options: Options, ids: Tensor, items: int, cumulative: Tensor | None) -> Tensor:
    """float64 log-probability of one draw."""
    if options.sampler in (LOG_UNIFORM, T4REC):
        return log_uniform_log_q(ids - options.low, options.log_size)
    if options.sampler == UNIFORM or cumulative is None:
        same = torch.full_like(ids, -math.log(items - options.low), dtype=torch.float64)
        return same.masked_fill(ids < options.low, -math.inf)
    before = torch.where(ids > 0, cumulative[(ids - 1).clamp(min=0)], 0.0)
    return ((cumulative[ids] - before) / cumulative[-1]).log()


def _expected(options: Options, ids: Tensor, items: int, cumulative: Tensor | None) -> Tensor:
    """float64 log of how often a set holds each id on average; of t4rec what the reference takes
    for it."""
    q = log_q(options, ids, items, cumulative)
    if options.sampler == T4REC:
        inclusion = -torch.expm1(-2 * options.num_negatives * torch.log1p(q.exp()))
        return torch.log(inclusion + T4REC_EPSILON)
    return q + math.log(options.num_negatives)


def _groups(
    options: Options, kept: Kept, seed: Tensor, items: Tensor, cumulative: Tensor | None
) -> Iterator[Group]:
    rows = kept.slot.shape[0]
    if rows == 0:
        return
    device, count = items.device, items.shape[0]
    if options.scope == ROW:
        step = max(1, _scores.CHUNK_BYTES // (8 * options.num_negatives * items.shape[1]))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            ids, _ = _draw(options, seed, kept.slot[start:stop], count, cumulative)
            yield Group(start, stop, ids, None)
        return
    if options.scope == BATCH or kept.size <= BLOCK_ROWS:
        edges = [0, rows]
    elif rows == kept.size:
        edges = [*range(0, rows, BLOCK_ROWS), rows]
    else:
        first = torch.arange(0, kept.size + BLOCK_ROWS, BLOCK_ROWS, device=device)
        edges = torch.searchsorted(kept.slot, first).tolist()
    step = max(1, _scores.CHUNK_BYTES // (8 * options.num_negatives))
    for block, (first_row, last) in enumerate(itertools.pairwise(edges)):
        if first_row == last:
            continue
        number = torch.full((1,), block, device=device)
        ids, valid = _draw(options, seed, number, count, cumulative)
        for start in range(first_row, last, step):
            stop = min(last, start + step)
            yield Group(start, stop, ids[0], None if valid is None else valid[0])


class Problem:
    """What forward and backward share: kept rows, logits of targets and of negatives."""

    def __init__(
        self,
        hidden: Tensor,
        items: Tensor,
        target: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        cumulative: Tensor | None,
        seed: Tensor,
        options: Options,
    ) -> None:
        self.items, self.bias, self.cumulative = items, bias, cumulative
        self.seed, self.options = seed, options
        self.kept = keep_rows(hidden.shape[0], rows, target, options.ignore_index, hidden)
        self.part = hidden[self.kept.source].to(compute_dtype(hidden.dtype))
        self.wanted = torch.where(self.kept.valid, target[self.kept.source], 0)

    def groups(self) -> Iterator[Group]:
        return _groups(self.options, self.kept, self.seed, self.items, self.cumulative)

    def read_ids(self) -> Tensor:
        """All ids of targets and negatives, sorted and different."""
        read = [self.wanted[self.kept.valid]]
        read += [g.ids.flatten() if g.valid is None else g.ids[g.valid] for g in self.groups()]
        return torch.cat(read).unique()

    def vectors(self, ids: Tensor) -> Tensor:
        return self.items[ids].to(self.part.dtype)

    def biases(self, ids: Tensor) -> Tensor | float:
        return 0.0 if self.bias is None else self.bias[ids].to(self.part.dtype)

    def expected(self, ids: Tensor) -> Tensor:
        return _expected(self.options, ids, self.items.shape[0], self.cumulative)

    def target_logits(self) -> Tensor:
        o = self.options
        z = (self.part * self.vectors(self.wanted)).sum(1) + self.biases(self.wanted)
        if o.sampler == T4REC:
            return _lowered(z, self.expected(self.wanted)) / o.temperature
        z = z / o.temperature
        if o.logq and not o.remove_hits:
            z = _lowered(z, torch.log1p(self.expected(self.wanted).exp()))
        return z

    def logits(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """Of the negatives (rows, K); the negatives' vectors; logits that are constants."""
        o = self.options
        h, wanted = self.part[group.start : group.stop], self.wanted[group.start : group.stop]
        w = self.vectors(group.ids)
        z = h @ w.T if w.dim() == 2 else torch.einsum("nd,nkd->nk", h, w)
        z = z + self.biases(group.ids)
        hit = group.ids == wanted[:, None]
        constant = torch.zeros_like(hit)
        if o.sampler == T4REC:
            z = _lowered(z, self.expected(group.ids)) / o.temperature
            z = torch.where(hit, T4REC_HIT / o.temperature, z)
            constant = hit
        else:
            z = z / o.temperature
            if o.logq:
                shift = self.expected(group.ids)
                if not o.remove_hits:
                    shift = torch.where(hit, torch.log1p(shift.exp()), shift)
                z = _lowered(z, shift)
            if o.remove_hits:
                z = torch.where(hit, -math.inf, z)
        if group.valid is not None:
            z = torch.where(group.valid, z, -math.inf)
        return z, w, constant


def read_ids(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    rows: Tensor | None,
    cumulative: Tensor | None,
    seed: Tensor,
    options: Options,
) -> Tensor:
    """The rows of items that the loss reads, sorted and different."""
    return Problem(hidden, items, target, None, rows, cumulative, seed, options).read_ids()


def _lowered(z: Tensor, shift: Tensor) -> Tensor:
    """z - shift. Rounded to float32 before, shift would be off in one direction for all rows."""
    return (z.double() - shift).to(z.dtype)


def _log_sum_exp(z: Tensor) -> Tensor:
    """float64: at |z| = 1e4 the rounding of float32 would be 1e-3 of every probability."""
    top = z.amax(1)
    shift = torch.where(top == -math.inf, 0.0, top)
    return shift.double() + torch.exp(z - shift[:, None]).sum(1).double().log()


def _soften(z: Tensor, lse: Tensor, constant: Tensor) -> Tensor:
    """exp(z - lse), 0 for constants; where every logit is -inf, 0."""
    lse = torch.where(lse == -math.inf, 0.0, lse)
    apart = (z.double() - lse[:, None]).to(z.dtype)
    return torch.where(constant, 0.0, torch.exp(apart))


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
    options = Options(
        num_negatives, sampler, scope, low, log_size, logq, remove_hits, temperature, ignore_index
    )
    problem = Problem(hidden, items, target, bias, rows, cumulative, seed, options)
    z_target = problem.target_logits()
    lse_negatives = torch.empty_like(z_target, dtype=torch.float64)
    mean = torch.empty_like(problem.part) if needs_unit else None
    for group in problem.groups():
        z, w, constant = problem.logits(group)
        lse = _log_sum_exp(z)
        lse_negatives[group.start : group.stop] = lse
        if mean is not None:
            p = _soften(z, lse, constant)
            mean[group.start : group.stop] = (
                p @ w if w.dim() == 2 else torch.einsum("nk,nkd->nd", p, w)
            )
    # softplus of the difference: exact also where the target has nearly all of the weight
    apart = lse_negatives - z_target.double()
    loss = torch.logaddexp(apart, torch.zeros_like(apart)).to(z_target.dtype)
    lse = torch.logaddexp(lse_negatives, z_target.double())
    kept = problem.kept
    unit = problem.part.new_empty((0, hidden.shape[1]))
    if mean is not None:
        share = -torch.expm1(-loss) / temperature
        unit = share[:, None] * (mean - problem.vectors(problem.wanted))
        unit = spread(unit, kept, 0.0)
    return spread(loss, kept, 0.0), spread(lse, kept, 0.0), unit


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
    """dhidden; the ids with a gradient; their rows of ditems and dbias, or all rows if not sparse.

    What is not needed is empty.
    """
    options = Options(
        num_negatives, sampler, scope, low, log_size, logq, remove_hits, temperature, ignore_index
    )
    problem = Problem(hidden, items, target, bias, rows, cumulative, seed, options)
    kept = problem.kept
    zero = dloss.new_zeros(())
    dloss = torch.where(kept.valid, dloss[kept.slot], zero)
    dhidden = hidden.new_empty((0, hidden.shape[1]))
    if needs_hidden:
        dhidden = hidden.new_zeros(hidden.shape, dtype=problem.part.dtype)
        dhidden = dhidden.index_add(0, kept.source, unit[kept.slot] * dloss[:, None])
        dhidden = dhidden.to(hidden.dtype)
    ids = kept.source.new_empty((0,))
    if not needs_items:
        none = items.new_empty((0, items.shape[1]))
        return dhidden, ids, none, none[:, 0] if bias is None else bias.new_empty((0,))
    size = items.shape[0]
    if sparse:
        ids = problem.read_ids()
        size = ids.shape[0]
    # float64: thousands of draws may add to one item, one after the other
    ditems = items.new_zeros((size, items.shape[1]), dtype=torch.float64)
    dbias = items.new_zeros((size,), dtype=torch.float64)

    def place(wanted: Tensor) -> Tensor:
        return torch.searchsorted(ids, wanted).clamp(max=max(size - 1, 0)) if sparse else wanted

    scaled = dloss / temperature
    for group in problem.groups():
        z, w, constant = problem.logits(group)
        part = slice(group.start, group.stop)
        dz = _soften(z, lse[kept.slot[part]], constant) * scaled[part, None]
        at = place(group.ids)
        if w.dim() == 2:
            ditems.index_add_(0, at, (dz.T @ problem.part[part]).double())
            dbias.index_add_(0, at, dz.double().sum(0))
        else:
            change = dz[..., None] * problem.part[part, None]
            ditems.index_add_(0, at.flatten(), change.flatten(0, 1).double())
            dbias.index_add_(0, at.flatten(), dz.flatten().double())
    share = torch.expm1(-loss[kept.slot]) * scaled
    at = place(problem.wanted)
    ditems.index_add_(0, at, (share[:, None] * problem.part).double())
    dbias.index_add_(0, at, share.double())
    ditems = ditems.to(items.dtype)
    return dhidden, ids, ditems, ditems[:0, 0] if bias is None else dbias.to(bias.dtype)

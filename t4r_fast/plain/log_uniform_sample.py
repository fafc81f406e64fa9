"""log_uniform_sample in plain PyTorch: the inverse of the distribution function, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from t4r_fast.plain._draws import SAMPLE, log_uniform, log_uniform_log_q, unit_draws


def _draw(seed: Tensor, start: int, count: int, size: int, log_size: float) -> Tensor:
    sets = torch.zeros(1, dtype=torch.int64, device=seed.device)
    return log_uniform(unit_draws(seed, SAMPLE, sets, start, count)[0], size, log_size)


def _draw_unique(seed: Tensor, n: int, size: int, log_size: float) -> tuple[Tensor, Tensor]:
    """The first n distinct classes in the order drawn, and after how many draws there were n."""
    tries, step = 0, 2 * n + (2 * n) % 2
    classes = torch.empty(0, dtype=torch.int64, device=seed.device)
    places = classes  # where a class was drawn first
    while classes.shape[0] < n:
        drawn = _draw(seed, tries, step, size, log_size)
        seen = torch.cat([classes, drawn])
        place = torch.cat([places, torch.arange(tries, tries + step, device=seed.device)])
        values, inverse = seen.unique(return_inverse=True)
        first = torch.full_like(values, tries + step)
        first = first.scatter_reduce(0, inverse, place, "amin")
        places, order = first.sort()
        classes, tries = values[order], tries + step
    last = places[n - 1] + 1 if n else places.new_zeros(())
    return classes[:n], last


def log_uniform_sample_fwd(
    seed: Tensor, n: int, size: int, low: int, log_size: float, unique: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log-probabilities and the number of draws."""
    if unique:
        classes, tries = _draw_unique(seed, n, size, log_size)
    else:
        classes = _draw(seed, 0, n, size, log_size)
        tries = torch.full((), n, dtype=torch.int64, device=seed.device)
    log_q = log_uniform_log_q(classes, log_size)
    if unique:
        log_q = torch.log(-torch.expm1(tries * torch.log1p(-log_q.exp())))
    return classes + low, log_q.float(), tries

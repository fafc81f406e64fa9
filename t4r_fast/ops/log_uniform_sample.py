"""log_uniform_sample: ids whose frequency falls like 1 / rank, in closed form."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops._seed import check_seed
from t4r_fast.plain import log_uniform_sample as plain
from t4r_fast.plain._draws import log_uniform_log_q

# From here on the 53 bits of a draw would show in the probabilities of single ids.
MAX_SIZE = 2**40


class LogUniformSample(NamedTuple):
    """What was drawn.

    ids       (n,) int64
    log_prob  (n,) float32, log of the probability of each id; with unique=True, of the chance that
              `tries` draws hold the id
    tries     () int64, the number of draws: n, or with unique=True as many as it took
    """

    ids: Tensor
    log_prob: Tensor
    tries: Tensor


def log_uniform_sample(
    n: int,
    high: int,
    *,
    low: int = 0,
    unique: bool = False,
    seed: Tensor | None = None,
    device: torch.device | str | None = None,
) -> LogUniformSample:
    """Ids low to high - 1, low the most frequent, as items sorted by popularity are.

    q[id] = log((c + 2) / (c + 1)) / log(high - low + 1)        c = id - low
    log_prob = log(q), or with unique=True log(-expm1(tries * log1p(-q)))

    n        int, how many; 0 gives empty tensors
    high     int, low < high <= low + 2**40; no memory or time depends on it
    low      int, ids below are never drawn: 1 spares padding
    unique   draw until n different ids are there, and give them in the order of their first draw.
             Exact, whatever n: no more than the closed form is approximate about log_prob. Takes
             many draws when n nears high - low
    seed     (2,) int64 (key, offset); None draws it from torch's default generator
    device   where, if seed is None; the device of seed otherwise
    returns  LogUniformSample(ids, log_prob, tries)

    The ids of a seed are the same bits on every backend. Not differentiable. Raises ValueError on
    sizes out of range and on a seed that is not int64 (2,).
    Replaces transformers4rec.torch.model.prediction_task.LogUniformSampler, which keeps the n
    lowest of 2 n draws (sampled_softmax_loss(sampler="t4rec") reproduces that).
    """
    _check_range("log_uniform_sample", high, low)
    if n < 0:
        raise ValueError(f"log_uniform_sample: n must be >= 0; got {n}")
    if unique and n > high - low:
        raise ValueError(
            f"log_uniform_sample: n must be at most high - low, {high - low}, with unique=True; "
            f"got {n}"
        )
    if seed is not None and device is None:
        device = seed.device
    seed = check_seed("log_uniform_sample", seed, torch.device("cpu" if device is None else device))
    functions = backend.ops(backend.pick("log_uniform_sample", seed), plain)
    size = high - low
    return LogUniformSample(
        *functions.log_uniform_sample_fwd(seed, n, size, low, math.log(size + 1), unique)
    )


def log_uniform_log_prob(
    ids: Tensor, high: int, low: int = 0, tries: Tensor | int | None = None
) -> Tensor:
    """log q[id] of log_uniform_sample for any ids; -inf outside low to high - 1.

    ids      int64, any shape
    high     int, low < high <= low + 2**40
    low      int
    tries    int or () int64; given, the log of the chance that so many draws hold the id, as
             unique=True gives it
    returns  float32 of the shape of ids

    Raises ValueError on sizes out of range, TypeError on ids that are not int64.
    """
    _check_range("log_uniform_log_prob", high, low)
    if ids.dtype != torch.int64:
        raise TypeError(f"log_uniform_log_prob: ids must be int64; got {ids.dtype}")
    classes = torch.where(ids < high, ids - low, -1)
    log_q = log_uniform_log_q(classes, math.log(high - low + 1))
    if tries is not None:
        log_q = torch.log(-torch.expm1(tries * torch.log1p(-log_q.exp())))
    return log_q.float()


def _check_range(op: str, high: int, low: int) -> None:
    if not low < high <= low + MAX_SIZE:
        raise ValueError(f"{op}: high must be > low, {low}, and at most low + 2**40; got {high}")


def _fake(
    seed: Tensor, n: int, size: int, low: int, log_size: float, unique: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return seed.new_empty((n,)), seed.new_empty((n,), dtype=torch.float32), seed.new_empty(())


backend.declare(
    "log_uniform_sample",
    "log_uniform_sample_fwd(Tensor seed, int n, int size, int low, float log_size, bool unique)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)

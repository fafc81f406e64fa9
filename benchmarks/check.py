"""No number from a wrong kernel: outputs against float64 on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.case import Benchmark, Case, Inputs, Outputs
from t4r_fast import backend

# A baseline may round as it likes; this only says that it computes the same thing.
BASELINE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 5e-2
# Without a baseline's rounding to compare with: a sum of a few thousand products.
ALONE_EPS = 16


class Wrong(Exception):
    """An output that differs from the truth; the text says where and by how much."""


def truth(benchmark: Benchmark, case: Case, inputs: Inputs) -> Outputs:
    """Our op in plain PyTorch, in float64."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with backend.use("plain"):
        return benchmark.providers[0].make(case)(wide)


def check(found: Outputs, true: Outputs, plain: Outputs | None, dtype: torch.dtype) -> None:
    """Raise Wrong unless every output in `found` agrees with the truth.

    plain  a baseline's outputs in the same dtype: the error may be twice its error and one eps of
           the largest value, as in the tests. None: `found` is a baseline itself
    """
    for name, value in found.items():
        exact = true[name]
        if value.shape != exact.shape:
            raise Wrong(f"{name} has shape {tuple(value.shape)}, expected {tuple(exact.shape)}")
        value, exact = _dense(value), _dense(exact)
        if not exact.is_floating_point():
            if not torch.equal(value, exact):
                at = (value != exact).nonzero()[0].tolist()
                raise Wrong(
                    f"{name}{at} is {value[tuple(at)].item()}, expected {exact[tuple(at)].item()}"
                )
            continue
        error = _largest_error(value, exact)
        largest = exact.abs().max().item() if exact.numel() else 0.0
        eps = torch.finfo(dtype).eps
        if plain is None:
            allowed = BASELINE_TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE) * largest
        elif name in plain:
            allowed = 2 * _largest_error(_dense(plain[name]), exact) + eps * largest
        else:
            allowed = ALONE_EPS * eps * largest
        if not error <= allowed:
            raise Wrong(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")


def _largest_error(value: Tensor, exact: Tensor) -> float:
    if not exact.numel():
        return 0.0
    # In slices: a float64 copy of a whole item gradient is large.
    pairs = zip(value.reshape(-1).split(1 << 22), exact.reshape(-1).split(1 << 22))
    worst = max((_error(v.double(), e.double()) for v, e in pairs), default=0.0)
    return worst


def _error(value: Tensor, exact: Tensor) -> float:
    same = (value == exact) | (value.isnan() & exact.isnan())  # infinities are equal to themselves
    return torch.where(same, 0.0, (value - exact).abs()).nan_to_num(nan=float("inf")).max().item()


def _dense(value: Tensor) -> Tensor:
    return value.detach().to_dense() if value.is_sparse else value.detach()

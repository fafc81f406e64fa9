"""One harness for all ops: lanes, and the comparison of a float op with the truth.

The truth is the naive formula in float64. An op may be twice as wrong as the naive formula in the
tested dtype, plus one eps of the largest value. Rows are checked one by one as well: a norm over a
whole gradient hides rows that are lost.
"""

from __future__ import annotations

import collections
import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu import build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from t4r_fast import backend

ROOT = Path(__file__).resolve().parent.parent

# lane -> backend, device, folder and suffix of the kernel files
LANES = {
    "plain": ("plain", "cpu", "t4r_fast/plain", ".py"),
    "plain-gpu": ("plain", "cuda", "t4r_fast/plain", ".py"),
    "cpu": ("cpu", "cpu", "csrc/cpu", ".cpp"),
    "triton-interpret": ("triton", "cpu", "kernels/triton", ".py"),
    "triton": ("triton", "cuda", "kernels/triton", ".py"),
    "cuda": ("cuda", "cuda", "csrc/cuda", ".cu"),
    "cuda-on-cpu": ("cuda", "cpu", "csrc/cuda", ".cu"),
}
REQUIRED = [name for name in os.environ.get("T4R_FAST_REQUIRE", "").split(",") if name]
if set(REQUIRED) - set(LANES):
    raise ValueError(
        f"T4R_FAST_REQUIRE must name lanes of {', '.join(LANES)}; got {', '.join(REQUIRED)}"
    )

SHUFFLE = os.environ.get("T4R_FAST_SHUFFLE", "")

# Sums over rows or items may come in any order, and where their terms cancel that moves more than a
# row's last bits. A skipped tile or a dropped small gradient loses the whole row.
ROW_EPS = {torch.float64: 4096, torch.float32: 4096, torch.float16: 16, torch.bfloat16: 16}


def lanes(op: str) -> list[str]:
    """The lanes for which the op's row has a kernel file; test_rows.py says why others have not."""
    return [
        lane
        for lane, (_, _, folder, suffix) in LANES.items()
        if (ROOT / folder / f"{op}{suffix}").exists()
    ]


@contextlib.contextmanager
def run_on(lane: str, op: str) -> Iterator[str]:
    """Force the lane's backend; gives its device. Skips, or fails where CI owes the lane."""
    name, device = LANES[lane][:2]
    reason = None
    if device == "cuda" and not torch.cuda.is_available():
        reason = "there is no GPU"
    elif lane == "triton-interpret" and torch.cuda.is_available():
        reason = "kernels run on the GPU here"
    elif lane == "cuda-on-cpu" and not os.environ.get("T4R_FAST_CUDA_ON_CPU"):
        reason = build.why_not("plain") or "kernels run on the GPU here"
    else:
        reason = backend.why_not(op, name, device)
    if reason is not None:
        if lane in REQUIRED:
            pytest.fail(f"T4R_FAST_REQUIRE names lane '{lane}', but {reason}")
        pytest.skip(f"lane '{lane}': {reason}")
    if lane == "cuda-on-cpu":  # every test has orders of its own, the same in every run
        test = os.environ.get("PYTEST_CURRENT_TEST", "")
        os.environ["T4R_FAST_SHUFFLE"] = str(zlib.crc32(f"{SHUFFLE}{test}".encode()))
    with backend.use(name):
        yield device


Inputs = dict[str, "Tensor | list[Tensor | None] | None"]


def _convert(inputs: Inputs, dtype: torch.dtype, device: str, diff: tuple[str, ...]) -> Inputs:
    def one(tensor: Tensor | None, grad: bool) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.to(device)
        if not tensor.is_floating_point():
            return tensor
        strides, size = tensor.stride(), tensor.shape
        copy = torch.empty_strided(size, strides, dtype=dtype, device=device).copy_(tensor)
        return copy.requires_grad_(grad)

    return {
        key: [one(t, key in diff) for t in value]
        if isinstance(value, list)
        else one(value, key in diff)
        for key, value in inputs.items()
    }


def _run(
    function: Callable[..., Any], inputs: Inputs, options: dict[str, Any], diff: tuple[str, ...]
) -> list[tuple[str, Tensor]]:
    """Outputs and gradients by name, on the CPU in float64."""
    results = function(**inputs, **options)
    results = results if isinstance(results, tuple) else (results,)
    found = [(f"output {i}", r.detach()) for i, r in enumerate(results)]
    names, leaves = [], []
    for key in diff:
        value = inputs[key]
        tensors = value if isinstance(value, list) else [value]
        for i, t in enumerate(tensors):
            if t is not None and t.is_floating_point():
                names.append(f"d{key}[{i}]" if isinstance(value, list) else f"d{key}")
                leaves.append(t)
    if leaves:
        generator = torch.Generator().manual_seed(7)
        weights = [
            torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device)
            for r in results
        ]
        # in the op's own dtype, so that low precision gets the same cotangent everywhere
        total = [(r, w.bfloat16().to(r.dtype)) for r, w in zip(results, weights)]
        grads = torch.autograd.grad(
            [r for r, _ in total], leaves, [w for _, w in total], allow_unused=True
        )
        found += [
            (name, torch.zeros_like(leaf) if grad is None else grad)
            for name, leaf, grad in zip(names, leaves, grads)
        ]
    return [(name, t.cpu().double()) for name, t in found]


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t.reshape(-1, 1)


def compare(
    name: str, ours: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, slack: float = 0.0
) -> None:
    """Largest error and error by row against the truth; slack is allowed on top of both bounds."""
    eps = torch.finfo(dtype).eps
    assert ours.shape == truth.shape, f"{name}: shape {ours.shape}, expected {truth.shape}"
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(ours), special(truth)), f"{name}: {special.__name__} differs"
    finite = torch.isfinite(truth)
    if not finite.any():
        return
    ours, truth = ours.where(finite, 0.0), truth.where(finite, 0.0)
    plain = plain.where(finite & torch.isfinite(plain), truth)
    error, allowed = (ours - truth).abs(), (plain - truth).abs()
    # For float64 the naive result is the truth itself and its error reads 0: allow for rounding.
    bound = 2 * allowed.max() + eps * truth.abs().max() * (16 if dtype == torch.float64 else 1)
    bound += slack
    assert error.max() <= bound, f"{name}: error {error.max():.3g}, allowed {bound:.3g}"
    error, allowed, size = _rows(error).amax(1), _rows(allowed).amax(1), _rows(truth).abs().amax(1)
    row_bound = 2 * allowed + ROW_EPS[dtype] * eps * size + slack
    worst = (error - row_bound).argmax()
    assert error[worst] <= row_bound[worst], (
        f"{name}: row {worst}: error {error[worst]:.3g}, allowed {row_bound[worst]:.3g}, "
        f"largest value {size[worst]:.3g}"
    )


def check(
    lane: str,
    op: Callable[..., Any],
    naive: Callable[..., Any],
    inputs: Inputs,
    options: dict[str, Any],
    dtype: torch.dtype,
    diff: tuple[str, ...] = (),
    slack: float = 0.0,
) -> None:
    """Compare outputs of the op, and gradients of the inputs named in diff, with the truth."""
    with run_on(lane, op.__name__) as device:
        rounded = _convert(inputs, dtype, "cpu", ())
        truth = _run(naive, _convert(rounded, torch.float64, "cpu", diff), options, diff)
        plain = _run(naive, _convert(rounded, dtype, "cpu", diff), options, diff)
        ours = _run(op, _convert(rounded, dtype, device, diff), options, diff)
    for (name, o), (_, p), (_, t) in zip(ours, plain, truth, strict=True):
        if t.numel():
            compare(name, o, p, t, dtype, slack)


class LargestTensor(TorchDispatchMode):
    """Records the elements of the tensors made inside, the most of any, and which ATen ops ran.

    Views of tensors, and results written into them, are not made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.made: list[int] = []
        self.calls: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.calls.add(func.overloadpacket.__name__)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and _storage(value) not in given:
                stored = value._values() if value.is_sparse else value
                self.made.append(stored.numel())
                self.elements = max(self.elements, stored.numel())
        return out


class CountedCalls(TorchDispatchMode):
    """How often each op of ours runs inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("t4r_fast"):
            self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _storage(tensor: Tensor) -> int:
    stored = tensor._values() if tensor.is_sparse else tensor
    return stored.untyped_storage()._cdata

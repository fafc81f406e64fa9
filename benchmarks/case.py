"""What an op's benchmark declares: cases, inputs, providers and the work that a call must do."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Inputs = Mapping[str, Any]
Outputs = dict[str, Tensor]
Call = Callable[[Inputs], Outputs]

TUTORIAL_V = 118_335  # items of the tutorial's data
LARGE_V = 390_000
SETS = ("quick", "standard", "full")


class Missing(Exception):
    """A baseline that is not here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One size of an op.

    kind    which call of the op: "fwd+bwd", "loss", ...
    sizes   the axis letters of STYLE, e.g. {"N": 1008, "V": 118335, "D": 64}; case["N"]
    set     the smallest run that includes it: "quick", "standard" or "full"
    wide    also with all threads, and peak memory in a process of its own
    shown   in the README's table
    """

    kind: str
    sizes: Mapping[str, int]
    set: str = "standard"
    wide: bool = False
    shown: bool = False

    def __getitem__(self, axis: str) -> int:
        return self.sizes[axis]

    @property
    def label(self) -> str:
        return " ".join([self.kind, *(f"{axis}={size}" for axis, size in self.sizes.items())])


@dataclasses.dataclass(frozen=True)
class Work:
    """What the best known algorithm must do, whoever does it.

    flop     float32 operations, a multiply-add counts two
    exp      exponentials
    read     bytes read in order
    gather   bytes read as single rows at random places
    written  bytes written
    """

    flop: float = 0
    exp: float = 0
    read: float = 0
    gather: float = 0
    written: float = 0

    @property
    def bytes(self) -> float:
        return self.read + self.gather + self.written

    def floor_ms(self, rates: Mapping[str, float]) -> float:
        """The least time at the machine's rates (1e9 per second): arithmetic or memory."""
        arithmetic = self.flop / rates["fma"] + self.exp / rates["exp"]
        memory = (
            self.read / rates["read"] + self.gather / rates["gather"] + self.written / rates["copy"]
        )
        return 1e-6 * max(arithmetic, memory)


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute the op.

    make      makes the call for a case, at the thread count that is set; raises Missing where it
              cannot
    ours      checked against float64 as strictly as the tests do
    slow      takes tens of seconds, say to compile: wide cases only, unless the run is "full"
    only      the cases it takes part in, at the thread count that is set; None: all
    """

    name: str
    make: Callable[[Case], Call]
    ours: bool = False
    slow: bool = False
    only: Callable[[Case], bool] | None = None

    def takes(self, case: Case) -> bool:
        return self.only is None or self.only(case)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """All of bench_<op>.py. The first provider is ours, the second the one to compare with.

    inputs  (case, dtype) -> tensors by name, from seed 0
    work    (case, bytes per number) -> Work
    """

    op: str
    cases: Sequence[Case]
    inputs: Callable[[Case, torch.dtype], Inputs]
    providers: Sequence[Provider]
    work: Callable[[Case, int], Work]

    def case(self, label: str) -> Case:
        return next(case for case in self.cases if case.label == label)

    def provider(self, name: str) -> Provider:
        return next(provider for provider in self.providers if provider.name == name)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def exact(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Multiples of 1/64 up to 3: dot products are exact in float32 in any order, to D = 256.

    So ranks and ids can be asked to be right, not nearly right.
    """
    return (
        (normal(*shape, dtype=torch.float32, seed=seed) * 64)
        .round()
        .clamp(-192, 192)
        .div(64)
        .to(dtype)
    )


def ids(*shape: int, below: int, seed: int = 0) -> Tensor:
    return torch.randint(1, below, shape, generator=torch.Generator().manual_seed(seed))


def sessions(case: Case) -> Tensor:
    """(B, L) item ids of 2 to L items, padding of 0 on the right."""
    generator = torch.Generator().manual_seed(1)
    length = torch.randint(2, case["L"] + 1, (case["B"], 1), generator=generator)
    items = ids(case["B"], case["L"], below=100_000)
    return torch.where(torch.arange(case["L"]) < length, items, 0)


def packed(item_ids: Tensor) -> dict[str, Tensor]:
    """The items of (B, L) sessions one after the other, and their offsets."""
    item = item_ids != 0
    ends = item.sum(1).cumsum(0)
    return {"items": item_ids[item], "offsets": torch.cat([ends.new_zeros(1), ends])}


def row_places(count: int) -> Tensor:
    """Places of packed rows, session << 32 | position: sessions of 2 to 10 items."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 11, (count,), generator=generator)
    session = torch.arange(count).repeat_interleave(lengths)[:count]
    starts = torch.cumsum(lengths, 0) - lengths
    return session << 32 | (torch.arange(count) - starts[session])


def in_turn(batches: Tensor) -> Callable[[], Tensor]:
    """One of the batches after another, the first first: rows that were just read are in a cache,
    which in training they are not."""
    order = itertools.cycle(batches.unbind())
    return lambda: next(order)


def with_gradients(function: Callable[..., Tensor], *names: str) -> Call:
    """A call giving the loss of function(inputs) and its gradients in `names`; none: loss alone."""

    def call(inputs: Inputs) -> Outputs:
        if not names:
            with torch.no_grad():
                return {"loss": function(inputs)}
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        loss = function({**inputs, **leaves})
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return {"loss": loss.detach(), **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}

    return call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one case. The reset keeps its limit of recompilations from being reached
    by earlier cases, after which it would run eagerly in silence."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)

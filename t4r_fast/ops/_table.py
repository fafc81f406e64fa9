"""How an optimizer gets the gradient of a table before it is formed.

A table is the (V, D) rows of the items, or the (V,) bias of their scores. A managed one carries a
Recorder as an attribute. The backward passes of the ops hand it what the gradient would be made of,
and give autograd no gradient for the table, except that the full softmax gives a bias its own. A
table without one costs one attribute look-up per call. docs/decisions/0005-gradient-records.md

For other tables of a CPU a lookup adds its rows to the gradient that the full softmax has formed.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from t4r_fast.plain._scores import compute_dtype, keep_rows

_ATTRIBUTE = "_t4r_fast_recorder"


class _Formed(NamedTuple):
    graph_task: int  # the running backward pass
    gradient: weakref.ref[Tensor]


_formed: MutableMapping[Tensor, _Formed] = WeakIdKeyDictionary()


def may_share_gradient(table: Tensor) -> bool:
    """Leaves only: all their gradients meet in one place. torch.compile makes its own sums."""
    return table.is_leaf and table.device.type == "cpu" and not torch.compiler.is_compiling()


def note_formed_gradient(table: Tensor, gradient: Tensor) -> None:
    """Called in a backward pass that is about to give autograd a gradient of the table's size."""
    _formed[table] = _Formed(torch._C._current_graph_task_id(), weakref.ref(gradient))


def formed_gradient(table: Tensor) -> Tensor | None:
    """The gradient of a leaf that autograd holds until the running backward pass has all of them.

    Whoever has rows to give adds them in place, and gives autograd none: two gradients of the
    table's size are one then. The bits are those of the sum.
    """
    found = _formed.get(table)
    if found is None or found.graph_task != torch._C._current_graph_task_id():
        return None
    gradient = found.gradient()
    if gradient is None:
        return None
    # Autograd may have put it into another sum, and a hook of the op's node may have kept it or a
    # view of it: then it is not ours to change. Held by autograd and by Python's tensor, and that
    # one by its owner in C++ and by us, as `alone` is; calls count differently by Python's version
    # and after torch.compile.
    alone = object()
    only_autograd_has_it = (
        gradient._use_count() == 2  # type: ignore[attr-defined]  # torch's stubs leave it out
        and torch._C._storage_Use_Count(gradient.untyped_storage()._cdata) == 2
        and sys.getrefcount(gradient) <= sys.getrefcount(alone) + 1
    )
    return gradient if only_autograd_has_it else None


class SoftmaxRows(NamedTuple):
    """Rows whose softmax has a gradient in the table: ditems = dz.T @ hidden, not formed yet.

    z  = (hidden @ items.T + bias) / temperature;  z = softcap * tanh(z / softcap) if softcap
    dz = weight * exp(z - lse) + constant, at a row's target + share;  * (1 - (z / softcap)**2)

    hidden    (K, D)  dtype of the table
    target    (K,)    int64
    factors   (4, K)  float64: lse, weight, constant, share
    bias      (V,)    or None
    """

    hidden: Tensor
    target: Tensor
    factors: Tensor
    bias: Tensor | None
    temperature: float
    softcap: float


class Recorder(Protocol):
    def add_softmax(self, rows: SoftmaxRows) -> None:
        """Take rows in; they add up."""

    def add_lookup(self, ids: Tensor, rows: Tensor) -> None:
        """Take in gradients (K, D), or (K,) for a bias, of the table's rows ids (K,)."""

    def before_read(self, ids: Callable[[], Tensor] | None) -> None:
        """Called before the table's rows ids() are read, or all rows: bring them up to date."""


def recorder_of(table: Tensor) -> Recorder | None:
    """The recorder of a managed table, None for all other tensors."""
    return getattr(table, _ATTRIBUTE, None)


def set_recorder(table: Tensor, recorder: Recorder) -> None:
    setattr(table, _ATTRIBUTE, recorder)


def remove_recorder(table: Tensor, recorder: Recorder | None = None) -> None:
    """Let the table have gradients again; with `recorder`, only if it is that one."""
    if recorder is None or recorder_of(table) is recorder:
        vars(table).pop(_ATTRIBUTE, None)


# Recording is a side effect: torch.compile runs this part as it stands, between two graphs.
@torch.compiler.disable(reason="the table's gradient goes to its optimizer (t4r_fast.optim)")
def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), for calls on a managed table."""
    return function(*args)


def up_to_date(table: Tensor) -> Tensor:
    """The table itself; a managed one is brought up to date first, for reading all of it."""
    if recorder_of(table) is not None:
        _before_read(table)
    return table


def all_up_to_date(items: Tensor, bias: Tensor | None) -> None:
    """For reading all scores: bring managed items and a managed bias up to date."""
    up_to_date(items)
    if bias is not None:
        up_to_date(bias)


@torch.compiler.disable(reason="rows of the table are brought up to date by t4r_fast.optim")
def _before_read(table: Tensor) -> None:
    recorder = recorder_of(table)
    if recorder is not None:
        recorder.before_read(None)


def recorded(table: Tensor, ids: Callable[[], Tensor]) -> Tensor:
    """A managed table under another name, whose sparse gradient goes to the recorder.

    ids  gives the rows that will be read; they are brought up to date. Call it by eagerly
    """
    recorder = recorder_of(table)
    if recorder is None:
        return table
    recorder.before_read(ids)
    return _Recorded.apply(table)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        ctx.recorder = recorder_of(table)
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        if not gradient.is_sparse:
            return gradient  # the optimizer takes a dense one as well
        ctx.recorder.add_lookup(gradient._indices()[0], gradient._values())
        return None


def softmax_rows(
    dloss: Tensor,
    dlse: Tensor | None,
    hidden: Tensor,
    item_count: int,
    target: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    lse: Tensor,
    temperature: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
) -> SoftmaxRows:
    """What a table's optimizer needs of a tied_softmax_loss: its inputs, lse, and d(loss)."""
    kept = keep_rows(hidden.shape[0], rows, target, ignore_index, hidden)
    lse = lse[kept.slot].double()
    # every logit's gradient has the factor 1 / temperature: put it into the rows' factors
    dloss = dloss[kept.slot].double() / temperature
    weight = dloss * (1.0 + 2.0 * z_loss * lse)
    if dlse is not None:
        weight = weight + dlse[kept.slot].double() / temperature
    constant = dloss * (-label_smoothing / item_count)
    share = dloss * (label_smoothing - 1.0)
    return SoftmaxRows(
        hidden[kept.source].detach(),
        target[kept.source],
        torch.stack([lse, weight, constant, share]),
        None if bias is None else bias.detach(),
        float(temperature),
        float(softcap),
    )


def table_dtype(table: Tensor) -> torch.dtype:
    """The dtype of sums and optimizer states for a table: float32, or float64 for float64."""
    return compute_dtype(table.dtype)

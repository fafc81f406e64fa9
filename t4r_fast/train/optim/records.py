"""What the backward passes leave for the next step of a table."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from t4r_fast.ops._table import SoftmaxRows

Lookup = tuple[Tensor, Tensor]


class Records:
    """The recorder of one table; see t4r_fast.ops._table.Recorder.

    Everything recorded belongs to one version of the table: the scores of a softmax are computed
    again from it.
    """

    def __init__(self, table: Tensor, before_read: Callable[[], object]) -> None:
        self._table = weakref.ref(table)
        # weak: a table must not keep its optimizer, and its moments, alive
        self._before_read = weakref.WeakMethod(before_read)
        self.softmax: list[SoftmaxRows] = []
        self.lookup: list[Lookup] = []
        self._version = 0
        self._bias: list[tuple[Tensor, int]] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # A pickled or copied model has no optimizer.
        return type(None), ()

    def __bool__(self) -> bool:
        return bool(self.softmax or self.lookup)

    def add_softmax(self, rows: SoftmaxRows) -> None:
        self._note_version()
        self.softmax.append(rows)
        if rows.bias is not None:
            self._bias.append((rows.bias, rows.bias._version))

    def add_lookup(self, ids: Tensor, rows: Tensor) -> None:
        self._note_version()
        self.lookup.append((ids, rows))

    def before_read(self, ids: Callable[[], Tensor] | None) -> None:
        update = self._before_read()
        if update is not None:
            update(ids)

    def _note_version(self) -> None:
        if not self:
            self._version = self._table()._version

    def check(self) -> None:
        """Refuse records of a table that was changed since."""
        if self.softmax and self._table()._version != self._version:
            raise RuntimeError(
                "TiedTableOptimizer: the table was changed between backward and step, so its"
                " gradient cannot be computed any more; call zero_grad() before the next backward"
            )
        if any(bias._version != version for bias, version in self._bias):
            raise RuntimeError(
                "TiedTableOptimizer: the bias of the scores was changed between backward and step;"
                " step the table before the optimizer of the bias, as for_model does"
            )

    def clear(self) -> None:
        self.softmax, self.lookup, self._bias = [], [], []


def sparse_parts(gradient: Tensor) -> Lookup:
    """ids and rows of a sparse gradient that autograd put into table.grad."""
    return gradient._indices()[0], gradient._values()


class History:
    """Learning rates of the steps since all rows were at one step, in memory that doubles."""

    def __init__(self) -> None:
        self.length = 0
        self._lrs = torch.empty(64, dtype=torch.float64)
        self._decay = torch.zeros(65, dtype=torch.float64)

    def add(self, lr: float, weight_decay: float) -> None:
        if not lr * weight_decay < 1:
            raise ValueError(
                "TiedTableOptimizer: lr * weight_decay must be < 1 for sparse gradients; got"
                f" {lr} * {weight_decay}"
            )
        n = self.length
        if n == self._lrs.shape[0]:
            self._lrs = torch.cat([self._lrs, torch.empty_like(self._lrs)])
            self._decay = torch.cat([self._decay, torch.empty_like(self._decay)])
        self._lrs[n] = lr
        self._decay[n + 1] = self._decay[n] + math.log1p(-lr * weight_decay)
        self.length = n + 1

    @property
    def lrs(self) -> Tensor:
        return self._lrs[: self.length]

    @property
    def log_decay(self) -> Tensor:
        return self._decay[: self.length + 1]

    def clear(self) -> None:
        self.length = 0

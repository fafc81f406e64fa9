"""TiedTableOptimizer: steps an item table from records of its backward passes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from t4r_fast.compat import warn_once
from t4r_fast.ops._table import recorder_of, remove_recorder, set_recorder
from t4r_fast.ops.tied_table_step import (
    KINDS,
    table_state,
    tied_table_catch_up,
    tied_table_grad_norm,
    tied_table_step,
)
from t4r_fast.train.optim.records import History, Records, sparse_parts

_NUMBERS = ("betas", "eps", "weight_decay", "momentum")


class TiedTableOptimizer(torch.optim.Optimizer):
    """Optimizer of one item table; its V x D gradient is never formed.

    table         nn.Parameter (V, D), contiguous: the embedding table, tied or not; or (V,): the
                  bias of the items' scores, whose rows are single numbers
    lr            float >= 0
    kind          "sgd", "adagrad", "adamw", "rowwise_adagrad" or "rowwise_adamw"; tied_table_step
    betas         of Adam's moments
    eps           None: torch's, 1e-8 for Adam, 1e-10 for Adagrad
    weight_decay  None: torch's, 0.01 for Adam, 0 for the others
    momentum      of "sgd"

    While it lives, t4r_fast's ops leave table.grad alone and record what the gradient is made of;
    records of several backward passes add up, step() uses them up and zero_grad() drops them. A
    gradient that other code puts into table.grad is added, dense (with a warning: it is V x D) or
    sparse. torch.autograd.grad gives None for the table.

    When only lookups and sampled losses took part, step() touches their rows alone. All other rows
    get the decay and the movement that they missed when t4r_fast's ops read them next, or by
    flush(), so that the result is that of dense steps, within rounding. Call flush() before other
    code reads the table. state_dict() calls it.

    With a bias the table must be stepped first: the softmax's gradient is computed from both.

    Equals torch.optim's SGD, Adagrad and AdamW on the formed gradient. state_dict() has their form.
    Raises ValueError on options out of range, RuntimeError when the table was changed between
    backward and step.
    """

    def __init__(
        self,
        table: nn.Parameter,
        lr: float = 1e-3,
        kind: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float | None = None,
        momentum: float = 0.0,
    ) -> None:
        adam, adagrad = kind.endswith("adamw"), kind.endswith("adagrad")
        _check_table(table, kind, momentum)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": (1e-10 if adagrad else 1e-8) if eps is None else eps,
            "weight_decay": (0.01 if adam else 0.0) if weight_decay is None else weight_decay,
            "momentum": momentum,
            "kind": kind,
        }
        for name in ("lr", "eps", "weight_decay"):
            if not defaults[name] >= 0:
                raise ValueError(f"TiedTableOptimizer: {name} must be >= 0; got {defaults[name]}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"TiedTableOptimizer: betas must be in [0, 1); got {betas}")
        super().__init__([table], defaults)
        self._scale = 1.0
        # Rows that touched-only steps left behind: the step each is at, and what they missed.
        self._last: Tensor | None = None
        self._base = 0
        self._history = History()
        self._history_numbers: dict[str, Any] = {}
        self._records = Records(table, self._catch_up)
        set_recorder(table, self._records)
        weakref.finalize(self, _let_go, weakref.ref(table), self._records)

    # -- the protocol of torch.optim -------------------------------------------------------------

    @property
    def table(self) -> nn.Parameter:
        return self.param_groups[0]["params"][0]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from everything recorded since the last one; nothing when that is nothing."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        softmax, lookup, gradient = self._gradient()
        scale, self._scale = self._scale, 1.0
        if not softmax and not lookup and gradient is None:
            return loss
        state, group = self._state(), self.param_groups[0]
        self._keep_to_one_set_of_numbers()
        touched_only = not softmax and gradient is None
        if not touched_only:
            self.flush()
        else:
            self._catch_up(lambda: torch.cat([ids for ids, _ in lookup]))
        state["step"] += 1
        step = int(state["step"])
        tied_table_step(
            _as_rows(self.table),
            self._as_rows_of(state),
            softmax,
            lookup,
            kind=group["kind"],
            step=step,
            lr=float(group["lr"]),
            scale=scale,
            gradient=gradient,
            touched_only=touched_only,
            **self._numbers(),
        )
        if touched_only:
            self._left_behind(lookup, step)
        else:
            self._base = step
        self._records.clear()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the records and the table's own gradient."""
        super().zero_grad(set_to_none)
        self._records.clear()
        self._scale = 1.0

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict(), of this class or of torch.optim's same rule."""
        load_states(self, state_dict)
        self.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise ValueError(
                "TiedTableOptimizer: it holds one table; make another one for another table, or"
                " for_model for a whole model"
            )
        super().add_param_group(param_group)

    # -- clipping --------------------------------------------------------------------------------

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """2-norm of the gradient that the next step() takes, () float64, without forming it.

        Exact: one more pass over the table where a full softmax took part, as dear as step().
        """
        softmax, lookup, gradient = self._gradient()
        return tied_table_grad_norm(_as_rows(self.table), softmax, lookup, gradient=gradient)

    def scale_gradient(self, factor: float) -> None:
        """Multiply the gradient that the next step() takes."""
        self._scale *= float(factor)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_ for the table alone; returns the norm before."""
        norm = self.grad_norm()
        self.scale_gradient(min(1.0, float(max_norm / (norm + 1e-6))))
        return norm

    # -- rows left behind ------------------------------------------------------------------------

    @torch.no_grad()
    def flush(self) -> None:
        """Bring all rows up to date. Cheap when nothing was left behind."""
        if self._history.length:
            self._give(None)
            self._base += self._history.length
            self._history.clear()

    def forget(self) -> None:
        """Regard all rows as up to date, for state that was loaded; drop the records."""
        self._history.clear()
        self._base = int(self.state[self.table].get("step", 0)) if self.table in self.state else 0
        self._records.clear()

    def release(self) -> None:
        """Let the table have gradients again, for another optimizer; step() then raises."""
        self.flush()
        remove_recorder(self.table, self._records)

    @torch.no_grad()
    def _catch_up(self, ids: Callable[[], Tensor] | None) -> None:
        """Bring the rows ids(), or all, up to date before they are read."""
        if not self._history.length:
            return
        if ids is None:
            self.flush()
        else:
            self._give(torch.unique(ids()))

    def _give(self, ids: Tensor | None) -> None:
        # What the table stands for does not change: graphs that saved it stay good.
        with torch.autograd._unsafe_preserve_version_counter(self.table):
            tied_table_catch_up(
                _as_rows(self.table),
                self._as_rows_of(self.state[self.table]),
                self._last,
                ids,
                self._history.lrs.to(self.table.device),
                base=self._base,
                log_decay=self._history.log_decay.to(self.table.device),
                kind=self.param_groups[0]["kind"],
                **self._history_numbers,
            )

    def _left_behind(self, lookup: list[tuple[Tensor, Tensor]], step: int) -> None:
        if self._last is None:
            rows = self.table.shape[0]
            self._last = torch.zeros(rows, dtype=torch.int32, device=self.table.device)
        group = self.param_groups[0]
        self._history.add(float(group["lr"]), group["weight_decay"])
        self._history_numbers = self._numbers()
        for ids, _ in lookup:
            self._last[ids] = step

    def _keep_to_one_set_of_numbers(self) -> None:
        # Missed steps are given with the numbers of their time.
        if self._history.length and self._history_numbers != self._numbers():
            self.flush()

    # -- parts -----------------------------------------------------------------------------------

    def _numbers(self) -> dict[str, Any]:
        group = self.param_groups[0]
        return {name: group[name] for name in _NUMBERS}

    def _state(self) -> dict[str, Tensor]:
        state, group = self.state[self.table], self.param_groups[0]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            made = table_state(_as_rows(self.table), group["kind"], group["momentum"])
            state.update(
                {n: v.flatten() for n, v in made.items()} if self.table.dim() == 1 else made
            )
        return state

    def _as_rows_of(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.table.dim() == 2:
            return state
        return {name: _as_rows(value) for name, value in state.items() if value.dim()}

    def _gradient(self) -> tuple[list, list, Tensor | None]:
        """softmax, lookup and the dense gradient of the next step."""
        if recorder_of(self.table) is not self._records:
            raise RuntimeError(
                "TiedTableOptimizer: another optimizer took the table over, or release() was called"
            )
        self._records.check()
        lookup, gradient = list(self._records.lookup), self.table.grad
        if gradient is not None and gradient.is_sparse:
            lookup.append(sparse_parts(gradient))
            gradient = None
        lookup = [(ids, _as_rows(rows)) for ids, rows in lookup]
        if gradient is not None and self.table.dim() == 1:
            gradient = _as_rows(gradient)  # the full softmax's own
        elif gradient is not None:
            warn_once(
                "TiedTableOptimizer gradient",
                f"the item table {tuple(self.table.shape)} got a gradient of its own size from code"
                " that does not use t4r_fast's ops; it is added",
            )
        return list(self._records.softmax), lookup, gradient


def load_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """load_state_dict of torch.optim that keeps the dtypes: states of a bfloat16 table are float32.

    Raises ValueError when groups, parameters or the kind of the table differ.
    """
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    mine = [(len(group["params"]), group.get("kind")) for group in groups]
    theirs = [(len(group["params"]), group.get("kind")) for group in saved]
    # torch.optim's groups do not name their rule
    if [m for m, t in zip(mine, theirs) if t in (m, (m[0], None))] != mine or len(saved) != len(
        groups
    ):
        raise ValueError(
            "optimizer: the state is of another model or rule: parameters and rule of each group"
            f" are {mine}; the state has {theirs}"
        )
    optimizer.state.clear()
    for group, other in zip(groups, saved, strict=True):
        for parameter, place in zip(group["params"], other["params"], strict=True):
            moved = group.get("fused")  # its step counts lie beside the parameters
            if place in state_dict["state"]:
                optimizer.state[parameter] = {
                    name: value.to(parameter.device)
                    if torch.is_tensor(value) and (value.dim() or moved)
                    else value
                    for name, value in state_dict["state"][place].items()
                }
        group.update({k: v for k, v in other.items() if k != "params"})


def _as_rows(table: Tensor) -> Tensor:
    """(V, D) as it is, (V,) as (V, 1)."""
    return table if table.dim() == 2 else table.unsqueeze(1)


def _check_table(table: Any, kind: str, momentum: float) -> None:
    if (
        not isinstance(table, torch.Tensor)
        or table.dim() not in (1, 2)
        or not table.is_contiguous()
    ):
        raise ValueError(
            "TiedTableOptimizer: table must be a contiguous parameter (V, D) or (V,); got"
            f" {tuple(table.shape) if isinstance(table, torch.Tensor) else type(table).__name__}"
        )
    if kind not in KINDS:
        raise ValueError(
            f"TiedTableOptimizer: kind must be one of {', '.join(KINDS)}; got {kind!r}"
        )
    if kind.startswith("rowwise") and table.dim() == 1:
        raise ValueError(
            f"TiedTableOptimizer: kind must be sgd, adagrad or adamw for a bias (V,); got {kind!r}"
        )
    if momentum and kind != "sgd":
        raise ValueError(f"TiedTableOptimizer: momentum must be 0 for {kind!r}; got {momentum}")


def _let_go(table: weakref.ref, records: Records) -> None:
    found = table()
    if found is not None:
        remove_recorder(found, records)

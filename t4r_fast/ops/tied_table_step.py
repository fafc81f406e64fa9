"""tied_table_step: one optimizer step of an item table whose gradient is never formed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from t4r_fast import backend
from t4r_fast.ops._check import (
    FLOAT_DTYPES,
    check_device,
    check_int64,
    check_values,
    checked,
    names,
)
from t4r_fast.ops._table import SoftmaxRows, table_dtype
from t4r_fast.plain import tied_table_step as plain

_OP = "tied_table_step"
# In the order of the codes in plain/tied_table_step.py
KINDS = ("sgd", "adagrad", "adamw", "rowwise_adagrad", "rowwise_adamw")
Lookup = tuple[Tensor, Tensor]


def tied_table_step(
    items: Tensor,
    state: Mapping[str, Tensor],
    softmax: Sequence[SoftmaxRows] = (),
    lookup: Sequence[Lookup] = (),
    *,
    kind: str = "adamw",
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    scale: float = 1.0,
    gradient: Tensor | None = None,
    touched_only: bool = False,
) -> None:
    """One optimizer step of an item table, in place, without its V x D gradient.

    ditems = scale * (sum of dz.T @ hidden over softmax, plus lookup rows at their ids, + gradient)
    items, state = the step of torch.optim's SGD, Adagrad or AdamW with ditems

    items         (V, D)  float32, float16, bfloat16 or float64, contiguous
    state         table_state(items, kind, momentum): float32 (float64 for float64) tensors
    softmax       SoftmaxRows of the losses since the last step, made by softmax_rows; dz is the
                  loss's gradient in the scores, recomputed tile by tile
    lookup        pairs of ids (K,) int64 in any order and gradients (K, D) of these rows
    kind          "sgd"              momentum in buffer if momentum > 0; no dampening, no Nesterov
                  "adagrad"          lr_decay = 0
                  "adamw"
                  "rowwise_adagrad"  one sum per row, of the mean of squares
                  "rowwise_adamw"    one second moment per row, of the mean of squares
    step          int    >= 1, this step's number, for the bias correction of Adam
    lr            float  >= 0
    betas         of the moments of Adam, each in [0, 1)
    eps           float  >= 0, added to the root; None: torch's, 1e-8 for Adam, 1e-10 for Adagrad
    weight_decay  float  >= 0; decoupled for Adam (w *= 1 - lr * weight_decay), else added to the
                  gradient, after scale
    momentum      float  in [0, 1), of "sgd"
    scale         float, of the gradient: a clipping coefficient
    gradient      (V, D) dtype of items: a gradient that was formed elsewhere, or None
    touched_only  step the rows named in lookup alone and leave all others as they are; without
                  softmax and gradient. See tied_table_catch_up
    returns       None; items and the tensors of state are changed

    Sums are float32 (float64 for float64), each row is written once, by one thread, and the bits
    depend on nothing but the inputs. Memory: O(N D) for the rows of softmax and lookup.
    Raises ValueError or TypeError on shapes, dtypes and options, IndexError on an id out of range.
    """
    _check(items, softmax, lookup, gradient)
    first, second = _states(items, state, kind, momentum)
    rule = _rule(kind, step, lr, betas, eps, weight_decay, momentum, scale)
    name = backend.pick(_OP, items)
    functions = backend.ops(name, plain)
    ids, rows = _sorted(items, lookup)

    def check() -> None:
        _check_values(items, softmax, lookup)

    with torch.no_grad():
        if touched_only:
            if softmax or gradient is not None:
                raise ValueError(
                    f"{_OP}: touched_only must come without softmax and gradient, which touch all "
                    "rows"
                )
            if ids is not None:
                step_rows = functions.tied_table_step_rows
                checked(name, check, step_rows, items, first, second, ids, rows, *rule)
        else:
            checked(
                name,
                check,
                functions.tied_table_step_fwd,
                *(items, first, second, *_flat(softmax), ids, rows, gradient, *rule),
            )
    _changed(items, first, second)


def tied_table_grad_norm(
    items: Tensor,
    softmax: Sequence[SoftmaxRows] = (),
    lookup: Sequence[Lookup] = (),
    *,
    gradient: Tensor | None = None,
) -> Tensor:
    """The 2-norm of the gradient that tied_table_step would take with scale 1, not formed.

    returns  () float64; its pass over items costs as much as that of tied_table_step. Without
             softmax and gradient only the named rows are looked at.

    Arguments and errors as tied_table_step.
    """
    _check(items, softmax, lookup, gradient)
    name = backend.pick(_OP, items)
    ids, rows = _sorted(items, lookup)
    with torch.no_grad():
        if not softmax and gradient is None:
            if ids is None or rows is None:
                return items.new_zeros((), dtype=torch.float64)
            _check_values(items, (), lookup)
            place = torch.unique_consecutive(ids, return_inverse=True)[1]
            return torch.zeros_like(rows).index_add_(0, place, rows).double().norm()
        return checked(
            name,
            lambda: _check_values(items, softmax, lookup),
            backend.ops(name, plain).tied_table_step_norm,
            *(items, *_flat(softmax), ids, rows, gradient),
        ).sqrt()


def tied_table_catch_up(
    items: Tensor,
    state: Mapping[str, Tensor],
    last: Tensor,
    ids: Tensor | None,
    lrs: Tensor,
    *,
    base: int,
    kind: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    log_decay: Tensor | None = None,
) -> None:
    """Give rows the steps that touched_only left out: decay of weights and of moments.

    A row that got no gradient for k steps still decays, and still moves by its moments. Afterwards
    it stands where k dense steps with gradient 0 would have put it, within rounding: Adam's moments
    are followed until all they can still move is below eps / 64 of the row's largest value, and the
    rest is one multiplication.

    last       (V,) int32, the number of the step each row is at; less than base counts as base.
               Set to base + T for the rows ids
    ids        (K,) int64, the rows, sorted and different; None for all, which leaves last alone
    lrs        (T,) float64, learning rates of the steps base + 1 to base + T
    log_decay  (T + 1,) float64, sums of log(1 - lr * weight_decay) over the first 0, 1, ... of lrs;
               None to compute it here

    Other arguments and errors as tied_table_step.
    """
    _check(items, (), (), None)
    first, second = _states(items, state, kind, momentum)
    steps = lrs.shape[0]
    rule = _rule(kind, max(base + steps, 1), 0.0, betas, eps, weight_decay, momentum, 1.0)
    if last.shape != items.shape[:1] or last.dtype != torch.int32:
        raise ValueError(
            f"{_OP}: last must be int32 ({items.shape[0]},); got {last.dtype} {tuple(last.shape)}"
        )
    if ids is not None:
        check_int64(_OP, "ids", ids, "(K,)", 1)
    if log_decay is None:
        log_decay = decay_sums(lrs, weight_decay)
    if steps == 0:
        return
    name = backend.pick(_OP, items)
    with torch.no_grad():
        checked(
            name,
            lambda: _check_ids(items, ids),
            backend.ops(name, plain).tied_table_step_catch_up,
            *(items, first, second, last, ids, base, lrs, log_decay, *rule),
        )
    _changed(items, first, second)


def decay_sums(lrs: Tensor, weight_decay: float) -> Tensor:
    """Sums of log(1 - lr * weight_decay) over the first 0, 1, ... of lrs: (T + 1,) float64."""
    each = torch.log1p(-lrs * weight_decay)
    if not bool(torch.isfinite(each).all()):
        raise ValueError(f"{_OP}: lr * weight_decay must be < 1 to step touched rows only")
    return torch.cat([each.new_zeros(1), each.cumsum(0)])


def table_state(items: Tensor, kind: str, momentum: float = 0.0) -> dict[str, Tensor]:
    """The optimizer state of a table before its first step, by the names of torch.optim.

    "sgd": momentum_buffer (V, D) if momentum; "adagrad": sum (V, D), "rowwise_adagrad": sum (V,);
    "adamw": exp_avg, exp_avg_sq (V, D); "rowwise_adamw": exp_avg (V, D), exp_avg_sq (V,).
    float32, or float64 for float64.
    """
    shapes = {"row": items.shape[:1], "all": items.shape}
    return {
        name: torch.zeros(shapes[size], dtype=table_dtype(items), device=items.device)
        for name, size in _state_sizes(kind, momentum).items()
    }


def _state_sizes(kind: str, momentum: float) -> dict[str, str]:
    if kind not in KINDS:
        raise ValueError(f"{_OP}: kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "sgd":
        return {"momentum_buffer": "all"} if momentum else {}
    size = "row" if kind.startswith("rowwise") else "all"
    if kind.endswith("adagrad"):
        return {"sum": size}
    return {"exp_avg": "all", "exp_avg_sq": size}


def _states(
    items: Tensor, state: Mapping[str, Tensor], kind: str, momentum: float
) -> tuple[Tensor | None, Tensor | None]:
    found: list[Tensor | None] = []
    for name, size in _state_sizes(kind, momentum).items():
        shape = items.shape if size == "all" else items.shape[:1]
        tensor = state.get(name)
        if tensor is None:
            raise ValueError(f"{_OP}: state must hold {name} for {kind!r}; make it by table_state")
        if tensor.shape != shape or tensor.dtype != table_dtype(items):
            raise ValueError(
                f"{_OP}: state[{name!r}] must be {table_dtype(items)} {tuple(shape)}; "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{_OP}: state[{name!r}] must be contiguous")
        check_device(_OP, "items", items, **{f"state[{name!r}]": tensor})
        found.append(tensor)
    first, second = (*found, None, None)[:2]
    return first, second


def _rule(
    kind: str,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float | None,
    weight_decay: float,
    momentum: float,
    scale: float,
) -> plain.Rule:
    if eps is None:
        eps = 1e-10 if kind.endswith("adagrad") else 1e-8
    for name, value, good, words in (
        ("step", step, step >= 1, ">= 1"),
        ("lr", lr, lr >= 0, ">= 0"),
        ("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        ("eps", eps, eps >= 0, ">= 0"),
        ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
        ("momentum", momentum, 0 <= momentum < 1, "in [0, 1)"),
    ):
        if not good:
            raise ValueError(f"{_OP}: {name} must be {words}; got {value}")
    if momentum and kind != "sgd":
        raise ValueError(f"{_OP}: momentum must be 0 for {kind!r}; got {momentum}")
    numbers = (lr, *betas, eps, weight_decay, momentum, scale)
    return plain.Rule(KINDS.index(kind), int(step), *map(float, numbers))


def _check(
    items: Tensor,
    softmax: Sequence[SoftmaxRows],
    lookup: Sequence[Lookup],
    gradient: Tensor | None,
) -> None:
    if items.dim() != 2 or items.shape[0] == 0 or not items.is_contiguous():
        raise ValueError(
            f"{_OP}: items must be contiguous with shape (V, D), V >= 1; "
            f"got {tuple(items.shape)}, strides {items.stride()}"
        )
    if items.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{_OP}: items must be {names(FLOAT_DTYPES)}; got {items.dtype}")
    for i, rows in enumerate(softmax):
        _check_softmax(items, rows, f"softmax[{i}]")
    for i, (ids, values) in enumerate(lookup):
        check_int64(_OP, f"ids of lookup[{i}]", ids, "(K,)", 1)
        if values.shape != (ids.shape[0], items.shape[1]) or not values.is_floating_point():
            raise ValueError(
                f"{_OP}: rows of lookup[{i}] must be floats ({ids.shape[0]}, {items.shape[1]}); "
                f"got {values.dtype} {tuple(values.shape)}"
            )
        check_device(_OP, "items", items, **{f"lookup[{i}]": values, f"ids of lookup[{i}]": ids})
    if gradient is not None:
        if gradient.shape != items.shape or gradient.dtype != items.dtype:
            raise ValueError(
                f"{_OP}: gradient must be {items.dtype} {tuple(items.shape)}; "
                f"got {gradient.dtype} {tuple(gradient.shape)}"
            )
        check_device(_OP, "items", items, gradient=gradient)


def _check_softmax(items: Tensor, rows: SoftmaxRows, name: str) -> None:
    count = rows.hidden.shape[0]
    for field, tensor, shape, dtype in (
        ("hidden", rows.hidden, (count, items.shape[1]), items.dtype),
        ("target", rows.target, (count,), torch.int64),
        ("factors", rows.factors, (4, count), torch.float64),
    ):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{_OP}: {name}.{field} must be {dtype} {shape}; "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if rows.bias is not None and rows.bias.shape != items.shape[:1]:
        raise ValueError(
            f"{_OP}: {name}.bias must have shape ({items.shape[0]},); got {tuple(rows.bias.shape)}"
        )
    check_device(
        _OP,
        "items",
        items,
        **{
            f"{name}.{field}": getattr(rows, field)
            for field in ("hidden", "target", "factors", "bias")
        },
    )


def _check_values(items: Tensor, softmax: Sequence[SoftmaxRows], lookup: Sequence[Lookup]) -> None:
    for i, rows in enumerate(softmax):
        check_values(
            (rows.target < 0) | (rows.target >= items.shape[0]),
            rows.target,
            f"{_OP}: softmax[{i}].target must be 0 <= target < {items.shape[0]} "
            "(the rows of items)",
            "row",
        )
    _check_ids(items, torch.cat([ids for ids, _ in lookup]) if lookup else None)


def _check_ids(items: Tensor, ids: Tensor | None) -> None:
    if ids is None:
        return
    check_values(
        (ids < 0) | (ids >= items.shape[0]),
        ids,
        f"{_OP}: ids must be 0 <= id < {items.shape[0]} (the rows of items)",
        "entry",
    )


def _sorted(items: Tensor, lookup: Sequence[Lookup]) -> tuple[Tensor | None, Tensor | None]:
    """All lookups together, by id; equal ids in the order in which they came."""
    if not lookup:
        return None, None
    ids = torch.cat([ids for ids, _ in lookup])
    dtype = table_dtype(items)
    rows = torch.cat([rows.detach().to(dtype) for _, rows in lookup])
    ids, order = torch.sort(ids, stable=True)
    return ids, rows[order]


def _flat(softmax: Sequence[SoftmaxRows]) -> tuple[list[Any], ...]:
    """Lists for the dispatcher; rows that share bias and options go together."""
    groups: dict[tuple[int, float, float], list[SoftmaxRows]] = {}
    for rows in softmax:
        place = 0 if rows.bias is None else rows.bias.data_ptr()
        key = (place, rows.temperature, rows.softcap)
        groups.setdefault(key, []).append(rows)
    hidden, target, factors = [], [], []
    bias: list[Tensor] = []
    bias_of, options = [], []
    for same in groups.values():
        hidden.append(torch.cat([rows.hidden for rows in same]))
        target.append(torch.cat([rows.target for rows in same]))
        factors.append(torch.cat([rows.factors for rows in same], 1))
        options += [same[0].temperature, same[0].softcap]
        bias_of.append(-1 if same[0].bias is None else len(bias))
        if same[0].bias is not None:
            bias.append(same[0].bias)
    return hidden, target, factors, bias, bias_of, options


def _changed(*tensors: Tensor | None) -> None:
    # A kernel does not tell autograd: graphs that saved the table must refuse to run backward.
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


_GRADIENT = (
    "Tensor[] hidden, Tensor[] target, Tensor[] factors, Tensor[] bias, int[] bias_of, "
    "float[] options, Tensor? ids, Tensor? rows, Tensor? gradient"
)
_TABLE = "Tensor(a!) items, Tensor(b!)? first, Tensor(c!)? second"
_RULE = (
    "int kind, int step, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "float momentum, float scale"
)


def _fake_nothing(*_: Any) -> None:
    return None


def _fake_norm(items: Tensor, *_: Any) -> Tensor:
    return items.new_empty((), dtype=torch.float64)


backend.declare(
    _OP, f"tied_table_step_fwd({_TABLE}, {_GRADIENT}, {_RULE}) -> ()", fake=_fake_nothing
)
backend.declare(_OP, f"tied_table_step_norm(Tensor items, {_GRADIENT}) -> Tensor", fake=_fake_norm)
backend.declare(
    _OP,
    f"tied_table_step_rows({_TABLE}, Tensor ids, Tensor rows, {_RULE}) -> ()",
    fake=_fake_nothing,
)
backend.declare(
    _OP,
    f"tied_table_step_catch_up({_TABLE}, Tensor(d!) last, Tensor? ids, int base, Tensor lrs, "
    f"Tensor log_decay, {_RULE}) -> ()",
    fake=_fake_nothing,
)

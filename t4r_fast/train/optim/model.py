"""One optimizer for a whole model, with its item table by TiedTableOptimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from t4r_fast.train.optim.tied_table import TiedTableOptimizer, load_states


class ModelOptimizer(torch.optim.Optimizer):
    """Several optimizers as one; made by for_model.

    tables  TiedTableOptimizers, stepped first and in this order: the gradient of an item table
            needs the bias of the scores as it was in backward
    rest    the optimizer of all other parameters, or None

    param_groups are those of rest, then one per table: a scheduler sets all learning rates.
    """

    def __init__(
        self, tables: Sequence[TiedTableOptimizer], rest: torch.optim.Optimizer | None
    ) -> None:
        parts = [*([] if rest is None else [rest]), *tables]
        groups = [group for part in parts for group in part.param_groups]
        super().__init__(groups, {})
        self.defaults = dict(parts[0].defaults)
        self.tables, self.rest = list(tables), rest
        for part in parts:  # one state for all, as there is one list of groups
            self.state.update(part.state)
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parts."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts():
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients and records."""
        for part in self._parts():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what state_dict() gave."""
        load_states(self, state_dict)
        for table in self.tables:
            table.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "tables"):
            raise ValueError("ModelOptimizer: make a new one by for_model for a changed model")
        super().add_param_group(param_group)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_ over all parameters, the tables included, exactly.

        The norm of a table's gradient takes one more pass over it. Returns the norm before, ().
        """
        grads = [
            parameter.grad
            for group in ([] if self.rest is None else self.rest.param_groups)
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
        norms += [table.grad_norm() for table in self.tables]
        total = torch.stack([norm.to(norms[0].device) for norm in norms]).norm()
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.dtype))
        for table in self.tables:
            table.scale_gradient(float(factor))
        return total

    def flush(self) -> None:
        """Bring all rows of the tables up to date; see TiedTableOptimizer."""
        for table in self.tables:
            table.flush()

    def release(self) -> None:
        """Let the tables have gradients again, for another optimizer."""
        for table in self.tables:
            table.release()

    def _parts(self) -> list[torch.optim.Optimizer]:
        return [*self.tables, *([] if self.rest is None else [self.rest])]


def for_model(
    model: nn.Module,
    lr: float = 1e-3,
    table: str = "adamw",
    *,
    items: nn.Parameter | Sequence[nn.Parameter] | None = None,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    table_eps: float | None = None,
    momentum: float = 0.0,
    no_decay: Collection[str] = (),
) -> ModelOptimizer:
    """One optimizer for a model: its item table without a V x D gradient, the rest by AdamW.

    lr            learning rate of all parameters, to begin with; schedulers set param_groups
    table         rule of the item table, a kind of TiedTableOptimizer
    items         the item table or tables, and biases (V,) of sampled scores; None: those that the
                  next-item tasks of a t4r_fast.torch model score with
    weight_decay  of all parameters but those named in no_decay
    betas, eps    of AdamW, for the rest and for the table
    table_eps     None: eps for Adam kinds, 1e-10 for Adagrad
    momentum      of table="sgd"

    A bias among the items is stepped by AdamW, the rule of the rest, and after the tables; after
    sampled losses its touched numbers alone, as with a table.

    Saving the model's state_dict, or loading one, brings the table up to date first.
    Raises ValueError when no item table is found and on options out of range.
    """
    found = _item_tables(model) if items is None else items
    found = [found] if isinstance(found, Tensor) else list(found)
    if not found:
        raise ValueError(
            "for_model: items must name the item table: the model has no next-item task of"
            " t4r_fast.torch that would tell it"
        )
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unknown = sorted(set(no_decay) - set(named))
    if unknown:
        raise ValueError(f"for_model: no_decay must name parameters of the model; got {unknown}")
    if table_eps is None:
        table_eps = 1e-10 if table.endswith("adagrad") else eps
    tables = []
    for parameter in sorted(found, key=lambda parameter: parameter.dim() == 1):
        name = next((n for n, p in named.items() if p is parameter), None)
        if name is None:
            raise ValueError("for_model: items must be trainable parameters of the model")
        decay = 0.0 if name in no_decay else weight_decay
        rule = (table, betas, table_eps, decay, momentum)
        if parameter.dim() == 1:
            rule = ("adamw", betas, eps, decay)
        tables.append(TiedTableOptimizer(parameter, lr, *rule))
        del named[name]
    groups = [
        {"params": [p for n, p in named.items() if n not in no_decay]},
        {"params": [p for n, p in named.items() if n in no_decay], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    rest = torch.optim.AdamW(groups, fused=True, **options) if groups else None
    optimizer = ModelOptimizer(tables, rest)
    _flush_with(model, optimizer)
    return optimizer


def _item_tables(model: nn.Module) -> list[nn.Parameter]:
    from t4r_fast.compat.torch.model.prediction_task import NextItemPredictionTask

    found = []
    for task in model.modules():
        if isinstance(task, NextItemPredictionTask) and hasattr(task, "pre"):
            scores = task.pre.module
            found.append(scores.items)
            # after a full softmax the bias has a gradient of its own size anyway
            if task.sampler is not None and scores.output_layer_bias is not None:
                found.append(scores.output_layer_bias)
    return list({id(table): table for table in found if table.requires_grad}.values())


def _flush_with(model: nn.Module, optimizer: ModelOptimizer) -> None:
    """Flush before the model's weights are saved or replaced, as long as the optimizer lives."""
    flush = _Flush(optimizer)
    for handle in (
        model.register_state_dict_pre_hook(flush),
        model.register_load_state_dict_pre_hook(flush),
    ):
        weakref.finalize(optimizer, handle.remove)


class _Flush:
    """A hook of the model; copies and pickles of the model have one that does nothing."""

    def __init__(self, optimizer: ModelOptimizer | None) -> None:
        self.optimizer = None if optimizer is None else weakref.ref(optimizer)

    def __call__(self, *_: Any) -> None:
        optimizer = None if self.optimizer is None else self.optimizer()
        if optimizer is not None:
            optimizer.flush()

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return _Flush, (None,)

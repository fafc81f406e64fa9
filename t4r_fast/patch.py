"""accelerate(model): the fused ops inside a model of the real Transformers4Rec, in place.

Nothing of that package is imported here, and nothing of t4r_fast.torch: a module is known by the
names of its classes. A task is given a subclass of its own class, so that its parameters, buffers,
state dict and everything else stay what they are; restore() gives the class back.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from t4r_fast.lazy_logits import LazyLogits
from t4r_fast.ops.item_topk import MAX_K, item_topk
from t4r_fast.ops.ranking_metrics import ranking_metrics
from t4r_fast.ops.sampled_softmax_loss import sampled_softmax_loss
from t4r_fast.ops.tied_softmax_loss import tied_softmax_loss

_PACKAGE = "transformers4rec"
# Their metric classes -> field of RankingMetrics. With one right item DCG is NDCG.
_METRICS = {
    "NDCGAt": "ndcg",
    "DCGAt": "ndcg",
    "RecallAt": "recall",
    "PrecisionAt": "precision",
    "AvgPrecisionAt": "map",
    "MeanReciprocalRankAt": "mrr",
}
# What gives each row from this row alone: rows can be chosen before it instead of behind it.
_ROW_BY_ROW = (nn.Linear, nn.LayerNorm, nn.Identity, nn.Sequential)


class AccelerateWarning(UserWarning):
    """A part of a model keeps its own, slower way."""


@dataclasses.dataclass(frozen=True)
class Acceleration:
    """What accelerate() did.

    replaced  names of the modules that have fused ops now
    kept      module or metric -> why it stays as it is
    """

    replaced: tuple[str, ...]
    kept: dict[str, str]

    def __str__(self) -> str:
        lines = [f"fused ops in {name}" for name in self.replaced]
        lines += [f"{name} as it is: {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Acceleration:
    """Put fused ops into a model of transformers4rec 23.12, in place.

    The next-item tasks of the model compute loss, ranks and best items without the N x V scores;
    their projection runs on the rows that have a target alone:

    loss           tied_softmax_loss; in training with sampled_softmax sampled_softmax_loss with
                   sampler "t4rec": other random numbers of the same distribution
    metrics        from the target's rank (target_rank); of equal scores the lower id ranks first
    model.top_k    item_topk, up to k = 128
    `predictions`  LazyLogits: a tensor as soon as anybody uses them as one. torch.topk of them, as
                   the Trainer does for predict_top_k, forms no scores up to k = 128. In training
                   with sampled_softmax they are those of all items

    returns  Acceleration: what was replaced, and what keeps its own way and why; each of these is
             an AccelerateWarning too. str() of it is a report

    Looking up the embeddings stays theirs: it is less than 1% of a step (CPU, 118,335 items). The
    Trainer's predict_top_k=0, which collects the scores of all items, needs restore() first.

    Weights, state dicts, checkpoints, optimizers and the other parts of the model stay. A copy by
    copy.deepcopy is accelerated as well; call restore() before pickling a model that others load
    without t4r_fast. Calling it again changes nothing. Raises TypeError for what is no module, and
    ValueError for a model without a next-item task of transformers4rec.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module; got {type(model).__name__}")
    replaced, kept = [], {}
    for name, task in _tasks(model):
        why = None if isinstance(task, _NextItemTask) else _obstacle(task)
        if why is not None:
            kept[name] = why
            continue
        if not isinstance(task, _NextItemTask):
            task.__class__ = _fused(type(task))
        replaced.append(name)
        kept.update(_slow_metrics(name, task))
    if not replaced and not kept:
        own = type(model).__module__.startswith("t4r_fast.")
        raise ValueError(
            "accelerate: the model holds no NextItemPredictionTask of transformers4rec"
            + ("; models of t4r_fast.torch have the fused ops already" if own else "")
        )
    for name, why in kept.items():
        warnings.warn(f"accelerate: {name} stays as it is: {why}", AccelerateWarning, stacklevel=2)
    return Acceleration(tuple(replaced), kept)


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo accelerate(): the names of the modules that are again what they were."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module; got {type(model).__name__}")
    found = []
    for name, module in model.named_modules():
        if isinstance(module, _NextItemTask):
            module.__class__ = module._class_before
            found.append(name)
    return tuple(found)


# -- finding ---------------------------------------------------------------------------------------


def _is_theirs(module: nn.Module, name: str) -> bool:
    """Whether a class of that name in transformers4rec is among the module's classes."""
    return any(
        cls.__name__ == name and cls.__module__.partition(".")[0] == _PACKAGE
        for cls in type(module).__mro__
    )


def _tasks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if _is_theirs(module, "NextItemPredictionTask"):
            yield name, module


def _obstacle(task: nn.Module) -> str | None:
    """Why this task cannot have the fused ops; None when it can."""
    for method in ("forward", "calculate_metrics"):
        owner = next(cls for cls in type(task).__mro__ if method in vars(cls))
        if owner.__module__.partition(".")[0] != _PACKAGE:
            return f"{owner.__name__} has a {method} of its own"
    scorer = getattr(getattr(task, "pre", None), "module", None)
    if scorer is None:
        return "it is not built: put it into a Head first"
    if not hasattr(scorer, "softmax_temperature") or hasattr(scorer, "output_layer_bias"):
        return "its output layer is not that of release 23.12"
    loss = task.loss
    if type(loss) is not nn.CrossEntropyLoss or loss.weight is not None:
        return f"its loss is {type(loss).__name__}, not CrossEntropyLoss without class weights"
    if loss.reduction not in ("mean", "sum"):
        return f"the reduction of its loss is {loss.reduction!r}"
    if scorer.sampled_softmax and loss.label_smoothing:
        return "sampled softmax with label smoothing has no fused op"
    return None


def _slow_metrics(name: str, task: nn.Module) -> dict[str, str]:
    return {
        f"{name}.metrics[{i}]": f"{type(metric).__name__} is computed from the formed N x V scores"
        for i, metric in enumerate(task.metrics)
        if _field(metric) is None
    }


def _field(metric: nn.Module) -> str | None:
    """The field of RankingMetrics that their metric is, if it takes item ids as targets."""
    name = type(metric).__name__
    known = name in _METRICS and type(metric).__module__.partition(".")[0] == _PACKAGE
    return _METRICS[name] if known and metric.labels_onehot else None


# -- the task --------------------------------------------------------------------------------------


def _fused(cls: type) -> type:
    """A subclass of theirs with our methods in front, under the same name."""
    return type(cls.__name__, (_NextItemTask, cls), {"_class_before": cls})


class _NextItemTask(nn.Module):
    """Methods of NextItemPredictionTask by fused ops."""

    _class_before: type

    def forward(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor, ...],
        targets: Any = None,
        training: bool = False,
        testing: bool = False,
        top_k: int | None = None,
        **_: Any,
    ) -> Any:
        hidden = (inputs[0] if isinstance(inputs, (tuple, list)) else inputs).float()
        if not training and not testing:
            return self._recommended(hidden, top_k)
        labels = self.masking.masked_targets.flatten()
        at = (labels != self.padding_idx).nonzero().squeeze(1)
        labels = labels[at].long()
        items = self._items
        logits = LazyLogits(
            self._rows(hidden.flatten(0, 1), hidden, at).to(items.dtype),
            items,
            labels,
            temperature=self._temperature,
            padding_idx=self.padding_idx,
        )
        return {"loss": self._loss(logits, training), "labels": labels, "predictions": logits}

    @property
    def _items(self) -> torch.Tensor:
        scorer = self.pre.module
        return scorer.item_embedding_table.weight if scorer.weight_tying else scorer.output_layer

    @property
    def _temperature(self) -> float:
        return float(self.pre.module.softmax_temperature or 1)  # 0 divides by nothing

    def _rows(self, flat: torch.Tensor, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """What is scored at these flat positions: (N, D)."""
        if not self.task_block:
            return flat[at]
        if all(_is_row_by_row(m) for m in self.task_block.modules()):
            return self.task_block(flat[at])
        return self.task_block(hidden).flatten(0, 1)[at]

    def _loss(self, logits: LazyLogits, training: bool) -> torch.Tensor:
        scorer = self.pre.module
        if training and scorer.sampled_softmax:
            return sampled_softmax_loss(
                logits.hidden,
                logits.items,
                logits.labels,
                num_negatives=scorer.sampler.max_n_samples,
                sampler="t4rec",
                temperature=logits.temperature,
                ignore_index=self.padding_idx,
                reduction=self.loss.reduction,
                low=self.padding_idx + 1,
                sparse=False,
            )
        if not training and not torch.is_grad_enabled() and not self.loss.label_smoothing:
            return logits.target_rank_and_loss(self.loss.reduction)[1]
        return tied_softmax_loss(
            logits.hidden,
            logits.items,
            logits.labels,
            temperature=logits.temperature,
            label_smoothing=self.loss.label_smoothing,
            ignore_index=self.padding_idx,
            reduction=self.loss.reduction,
        )

    def _recommended(self, hidden: torch.Tensor, top_k: int | None) -> Any:
        items, length = self._items, hidden.shape[1]
        item_ids = self.embeddings.item_seq
        last = (item_ids != self.padding_idx).sum(dim=1)
        if not _is_theirs(self.masking, "MaskedLanguageModeling"):
            last = last - 1
        # an empty session is read at its last position, as an index of -1 does
        at = torch.arange(len(hidden), device=hidden.device) * length + last % length
        rows = self._rows(hidden.flatten(0, 1), hidden, at).to(items.dtype)
        if top_k is not None and top_k <= MAX_K and not torch.jit.is_tracing():
            return item_topk(rows, items, top_k, temperature=self._temperature)
        scores = rows @ items.T / self._temperature
        return scores if top_k is None else tuple(torch.topk(scores, top_k, dim=-1))

    def calculate_metrics(self, predictions: Any, targets: Any) -> dict[str, torch.Tensor]:
        if not isinstance(predictions, LazyLogits):
            return super().calculate_metrics(predictions, targets)
        if isinstance(targets, Mapping) and self.target_name:
            targets = targets[self.target_name]
        rank = predictions.target_rank()
        found = {}
        for metric in self.metrics:
            field = _field(metric)
            if field is None:
                value = metric(self.forward_to_prediction_fn(predictions.dense()), targets)
            else:
                rows = getattr(ranking_metrics(rank, metric.top_ks), field)
                metric.metric_mean.append(rows)
                metric._update_count += 1
                metric._computed = None
                value = rows.mean(0).squeeze()
            found[self.metric_name(metric)] = value
        return found


def _is_row_by_row(module: nn.Module) -> bool:
    kind = type(module)
    among = kind.__module__ == "torch.nn.modules.activation"
    elementwise = among and "Softm" not in kind.__name__ and "Attention" not in kind.__name__
    theirs = _is_theirs(module, "SequentialBlock") or _is_theirs(module, "DenseBlock")
    return isinstance(module, _ROW_BY_ROW) or elementwise or theirs

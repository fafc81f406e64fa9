"""accelerate(model): the fused ops inside a model of the real Transformers4Rec, in place.

Nothing of that package is imported here, and nothing of t4r_fast.torch: a module is known by the
names of its classes. A task, and a body around a Transformer, are given subclasses of their own
classes, so that parameters, buffers, state dict and everything else stay what they are; restore()
gives the classes back.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from t4r_fast.model import sessions
from t4r_fast.model.known import is_hooked, is_row_by_row, packed_body
from t4r_fast.model.mask import in_blocks
from t4r_fast.model.next_item import LazyLogits, NextItem
from t4r_fast.model.sessions import Layout
from t4r_fast.ops._seed import check_seed
from t4r_fast.ops.item_topk import MAX_K
from t4r_fast.ops.ranking_metrics import ranking_metrics

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
# Maskings that hide items by replacing their vectors, and pass the Transformer nothing besides.
_MASKINGS = ("CausalLanguageModeling", "MaskedLanguageModeling", "ReplacementLanguageModeling")


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


def accelerate(model: nn.Module, *, attend_padding: bool = True) -> Acceleration:
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

    A body around an XLNet, GPT-2 or BERT under causal, masked or replacement modelling projects
    positions once per batch and runs its last layer where a prediction is made alone. Elsewhere the
    body gives zeros, and behind a causal Transformer nothing runs on padding; so this is done only
    where next-item tasks alone read the body and all that stands between gives each row from this
    row alone. Dropout is drawn inside the ops by a seed of torch's default generator: other random
    numbers of the same distribution.

    attend_padding  True: items attend to the padding behind them, as transformers4rec has it; all
                    results stay what they were. False: they do not, and nothing is computed for
                    padding, as if the Transformer were given an attention mask. Predictions change,
                    for the better: with padding in the sums, what is predicted for a session
                    depends on the length of the longest session beside it. Weights that were
                    trained with the one should not be used with the other

    returns  Acceleration: what was replaced, and what keeps its own way and why; each of these is
             an AccelerateWarning too. str() of it is a report

    Looking up the embeddings stays theirs: it is less than 1% of a step (CPU, 118,335 items). The
    Trainer's predict_top_k=0, which collects the scores of all items, needs restore() first; so
    does code that reads a body's output itself.

    Weights, state dicts, checkpoints, optimizers and the other parts of the model stay. A copy by
    copy.deepcopy is accelerated as well; call restore() before pickling a model that others load
    without t4r_fast. Calling it again changes nothing but attend_padding. Raises TypeError for what
    is no module, and ValueError for a model without a next-item task of transformers4rec.
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
            task.__class__ = _fused(_NextItemTask, type(task))
        replaced.append(name)
        kept.update(_slow_metrics(name, task))
    if not replaced and not kept:
        own = type(model).__module__.startswith("t4r_fast.")
        raise ValueError(
            "accelerate: the model holds no NextItemPredictionTask of transformers4rec"
            + ("; models of t4r_fast.torch have the fused ops already" if own else "")
        )
    for name, body, heads in _bodies(model):
        _restore(body)
        why = _body_obstacle(body, heads)
        if why is not None:
            kept[name] = why if attend_padding else f"{why}; it attends to padding"
            continue
        body.__class__ = _fused(_Body, type(body), _attend_padding=attend_padding)
        replaced.append(name)
    for name, why in kept.items():
        warnings.warn(f"accelerate: {name} stays as it is: {why}", AccelerateWarning, stacklevel=2)
    order = [name for name, _ in model.named_modules()]
    return Acceleration(tuple(sorted(replaced, key=order.index)), kept)


def restore(model: nn.Module) -> tuple[str, ...]:
    """Undo accelerate(): the names of the modules that are again what they were."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module; got {type(model).__name__}")
    found = []
    for name, module in model.named_modules():
        if _restore(module):
            found.append(name)
    return tuple(found)


def _restore(module: nn.Module) -> bool:
    if not isinstance(module, (_NextItemTask, _Body)):
        return False
    module.__class__ = module._class_before
    return True


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


def _bodies(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Bodies that hold a Transformer, and the heads that read them."""
    readers: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        if _is_theirs(module, "Head"):
            readers.setdefault(module.body, []).append(module)
    for name, module in model.named_modules():
        if module in readers and any(_is_theirs(m, "TransformerBlock") for m in module.modules()):
            yield name, module, readers[module]


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


def _body_obstacle(body: nn.Module, heads: list[nn.Module]) -> str | None:
    """Why this body keeps its own way; None when it can have ours."""
    blocks = list(body) if _has_their(body, "SequentialBlock", "forward") else []
    at = _place_of_transformer(blocks)
    if at < 1 or not _is_theirs(blocks[0], "TabularSequenceFeatures"):
        return "it is not a SequentialBlock of input block, TransformerBlock and others"
    inputs, block, behind = blocks[0], blocks[at], blocks[at + 1 :]
    tasks = [task for head in heads for task in head.prediction_task_dict.values()]
    for task in tasks:
        if not isinstance(task, _NextItemTask):
            return f"its output is read by {type(task).__name__}, which has no fused ops"
        if task.masking is not inputs.masking or task.embeddings is not inputs.categorical_module:
            return "a task reads the labels of another input block"
    behind += [task.task_block for task in tasks if task.task_block]
    for mixer in map(_mixer, behind):
        if mixer is not None:
            return f"behind its Transformer {type(mixer).__name__} may mix rows"
    parts = [m for part in (block, *behind) for m in part.modules()]
    if any(is_hooked(m) for m in (*parts, body, *heads, *tasks)):
        return "hooks on its parts, or on what reads it, may read what it leaves out"
    masking = inputs.masking
    if not any(_has_their(masking, name) for name in _MASKINGS):
        return f"{type(masking).__name__} may tell the Transformer more than vectors do"
    if block.masking is not None and block.masking is not masking:
        return "the masking of its TransformerBlock is not that of its input block"
    return _block_obstacle(block)


def _block_obstacle(block: nn.Module) -> str | None:
    if not _has_their(block, "TransformerBlock", "forward"):
        return f"{type(block).__name__} has a forward of its own"
    prepare = block.prepare_module
    if prepare is not None and not _has_their(prepare, "GPT2Prepare"):
        return f"its prepare_module {type(prepare).__name__} is not known"
    owner = next(cls for cls in type(block).__mro__ if cls.__name__ == "TransformerBlock")
    if block.output_fn is not inspect.signature(owner.__init__).parameters["output_fn"].default:
        return "its output_fn is not the default"
    found = packed_body(block.transformer)
    return found if isinstance(found, str) else None


def _has_their(module: nn.Module, name: str, method: str | None = None) -> bool:
    """Whether a module is of their class of that name; with a method, of a subclass of it that
    has not overridden this method."""
    if not _is_theirs(module, name) or "forward" in vars(module):
        return False
    if method is None:
        return type(module).__name__ == name and type(module).__module__.startswith(_PACKAGE)
    owner = next(cls for cls in type(module).__mro__ if method in vars(cls))
    return owner.__name__ == name


def _place_of_transformer(blocks: list[nn.Module]) -> int:
    """The last TransformerBlock, -1 for none."""
    return max((n for n, b in enumerate(blocks) if _is_theirs(b, "TransformerBlock")), default=-1)


def _mixer(module: nn.Module) -> nn.Module | None:
    """A part because of which a row of the result may come from other rows, too; None for none."""
    if type(module) is nn.Sequential or any(
        _has_their(module, name) for name in ("SequentialBlock", "DenseBlock", "Block")
    ):
        mixers = map(_mixer, module.children())
        return next((mixer for mixer in mixers if mixer is not None), None)
    return None if is_row_by_row(module) else module


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


def _fused(ours: type, cls: type, **attributes: Any) -> type:
    """A subclass of theirs with our methods in front, under the same name."""
    return type(cls.__name__, (ours, cls), {"_class_before": cls, **attributes})


# -- the body --------------------------------------------------------------------------------------


class _Body(nn.Module):
    """SequentialBlock.forward with its Transformer at the rows that are scored; zeros elsewhere."""

    _class_before: type
    _attend_padding: bool

    def forward(
        self, input: Any, training: bool = False, testing: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        blocks = list(self)
        at = _place_of_transformer(blocks)
        modes = {"training": training, "testing": testing}
        for number, block in enumerate(blocks):
            if number == at:
                input = self._transformed(blocks[0], block, input, training or testing)
                continue
            takes = inspect.signature(block.forward).parameters if number < len(blocks) - 1 else ()
            input = block(input, **{name: value for name, value in modes.items() if name in takes})
        return input

    def _transformed(
        self, inputs: nn.Module, block: nn.Module, x: torch.Tensor, labelled: bool
    ) -> torch.Tensor:
        """(B, L, D) to (B, L, D)."""
        masking, item_ids = inputs.masking, inputs.categorical_module.item_seq
        count, width = x.shape[:2]
        attended = _attended(item_ids, masking.padding_idx, width)
        body = packed_body(block.transformer)
        # it may have been changed since accelerate() looked at it
        changed = isinstance(body, str) or any(map(is_hooked, block.modules()))
        if torch.jit.is_tracing() or changed:
            return block(x) if self._attend_padding else _masked(block, x, attended)
        if labelled:
            at = (masking.masked_targets.flatten() != masking.padding_idx).nonzero().squeeze(1)
        else:
            at = _read_at(item_ids, masking, masking.padding_idx, width)
        if self._attend_padding and not body.looks_back:
            packed, layout, rows = x.flatten(0, 1), sessions.whole_rows(count, width, x.device), at
        else:
            if self._attend_padding:  # what an empty session is read at sees all of its padding
                attended = torch.where(item_ids.ne(masking.padding_idx).any(1), attended, width)
            packed, layout, rows = _packed(x, attended, at)
        seed = check_seed("dropout", None, x.device) if _drops(block.transformer) else None
        found = body.run(packed, layout, in_blocks(rows), seed)[: len(at)]
        full = found.new_zeros(count * width, found.shape[1])
        return full.index_copy(0, at, found).view(count, width, -1)


def _masked(block: nn.Module, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Their Transformer, whose items attend to the first `attended` (B,) positions alone."""
    arguments = {} if block.prepare_module is None else block.prepare_module(x)
    mask = torch.arange(x.shape[1], device=x.device) < attended[:, None]
    return block.transformer(**{**arguments, "inputs_embeds": x, "attention_mask": mask.float()})[0]


def _drops(module: nn.Module) -> bool:
    return module.training and any(m.p for m in module.modules() if isinstance(m, nn.Dropout))


def _attended(item_ids: torch.Tensor, padding_idx: int, width: int) -> torch.Tensor:
    """(B,) how many of `width` positions of each session are not padding; at least one.

    Inference under masked modelling puts one position behind the last item.
    """
    length = item_ids.shape[1]
    place = torch.arange(1, length + 1, device=item_ids.device)
    last = torch.where(item_ids != padding_idx, place, 0).amax(1)
    return (last + width - length).clamp(min=1)


def _read_at(
    item_ids: torch.Tensor, masking: nn.Module, padding_idx: int, width: int
) -> torch.Tensor:
    """(B,) flat positions in (B, width) from which inference predicts."""
    last = (item_ids != padding_idx).sum(dim=1)
    if not _is_theirs(masking, "MaskedLanguageModeling"):
        last = last - 1
    # an empty session is read at its last position, as an index of -1 does
    return torch.arange(len(item_ids), device=item_ids.device) * width + last % width


def _packed(
    x: torch.Tensor, lengths: torch.Tensor, at: torch.Tensor
) -> tuple[torch.Tensor, Layout, torch.Tensor]:
    """Vectors (B, L, D) without padding, their layout, and where the flat positions `at` went; what
    is padding counts as its session's last item."""
    batch = sessions.pack({"x": x}, lengths)
    session = torch.div(at, x.shape[1], rounding_mode="floor")
    place = torch.minimum(at % x.shape[1], lengths[session] - 1)
    return batch.columns["x"], sessions.layout_of(batch), batch.offsets[session] + place


# -- the task --------------------------------------------------------------------------------------


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
        head = self._next_item
        logits = head.logits(self._rows(hidden, at).to(head.items.dtype), labels)
        return {"loss": head.loss(logits, training), "labels": labels, "predictions": logits}

    @property
    def _next_item(self) -> NextItem:
        scorer, loss = self.pre.module, self.loss
        return NextItem(
            scorer.item_embedding_table.weight if scorer.weight_tying else scorer.output_layer,
            temperature=float(scorer.softmax_temperature or 1),  # 0 divides by nothing
            padding_idx=self.padding_idx,
            reduction=loss.reduction,
            label_smoothing=loss.label_smoothing,
            sampler="t4rec" if scorer.sampled_softmax else None,
            negatives=scorer.sampler.max_n_samples if scorer.sampled_softmax else 0,
        )

    def _rows(self, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """What is scored at these flat positions: (N, D)."""
        if not self.task_block:
            return hidden.flatten(0, 1)[at]
        if _mixer(self.task_block) is None:
            return self.task_block(hidden.flatten(0, 1)[at])
        return self.task_block(hidden).flatten(0, 1)[at]

    def _recommended(self, hidden: torch.Tensor, top_k: int | None) -> Any:
        head = self._next_item
        item_ids, width = self.embeddings.item_seq, hidden.shape[1]
        at = _read_at(item_ids, self.masking, self.padding_idx, width)
        rows = self._rows(hidden, at).to(head.items.dtype)
        if top_k is None or (top_k <= MAX_K and not torch.jit.is_tracing()):
            return head.recommend(rows, top_k)
        return tuple(torch.topk(head.recommend(rows, None), top_k, dim=-1))

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

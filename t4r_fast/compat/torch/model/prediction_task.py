"""Next-item prediction: what stands behind the body, its loss and its metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from t4r_fast.compat import get_compat, warn_once
from t4r_fast.compat.torch.block.base import BuildableBlock, takes_mode
from t4r_fast.compat.torch.block.mlp import MLPBlock
from t4r_fast.compat.torch.features.sequence import Encoded
from t4r_fast.compat.torch.model.item_scores import NextItemPredictionPrepareBlock
from t4r_fast.compat.torch.model.sampler import LogUniformSampler
from t4r_fast.compat.torch.model.session_task import (
    BinaryClassificationPrepareBlock,
    BinaryClassificationTask,
    RegressionPrepareBlock,
    RegressionTask,
)
from t4r_fast.compat.torch.model.task import PredictionTask, built
from t4r_fast.compat.torch.ranking_metric import AvgPrecisionAt, NDCGAt, RankingMetric, RecallAt
from t4r_fast.model.next_item import LazyLogits, NextItem
from t4r_fast.ops.sampled_softmax_loss import SAMPLERS

__all__ = [
    "BinaryClassificationPrepareBlock",
    "BinaryClassificationTask",
    "LogUniformSampler",
    "NextItemPredictionPrepareBlock",
    "NextItemPredictionTask",
    "RegressionPrepareBlock",
    "RegressionTask",
]

LOG = logging.getLogger("t4r_fast")


class Asked(NamedTuple):
    """What inference is asked for; None: as the task was built.

    top_k           how many items; None: the scores of all
    recommend_from  the lowest item id
    recommend_seen  whether items of the session itself may be among them
    """

    top_k: int | None = None
    recommend_from: int | None = None
    recommend_seen: bool | None = None


class NextItemPredictionTask(PredictionTask):
    """Predict the next item out of all: softmax over the whole catalogue, ranking metrics.

    loss                 torch.nn.CrossEntropyLoss(), with or without label_smoothing: computed by
                         the fused tied_softmax_loss. Any other module gets the formed (N, V) scores
    metrics              RankingMetrics; None for NDCG, average precision and recall at 10 and 20
    task_block           what stands between the body and the scores; None: a linear map to the
                         width of the item table where widths differ (with ReLU at compat 0.1)
    task_name            prefix of the metric keys
    weight_tying         score with the item embedding table itself
    softmax_temperature  > 0; scores are divided by it
    padding_idx          the id of padding; the masking's wins
    target_dim           number of items without weight tying; None: rows of the item table
    sampled_softmax      train on the target and max_n_samples drawn negatives instead of all items;
                         evaluation and inference score all items as always
    max_n_samples        negatives per batch
    sampler              how they are drawn, see t4r_fast.sampled_softmax_loss: "log_uniform" (item
                         ids must be sorted by popularity, as `t4r-fast etl` gives them), "uniform",
                         or "t4rec", the reference's, which never draws rare items. None: "t4rec",
                         with a warning
    sparse               with sampled_softmax: the gradients of what the sampled scores are made of,
                         the item table (its lookup too, by `sparse` of its torch.nn.Embedding) or
                         the output layer, and the bias, are sparse tensors of the rows that took
                         part, for torch.optim.SparseAdam. Dense ones are V x D. An optimizer of
                         t4r_fast.optim forms neither and needs no `sparse`
    score_padding        False: padding takes no part in the softmax, in the ranking and in what is
                         recommended; needs compat 23.12 and a loss without label_smoothing
    recommend_from       the lowest item id that inference recommends; 3 leaves out padding and the
                         ids that `t4r-fast etl` gives to missing and unknown items
    recommend_seen       False: inference recommends no item of the session itself
    hf_format            accepted from 0.1.x: the output is a dict in any case

    recommend_from and recommend_seen concern inference alone: scores of what is left out are -inf,
    and top_k fills up with id -1 where fewer items are left. Metrics rank among all items.
    Training and evaluation return loss, labels and predictions. labels (M,) int64 holds one entry
    per place where a target may stand, padding where none does; a model that runs without padding
    has the targets first. predictions are LazyLogits: nothing N x V is formed until somebody asks.
    Inference returns the scores (B, V), or (scores, ids) with `top_k`. At compat 0.1 all scores are
    log-probabilities over all items. Without these options padding, nulls and unknown items take
    part in all, as in the reference; samplers never draw padding.
    Replaces transformers4rec.torch.NextItemPredictionTask.
    """

    def __init__(
        self,
        loss: nn.Module | None = None,
        metrics: Iterable[RankingMetric] | None = None,
        task_block: BuildableBlock | nn.Module | None = None,
        task_name: str = "next-item",
        weight_tying: bool = False,
        softmax_temperature: float = 1,
        padding_idx: int = 0,
        target_dim: int | None = None,
        sampled_softmax: bool = False,
        max_n_samples: int = 100,
        sampler: str | None = None,
        sparse: bool = False,
        hf_format: bool = False,
        score_padding: bool = True,
        recommend_from: int = 0,
        recommend_seen: bool = True,
    ) -> None:
        super().__init__(
            loss=nn.CrossEntropyLoss() if loss is None else loss,
            metrics=_default_metrics() if metrics is None else metrics,
            task_name=task_name,
            task_block=task_block,
        )
        if not softmax_temperature > 0:
            raise ValueError(
                "NextItemPredictionTask: softmax_temperature must be > 0; got"
                f" {softmax_temperature}"
            )
        self.sampler = _checked_sampler(sampled_softmax, max_n_samples, sampler, self.loss)
        self.max_n_samples = max_n_samples
        if sparse and not sampled_softmax:
            raise ValueError(
                "NextItemPredictionTask: sparse=True needs sampled_softmax=True: a softmax over all"
                " items gives each of them a gradient. To train without forming it:"
                " T4RecTrainingArguments(table_optimizer='adamw'), or t4r_fast.optim.for_model"
            )
        self.sparse = sparse
        self.weight_tying = weight_tying
        self.softmax_temperature = float(softmax_temperature)
        self.padding_idx = padding_idx
        self.target_dim = target_dim
        self.hf_format = hf_format
        if not score_padding and getattr(self.loss, "label_smoothing", 0.0):
            raise ValueError(
                "NextItemPredictionTask: label_smoothing gives every item a share, padding too; it"
                " does not go with score_padding=False"
            )
        if not score_padding and get_compat() == "0.1":
            raise ValueError(
                "NextItemPredictionTask: score_padding=False needs scores without a bias, as they"
                " are at compat 23.12; call t4r_fast.set_compat('23.12') first"
            )
        if recommend_from < 0:
            raise ValueError(
                f"NextItemPredictionTask: recommend_from must be >= 0; got {recommend_from}"
            )
        self.score_padding = score_padding
        self.recommend_from = recommend_from
        self.recommend_seen = recommend_seen
        self.masking: nn.Module | None = None
        self._log_probabilities = get_compat() == "0.1"

    # -- building --------------------------------------------------------------------------------

    def build(
        self,
        body: nn.Module,
        input_size: tuple[int, ...],
        inputs: nn.Module | None = None,
        device: torch.device | str | None = None,
        task_block: BuildableBlock | nn.Module | None = None,
    ) -> None:
        """Connect the task to the input block's item table and masking."""
        inputs = getattr(body, "inputs", None) if inputs is None else inputs
        if inputs is None or getattr(inputs, "item_id", None) is None:
            raise ValueError(
                "NextItemPredictionTask: the model needs an input block with a column tagged"
                " item_id; give Head(..., inputs=...)"
            )
        if inputs.masking is None:
            raise ValueError(
                "NextItemPredictionTask: the input block needs a masking, e.g."
                " TabularSequenceFeatures.from_schema(..., masking='mlm')"
            )
        old = get_compat() == "0.1"
        self.masking = inputs.masking
        self.padding_idx = inputs.masking.padding_idx
        self.embeddings = inputs.categorical_module
        self.item_embedding_table = inputs.item_embedding_table
        table, width = self.item_embedding_table, int(input_size[-1])
        block = self._task_block if task_block is None else task_block
        if block is None and self.weight_tying and width != table.embedding_dim:
            LOG.warning(
                "Projecting inputs of NextItemPredictionTask to'%d' As weight tying requires the"
                " input dimension '%d' to be equal to the item-id embedding dimension '%d'",
                table.embedding_dim,
                width,
                table.embedding_dim,
            )
            block = MLPBlock([table.embedding_dim], activation=nn.ReLU if old else None)
        self.task_block = block = built(block, input_size)
        self._block_takes_mode = block is not None and takes_mode(block)
        if block is not None:
            width = int(block.output_size()[-1])
        if self.weight_tying and width != table.embedding_dim:
            raise ValueError(
                "NextItemPredictionTask: with weight_tying task_block must end in the item table's"
                f" width, {table.embedding_dim}; got {width}"
            )
        rows = table.num_embeddings if self.target_dim is None else self.target_dim
        if self.weight_tying and rows != table.num_embeddings:
            raise ValueError(
                "NextItemPredictionTask: with weight_tying target_dim must be the item table's"
                f" rows, {table.num_embeddings}; got {rows}"
            )
        tied = table if self.weight_tying else None
        if tied is not None and self.sparse:
            tied.sparse = True  # of the two gradients of the table neither may be dense
        self.target_dim = rows
        self.pre = NextItemPredictionPrepareBlock(
            rows,
            self.weight_tying,
            tied,
            self.softmax_temperature,
            self.sampler is not None,
            self.max_n_samples,
            self.padding_idx + 1,
        ).build((width,))
        # the layer by itself draws as the reference does and in no other way
        self.pre.module.sampled_softmax = self.sampler == "t4rec"
        if not self.score_padding:
            bias = torch.zeros(rows)
            bias[self.padding_idx] = -torch.inf
            self.register_buffer("_without_padding", bias, persistent=False)
        if device is not None:
            self.to(device)

    # -- the pass --------------------------------------------------------------------------------

    def _hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D_body) -> (..., D) float32, what is scored against the items."""
        hidden = hidden.float()
        if self.task_block is None:
            return hidden
        # float again: under autocast a linear map gives half precision, the item table is float32
        mode = {"training": self.training} if self._block_takes_mode else {}
        return self.task_block(hidden, **mode).float()

    def forward(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor, ...],
        targets: torch.Tensor | None = None,
        training: bool = False,
        testing: bool = False,
        top_k: int | None = None,
    ) -> dict[str, object] | torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self.run(inputs, self.noted(), targets, training, testing, Asked(top_k))

    def noted(self) -> Encoded:
        """The batch that the input block has seen last, for a task that is called by itself."""
        return Encoded({}, self.embeddings.item_seq, self.masking.noted, {})

    def run(
        self,
        inputs: torch.Tensor | tuple[torch.Tensor, ...],
        batch: Encoded,
        targets: torch.Tensor | None = None,
        training: bool = False,
        testing: bool = False,
        asked: Asked | None = None,
    ) -> Any:
        """forward() on a batch that is given as a value."""
        if isinstance(inputs, (tuple, list)):  # GRU: (outputs, state)
            inputs = inputs[0]
        flat, drawn = inputs.reshape(-1, inputs.shape[-1]), batch.drawn
        if not training and not testing:
            # the flat position at which each session's prediction is read; -1 for empty sessions
            rows = drawn.rows[: inputs.shape[0]].clamp(min=0)
            return self.recommended(self._hidden(flat[rows]), asked, batch.item_ids)
        labels = drawn.masked_targets.reshape(-1)
        # Where targets stand, then -1: a kernel finds its rows side by side, whatever the device.
        counted = drawn.rows
        if not training and drawn.one_target_per_session:
            # At most one target per session: the first B entries of the row list hold them all.
            rows, counted = drawn.rows[: inputs.shape[0]], None
            labels = torch.where(rows >= 0, labels[rows.clamp(min=0)], self.padding_idx)
            flat = flat[rows.clamp(min=0)]
        return self.scored(self._hidden(flat), labels, counted, training)

    def scored(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        rows: torch.Tensor | None,
        training: bool,
    ) -> dict[str, object]:
        """Loss, labels and predictions of hidden (M, D); see NextItem.loss for rows."""
        head = self.next_item
        logits = head.logits(hidden, labels)
        if _is_plain_cross_entropy(self.loss):
            loss = head.loss(logits, training, rows)
        else:
            loss = self.loss(logits.dense(), labels[labels != self.padding_idx])
        return {"loss": loss, "labels": labels, "predictions": logits}

    def recommended(
        self, hidden: torch.Tensor, asked: Asked | None, item_ids: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Scores, or (scores, ids), for hidden (B, D) of sessions with these items, (B, L)."""
        asked = Asked() if asked is None else asked
        lowest = self.recommend_from if asked.recommend_from is None else asked.recommend_from
        seen = self.recommend_seen if asked.recommend_seen is None else asked.recommend_seen
        parts = []
        if lowest:
            low = torch.arange(lowest, device=hidden.device)
            parts.append(low.expand(hidden.shape[0], -1))
        if not seen:
            parts.append(torch.where(item_ids == self.padding_idx, -1, item_ids))
        return self.next_item.recommend(
            hidden, asked.top_k, torch.cat(parts, dim=1) if parts else None
        )

    @property
    def next_item(self) -> NextItem:
        """The scores and the loss of this task."""
        bias = self.pre.module.output_layer_bias if self.score_padding else self._without_padding
        return NextItem(
            self.pre.module.items,
            bias,
            self.softmax_temperature,
            self.padding_idx,
            self._log_probabilities,
            getattr(self.loss, "reduction", "mean"),
            getattr(self.loss, "label_smoothing", 0.0),
            self.sampler,
            self.max_n_samples,
            self.sparse,
        )

    def remove_pad_3d(self, inp_tensor: torch.Tensor, non_pad_mask: torch.Tensor) -> torch.Tensor:
        """The rows of (B, L, D) at which the mask, (B * L,) bool, is True: (N, D)."""
        return inp_tensor.flatten(end_dim=1)[non_pad_mask]

    # -- metrics ---------------------------------------------------------------------------------

    def calculate_metrics(
        self, predictions: LazyLogits | torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Count a batch into the metrics; returns the batch's own values by key."""
        rank = predictions.target_rank() if isinstance(predictions, LazyLogits) else None
        found = {}
        for metric in self.metrics:
            values = metric(predictions, targets) if rank is None else metric.add_rank(rank)
            found.update(self._named(metric, values))
        return found

    def compute_metrics(self) -> dict[str, torch.Tensor]:
        """The metrics over all batches since the last reset, by key, e.g. next-item/ndcg_at_10."""
        found = {}
        for metric in self.metrics:
            found.update(self._named(metric, metric.compute()))
        return found

    def _named(self, metric: RankingMetric, values: torch.Tensor) -> dict[str, torch.Tensor]:
        name = self.metric_name(metric)
        return {f"{name}_{k}": v for k, v in zip(metric.top_ks, values, strict=True)}


def _default_metrics() -> list[RankingMetric]:
    # Made anew for each task: the reference shares one set between all models of a process.
    kinds = (NDCGAt, AvgPrecisionAt, RecallAt)
    return [kind(top_ks=[10, 20], labels_onehot=True) for kind in kinds]


def _checked_sampler(
    sampled_softmax: bool, max_n_samples: int, sampler: str | None, loss: nn.Module
) -> str | None:
    """The sampler in force; None for the softmax over all items."""
    if not sampled_softmax:
        if sampler is not None:
            raise ValueError(
                f"NextItemPredictionTask: sampler={sampler!r} needs sampled_softmax=True"
            )
        return None
    if max_n_samples < 1:
        raise ValueError(f"NextItemPredictionTask: max_n_samples must be >= 1; got {max_n_samples}")
    if not _is_plain_cross_entropy(loss) or getattr(loss, "label_smoothing", 0.0):
        raise ValueError(
            "NextItemPredictionTask: sampled_softmax needs torch.nn.CrossEntropyLoss without"
            " class weights or label smoothing"
        )
    known = [s for s in SAMPLERS if s != "popularity"]
    if sampler is None:
        warn_once(
            "sampler",
            "sampled_softmax draws negatives as Transformers4Rec does: it keeps the lowest ids of"
            " its draws and corrects for the wrong probabilities, so that rare items are never"
            " drawn; give sampler='log_uniform' for the right ones",
        )
        return "t4rec"
    if sampler not in known:
        raise ValueError(
            f"NextItemPredictionTask: sampler must be one of {', '.join(known)}; got {sampler!r}"
        )
    return sampler


def _is_plain_cross_entropy(loss: nn.Module) -> bool:
    """Whether tied_softmax_loss computes this loss. NLLLoss stands behind a log-softmax in 0.1."""
    if not isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) or loss.weight is not None:
        return False
    return loss.reduction in ("mean", "sum")

"""The output layer of next-item prediction: the item table, its own or the embedding's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from t4r_fast.compat import get_compat
from t4r_fast.compat.torch.block.base import Block, BuildableBlock, Size
from t4r_fast.compat.torch.model.sampler import LogUniformSampler, keep_tables_in_checkpoints
from t4r_fast.ops._table import up_to_date
from t4r_fast.plain.sampled_softmax_loss import T4REC_EPSILON, T4REC_HIT


class ItemScores(nn.Module):
    """Scores of all items: the item table itself when weights are tied, else a table of its own.

    forward forms them, N x V numbers; NextItemPredictionTask goes by fused ops instead.
    """

    def __init__(self, recipe: NextItemPredictionPrepareBlock, width: int) -> None:
        super().__init__()
        rows = recipe.target_dim
        if recipe.weight_tying:
            self.item_embedding_table = recipe.item_embedding_table
        else:
            self.output_layer = nn.Parameter(torch.empty(rows, width))
            nn.init.kaiming_uniform_(self.output_layer, a=math.sqrt(5))
        old = get_compat() == "0.1"
        self.output_layer_bias = nn.Parameter(torch.zeros(rows)) if old else None
        self._log_probabilities = old
        self.softmax_temperature = recipe.softmax_temperature
        self.sampled_softmax = recipe.sampled_softmax
        self._drawn_from = recipe.max_n_samples, recipe.target_dim, recipe.min_id
        self._sampler: tuple[LogUniformSampler, ...] = ()  # in a tuple: no tables in the state
        if recipe.sampled_softmax:
            keep_tables_in_checkpoints(self, recipe.max_n_samples, recipe.min_id)

    @property
    def items(self) -> torch.Tensor:
        tied = "item_embedding_table" in self._modules
        return self.item_embedding_table.weight if tied else self.output_layer

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor | None = None,
        training: bool = False,
        testing: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(scores, targets) of inputs (N, D): (N, V), log-probabilities at compat 0.1.

        With sampled softmax in training (N, 1 + n): the target's score first, then those of n drawn
        items, and targets are zeros.
        """
        sampled = self.sampled_softmax and training
        if sampled:
            scores, targets = self.sampled(inputs, targets)
        else:
            scores = inputs @ up_to_date(self.items).T + self._bias()
        if self.softmax_temperature:
            scores = scores / self.softmax_temperature
        return scores.log_softmax(-1) if self._log_probabilities else scores, targets

    def sampled(
        self, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the targets and of drawn items, each less the log of its chance; see
        LogUniformSampler. Drawn items that are the target get -655.04."""
        if not self._sampler:
            self._sampler = (LogUniformSampler(*self._drawn_from),)
        ids, of_targets, of_ids = self._sampler[0].to(inputs.device).sample(targets)
        items, bias = up_to_date(self.items), self._bias()
        own = (inputs * items[targets]).sum(-1) - torch.log(of_targets + T4REC_EPSILON)
        others = inputs @ items[ids].T - torch.log(of_ids + T4REC_EPSILON)
        if self.output_layer_bias is not None:
            own, others = own + bias[targets], others + bias[ids]
        others = torch.where(targets[:, None] == ids, T4REC_HIT, others)
        return torch.cat([own[:, None], others], dim=1), torch.zeros_like(targets)

    def _bias(self) -> torch.Tensor | float:
        return 0.0 if self.output_layer_bias is None else up_to_date(self.output_layer_bias)


class _Scorer(Block):
    """Keeps the reference's checkpoint keys, `pre.module...`."""

    def forward(self, inputs: torch.Tensor, **options: Any) -> Any:
        return self.module(inputs, **options)


class NextItemPredictionPrepareBlock(BuildableBlock):
    """The output layer of NextItemPredictionTask.

    target_dim            number of items, V
    weight_tying          score with item_embedding_table, else with a table of the layer's own
    item_embedding_table  torch.nn.Embedding of V rows
    softmax_temperature   scores are divided by it; 0: by nothing
    sampled_softmax       in training score the target and max_n_samples drawn items
    max_n_samples         how many items are drawn
    min_id                the lowest id that is drawn

    build(input_size) gives a block: inputs (N, D) -> (scores, targets), see ItemScores; at compat
    0.1 with a bias. Raises ValueError for a table that is missing or of other sizes.
    Replaces transformers4rec.torch.model.prediction_task.NextItemPredictionPrepareBlock.
    """

    def __init__(
        self,
        target_dim: int,
        weight_tying: bool = False,
        item_embedding_table: nn.Embedding | None = None,
        softmax_temperature: float = 0,
        sampled_softmax: bool | None = False,
        max_n_samples: int | None = 100,
        min_id: int | None = 0,
    ) -> None:
        if weight_tying and item_embedding_table is None:
            raise ValueError(
                "NextItemPredictionPrepareBlock: weight_tying needs item_embedding_table"
            )
        if weight_tying and item_embedding_table.num_embeddings != target_dim:
            raise ValueError(
                "NextItemPredictionPrepareBlock: with weight_tying target_dim must be the item"
                f" table's rows, {item_embedding_table.num_embeddings}; got {target_dim}"
            )
        self.target_dim = target_dim
        self.weight_tying = weight_tying
        self.item_embedding_table = item_embedding_table
        self.softmax_temperature = softmax_temperature
        self.sampled_softmax = bool(sampled_softmax)
        self.max_n_samples = max_n_samples
        self.min_id = min_id or 0

    def build(self, input_size: Size) -> Block:
        """The output layer for inputs of this size."""
        width = int(input_size[-1])
        if self.weight_tying and width != self.item_embedding_table.embedding_dim:
            raise ValueError(
                "NextItemPredictionPrepareBlock: with weight_tying inputs must be as wide as the"
                f" item table, {self.item_embedding_table.embedding_dim}; got {width}"
            )
        return _Scorer(ItemScores(self, width), [-1, self.target_dim])

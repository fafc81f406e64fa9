"""Replaced-item detection: a model learns to tell its own guesses from the items of a session.

ELECTRA (Clark et al., arXiv 2003.10555) for sessions: the generator is the masked language model of
masking "rtd"; its guesses take the place of the masked items, and the discriminator says of each
position whether a replaced item stands there.
"""

from __future__ import annotations

import torch
from torch import nn

from t4r_fast.compat.torch.block.base import BuildableBlock
from t4r_fast.compat.torch.block.transformer import TransformerBlock
from t4r_fast.compat.torch.features.sequence import Encoded
from t4r_fast.compat.torch.masking import ReplacementLanguageModeling, gumbel
from t4r_fast.compat.torch.model.prediction_task import Asked, NextItemPredictionTask
from t4r_fast.model.next_item import LazyLogits
from t4r_fast.ops._table import up_to_date

# Scores of this many items are formed at a time while guesses are drawn: N x 4,096 numbers.
_TILE = 4096


class ReplacedItemPredictionTask(NextItemPredictionTask):
    """Next-item prediction under masking "rtd", trained together with detection of replaced items.

    loss = next-item loss + discriminator_weight * mean over items of BCE(is this item replaced?)

    discriminator         a block from the input block's vectors (B, L, D) to hidden states, e.g. a
                          TransformerBlock of another config. None: the body itself, so that both
                          models share their weights
    discriminator_weight  > 0; 50 is ELECTRA's

    The other arguments are those of NextItemPredictionTask. Guesses are drawn from the generator's
    softmax over all items, or over the batch's masked items with sample_from_batch; no gradient
    goes through the draw. A guess that hits the true item counts as not replaced. Side features
    stay those of the true item. Evaluation, inference, `labels` and `predictions` are those of the
    next-item task. The reference defines the draw (ReplacementLanguageModeling) but never trains
    with it. Raises ValueError when the masking is another one.
    """

    def __init__(
        self,
        *args: object,
        discriminator: nn.Module | BuildableBlock | None = None,
        discriminator_weight: float = 50.0,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not discriminator_weight > 0:
            raise ValueError(
                "ReplacedItemPredictionTask: discriminator_weight must be > 0; got"
                f" {discriminator_weight}"
            )
        self._given_discriminator = discriminator
        self.discriminator: nn.Module | None = None
        self.discriminator_weight = discriminator_weight

    def build(
        self,
        body: nn.Module,
        input_size: tuple[int, ...],
        inputs: nn.Module | None = None,
        **options: object,
    ) -> None:
        """Connect the task to the body and its input block."""
        inputs = getattr(body, "inputs", None) if inputs is None else inputs
        super().build(body, input_size, inputs, **options)
        if not isinstance(self.masking, ReplacementLanguageModeling):
            raise ValueError(
                "ReplacedItemPredictionTask: the input block's masking must be 'rtd'; got"
                f" {type(self.masking).__name__}"
            )
        self.masking.has_discriminator = True
        discriminator, width = self._given_discriminator, int(input_size[-1])
        if isinstance(discriminator, BuildableBlock):
            discriminator = discriminator.build(inputs.output_size())
        if discriminator is not None:
            width = int(discriminator.output_size()[-1])
        elif not isinstance(body, nn.Sequential) or body[0] is not inputs:
            raise ValueError(
                "ReplacedItemPredictionTask: the body must be a SequentialBlock that begins with"
                " the input block; else give discriminator=..."
            )
        self.discriminator = discriminator
        self.detector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        # In a tuple: they are the model's modules, and not this task's once more.
        self._model = (inputs, body)

    def noted(self) -> Encoded:
        return super().noted()._replace(columns=self._model[0].noted_columns)

    def run(
        self,
        inputs: torch.Tensor,
        batch: Encoded,
        targets: torch.Tensor | None = None,
        training: bool = False,
        testing: bool = False,
        asked: Asked | None = None,
    ):
        output = super().run(inputs, batch, targets, training, testing, asked)
        if training:
            detection = self.detection_loss(output["predictions"], batch)
            output["loss"] = output["loss"] + self.discriminator_weight * detection
        return output

    def detection_loss(self, predictions: LazyLogits, batch: Encoded | None = None) -> torch.Tensor:
        """Mean binary cross-entropy over the items of the batch, replaced or not.

        batch  None: the one that the input block has seen last
        """
        batch = self.noted() if batch is None else batch
        input_block, body = self._model
        item_ids = batch.drawn.item_ids
        corrupted, replaced = self.masking.replace_items(item_ids, *self._guesses(predictions))
        x = input_block.unmasked(batch.columns, corrupted)
        if self.discriminator is not None:
            x = self.discriminator(x)
        else:
            for block in list(body)[1:]:
                x = block.run(x, batch.drawn) if isinstance(block, TransformerBlock) else block(x)
        x = x[0] if isinstance(x, (tuple, list)) else x  # GRU: (outputs, state)
        scores = self.detector(x.float()).squeeze(-1)
        item = (item_ids != self.padding_idx).to(scores.dtype)
        losses = nn.functional.binary_cross_entropy_with_logits(
            scores, replaced.to(scores.dtype), reduction="none"
        )
        return (losses * item).sum() / item.sum().clamp(min=1)

    @torch.no_grad()
    def _guesses(self, predictions: LazyLogits) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat positions of the masked items (N,), and the generator's guesses for them."""
        # One host sync: the draw forms N x V numbers, of which only masked items are worth any.
        at = (predictions.labels != self.padding_idx).nonzero().flatten()
        hidden, items = predictions.hidden[at], up_to_date(predictions.items)
        bias = None if predictions.bias is None else up_to_date(predictions.bias)
        if not self.masking.sample_from_batch:
            return at, _sample(hidden, items, bias, predictions.temperature)
        masked = predictions.labels[at]
        bias = None if bias is None else bias[masked]
        return at, masked[_sample(hidden, items[masked], bias, predictions.temperature)]


def _sample(
    hidden: torch.Tensor,
    items: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """One item per row of hidden (N, D), drawn from softmax(scores): int64 (N,).

    The largest of scores + Gumbel noise is such a draw, and it can be looked for tile by tile.
    """
    best = hidden.new_full((len(hidden),), float("-inf"))
    found = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    for start in range(0, len(items), _TILE):
        tile = slice(start, start + _TILE)
        scores = hidden @ items[tile].T
        if bias is not None:
            scores = scores + bias[tile]
        scores = scores / temperature
        noisy = scores + gumbel(scores)
        value, index = noisy.max(1)
        found = torch.where(value > best, index + start, found)
        best = torch.maximum(value, best)
    return found

"""Blocks that the reference calls experimental."""

from __future__ import annotations

import torch
from torch import nn

from t4r_fast.compat.torch.tabular.base import TabularBlock

_FUSIONS = ("elementwise-mul", "elementwise-sum", "concat")


class PostContextFusion(TabularBlock):
    """Joins what a sequence model found with a context that it did not see (latent cross).

    sequential_module    SequentialBlock of an input block and a body: (B, L, D)
    post_context_module  a block on the same batch: (B, L, C), or (B, C), repeated over L
    fusion_aggregation   "elementwise-mul": h * (1 + W c + b); "elementwise-sum": h + W c + b;
                         "concat": (B, L, D + C)

    Raises ValueError on another fusion. Source: Beutel et al., "Latent Cross", WSDM 2018.
    Replaces transformers4rec.torch.experimental.PostContextFusion.
    """

    def __init__(
        self,
        sequential_module: nn.Module,
        post_context_module: nn.Module,
        fusion_aggregation: str = "elementwise-mul",
    ) -> None:
        super().__init__()
        if fusion_aggregation not in _FUSIONS:
            raise ValueError(
                f"PostContextFusion: fusion_aggregation must be one of {', '.join(_FUSIONS)}; got"
                f" {fusion_aggregation!r}"
            )
        self.sequential_module = sequential_module
        self.post_context_module = post_context_module
        self.fusion_aggregation = fusion_aggregation
        self.inputs = sequential_module.inputs
        *_, self.seq_length, width = sequential_module.output_size()
        context_width = int(post_context_module.output_size()[-1])
        if fusion_aggregation == "concat":
            self.last_dim = width + context_width
        else:
            self.last_dim = width
            self.context_projection = nn.Linear(context_width, width)

    def forward(
        self,
        inputs: dict[str, torch.Tensor],
        training: bool = False,
        testing: bool = False,
        **_: object,
    ) -> torch.Tensor:
        hidden = self.sequential_module(inputs, training=training, testing=testing)
        if isinstance(hidden, (tuple, list)):  # GRU: (outputs, state)
            hidden = hidden[0]
        context = self.post_context_module(inputs)
        if context.dim() == 2:
            context = context.unsqueeze(1).expand(-1, hidden.shape[1], -1)
        elif context.shape[1] < hidden.shape[1]:
            # Inference of a masked model appends a position; nothing is known of the next item.
            missing = hidden.shape[1] - context.shape[1]
            context = nn.functional.pad(context, (0, 0, 0, missing))
        if self.fusion_aggregation == "concat":
            return torch.cat([hidden, context], dim=-1)
        context = self.context_projection(context)
        if self.fusion_aggregation == "elementwise-mul":
            return hidden * (1.0 + context)
        return hidden + context

    def output_size(self, input_size: object = None) -> tuple[int, ...]:
        return (-1, self.seq_length, self.last_dim)

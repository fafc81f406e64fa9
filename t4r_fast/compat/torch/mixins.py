"""What blocks, tasks, heads and models have in common, by the names of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from t4r_fast.compat.config.schema import SchemaMixin
from t4r_fast.compat.torch.nested import nested_detach
from t4r_fast.schema import Schema


class OutputSizeMixin(SchemaMixin):
    """A module that knows the size of its output for a size of its input.

    Subclasses define forward_output_size(input_size), or output_size itself. Sizes are tuples with
    -1 (or None) for axes that vary; of a dict of columns a dict of tuples.
    """

    input_size: Any = None

    def build(self, input_size: Any, schema: Schema | None = None, **_: object) -> Any:
        """Prepare for inputs of this size; returns itself. The first schema that is set stays."""
        self.set_schema(schema)
        self.input_size = input_size
        return self

    def output_size(self, input_size: Any = None) -> Any:
        """For inputs of this size, by default of the size that it was built with; None without
        either."""
        input_size = self.input_size if input_size is None else input_size
        return None if input_size is None else self.forward_output_size(input_size)

    def forward_output_size(self, input_size: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not know its output size")

    def __rrshift__(self, other: Any) -> Any:
        from t4r_fast.compat.torch.block.base import right_shift_block

        return right_shift_block(self, other)


class LossMixin:
    """For a torch.nn.Module with a loss: forward(inputs, targets, training, testing) of the module
    gives dict(loss, labels, predictions)."""

    def compute_loss(
        self,
        inputs: torch.Tensor | Mapping[str, torch.Tensor],
        targets: torch.Tensor | Mapping[str, torch.Tensor],
        compute_metrics: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The loss of a batch, (). In evaluation mode that of evaluation.

        compute_metrics  also count the batch into the metrics, where the module has some
        kwargs           further arguments of forward, such as call_body of a Head

        The reference leaves it to subclasses, and none of its own has it.
        """
        flags = {"training": self.training, "testing": not self.training}
        outputs = self(inputs, targets=targets, **{**flags, **kwargs})
        if compute_metrics and isinstance(self, MetricsMixin):
            self.calculate_metrics(nested_detach(outputs["predictions"]), outputs["labels"])
        return outputs["loss"]


class MetricsMixin:
    """For a torch.nn.Module with metrics, which count batches until they are reset."""

    def calculate_metrics(self, inputs: Any, targets: Any) -> dict[str, torch.Tensor]:
        """Count predictions (`inputs`) and targets of a batch; returns the batch's own values."""
        raise NotImplementedError(f"{type(self).__name__} must define calculate_metrics")

    def compute_metrics(self, mode: str | None = None) -> dict[str, Any]:
        """The metrics over all batches since reset_metrics(), by key."""
        raise NotImplementedError(f"{type(self).__name__} must define compute_metrics")

    def reset_metrics(self) -> None:
        """Forget all batches."""
        raise NotImplementedError(f"{type(self).__name__} must define reset_metrics")

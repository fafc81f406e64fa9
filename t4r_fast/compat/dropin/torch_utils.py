"""transformers4rec.torch.utils.torch_utils: its names, gathered from where they stand here."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from t4r_fast.compat.config.schema import requires_schema
from t4r_fast.compat.torch.block.transformer import MappingTransformerMasking
from t4r_fast.compat.torch.mixins import LossMixin, MetricsMixin, OutputSizeMixin
from t4r_fast.compat.torch.nested import (
    atleast_1d,
    nested_concat,
    nested_detach,
    nested_numpify,
    nested_truncate,
    numpy_pad_and_concatenate,
    torch_pad_and_concatenate,
)
from t4r_fast.compat.torch.relevance import (
    check_inputs,
    create_output_placeholder,
    extract_topk,
    one_hot_1d,
    tranform_label_to_onehot,
)
from t4r_fast.compat.torch.tabular.base import column_sizes
from t4r_fast.schema import Schema

__all__ = [
    "LambdaModule",
    "LossMixin",
    "MappingTransformerMasking",
    "MetricsMixin",
    "OutputSizeMixin",
    "atleast_1d",
    "calculate_batch_size_from_input_size",
    "check_gpu",
    "check_inputs",
    "create_output_placeholder",
    "extract_topk",
    "get_output_sizes_from_schema",
    "nested_concat",
    "nested_detach",
    "nested_numpify",
    "nested_truncate",
    "numpy_pad_and_concatenate",
    "one_hot_1d",
    "requires_schema",
    "torch_pad_and_concatenate",
    "tranform_label_to_onehot",
]


class LambdaModule(nn.Module):
    """A function of one argument as a module. A model that holds one cannot be saved as JSON."""

    def __init__(self, lambda_fn: Callable[[Any], Any]) -> None:
        super().__init__()
        if not isinstance(lambda_fn, types.FunctionType):
            raise TypeError(f"LambdaModule: lambda_fn must be a function; got {lambda_fn!r}")
        self.lambda_fn = lambda_fn

    def forward(self, x: Any) -> Any:
        return self.lambda_fn(x)


def check_gpu(module: nn.Module) -> bool:
    """Whether a module's first parameter is on a CUDA device; False without parameters."""
    first = next(module.parameters(), None)
    return first is not None and first.is_cuda


def calculate_batch_size_from_input_size(input_size: Any) -> int:
    """The first number of a size, or of the first size in a dict of columns."""
    if isinstance(input_size, Mapping):
        input_size = next(size for size in input_size.values() if isinstance(size, (tuple, list)))
    return input_size[0]


def get_output_sizes_from_schema(
    schema: Schema, batch_size: int = -1, max_sequence_length: int | None = None
) -> dict[str, torch.Size]:
    """Size of every column of a batch: (B,) numbers, (B, L) lists, (B, L, W) or (B, W) vectors.

    L is max_sequence_length, else the largest value count of the column. Raises ValueError for a
    column of vectors whose shape the schema does not give.
    """
    sizes = column_sizes(schema, max_sequence_length, batch_size)
    return {name: torch.Size(size) for name, size in sizes.items()}

"""Tensors and arrays in lists, tuples and dicts: detached, cut, and joined along the first axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch


def _each(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """function(leaf, leaf of each other) in the same lists, tuples and dicts."""
    if isinstance(value, Mapping):
        found = {name: _each(function, v, *(o[name] for o in others)) for name, v in value.items()}
        return type(value)(found)
    if isinstance(value, (list, tuple)):
        parts = [_each(function, *leaves) for leaves in zip(value, *others, strict=True)]
        named = hasattr(value, "_fields")
        return type(value)(*parts) if named else type(value)(parts)
    return function(value, *others)


def nested_detach(tensors: Any) -> Any:
    """The same without gradients."""
    return _each(lambda t: t.detach(), tensors)


def nested_numpify(tensors: Any) -> Any:
    """As arrays on the host; bfloat16, which NumPy does not have, as float32."""

    def array(tensor: torch.Tensor) -> np.ndarray:
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    return _each(array, tensors)


def nested_truncate(tensors: Any, limit: int) -> Any:
    """The first `limit` rows."""
    return _each(lambda t: t[:limit], tensors)


def nested_concat(tensors: Any, new_tensors: Any, padding_index: float = -100) -> Any:
    """The rows of both, in the same lists, tuples and dicts; see torch_pad_and_concatenate.

    Raises TypeError where the two are not made alike, or hold neither tensors nor arrays.
    """
    if type(tensors) is not type(new_tensors):
        raise TypeError(
            "nested_concat: tensors and new_tensors must be of one type; got"
            f" {type(tensors).__name__} and {type(new_tensors).__name__}"
        )

    def joined(first: Any, second: Any) -> Any:
        for kind, join in (
            (torch.Tensor, torch_pad_and_concatenate),
            (np.ndarray, numpy_pad_and_concatenate),
        ):
            if isinstance(first, kind) and isinstance(second, kind):
                return join(first, second, padding_index)
        raise TypeError(
            "nested_concat: needs two tensors or two arrays in each place; got"
            f" {type(first).__name__} and {type(second).__name__}"
        )

    return _each(joined, tensors, new_tensors)


def torch_pad_and_concatenate(
    tensor1: torch.Tensor, tensor2: torch.Tensor, padding_index: float = -100
) -> torch.Tensor:
    """(N1 + N2, max(L1, L2), ...): the rows of both; where they are (N, L, ...) with different L,
    shorter rows end in padding_index. A number counts as (1,)."""
    tensor1, tensor2 = atleast_1d(tensor1), atleast_1d(tensor2)
    if tensor1.dim() == 1 or tensor1.shape[1] == tensor2.shape[1]:
        return torch.cat((tensor1, tensor2))
    found = tensor1.new_full(_joined_shape(tensor1.shape, tensor2.shape), padding_index)
    return _filled(found, tensor1, tensor2)


def numpy_pad_and_concatenate(
    array1: np.ndarray, array2: np.ndarray, padding_index: float = -100
) -> np.ndarray:
    """torch_pad_and_concatenate of arrays."""
    array1, array2 = atleast_1d(array1), atleast_1d(array2)
    if array1.ndim == 1 or array1.shape[1] == array2.shape[1]:
        return np.concatenate((array1, array2))
    shape = _joined_shape(array1.shape, array2.shape)
    return _filled(np.full(shape, padding_index, dtype=array1.dtype), array1, array2)


def atleast_1d(tensor_or_array: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
    """(1,) for a tensor or an array of no axes, anything else as it is."""
    if isinstance(tensor_or_array, torch.Tensor):
        return torch.atleast_1d(tensor_or_array)
    return np.atleast_1d(tensor_or_array)


def _joined_shape(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return (first[0] + second[0], max(first[1], second[1]), *first[2:])


def _filled(found: Any, first: Any, second: Any) -> Any:
    found[: first.shape[0], : first.shape[1]] = first
    found[first.shape[0] :, : second.shape[1]] = second
    return found

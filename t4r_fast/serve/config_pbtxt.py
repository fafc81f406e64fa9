"""config.pbtxt of a Python-backend model, as text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Column:
    """A tensor of a served model. kind: INT64, INT32, FP32, FP64 or STRING; dims without the batch.

    of_any_length  requests with different dims may stand in one batch
    """

    name: str
    kind: str
    dims: tuple[int, ...]
    of_any_length: bool = False


def render(
    name: str,
    inputs: Sequence[Column],
    outputs: Sequence[Column],
    *,
    max_batch_size: int,
    queue_delay_us: int,
    instances: int,
    warmup: dict[str, tuple[int, ...]],
) -> str:
    """The file's text.

    max_batch_size  0: the dims are whole shapes and requests are not batched
    warmup          the dims of each input of one warm-up request; input i reads warmup/input_i
    """
    lines = [f"name: {_quoted(name)}", 'backend: "python"', f"max_batch_size: {max_batch_size}"]
    lines += [_tensor("input", column) for column in inputs]
    lines += [_tensor("output", column) for column in outputs]
    if max_batch_size:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {queue_delay_us} }}")
    lines.append(f"instance_group [ {{ count: {instances} kind: KIND_CPU }} ]")
    lines.append('model_warmup [\n  {\n    name: "one session"\n    batch_size: 1')
    lines += [_warm(i, column, warmup[column.name]) for i, column in enumerate(inputs)]
    lines.append("  }\n]")
    return "\n".join(lines) + "\n"


def _tensor(field: str, column: Column) -> str:
    ragged = " allow_ragged_batch: true" if column.of_any_length else ""
    dims = ", ".join(map(str, column.dims))
    return (
        f"{field} [ {{ name: {_quoted(column.name)} data_type: TYPE_{column.kind}"
        f" dims: [ {dims} ]{ragged} }} ]"
    )


def _warm(place: int, column: Column, dims: tuple[int, ...]) -> str:
    shape = ", ".join(map(str, dims))
    return (
        f"    inputs {{ key: {_quoted(column.name)} value: {{ data_type: TYPE_{column.kind}"
        f' dims: [ {shape} ] input_data_file: "input_{place}" }} }}'
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

"""A train step of a tutorial model on generated sessions, eager and as one CUDA graph."""

from __future__ import annotations

import time
from typing import Any

import torch

from t4r_fast.schema import ColumnSchema, Schema
from t4r_fast.tutorial.models import SIDE_FEATURES, build

MODELS = ("gru", "xlnet_mlm", "xlnet_mlm_side")
SESSIONS, LENGTH = 256, 20
SUFFIX = "-list_seq"
SIZES = {"category_id": 567, "brand": 2641}  # the tutorial's
LEARNING_RATE = 1e-3
# Of the losses of graph and eager steps. The GRU draws nothing; XLNet's masks and dropout come from
# other places of the random stream in a graph.
TOLERANCE = {"gru": 1e-3, "xlnet_mlm": 0.05, "xlnet_mlm_side": 0.05}


def schema(items: int) -> Schema:
    columns = [
        ColumnSchema.create_categorical("product_id" + SUFFIX, items - 1, tags=["item_id", "list"])
    ]
    for name in SIDE_FEATURES:
        if name in SIZES:
            column = ColumnSchema.create_categorical(name + SUFFIX, SIZES[name] - 1, tags=["list"])
        else:
            column = ColumnSchema.create_continuous(name + SUFFIX, tags=["list"])
        columns.append(column)
    return Schema(columns)


def batch(items: int, device: str, sessions: int = SESSIONS) -> dict[str, torch.Tensor]:
    """Sessions of 2 to 20 items, six on average."""
    generator = torch.Generator().manual_seed(0)
    length = 2 + (torch.rand(sessions, 1, generator=generator) ** 3.5 * (LENGTH - 1)).long()
    real = torch.arange(LENGTH) < length
    found = {}
    for name, size in {"product_id": items, **SIZES}.items():
        ids = torch.randint(3, size, (sessions, LENGTH), generator=generator)
        found[name + SUFFIX] = torch.where(real, ids, 0)
    for name in SIDE_FEATURES:
        if name not in SIZES:
            values = torch.randn(sessions, LENGTH, generator=generator)
            found[name + SUFFIX] = torch.where(real, values, 0.0)
    return {name: tensor.to(device) for name, tensor in found.items()}


class Step:
    """One training step on one batch; calling it gives the loss, not read to the host."""

    def __init__(self, name: str, device: str, items: int, sessions: int = SESSIONS) -> None:
        torch.manual_seed(0)
        self.model = build(name, schema(items)).to(device)
        self.batch = batch(items, device, sessions)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, fused=True, capturable=device == "cuda"
        )

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(self.batch, training=True)["loss"]
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def eager_losses(
    name: str, device: str, items: int, steps: int, sessions: int = SESSIONS
) -> list[float]:
    step = Step(name, device, items, sessions)
    return [float(step()) for _ in range(steps)]


def compare_graph(name: str, device: str, items: int = 118_335, steps: int = 20) -> dict[str, Any]:
    """Milliseconds of a step, eager and replayed; raises when the losses part or a value is read.

    A capture fails by itself when a step reads a value on the host or allocates by data.
    """
    warm = 3  # on a side stream, as torch.cuda.graph asks for
    eager = eager_losses(name, device, items, warm + steps)
    step = Step(name, device, items)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    step.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step()
    replayed = []
    for _ in range(steps):
        graph.replay()
        replayed.append(float(loss))
    for i, (ours, theirs) in enumerate(zip(replayed, eager[warm:], strict=True)):
        if not abs(ours - theirs) <= TOLERANCE[name] * theirs:
            raise AssertionError(f"{name}: step {i} has loss {ours} in the graph, {theirs} without")
    return {
        "graph_ms": milliseconds(graph.replay),
        "eager_ms": milliseconds(Step(name, device, items)),
    }


def milliseconds(call: Any, repeats: int = 20) -> float:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats

"""Blocks that know the size of their output, and how they are put in a row.

Names, arguments and checkpoint keys of transformers4rec.torch.block.base. Sizes are tuples with -1
(or None) for axes that vary: (B, L, D) is (-1, L, D).
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Sequence

import torch
from torch import nn

from t4r_fast.compat import warn_once

Size = Sequence[int | None]


def _size(output_size: Size) -> tuple[int, ...]:
    return tuple(-1 if n is None else int(n) for n in output_size)


def takes_mode(module: nn.Module) -> bool:
    """Whether forward(...) accepts training= and testing=; asked once, when a block is built."""
    parameters = inspect.signature(module.forward).parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return any_keyword or {"training", "testing"} <= set(parameters)


class BlockBase(nn.Module):
    """A module with an output size. `a >> b` puts b behind a."""

    def output_size(self) -> tuple[int, ...]:
        raise NotImplementedError(f"{type(self).__name__} does not know its output size")

    def __rshift__(self, other: nn.Module | BuildableBlock) -> SequentialBlock:
        return SequentialBlock(self, other)


class BuildableBlock(abc.ABC):
    """A recipe: becomes a block once the size of its input is known."""

    @abc.abstractmethod
    def build(self, input_size: Size) -> BlockBase:
        """The block for inputs of this size."""

    def __rrshift__(self, other: nn.Module) -> SequentialBlock:
        return SequentialBlock(other, self)


class Block(BlockBase):
    """Any module with the size of its output.

    module       (..., D_in) -> (..., D_out), or a tuple whose first entry is that, as GRU gives
    output_size  e.g. [None, 20, 128]

    torch.nn.GRU, LSTM and RNN without batch_first=True read (B, L, D) as (time, batch, D): they
    recur over the *sessions of the batch*, and no session sees its own past. Transformers4Rec's
    tutorial does this; the block keeps it and warns once. Pass batch_first=True to recur over time.
    """

    def __init__(self, module: nn.Module, output_size: Size) -> None:
        super().__init__()
        self.module = module
        self._output_size = _size(output_size)
        if isinstance(module, nn.RNNBase) and not module.batch_first:
            warn_once(
                "batch_first",
                f"{type(module).__name__} without batch_first=True recurs over the sessions of a"
                " batch, not over the items of a session, as the Transformers4Rec tutorial does;"
                " build it with batch_first=True to recur over time",
            )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self.module(inputs)

    def output_size(self) -> tuple[int, ...]:
        return self._output_size


class SequentialBlock(nn.Sequential, BlockBase):
    """Blocks in a row; recipes among them (MLPBlock) are built with the size they receive.

    output_size  given where the last module does not know its own, e.g. a plain nn.Module
    """

    def __init__(self, *args: nn.Module | BuildableBlock, output_size: Size | None = None) -> None:
        if len(args) == 1 and isinstance(args[0], (list, tuple)):
            args = tuple(args[0])
        built: list[nn.Module] = []
        size: tuple[int, ...] | None = None
        for position, block in enumerate(args):
            if isinstance(block, BuildableBlock):
                if size is None:
                    raise ValueError(
                        f"SequentialBlock: block {position} ({type(block).__name__}) must follow a"
                        " block with a known output size; give that block an output_size"
                    )
                block = block.build(size)
            size = _output_size_of(block, size)
            built.append(block)
        super().__init__(*built)
        self._output_size = _size(output_size) if output_size is not None else size
        self._takes_mode = [takes_mode(block) for block in built]

    @property
    def inputs(self) -> nn.Module | None:
        """The input block in front, if this row begins with one."""
        first = self[0] if len(self) else None
        if first is None:
            return None
        return first if hasattr(first, "item_embedding_table") else getattr(first, "inputs", None)

    def forward(self, inputs, training: bool = False, testing: bool = False):
        for block, mode in zip(self, self._takes_mode, strict=True):
            flags = {"training": training, "testing": testing} if mode else {}
            inputs = block(inputs, **flags)
        return inputs

    def output_size(self) -> tuple[int, ...]:
        if self._output_size is None:
            raise ValueError(
                "SequentialBlock: the last block does not know its output size; pass output_size"
            )
        return self._output_size


def _output_size_of(block: nn.Module, before: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Size behind `block`; plain activations, norms and dropout keep the size."""
    if isinstance(block, BlockBase):
        return block.output_size()
    if isinstance(block, nn.Linear) and before is not None:
        return (*before[:-1], block.out_features)
    keeps = (nn.Dropout, nn.LayerNorm, nn.BatchNorm1d, nn.Identity)
    elementwise = type(block).__module__ == "torch.nn.modules.activation"
    return before if isinstance(block, keeps) or elementwise else None

"""Blocks that know the size of their output, and how they are put in a row.

Names, arguments and checkpoint keys of transformers4rec.torch.block.base. Sizes are tuples with -1
(or None) for axes that vary: (B, L, D) is (-1, L, D).
"""

from __future__ import annotations

import abc
import inspect
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from t4r_fast.compat import warn_once
from t4r_fast.compat.torch.mixins import OutputSizeMixin

LOG = logging.getLogger("t4r_fast")
Size = Sequence[int | None]


def _size(output_size: Size) -> tuple[int, ...]:
    return tuple(-1 if n is None else int(n) for n in output_size)


def takes_mode(module: nn.Module) -> bool:
    """Whether forward(...) accepts training= and testing=; asked once, when a block is built."""
    parameters = inspect.signature(module.forward).parameters
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return any_keyword or {"training", "testing"} <= set(parameters)


class BlockBase(OutputSizeMixin, nn.Module):
    """A module with an output size. `a >> b` puts b behind a, ["x", "y"] >> a picks columns for a.

    Subclasses define forward and forward_output_size(input_size), or output_size itself.
    """

    def to_model(self, prediction_task_or_head: nn.Module, inputs: Any = None, **kwargs: object):
        """The model of this body and a task or a Head; kwargs are those of Model."""
        from t4r_fast.compat.torch.model.base import Model
        from t4r_fast.compat.torch.model.head import Head

        head = prediction_task_or_head
        if not isinstance(head, Head):
            head = Head(self, head, inputs=inputs)
        return Model(head, **kwargs)

    def as_tabular(self, name: str | None = None) -> SequentialBlock:
        """The output as a dict with one entry, named after the class by default."""
        from t4r_fast.compat.torch.tabular.base import AsTabular

        return SequentialBlock(self, AsTabular(name or type(self).__name__))

    def __rshift__(self, other: Any) -> SequentialBlock:
        return right_shift_block(other, self)


class BuildableBlock(abc.ABC):
    """A recipe: becomes a block once the size of its input is known."""

    @abc.abstractmethod
    def build(self, input_size: Size) -> BlockBase:
        """The block for inputs of this size."""

    def to_module(self, shape_or_module: Any) -> BlockBase:
        """build() for a size, or for what comes out of a module."""
        return self.build(size_of(shape_or_module))

    def __rrshift__(self, other: Any) -> SequentialBlock:
        return right_shift_block(self, other)


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

    def output_size(self, input_size: Any = None) -> tuple[int, ...]:
        return self._output_size


class SequentialBlock(nn.Sequential, BlockBase):
    """Blocks in a row; recipes among them (MLPBlock) are built with the size they receive.

    output_size  given where the last module does not know its own, e.g. a plain nn.Module
    """

    def __init__(self, *args: nn.Module | BuildableBlock, output_size: Size | None = None) -> None:
        if len(args) == 1 and isinstance(args[0], (list, tuple)):
            args = tuple(args[0])
        super().__init__()
        self._given_size = None if output_size is None else _size(output_size)
        self._takes_mode: list[bool] = []
        last = None
        for place, block in enumerate(args):
            last = self.add_module_and_maybe_build(str(place), block, last, place)
        self._takes_mode = self.modes()
        _warn_of_masking(list(self))

    def add_module(self, name: str, module: nn.Module | list[str] | None) -> None:
        """Put a module behind the others; a list of names becomes a FilterFeatures."""
        if isinstance(module, list):
            from t4r_fast.compat.torch.tabular.base import FilterFeatures

            module = FilterFeatures(module)
        super().add_module(name, module)

    def add_module_and_maybe_build(
        self,
        name: str,
        module: nn.Module | BuildableBlock | list[str],
        parent: nn.Module | None,
        idx: int,
    ) -> nn.Module:
        """Put a block behind the others, built with the size that it receives.

        name     its name in the row, "0", "1", ...
        module   a block, a recipe, or names of columns
        parent   the block in front of it, or None
        idx      its place; the first block says what size the row takes in
        returns  the block

        Raises ValueError for a recipe behind a block that does not know its output size.
        """
        size = self._size_behind(parent)
        if isinstance(module, BuildableBlock):
            if size is None:
                raise ValueError(
                    f"SequentialBlock: block {idx} ({type(module).__name__}) must follow a block"
                    " with a known output size; give that block an output_size"
                )
            module = module.build(size)
        elif isinstance(module, BlockBase) and size is not None and module.input_size is None:
            module.build(size)
        self.add_module(name, module)
        module = self._modules[name]
        if idx == 0:
            self.input_size = getattr(module, "input_size", None)
        return module

    def _size_behind(self, block: nn.Module | None) -> Any:
        """Of what comes out of a block, which may stand in this row; None where nobody knows."""
        if block is None:
            return None
        row = list(self)
        if not any(b is block for b in row):
            return _output_size_of(block, None)
        size = None
        for b in row:
            size = _output_size_of(b, size)
            if b is block:
                break
        return size

    @staticmethod
    def get_children_by_class_name(parent: Iterable[nn.Module], *class_name: str) -> list:
        """The blocks of a row whose class has one of these names, and those that they merge."""
        found = []
        for child in parent:
            merged = getattr(child, "merge_values", None) or []
            found += [b for b in (*merged, child) if type(b).__name__ in class_name]
        return found

    @property
    def inputs(self) -> nn.Module | None:
        """The input block in front, if this row begins with one."""
        first = self[0] if len(self) else None
        # An input block has parts to merge; plain MergeTabulars, which have them too, do as well.
        return first if hasattr(first, "to_merge") else getattr(first, "inputs", None)

    def forward(self, inputs, training: bool = False, testing: bool = False):
        for block, mode in zip(self, self.modes(), strict=True):
            flags = {"training": training, "testing": testing} if mode else {}
            inputs = block(inputs, **flags)
        return inputs

    def modes(self) -> list[bool]:
        """Which blocks take training= and testing=; asked anew where blocks were added since."""
        known = self._takes_mode
        return known if len(known) == len(self) else [takes_mode(block) for block in self]

    def output_size(self, input_size: Any = None) -> Any:
        size = self._given_size
        if size is None and len(self):
            size = self._size_behind(self[-1])
        if size is None:
            raise ValueError(
                "SequentialBlock: the last block does not know its output size; pass output_size"
            )
        return size

    def __add__(self, other: nn.Module):
        """Both on the same inputs, their dicts of outputs merged."""
        from t4r_fast.compat.torch.tabular.base import MergeTabular

        return MergeTabular(self, other)


def size_of(shape_or_module: Any) -> Any:
    """The output size of a module; a size as it is.

    Raises ValueError for a module that does not know its output size.
    """
    if not isinstance(shape_or_module, nn.Module):
        return shape_or_module
    known = getattr(shape_or_module, "output_size", None)
    size = None if known is None else known()
    if size is None:
        raise ValueError(
            f"{type(shape_or_module).__name__} does not know its output size; wrap the module in"
            " Block(module, output_size)"
        )
    return size


def right_shift_block(self: Any, other: Any) -> SequentialBlock:
    """`other >> self`: the blocks of both in one row; a list of names picks columns."""
    return SequentialBlock(*_in_a_row(other), *_in_a_row(self))


def _in_a_row(block: Any) -> list:
    # Subclasses of SequentialBlock, transformations for instance, stay whole.
    return list(block) if type(block) is SequentialBlock else [block]


def build_blocks(*modules: Any) -> list[nn.Module]:
    """The modules, recipes among them built one behind the other."""
    return list(SequentialBlock(*modules))


def _warn_of_masking(blocks: list[nn.Module]) -> None:
    """The masking of the inputs may have arguments for the Transformer, which must know it then."""
    masking = getattr(blocks[0], "masking", None) if blocks else None
    for block in blocks[1:]:
        is_transformer = type(block).__name__ == "TransformerBlock"
        if masking is not None and is_transformer and block.masking is not masking:
            LOG.warning(
                "SequentialBlock: the input block has a masking that the TransformerBlock does not"
                " know; give TransformerBlock(..., masking=inputs.masking)"
            )


def _output_size_of(block: nn.Module, before: Any) -> Any:
    """Size behind `block`; plain activations, norms and dropout keep the size."""
    if isinstance(block, BlockBase):
        try:
            return block.output_size()
        except NotImplementedError:
            return None
    if hasattr(block, "forward_output_size") and before is not None:
        return block.output_size(before)
    if isinstance(block, nn.Linear) and before is not None:
        return (*before[:-1], block.out_features)
    keeps = (nn.Dropout, nn.LayerNorm, nn.BatchNorm1d, nn.Identity)
    elementwise = type(block).__module__ == "torch.nn.modules.activation"
    return before if isinstance(block, keeps) or elementwise else None

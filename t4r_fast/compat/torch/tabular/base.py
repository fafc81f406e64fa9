"""Blocks that take a dict of columns: transformations before and after, and an aggregation.

Names, arguments and checkpoint keys of transformers4rec.torch.tabular.base. `TabularData` is a dict
from feature name to tensor. Sizes of a dict are a dict of tuples, with -1 for axes that vary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from t4r_fast.compat.config.schema import SchemaMixin
from t4r_fast.compat.torch.block.base import BlockBase, SequentialBlock, size_of
from t4r_fast.compat.torch.mixins import OutputSizeMixin
from t4r_fast.registry import Registry
from t4r_fast.schema import ColumnSchema, Schema, Tags

TabularData = dict[str, torch.Tensor]
Sizes = dict[str, tuple[int, ...]]

tabular_transformation_registry = Registry("transformation", instantiate=True)
tabular_aggregation_registry = Registry("aggregation", instantiate=True)


def column_sizes(
    schema: Schema, max_sequence_length: int | None = None, batch_size: int = -1
) -> Sizes:
    """Size of every column of a batch: (B,) values, (B, L) lists, (B, L, W) or (B, W) vectors.

    L is max_sequence_length, else the schema's largest value count, else -1. W is the last entry
    of the column's shape; only columns tagged "embedding" hold vectors.
    Raises ValueError for a column of vectors without a shape.
    """

    def size(column: ColumnSchema) -> tuple[int, ...]:
        shape = tuple(column.properties.get("shape") or ())
        counted = column.value_count.max if column.value_count is not None else 0
        length = max_sequence_length or counted or -1
        leading = (batch_size, length) if column.is_list else (batch_size,)
        if Tags.EMBEDDING not in column.tags:
            return leading if column.is_list else (*leading, *shape)
        if not shape:
            raise ValueError(
                f"schema: column {column.name!r} is tagged embedding but has no shape, so the"
                " width of its vectors is unknown; give shape=(width,)"
            )
        return (*leading, int(shape[-1]))

    return {column.name: size(column) for column in schema}


class TabularTransformation(OutputSizeMixin, nn.Module):
    """From a dict of columns to a dict of columns. Subclasses define forward(inputs, **kwargs)."""

    def forward(self, inputs: TabularData, **kwargs: object) -> TabularData:
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def forward_output_size(self, input_size: Sizes) -> Sizes:
        return input_size

    @classmethod
    def parse(cls, class_or_str: str | TabularTransformation) -> TabularTransformation:
        return tabular_transformation_registry.parse(class_or_str)


class TabularAggregation(OutputSizeMixin, nn.Module):
    """From a dict of features to one tensor. Subclasses define forward and forward_output_size.

    A feature is (B, D) or, as part of a sequence, (B, L, D). The dict that forward receives is its
    own: it may change the dict, but not the tensors.
    """

    def forward(self, inputs: TabularData) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def forward_output_size(self, input_size: Sizes) -> tuple[int, ...]:
        raise NotImplementedError(f"{type(self).__name__} must define forward_output_size")

    @classmethod
    def parse(cls, class_or_str: str | TabularAggregation) -> TabularAggregation:
        return tabular_aggregation_registry.parse(class_or_str)

    # -- for subclasses --------------------------------------------------------------------------

    def _expand_non_sequential_features(self, inputs: TabularData) -> TabularData:
        """Repeat (B, D) features over the positions of the others, in place."""
        _, length = self._get_seq_features_shapes({k: tuple(v.shape) for k, v in inputs.items()})
        if length:
            for name, value in inputs.items():
                if value.dim() == 2:
                    inputs[name] = value.unsqueeze(1).expand(-1, length, -1)
        return inputs

    def _get_seq_features_shapes(self, sizes: Sizes) -> tuple[Sizes, int]:
        """(B, L) of the features with positions, and L; 0 when there are none."""
        leading = {name: tuple(size[:2]) for name, size in sizes.items() if len(size) >= 3}
        if _differ(leading.values()):
            raise ValueError(
                f"{type(self).__name__}: features of a sequence must share (sessions, positions);"
                f" got {sizes}"
            )
        return leading, next(iter(leading.values()))[1] if leading else 0

    def _check_concat_shapes(self, inputs: TabularData) -> None:
        """Raises ValueError unless all axes but the last agree."""
        if _differ(v.shape[:-1] for v in inputs.values()):
            shapes = {k: tuple(v.shape) for k, v in inputs.items()}
            raise ValueError(
                f"{type(self).__name__}: features must agree in all axes but the last; got {shapes}"
            )

    def _get_agg_output_size(self, input_size: Sizes, agg_dim: int) -> tuple[int, ...]:
        """(B, L, agg_dim), or (B, agg_dim) without a feature that has positions."""
        leading, length = self._get_seq_features_shapes(input_size)
        batch = next(iter(input_size.values()))[0]
        return (batch, length, agg_dim) if leading else (batch, agg_dim)


TabularTransformationType = str | TabularTransformation
TabularTransformationsType = TabularTransformationType | list[TabularTransformationType]
TabularAggregationType = str | TabularAggregation


class SequentialTabularTransformations(SequentialBlock):
    """Transformations in a row, given as modules or names; a list of names is a FilterFeatures."""

    def __init__(self, *transformation: TabularTransformationsType) -> None:
        if len(transformation) == 1 and isinstance(transformation[0], list):
            transformation = tuple(transformation[0])
        super().__init__(*[_transformation(t) for t in transformation])

    def append(self, transformation: TabularTransformationType) -> SequentialTabularTransformations:
        """Put another transformation behind the others."""
        self.add_module(str(len(self)), _transformation(transformation))
        return self

    def build(
        self, input_size: Sizes, schema: Schema | None = None, **_: object
    ) -> SequentialTabularTransformations:
        self.input_size = input_size
        for transformation in self:
            transformation.build(input_size, schema=schema)
            input_size = transformation.output_size(input_size)
        return self

    def output_size(self, input_size: Sizes | None = None) -> Any:
        size = self.input_size if input_size is None else input_size
        for transformation in self:
            size = transformation.output_size(size)
        return size

    def forward(self, inputs: TabularData, **_: object) -> TabularData:
        for transformation in self:
            inputs = transformation(inputs)
        return inputs


def _transformation(value: TabularTransformationsType) -> nn.Module:
    return FilterFeatures(value) if isinstance(value, list) else TabularTransformation.parse(value)


class TabularModule(nn.Module):
    """A module on a dict of columns.

    pre          transformations of its inputs, by name or as modules
    post         transformations of its outputs
    aggregation  what joins its outputs to one tensor, by name or as a module; None: a dict

    All three can also be given for a single call: module(inputs, pre=..., post=...,
    merge_with=..., aggregation=...). merge_with adds the outputs of other modules, or other dicts.
    `a + b` and a.merge(b) run both on the same inputs and merge their outputs.
    """

    def __init__(
        self,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
    ) -> None:
        super().__init__()
        self.input_size: Sizes | None = None
        self.pre = pre
        self.post = post
        self.aggregation = aggregation

    @classmethod
    def from_schema(
        cls, schema: Schema, tags: object = None, **kwargs: object
    ) -> TabularModule | None:
        """For the schema's columns with these tags, or None when there are none."""
        if tags:
            schema = schema.select_by_tag(tags)
        if not len(schema):
            return None
        return cls.from_features(schema.column_names, schema=schema, **kwargs)

    @classmethod
    def from_features(
        cls,
        features: list[str],
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        schema: Schema | None = None,
    ) -> TabularModule:
        """A module that keeps these features and then applies `pre`."""
        rest = pre if isinstance(pre, list) else [pre] if pre is not None else []
        module = cls(pre=[FilterFeatures(features), *rest], post=post, aggregation=aggregation)
        if schema is not None and isinstance(module, SchemaMixin):
            module.set_schema(schema)
        return module

    # The reference's checkpoint keys: what is given by name stands under _pre, _post and
    # _aggregation, what is given as a module under the name itself.

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("pre", "post", "aggregation"):
            super().__setattr__(name, value)
            return
        for key in (name, f"_{name}"):
            self._modules.pop(key, None)
        if isinstance(value, nn.Module):
            self._modules[name] = value
        elif value is not None and name == "aggregation":
            self._modules["_aggregation"] = TabularAggregation.parse(value)
        elif value is not None:
            self._modules[f"_{name}"] = SequentialTabularTransformations(value)

    def _given(self, name: str) -> Any:
        return self._modules.get(name, self._modules.get(f"_{name}"))

    @property
    def pre(self) -> TabularTransformation | SequentialTabularTransformations | None:
        return self._given("pre")

    @property
    def post(self) -> TabularTransformation | SequentialTabularTransformations | None:
        return self._given("post")

    @property
    def aggregation(self) -> TabularAggregation | None:
        return self._given("aggregation")

    def pre_forward(
        self, inputs: TabularData, transformations: TabularTransformationsType | None = None
    ) -> TabularData:
        """What forward receives; `transformations` take the place of `pre`."""
        return _transformed(inputs, self.pre if transformations is None else transformations)

    def forward(self, x: TabularData, *args: object, **kwargs: object) -> TabularData:
        return x

    def post_forward(
        self,
        inputs: TabularData,
        transformations: TabularTransformationsType | None = None,
        merge_with: Any = None,
        aggregation: TabularAggregationType | None = None,
    ) -> TabularData | torch.Tensor:
        """Merge, transform and join what forward gave; the arguments take the module's place."""
        outputs = dict(inputs)
        others = merge_with if isinstance(merge_with, (list, tuple)) else [merge_with]
        for other in others:
            if other is not None:
                outputs.update(other(inputs) if callable(other) else other)
        outputs = _transformed(outputs, self.post if transformations is None else transformations)
        joined = self.aggregation if aggregation is None else TabularAggregation.parse(aggregation)
        if joined is None:
            return outputs
        joined.set_schema(getattr(self, "schema", None))
        return joined(dict(outputs))

    def __call__(
        self,
        inputs: Any,
        *args: object,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        merge_with: Any = None,
        aggregation: TabularAggregationType | None = None,
        **kwargs: object,
    ) -> Any:
        inputs = self.pre_forward(inputs, pre)
        outputs = super().__call__(inputs, *args, **kwargs)
        if isinstance(outputs, dict):
            outputs = self.post_forward(outputs, post, merge_with, aggregation)
        return outputs

    def merge(self, other: nn.Module) -> MergeTabular:
        return MergeTabular(self, other)

    def __add__(self, other: nn.Module) -> MergeTabular:
        return MergeTabular(self, other)


def _transformed(inputs: TabularData, transformations: Any) -> TabularData:
    if transformations is None:
        return inputs
    if isinstance(transformations, list):
        transformations = SequentialTabularTransformations(*transformations)
    return TabularTransformation.parse(transformations)(inputs)


class FilterFeatures(TabularTransformation):
    """Keeps some columns; names that a batch lacks are skipped.

    to_include  their names
    pop         also take them out of the dict that was given
    """

    def __init__(self, to_include: Iterable[str], pop: bool = False) -> None:
        super().__init__()
        self.to_include = list(to_include)
        self.pop = pop

    def forward(self, inputs: TabularData, **_: object) -> TabularData:
        kept = {name: value for name, value in inputs.items() if name in self.to_include}
        if self.pop:
            for name in kept:
                del inputs[name]
        return kept

    def forward_output_size(self, input_size: Sizes) -> Sizes:
        return {name: size for name, size in input_size.items() if name in self.to_include}


class TabularBlock(TabularModule, BlockBase):
    """A TabularModule that knows its output size once it is built; see there for the arguments.

    schema  of its columns
    """

    def __init__(
        self,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        schema: Schema | None = None,
    ) -> None:
        super().__init__(pre=pre, post=post, aggregation=aggregation)
        self.schema = schema

    def build(self, input_size: Sizes, schema: Schema | None = None, **_: object) -> TabularBlock:
        """Prepare for columns of these sizes; returns itself."""
        self.set_schema(schema)
        self.input_size = input_size
        if self.pre is not None:
            input_size = self.pre.build(input_size, schema=schema).output_size(input_size)
        size = self.forward_output_size(input_size)
        if self.post is not None:
            size = self.post.build(size, schema=schema).output_size(size)
        if self.aggregation is not None:
            self.aggregation.build(size, schema=schema)
        return self

    def to_module(self, shape_or_module: Any, device: torch.device | str | None = None) -> Any:
        """build() for a size, or for what comes out of a module; on that device."""
        built = self.build(size_of(shape_or_module))
        return built if device is None else built.to(device)

    def output_size(self, input_size: Sizes | None = None) -> Any:
        """Size of the outputs, a dict of sizes without an aggregation; None before build()."""
        input_size = self.input_size if input_size is None else input_size
        if input_size is None:
            return None
        if self.pre is not None:
            input_size = self.pre.output_size(input_size)
        return self._joined_size(self.forward_output_size(input_size))

    def forward_output_size(self, input_size: Sizes) -> Any:
        return input_size

    def _joined_size(self, size: Any) -> Any:
        if not isinstance(size, dict):
            return size
        if self.post is not None:
            size = self.post.output_size(size)
        if self.aggregation is None:
            return size
        self.aggregation.set_schema(self.schema)
        return self.aggregation.forward_output_size(size)


class MergeTabular(TabularBlock):
    """Runs several modules on the same inputs and merges their outputs.

    modules_to_merge  modules, or dicts of modules by name
    """

    def __init__(
        self,
        *modules_to_merge: nn.Module | dict[str, nn.Module],
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        schema: Schema | None = None,
    ) -> None:
        super().__init__(pre=pre, post=post, aggregation=aggregation, schema=schema)
        if not modules_to_merge:
            raise ValueError(f"{type(self).__name__}: give at least one module to merge")
        if all(isinstance(m, dict) for m in modules_to_merge):
            named = {name: m for modules in modules_to_merge for name, m in modules.items()}
            self.to_merge: nn.ModuleDict | nn.ModuleList = nn.ModuleDict(named)
        elif all(isinstance(m, nn.Module) for m in modules_to_merge):
            self.to_merge = nn.ModuleList(modules_to_merge)
        else:
            raise ValueError(
                f"{type(self).__name__}: modules_to_merge must be modules, or dicts of modules;"
                f" got {[type(m).__name__ for m in modules_to_merge]}"
            )
        schemas = [getattr(m, "schema", None) for m in self.merge_values]
        if schema is None and all(s is not None for s in schemas):
            self.schema = sum(schemas[1:], schemas[0])

    @property
    def merge_values(self) -> list[nn.Module]:
        merged = self.to_merge
        return list(merged.values() if isinstance(merged, nn.ModuleDict) else merged)

    def forward(self, inputs: TabularData, training: bool = True, **_: object) -> TabularData:
        outputs: TabularData = {}
        for module in self.merge_values:
            outputs.update(module(inputs))
        return outputs

    def forward_output_size(self, input_size: Sizes) -> Sizes:
        sizes: Sizes = {}
        for module in self.merge_values:
            sizes.update(module.output_size(input_size))
        return sizes

    def build(self, input_size: Sizes, schema: Schema | None = None, **_: object) -> MergeTabular:
        built = input_size
        if self.pre is not None:
            built = self.pre.build(input_size, schema=schema).output_size(input_size)
        for module in self.merge_values:
            if isinstance(module, TabularBlock):
                module.build(built, schema=schema)
        super().build(input_size, schema=schema)
        return self


class AsTabular(TabularBlock):
    """A tensor to a dict with the one entry `output_name`."""

    def __init__(self, output_name: str) -> None:
        super().__init__()
        self.output_name = output_name

    def forward(self, inputs: torch.Tensor, **_: object) -> TabularData:
        return {self.output_name: inputs}

    def forward_output_size(self, input_size: Any) -> Sizes:
        return {self.output_name: input_size}


def merge_tabular(self: nn.Module, other: nn.Module) -> MergeTabular:
    """Both on the same inputs, their dicts of outputs merged."""
    return MergeTabular(self, other)


def _differ(shapes: Iterable[Any]) -> bool:
    """Whether shapes are not all alike; of an exported model they cannot stand in a set."""
    shapes = list(shapes)
    return any(shape != shapes[0] for shape in shapes[1:])

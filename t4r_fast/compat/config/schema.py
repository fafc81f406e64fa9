"""Modules that need to know the schema of their inputs."""

from __future__ import annotations

from typing import TypeVar

import torch

from t4r_fast.schema import Schema

Module = TypeVar("Module")


def requires_schema(module: Module) -> Module:
    """Class decorator: using the module without a schema raises ValueError."""
    module.REQUIRES_SCHEMA = True
    return module


class SchemaMixin:
    """Holds a schema. The first one that is set stays, as in the reference."""

    REQUIRES_SCHEMA = False
    _schema: Schema | None = None

    @property
    def schema(self) -> Schema | None:
        return self._schema

    @schema.setter
    def schema(self, schema: Schema | None) -> None:
        self._schema = schema

    def set_schema(self, schema: Schema | None = None) -> SchemaMixin:
        """Take the schema unless there is one. Raises ValueError when one is needed and missing."""
        self.check_schema(schema)
        if self._schema is None:
            self._schema = schema
        return self

    def check_schema(self, schema: Schema | None = None) -> None:
        if self.REQUIRES_SCHEMA and self._schema is None and schema is None:
            raise ValueError(
                f"{type(self).__name__} requires a schema: give schema=..., or use it in a block"
                " built by from_schema"
            )

    def get_item_ids_from_inputs(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The entry of `inputs` for the column tagged item_id."""
        self.check_schema()
        return inputs[self._schema.item_id_column_name]

    def get_padding_mask_from_item_id(
        self, inputs: dict[str, torch.Tensor], pad_token: int = 0
    ) -> torch.Tensor:
        """(B, L) bool, True at items. Raises ValueError when the item ids are not (B, L)."""
        item_ids = self.get_item_ids_from_inputs(inputs)
        if item_ids.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}: item ids must be (sessions, positions) to find the"
                f" padding; got shape {tuple(item_ids.shape)}"
            )
        return item_ids != pad_token

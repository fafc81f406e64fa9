"""Our schema as merlin-core's, and back, for people who go on with Merlin's other libraries."""

from __future__ import annotations

import math
from typing import Any

from t4r_fast.schema import Schema


def to_core_schema(t4rec_schema: Schema) -> Any:
    """The schema as a merlin.schema.Schema.

    Float ranges without an end are left out. The tag item_id becomes item and id, as merlin-core
    has it. Raises RuntimeError where merlin-core is not installed. Replaces
    transformers4rec.torch.utils.data_utils.to_core_schema.
    """
    try:
        from merlin.schema.io.tensorflow_metadata import TensorflowMetadata
    except ImportError as e:
        raise RuntimeError(
            "to_core_schema: merlin-core is not installed; pip install merlin-core, or use the"
            " schema as it is: everything in t4r_fast takes it"
        ) from e
    bounded = Schema(
        c.copy(float_domain=None)
        if (f := c.float_domain) is not None and not (math.isfinite(f.min) and math.isfinite(f.max))
        else c
        for c in t4rec_schema
    )
    return TensorflowMetadata.from_json(bounded.to_json()).to_merlin_schema()


def from_core_schema(core_schema: Any) -> Schema:
    """A merlin.schema.Schema as ours."""
    from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

    return Schema().from_proto_text(
        TensorflowMetadata.from_merlin_schema(core_schema).to_proto_text()
    )

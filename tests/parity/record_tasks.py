"""Record what the real Transformers4Rec 23.12 computes: tests/parity/tasks.json.

Run it in an environment that holds transformers4rec 23.12 (not ours):

    python tests/parity/record_tasks.py

Only numbers are recorded; models, weights and batches come from tasks.py on both sides.
"""

from __future__ import annotations

import json
from pathlib import Path

import record_surface
import tasks
import transformers4rec
import transformers4rec.torch as tr
from merlin_standard_lib import ColumnSchema, Schema


def schema(names: list[str]) -> Schema:
    if "price" not in names:
        return record_surface.schema(names)
    # Head.from_schema reads the older schema class, in which a tag selects by its own name
    return Schema(
        [
            ColumnSchema.create_categorical("bought", 1, tags=["binary", "classification"]),
            ColumnSchema.create_continuous("price", tags=["regression"]),
        ]
    )


def main() -> None:
    models = {name: tasks.measure(tasks.model(tr, schema, name)) for name in tasks.MODELS}
    sampled = {
        name: tasks.measure_sampled(tasks.sampled(tr, schema, negatives), 3000)
        for name, negatives in tasks.SAMPLED.items()
    }
    version = transformers4rec.__version__
    found = {"transformers4rec": version, "models": models, "sampled": sampled}
    path = Path(__file__).with_name("tasks.json")
    path.write_text(json.dumps(record_surface.rounded(found), separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""Record what the real Transformers4Rec 23.12 computes: tests/parity/surface.json.

Run it in an environment that holds transformers4rec 23.12 (not ours):

    python tests/parity/record_surface.py

Only numbers are recorded; blocks, weights and batches come from surface.py on both sides.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import surface
import torch
import transformers4rec
import transformers4rec.torch as tr
from merlin.schema import ColumnSchema, Schema, Tags

# ElementwiseSumItemMulti reads this from its schema; only the older schema class has it.
Schema.item_id_column_name = property(lambda s: s.select_by_tag(Tags.ITEM_ID).column_names[0])


def schema(names: list[str]) -> Schema:
    count = {"min": 2, "max": surface.LENGTH}
    columns = []
    for name in names:
        if name == "vec":
            dims = (None, (2, surface.LENGTH), surface.VECTOR)
            column = ColumnSchema(name, dtype=np.float32, dims=dims, tags=[Tags.EMBEDDING])
        elif name in surface.NUMBERS:
            column = ColumnSchema(
                name,
                dtype=np.float32,
                is_list=True,
                is_ragged=True,
                tags=[Tags.CONTINUOUS, Tags.LIST],
                properties={"value_count": count},
            )
        else:
            domain = {"min": 0, "max": surface.ROWS[name] - 1, "name": name}
            listed = name in surface.LISTS
            tags = [Tags.CATEGORICAL] + ([Tags.LIST] if listed else [])
            tags += [Tags.ITEM_ID] if name == "item" else []
            properties = {"domain": domain, **({"value_count": count} if listed else {})}
            column = ColumnSchema(
                name, dtype=np.int64, is_list=listed, is_ragged=listed, tags=tags,
                properties=properties,
            )  # fmt: skip
        columns.append(column)
    return Schema(columns)


def bits(rows: torch.Tensor) -> list:
    """Rows of 0 and 1 as integers, position 0 in the lowest bit."""
    rows = rows.long()
    return (rows << torch.arange(rows.shape[-1])).sum(-1).tolist()


def record_model(name: str) -> dict:
    module = surface.model(tr, schema, name)
    masking = module.heads[0].body[0].masking
    drawn: dict[str, list] = {"targets_at": [], "perm_mask": [], "target_mapping": []}
    original = masking.compute_masked_targets

    def recording(item_ids, training=False, testing=False):
        info = original(item_ids, training=training, testing=testing)
        if training:
            drawn["targets_at"].append(bits(info.targets != 0))
            if isinstance(masking, tr.masking.PermutationLanguageModeling):
                drawn["perm_mask"].append(bits(masking.perm_mask))
                drawn["target_mapping"].append(bits(masking.target_mapping))
        return info

    masking.compute_masked_targets = recording
    found = surface.measure_model(module, torch.manual_seed)
    if len({str(step) for step in drawn["targets_at"]}) == 1:
        drawn = {what: steps[:1] for what, steps in drawn.items()}  # nothing random
    return {**found, **{what: steps for what, steps in drawn.items() if steps}}


def rounded(value):
    """Nine digits, two more than float32 holds."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {name: rounded(v) for name, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    blocks = {
        name: surface.measure_block(build(tr, schema), columns)
        for name, (columns, build) in surface.BLOCKS.items()
    }
    models = {name: record_model(name) for name in surface.MODELS}
    found = {"transformers4rec": transformers4rec.__version__, "blocks": blocks, "models": models}
    path = Path(__file__).with_name("surface.json")
    path.write_text(json.dumps(rounded(found), separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

"""Record what the real Transformers4Rec 23.12 computes: tests/parity/recorded.json.

Run it in an environment that holds transformers4rec 23.12 (not ours):

    python tests/parity/record.py

Only numbers are recorded; weights and batches come from problem.py on both sides.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import problem
import torch
import transformers4rec
import transformers4rec.torch as tr
from merlin.schema import ColumnSchema, Schema, Tags


def schema() -> Schema:
    count = {"min": 2, "max": problem.LENGTH}
    item = next(iter(problem.SIZES))
    columns = [
        ColumnSchema(
            name,
            dtype=np.int64,
            is_list=True,
            is_ragged=True,
            tags=[Tags.CATEGORICAL, Tags.LIST] + ([Tags.ITEM_ID] if name == item else []),
            properties={"domain": {"min": 0, "max": rows - 1, "name": name}, "value_count": count},
        )
        for name, rows in problem.SIZES.items()
    ]
    columns += [
        ColumnSchema(
            name,
            dtype=np.float32,
            is_list=True,
            is_ragged=True,
            tags=[Tags.CONTINUOUS, Tags.LIST],
            properties={"value_count": count},
        )
        for name in problem.NUMBERS
    ]
    return Schema(columns)


def build(kind: str) -> tr.Model:
    chosen = schema().select_by_name(problem.columns(kind))
    length = problem.LENGTH
    make = tr.TabularSequenceFeatures.from_schema
    if kind == "gru":
        inputs = make(chosen, max_sequence_length=length, masking="causal")
        rest = [
            tr.MLPBlock([128]),
            tr.Block(torch.nn.GRU(128, 128, 1), [None, length, 128]),
        ]
    else:
        inputs = make(
            chosen, max_sequence_length=length, d_output=192, masking="mlm", aggregation="concat"
        )
        config = tr.XLNetConfig.build(d_model=192, n_head=4, n_layer=2, total_seq_length=length)
        rest = [tr.MLPBlock([192]), tr.TransformerBlock(config, masking=inputs.masking)]
    body = tr.SequentialBlock(inputs, *rest)
    return tr.Model(tr.Head(body, tr.NextItemPredictionTask(weight_tying=True), inputs=inputs))


def main() -> None:
    found = {"transformers4rec": transformers4rec.__version__, "models": {}}
    for kind in problem.KINDS:
        model = build(kind)
        problem.set_weights(model)
        masking = model.heads[0].body[0].masking
        drawn = []

        def keep_mask(info, drawn=drawn):
            # a row's mask as one integer, position 0 in the lowest bit
            bits = (info.targets != 0).long()
            drawn.append((bits << torch.arange(bits.shape[1])).sum(1).tolist())
            return info

        original = masking._compute_masked_targets

        def recording(item_ids, training=False, testing=False, original=original, keep=keep_mask):
            info = original(item_ids, training=training, testing=testing)
            return keep(info) if training else info

        masking._compute_masked_targets = recording
        numbers = problem.measure(model, kind, lambda step: torch.manual_seed(step))
        found["models"][kind] = {**numbers, "targets_at": drawn}
    path = Path(__file__).with_name("recorded.json")
    path.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

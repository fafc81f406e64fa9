"""Evaluating 100,000 sessions over 390,000 items takes the memory of a batch of hidden vectors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SESSIONS, ITEMS = 100_000, 390_000
SCORES_OF_A_BATCH = 1000 * ITEMS * 4

SCRIPT = """
import json, sys
import numpy as np, pyarrow as pa, torch
from transformers import TrainerCallback
import t4r_fast.torch as tr
from t4r_fast.schema import ColumnSchema, Schema

sessions, items = int(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
lists = pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(3, items, 4 * sessions)), 4)
schema = Schema([ColumnSchema.create_categorical("item", items - 1, tags=["item_id", "list"])])
inputs = tr.TabularSequenceFeatures.from_schema(
    schema, max_sequence_length=4, masking="causal", embedding_dim_default=8, d_output=8
)
body = tr.SequentialBlock(inputs, tr.MLPBlock([8]))
task = tr.NextItemPredictionTask(weight_tying=True)
model = tr.Model(tr.Head(body, task, inputs=inputs))
arguments = tr.T4RecTrainingArguments(
    output_dir=sys.argv[3], per_device_eval_batch_size=1000, max_sequence_length=4, use_cpu=True,
    report_to=[], disable_tqdm=True,
)


def resident():
    status = open("/proc/self/status").read()
    return {k: int(status.split(k + ":")[1].split()[0]) * 1024 for k in ("VmRSS", "VmHWM")}


class Memory(TrainerCallback):
    seen = []

    def on_prediction_step(self, args, state, control, **kwargs):
        self.seen.append(resident())


trainer = tr.Trainer(
    model, arguments, schema=schema, eval_dataset_or_path=pa.table({"item": lists}),
    compute_metrics=True, callbacks=[Memory()],
)
found = trainer.evaluate()
early, late = Memory.seen[4], resident()
print(json.dumps({
    "batches": len(Memory.seen), "recall": found["eval_/next-item/recall_at_20"],
    "growth": late["VmRSS"] - early["VmRSS"], "peak": late["VmHWM"] - early["VmRSS"],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_evaluation_takes_constant_memory(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(SESSIONS), str(ITEMS), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["batches"] == 100
    assert 0 <= found["recall"] < 0.01  # of random sessions
    assert found["growth"] < SCORES_OF_A_BATCH / 50
    assert found["peak"] < SCORES_OF_A_BATCH / 20

"""A small model, its data and its Trainer, for tests; as a script, a training run that is killed.

python training_case.py DATA OUT STEP trains and sends itself SIGKILL in the middle of step STEP.
"""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import TrainerCallback

import t4r_fast.torch as tr
from t4r_fast.config.trainer import T4RecTrainingArguments
from t4r_fast.schema import ColumnSchema, Schema
from t4r_fast.torch.trainer import Trainer

ITEM, PRICE = "product_id-list_seq", "price_log_norm-list_seq"
ITEMS, LENGTH, ROWS, BATCH = 40, 6, 90, 16  # six batches an epoch, the last one of ten
SCHEMA = Schema(
    [
        ColumnSchema.create_categorical(ITEM, ITEMS - 1, tags=["item_id", "list"]),
        ColumnSchema.create_continuous(PRICE, tags=["list"]),
    ]
)


def write_sessions(path, rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    items = [rng.integers(3, ITEMS, n).tolist() for n in rng.integers(2, LENGTH + 1, rows)]
    prices = [[float(np.sin(i)) for i in s] for s in items]
    table = pa.table({ITEM: items, PRICE: pa.array(prices, pa.list_(pa.float32()))})
    pq.write_table(table, path, row_group_size=25)
    return str(path)


def make_model(masking="mlm", seed=0):
    """XLNet with dropout, so that a resumed run must find the random state again."""
    torch.manual_seed(seed)
    inputs = tr.TabularSequenceFeatures.from_schema(
        SCHEMA,
        max_sequence_length=LENGTH,
        aggregation="concat",
        d_output=16,
        masking=masking,
        embedding_dim_default=8,
    )
    config = tr.XLNetConfig.build(16, 2, 1, LENGTH)
    body = tr.SequentialBlock(inputs, tr.TransformerBlock(config, masking=inputs.masking))
    task = tr.NextItemPredictionTask(weight_tying=True)
    return tr.Model(tr.Head(body, task, inputs=inputs))


def make_trainer(out, data=None, model=None, callbacks=None, trainer_options=None, **arguments):
    arguments = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "num_train_epochs": 3,
        "max_sequence_length": LENGTH,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "save_steps": 5,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        **arguments,
    }
    return Trainer(
        make_model() if model is None else model,
        T4RecTrainingArguments(output_dir=str(out), **arguments),
        schema=SCHEMA,
        train_dataset_or_path=data,
        eval_dataset_or_path=data,
        callbacks=callbacks,
        **{"compute_metrics": True, **(trainer_options or {})},
    )


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_trainer(sys.argv[2], sys.argv[1], callbacks=[KillAt(int(sys.argv[3]))]).train()

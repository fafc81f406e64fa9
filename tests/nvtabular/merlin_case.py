"""What runs where NVTabular is, for test_nvtabular.py: EVENTS OUT writes two ETL outputs into OUT
and OUT/found.json with the metrics of one model on Merlin's loader and on ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nvtabular as nvt
import polars as pl
import torch
from merlin.dataloader.torch import Loader

import t4r_fast.torch as tr
from t4r_fast import etl
from t4r_fast.merlin_schema import to_core_schema

COLUMNS = ["product_id-list_seq", "price_log_norm-list_seq"]


def metrics(found: dict) -> dict:
    return {k: v for k, v in found.items() if "/" in k}


def alike(data: nvt.Dataset, train: str) -> list[bool]:
    """Are the batches of a real Dataset, by our MerlinDataLoader, those of its files?"""
    by_dataset = tr.MerlinDataLoader(data, 64, 20)
    by_name = tr.MerlinDataLoader(train, 64, 20, cats=COLUMNS[:1], conts=COLUMNS[1:], lists=COLUMNS)
    pairs = list(zip(by_dataset, by_name, strict=True))
    return [torch.equal(a[name], b[name]) for (a, _), (b, _) in pairs for name in COLUMNS]


def main(events: str, out: Path) -> None:
    for engine in ("polars", "nvtabular"):
        etl.run(events, out / engine, engine=engine)
    schema = tr.Schema().from_proto_text(out / "nvtabular" / "schema.pbtxt")
    schema = schema.select_by_name(COLUMNS)
    train = str(out / "nvtabular" / "sessions_by_day" / "1" / "train.parquet")
    torch.manual_seed(0)
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema,
        max_sequence_length=20,
        masking="mlm",
        d_output=16,
        aggregation="concat",
        embedding_dim_default=16,
    )
    config = tr.XLNetConfig.build(16, 2, 1, 20)
    block = tr.TransformerBlock(config, masking=inputs.masking, attend_padding=False)
    task = tr.NextItemPredictionTask(weight_tying=True)
    body = tr.SequentialBlock(inputs, block)
    model = tr.Model(tr.Head(body, task, inputs=inputs), max_sequence_length=20)
    data = nvt.Dataset(train, engine="parquet")
    data.schema = data.schema.select_by_name(COLUMNS)
    arguments = tr.T4RecTrainingArguments(
        output_dir=str(out / "run"),
        per_device_train_batch_size=64,
        per_device_eval_batch_size=64,
        max_steps=20,
        max_sequence_length=20,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = tr.Trainer(
        model,
        arguments,
        schema=schema,
        train_dataloader=Loader(data, batch_size=64, shuffle=True),
        eval_dataloader=Loader(data, batch_size=64, shuffle=False),
        compute_metrics=True,
    )
    first = metrics(trainer.evaluate())
    trainer.train()
    merlin = metrics(trainer.evaluate())
    trainer.eval_dataloader = None
    trainer.eval_dataset_or_path = train
    found = {"first": first, "merlin": merlin, "ours": metrics(trainer.evaluate())}
    workflow = nvt.Workflow.load(str(out / "nvtabular" / "nvtabular_workflow"))
    found["columns"] = workflow.output_schema.column_names
    found["sessions"] = pl.read_parquet(train).height
    found["core"] = [
        [c.name, c.dtype.name, c.is_list, sorted(t.value for t in c.tags), c.properties]
        for c in to_core_schema(schema)
    ]
    found["alike"] = alike(data, train)
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

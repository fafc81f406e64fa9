"""Time a training step or an evaluation step of a tutorial model, by the Trainer. One JSON line.

The counterpart of bench_t4rec.py: the same data, models, batch, optimizer and clock, so that
against_t4rec.py can run the two in turn. By itself:

    python benchmarks/bench_tutorial_step.py --data FOLDER --model gru [--mode eval]

FOLDER is what make_sessions.py --schema wrote. With --negatives K, training scores the targets and
K drawn items, and the item table is stepped by t4r_fast.optim, touched rows only.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from t4r_fast.config.trainer import T4RecTrainingArguments  # noqa: E402
from t4r_fast.schema import Schema  # noqa: E402
from t4r_fast.torch.trainer import Trainer  # noqa: E402
from t4r_fast.tutorial.models import build, feature_columns  # noqa: E402

MODELS = {"gru": "gru_as_printed", "xlnet": "xlnet_mlm", "xlnet_side": "xlnet_mlm_side"}


class StepClock(transformers.TrainerCallback):
    """Wall and CPU time (all threads) at the end of each step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def make_trainer(options: argparse.Namespace, folder: str) -> Trainer:
    schema = Schema().from_proto_text(options.data / "processed_nvt/schema.pbtxt")
    name = "gru" if options.over_time else MODELS[options.model]
    torch.manual_seed(0)
    model = build(
        name,
        schema,
        negatives=options.negatives,
        sampler=options.sampler,
        attend_padding=options.attend_padding,
    )
    arguments = T4RecTrainingArguments(
        output_dir=folder,
        max_sequence_length=20,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=0.00071 if options.model == "gru" else 0.000666,
        max_steps=options.warm + options.steps,
        logging_steps=200,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        optim="adamw_torch_fused",
        table_optimizer="adamw" if options.negatives else None,
    )
    columns = schema.select_by_name(feature_columns(name, schema))
    return Trainer(model=model, args=arguments, schema=columns, compute_metrics=True)


def time_training(options: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train_dataset_or_path = str(options.data / "sessions_by_day/1/train.parquet")
    result = trainer.train()
    wall = np.diff(clock.wall)[options.warm - 1 :]
    cpu = np.diff(clock.cpu)[options.warm - 1 :]
    return {
        "wall_s": [float(w) for w in wall],
        "cpu_s": [float(c) for c in cpu],
        "wall_s_median": float(np.median(wall)),
        "cpu_s_median": float(np.median(cpu)),
        "loss": float(result.training_loss),
    }


def time_evaluation(options: argparse.Namespace, trainer: Trainer) -> dict[str, Any]:
    """Seconds per batch: the difference of a long and a short call, as bench_t4rec.py takes it."""
    files = [
        options.data / f"sessions_by_day/{day}/{part}.parquet"
        for day in (2, 3)
        for part in ("valid", "train")
    ]
    table = pa.concat_tables(
        pq.read_table(file, columns=trainer.schema.column_names) for file in files
    )

    def evaluate(batches: int) -> tuple[float, float, dict[str, float]]:
        trainer.eval_dataset_or_path = table.slice(0, batches * options.batch)
        wall, cpu = time.perf_counter(), time.process_time()
        metrics = trainer.evaluate()
        return time.perf_counter() - wall, time.process_time() - cpu, metrics

    evaluate(1)
    short = evaluate(1)
    long = evaluate(1 + options.steps)
    wall, cpu = ((long[i] - short[i]) / options.steps for i in range(2))
    return {
        "wall_s_per_step": wall,
        "cpu_s_per_step": cpu,
        "metrics": {k: v for k, v in long[2].items() if "next-item" in k or "loss" in k},
    }


def peak_gib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True, choices=sorted(MODELS))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--mode", default="train", choices=["train", "eval"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--negatives", type=int, default=0)
    parser.add_argument("--sampler", default="log_uniform")
    parser.add_argument("--attend-padding", action="store_true", help="of XLNet, as printed")
    parser.add_argument("--over-time", action="store_true", help="the GRU with batch_first=True")
    options = parser.parse_args()
    if options.warm < 1 or options.steps < 1:
        parser.error("--warm and --steps must be at least 1")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, folder)
        timed = time_training if options.mode == "train" else time_evaluation
        found = timed(options, trainer)
    found |= {
        "model": options.model,
        "mode": options.mode,
        "threads": options.threads,
        "params": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "peak_rss_gib": round(peak_gib(), 3),
        "loadavg": os.getloadavg()[0],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

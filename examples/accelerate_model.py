"""A model of the real Transformers4Rec, before and after t4r_fast.accelerate: seconds and memory.

    python examples/accelerate_model.py [--items 118335] [--steps 3]

Run it where transformers4rec 23.12 and torch >= 2.11 are installed beside t4r_fast. The tutorial's
XLNet and GRU train and evaluate on 256 sessions of up to 20 items; each measurement has a process
of its own, so that its peak memory is its own. Some minutes on a laptop's CPU.

One thread of a busy machine, 118,335 items: the XLNet trains 2.0 times as fast and evaluates 3.3
times as fast, in 1.0 instead of 1.6 GiB; the GRU 3.5 and 7.5 times, in 0.75 instead of 2.6 GiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

SESSIONS, LENGTH, WIDTH = 256, 20, 64
MODELS = ("xlnet_mlm", "gru")


def build(kind: str, items: int):
    """The tutorial's model, built with the real package."""
    import numpy as np
    import torch
    import transformers4rec.torch as tr
    from merlin.schema import ColumnSchema, Schema, Tags

    column = ColumnSchema(
        "item_id",
        dtype=np.int64,
        is_list=True,
        is_ragged=True,
        tags=[Tags.CATEGORICAL, Tags.LIST, Tags.ITEM_ID],
        properties={
            "domain": {"min": 0, "max": items - 1, "name": "item_id"},
            "value_count": {"min": 2, "max": LENGTH},
        },
    )
    make = tr.TabularSequenceFeatures.from_schema
    if kind == "gru":
        inputs = make(Schema([column]), max_sequence_length=LENGTH, masking="clm")
        gru = torch.nn.GRU(128, 128, batch_first=True)
        rest = [tr.MLPBlock([128]), tr.Block(gru, [None, LENGTH, 128])]
    else:
        inputs = make(Schema([column]), max_sequence_length=LENGTH, d_output=192, masking="mlm")
        config = tr.XLNetConfig.build(192, 4, 2, LENGTH)
        rest = [tr.MLPBlock([192]), tr.TransformerBlock(config, masking=inputs.masking)]
    task = tr.NextItemPredictionTask(weight_tying=True)
    return tr.Model(tr.Head(tr.SequentialBlock(inputs, *rest), task, inputs=inputs))


def sessions(items: int):
    """Random sessions of 2 to LENGTH items, padded on the right: mean length about 6."""
    import torch

    length = torch.randint(2, 6, (SESSIONS, 1)) + (torch.rand(SESSIONS, 1) < 0.2) * 14
    ids = torch.randint(1, items, (SESSIONS, LENGTH))
    return {"item_id": torch.where(torch.arange(LENGTH) < length, ids, 0)}


def timed(call, steps: int) -> float:
    """Median seconds, after one call to warm up."""
    call()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure(kind: str, items: int, steps: int, fast: bool) -> dict[str, float]:
    import torch

    import t4r_fast

    torch.manual_seed(0)
    model, batch = build(kind, items), sessions(items)
    if fast:
        print(t4r_fast.accelerate(model), file=sys.stderr)
    optimizer = torch.optim.Adam(model.parameters())
    losses = []

    def train() -> None:
        optimizer.zero_grad()
        loss = model(dict(batch), training=True)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss))

    @torch.no_grad()
    def evaluate() -> None:
        out = model(dict(batch), testing=True)
        model.calculate_metrics(out["predictions"], out["labels"])

    found = {"train": timed(train, steps)}
    model.eval()
    found["evaluate"] = timed(evaluate, steps)
    found["loss"] = losses[0]
    found["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def alone(kind: str, arguments: argparse.Namespace, fast: bool) -> dict[str, float]:
    """measure() in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--model", kind]
    command += ["--items", str(arguments.items), "--steps", str(arguments.steps)]
    run = subprocess.run(
        [*command, *(["--fast"] if fast else [])], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=118_335)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", choices=MODELS, help="this one alone, as JSON")
    parser.add_argument("--fast", action="store_true", help="with --model: accelerated")
    arguments = parser.parse_args()
    if arguments.model:
        found = measure(arguments.model, arguments.items, arguments.steps, arguments.fast)
        print(json.dumps(found))
        return
    print(f"{arguments.items:,} items, {SESSIONS} sessions a step; seconds and peak memory")
    print(f"{'':22}{'train step':>12}{'evaluate':>12}{'GiB':>8}{'first loss':>12}")
    for kind in MODELS:
        both = [alone(kind, arguments, fast) for fast in (False, True)]
        for name, f in zip((kind, "  accelerated"), both):
            print(
                f"{name:22}{f['train']:12.3f}{f['evaluate']:12.3f}{f['gib']:8.2f}{f['loss']:12.5f}"
            )
        gain = [both[0][n] / both[1][n] for n in ("train", "evaluate", "gib")]
        print(f"{'  times':22}{gain[0]:11.1f}x{gain[1]:11.1f}x{gain[2]:7.1f}x")


if __name__ == "__main__":
    main()

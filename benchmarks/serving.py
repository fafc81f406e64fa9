"""Latency of recommendations: in process, over HTTP and over Triton, beside Transformers4Rec 23.12.

    make bench-serving                                     everything, about 6 minutes
    make bench-serving ARGS="--items 1000000 --batches 32"

The model is the tutorial's XLNet-MLM with random weights; one thread, K = 20, 20 events a session.
Transformers4Rec and `model.recommend` start from encoded sessions, the others from raw events. All
answers are compared before they are timed. Transformers4Rec needs its own environment, named by
T4R_PEER_PYTHON; without one its row is missing, as is Triton's where the server is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.table import Table

from benchmarks import machine
from t4r_fast import serving
from t4r_fast.cli.console import notes, results
from t4r_fast.etl import Workflow
from t4r_fast.etl.workflow import SessionRules
from t4r_fast.torch import Model
from t4r_fast.tutorial.models import build

ROOT = Path(__file__).parents[1]
ITEM, LENGTH, K = "product_id-list_seq", 20, 20
THEIRS = "Transformers4Rec 23.12, forward and torch.topk"
OURS = "model.recommend"


def made_up(rows: int) -> tuple[Workflow, Model]:
    """A workflow that knows products, and a model with a table of so many rows."""
    ids = np.arange(3, rows)
    vocabulary = pl.DataFrame({"value": ids * 7 + 1_000_000, "id": ids, "count": np.ones_like(ids)})
    vocabulary = vocabulary.with_columns(first_seen=pl.lit(1_569_888_000_000_000))
    columns = {"session": "user_session", "item": "product_id", "time": "event_time"}
    fitted = Workflow(columns, SessionRules(), {"item": vocabulary}, {"recency": (0.0, 1.0)}, {})
    torch.manual_seed(0)
    return fitted, build("xlnet_mlm", fitted.schema().select_by_name([ITEM])).eval()


def events_of(rows: int, batch: int) -> pl.DataFrame:
    rng = np.random.default_rng(batch)
    return pl.DataFrame(
        {
            "user_session": np.repeat([f"s{n}" for n in range(batch)], LENGTH),
            "product_id": rng.integers(3, rows, batch * LENGTH) * 7 + 1_000_000,
            "event_time": [str(1_600_000_000 + n % LENGTH) for n in range(batch * LENGTH)],
        }
    )


def timed(call: Callable[[], Any], seconds: float) -> dict[str, list[float]]:
    """Wall and CPU seconds of this process, of each call."""
    found: dict[str, list[float]] = {"wall": [], "cpu": []}
    call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found["wall"]) < 10:
        start, used = time.perf_counter(), time.process_time()
        call()
        found["wall"].append(time.perf_counter() - start)
        found["cpu"].append(time.process_time() - used)
    return found


def theirs(schema: Path, batches: list[int], seconds: float, parameters: int) -> dict[int, Any]:
    """Times of Transformers4Rec by batch; empty where there is none."""
    python = os.environ.get("T4R_PEER_PYTHON")
    if python is None:
        notes.print("missing: Transformers4Rec; name its python by T4R_PEER_PYTHON")
        return {}
    script = str(ROOT / "benchmarks" / "t4rec_serving.py")
    arguments = [str(schema), str(seconds), str(K), *map(str, batches)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [python, "-W", "ignore", script, *arguments], env=variables, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stderr[-2000:]}")
    told = json.loads(done.stdout.splitlines()[-1])
    if told["parameters"] != parameters:
        raise RuntimeError(f"{told['parameters']:,} parameters there, {parameters:,} here")
    return {int(batch): times for batch, times in told["found"].items()}


@contextlib.contextmanager
def over_http(model: Path, workflow: Path) -> Iterator[Callable[[pl.DataFrame], list[list[int]]]]:
    """Ask `t4r-fast serve` in a process of its own."""
    script = "from t4r_fast.cli import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", script, "serve", str(model), "--port", "0"]
    with subprocess.Popen(
        [*command, "--workflow", str(workflow)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        text=True,
    ) as process:  # fmt: skip
        try:
            found = (re.search(r"http://([\d.]+):(\d+)", line) for line in process.stderr)
            host, port = next(m.groups() for m in found if m)
            connection = http.client.HTTPConnection(host, int(port))

            def ask(events: pl.DataFrame) -> list[list[int]]:
                body = json.dumps({"events": events.to_dicts(), "top_k": K})
                sent = ("POST", "/recommend", body, {"Content-Type": "application/json"})
                try:
                    connection.request(*sent)
                    reply = connection.getresponse()
                except ConnectionError:  # the server closes a connection that was idle for 5 s
                    connection.close()
                    connection.request(*sent)
                    reply = connection.getresponse()
                answer = json.loads(reply.read())
                return [[i["item"] for i in s["items"]] for s in answer["sessions"]]

            yield ask
        finally:
            process.terminate()
            process.communicate()


@contextlib.contextmanager
def over_triton(
    model: Model, workflow: Workflow, folder: Path
) -> Iterator[Callable[[pl.DataFrame], list[list[int]]] | None]:
    """Ask a Triton Inference Server by gRPC; None where it is not installed."""
    sys.path.insert(0, str(ROOT / "tests"))
    import triton_server

    reason = triton_server.missing()
    if reason is not None:
        notes.print(f"missing: Triton; {reason}")
        yield None
        return
    import tritonclient.grpc as grpc

    serving.export(model, workflow, folder / "models", "shop", top_k=K, queue_delay_us=0)
    with triton_server.running(folder / "models", folder) as server:
        client = grpc.InferenceServerClient(server.grpc)
        wanted = [grpc.InferRequestedOutput(name) for name in ("session", "items", "scores")]

        def ask(events: pl.DataFrame) -> list[list[int]]:
            sent = []
            for column in events:
                text = column.dtype == pl.String
                values = (
                    np.array([v.encode() for v in column], dtype=np.object_)
                    if text
                    else column.to_numpy()
                )
                tensor = grpc.InferInput(
                    column.name, [len(values), 1], "BYTES" if text else "INT64"
                )
                tensor.set_data_from_numpy(values.reshape(-1, 1))
                sent.append(tensor)
            return client.infer("shop", sent, outputs=wanted).as_numpy("items").tolist()

        yield ask


def run(rows: int, batches: list[int], seconds: float) -> list[dict[str, Any]]:
    """The records of one number of items. Raises RuntimeError where two ways disagree."""
    workflow, model = made_up(rows)
    recommender = serving.Recommender(model, workflow)
    records = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        model.save(folder / "model")
        workflow.save(folder / "workflow")
        workflow.schema().select_by_name([ITEM]).to_proto_text(folder / "schema.pbtxt")
        parameters = sum(p.numel() for p in model.parameters())
        others = theirs(folder / "schema.pbtxt", batches, seconds, parameters)
        ways = {"Recommender": lambda events: recommender.recommend(events, K).items}
        ways["HTTP"] = stack.enter_context(over_http(folder / "model", folder / "workflow"))
        triton = stack.enter_context(over_triton(model, workflow, folder))
        if triton is not None:
            ways["Triton, gRPC"] = triton
        for batch in batches:
            events = events_of(rows, batch)
            _, inputs = recommender.encode(events)
            expected = recommender.recommend(events, K)
            scores = torch.from_numpy(recommender.scores(inputs))[:, 3:]
            if not np.array_equal(scores.topk(K).indices.numpy() + 3, expected.ids):
                raise RuntimeError("recommend and torch.topk of all scores disagree")
            times = {THEIRS: others[batch]} if batch in others else {}
            times[OURS] = timed(lambda x=inputs: model.recommend(x, K, recommend_from=3), seconds)
            for way, ask in ways.items():
                if ask(events) != expected.items:
                    raise RuntimeError(f"{way} answers otherwise than the Recommender")
                times[way] = timed(lambda ask=ask, events=events: ask(events), seconds)
            records += [_record(rows, batch, way, found) for way, found in times.items()]
    return records


def _record(rows: int, batch: int, way: str, found: dict[str, list[float]]) -> dict[str, Any]:
    wall = {f"p{p}": round(1e3 * float(np.percentile(found["wall"], p)), 3) for p in (50, 95, 99)}
    record = {"items": rows, "batch": batch, "way": way, "samples": len(found["wall"])}
    record["wall_ms"] = wall
    if way in (THEIRS, OURS, "Recommender"):  # the work of the others is in another process
        record["cpu_ms"] = round(1e3 * float(np.median(found["cpu"])), 3)
    return record


def show(records: list[dict[str, Any]]) -> None:
    table = Table("items", "batch", "way", "p50", "p95", "p99", "CPU ms", "against theirs")
    base: dict[tuple[int, int], dict[str, Any]] = {
        (r["items"], r["batch"]): r for r in records if r["way"] == THEIRS
    }
    for r in records:
        other = base.get((r["items"], r["batch"]))
        ratio = ""
        if other is not None and r["way"] != THEIRS and "cpu_ms" in r:
            ratio = f"{other['cpu_ms'] / r['cpu_ms']:.2f}x"
        cells = [f"{r['wall_ms'][p]:.2f}" for p in ("p50", "p95", "p99")]
        cpu = f"{r['cpu_ms']:.2f}" if "cpu_ms" in r else ""
        table.add_row(f"{r['items']:,}", str(r["batch"]), r["way"], *cells, cpu, ratio)
    results.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", nargs="+", type=int, default=[118_335, 1_000_000])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each timing")
    parser.add_argument("--out", type=Path, help="JSON lines are appended to it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = [r for rows in options.items for r in run(rows, options.batches, options.seconds)]
    show(records)
    if options.out is not None:
        shared = machine.origin()
        with open(options.out, "a", encoding="utf-8") as f:
            f.writelines(json.dumps({**shared, **record}) + "\n" for record in records)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The tutorial's steps beside the real Transformers4Rec 23.12, in processes that take turns.

    make bench-t4rec                                    everything, about 30 minutes
    make bench-t4rec ARGS="--items 118335 --models gru --threads 1"

The sampled models train on the targets and NEGATIVES drawn items: gru_sampled beside the other
side's softmax over all items, gru_sampled_both beside its sampled softmax, its sampler on both
sides.

Transformers4Rec needs an environment of its own: T4R_PEER_PYTHON names its python, else one is made
in .cache/t4rec (some 3 minutes, 2 GB) by the script of ../shared/peers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape

from t4r_fast.cli.bench import find_checkout, load_benchmarks
from t4r_fast.cli.console import notes
from t4r_fast.errors import InputError

ROOT = find_checkout()
load_benchmarks(ROOT)
from benchmarks import machine  # noqa: E402
from benchmarks.bench import append, results_file  # noqa: E402
from benchmarks.table import TUTORIAL  # noqa: E402

CACHE = ROOT / ".cache" / "t4rec"
PEERS = ROOT.parent / "shared" / "peers"
THEIRS = "Transformers4Rec 23.12"
MODES = ("train", "eval")
NEGATIVES = 4096


class Pair(NamedTuple):
    """What runs on both sides.

    model    as both timing scripts name it
    label    in the table
    ours     further arguments of ours
    sampled  whether the other side draws negatives too
    modes    the modes that there are
    """

    model: str
    label: str
    ours: tuple[str, ...] = ()
    sampled: bool = False
    modes: tuple[str, ...] = MODES


_DRAWN = ("--negatives", str(NEGATIVES))
# Evaluation scores all items in any case.
MODELS = {
    "gru": Pair("gru", "gru"),
    "gru_over_time": Pair("gru", "gru over time, theirs over sessions", ("--over-time",)),
    "gru_sampled": Pair(
        "gru", f"gru on {NEGATIVES:,} negatives, theirs on all items", _DRAWN, modes=("train",)
    ),
    "gru_sampled_both": Pair(
        "gru",
        f"gru on {NEGATIVES:,} negatives, both sides",
        (*_DRAWN, "--sampler", "t4rec"),
        sampled=True,
        modes=("train",),
    ),
    "xlnet": Pair("xlnet", "xlnet without padding"),
    "xlnet_padded": Pair("xlnet", "xlnet attending to padding", ("--attend-padding",)),
    "xlnet_side": Pair("xlnet_side", "xlnet_side"),
}
ITEMS = (10_000, 118_335, 390_000)
# Of two losses near ln V, from weights drawn by different code.
LOSS_TOLERANCE = 0.02


def peer_python() -> Path:
    """The python of an environment with Transformers4Rec; made where there is none."""
    named = os.environ.get("T4R_PEER_PYTHON")
    if named:
        if not Path(named).exists():
            raise InputError(f"T4R_PEER_PYTHON: {named} does not exist")
        return Path(named)
    if not (PEERS / "bench_t4rec.py").exists():
        raise InputError(f"{PEERS}: bench_t4rec.py is not there; it and setup_t4rec.sh are needed")
    python = CACHE / "venv/bin/python"
    done = CACHE / "venv/.installed"
    if not done.exists():
        notes.print(f"making the environment of Transformers4Rec in {CACHE / 'venv'}: 3 minutes")
        made = subprocess.run(["bash", str(PEERS / "setup_t4rec.sh"), str(CACHE / "venv")])
        if made.returncode != 0:
            raise InputError(f"{PEERS / 'setup_t4rec.sh'} failed; its messages are above")
        done.touch()
    return python


def last_json(command: list[str], threads: int, environment: dict[str, str]) -> dict[str, Any]:
    """Run a timing process and read the JSON of its last line."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads), **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=CACHE, env=variables)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not lines:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise InputError(f"{' '.join(command)} ended with status {done.returncode}:\n{tail}")
    return json.loads(lines[-1])


def make_data(python: Path, items: int) -> Path:
    folder = CACHE / "data" / str(items)
    if not (folder / "processed_nvt/part_0.parquet").exists():
        notes.print(f"making sessions over {items:,} items")
        command = [str(python), "-W", "ignore", str(PEERS / "make_sessions.py"), "--out"]
        command += [str(folder), "--items", str(items), "--sessions", "20000", "--days", "3"]
        last_json([*command, "--schema"], 1, {})
    return folder


def run_pair(
    python: Path, model: str, items: int, mode: str, threads: int, options: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Both sides, one after the other, `rounds` times; the second goes first every other time."""
    data, pair = make_data(python, items), MODELS[model]
    shared = ["--model", pair.model, "--mode", mode, "--threads", str(threads)]
    shared += ["--steps", str(options.steps), "--warm", "2"]
    ours = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/bench_tutorial_step.py")]
    theirs = [str(python), "-W", "ignore"]
    if pair.sampled:
        theirs += [str(ROOT / "benchmarks/t4rec_sampled.py"), str(NEGATIVES)]
    theirs += [str(PEERS / "bench_t4rec.py"), "--items", str(items)]
    commands = {
        "t4r_fast": ([*ours, "--data", str(data), *pair.ours, *shared], {}),
        THEIRS: ([*theirs, *shared], {"T4R_PEER_DIR": str(CACHE), "PYTHONPATH": ""}),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for i in range(options.rounds):
        for name in sorted(commands, reverse=i % 2 == 0):
            command, environment = commands[name]
            found[name].append(last_json(command, threads, environment))
    return found


def loss(run: dict[str, Any]) -> float:
    """The training loss, or that of the evaluation, whose key differs between the packages."""
    if "loss" in run:
        return run["loss"]
    return next(value for key, value in run["metrics"].items() if key.endswith("/loss"))


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """In words where the two did not compute the same; else nothing."""
    if ours["params"] != theirs["params"]:
        return f"{ours['params']:,} parameters, theirs {theirs['params']:,}"
    if abs(loss(ours) - loss(theirs)) > LOSS_TOLERANCE * loss(theirs):
        return f"loss {loss(ours):.4f}, theirs {loss(theirs):.4f}"
    return ""


def records_of(
    found: dict[str, list[dict[str, Any]]], model: str, items: int, mode: str, threads: int
) -> list[dict[str, Any]]:
    reason = difference(found["t4r_fast"][0], found[THEIRS][0])
    records = []
    for name, runs in found.items():
        record: dict[str, Any] = {
            "op": TUTORIAL,
            "case": f"{model} {mode} V={items} B=256",
            "kind": f"{MODELS[model].label}, {mode}",
            "sizes": {"V": items, "B": 256},
            "shown": True,
            "provider": name,
            "ours": name != THEIRS,
            "threads": threads,
            "status": "wrong" if reason else "ok",
            "samples": len(runs),
            "memory": {"process": max(1024 * run["peak_rss_gib"] for run in runs)},
            "load": runs[-1]["loadavg"],
        }
        if reason:
            record["reason"] = reason
        for unit in ("cpu", "wall"):
            key = f"{unit}_s_median" if mode == "train" else f"{unit}_s_per_step"
            times = sorted(1e3 * run[key] for run in runs)
            record[f"{unit}_ms"] = {
                "p20": times[0],
                "p50": statistics.median(times),
                "p80": times[-1],
            }
        records.append(record)
    return records


def show(records: list[dict[str, Any]]) -> None:
    unit = "cpu_ms" if records[0]["threads"] == 1 else "wall_ms"
    ours, theirs = (record[unit]["p50"] / 1e3 for record in records)
    state = f"[red]{records[0]['reason']}[/red]" if "reason" in records[0] else ""
    notes.print(
        f"{records[0]['case']}, {records[0]['threads']} threads ({unit[:-3]}):"
        f" {ours:.3f} s, theirs {theirs:.3f} s,"
        f" [bold]{theirs / ours:.2f}x[/bold]; GiB"
        f" {records[0]['memory']['process'] / 1024:.2f} and"
        f" {records[1]['memory']['process'] / 1024:.2f} {state}",
        highlight=False,
        soft_wrap=True,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--items", nargs="+", type=int, default=ITEMS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and all")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each side per case")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/MACHINE.jsonl")
    options = parser.parse_args(arguments)
    options.threads = options.threads or list(dict.fromkeys((1, machine.cores())))
    for name in ("steps", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def main() -> int:
    options = parse()
    CACHE.mkdir(parents=True, exist_ok=True)
    shared = {
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "set": "standard",
        "dtype": "float32",
        "checked": True,
        **machine.origin(),
    }
    wrong = 0
    try:
        python = peer_python()
        for items in options.items:
            for model in options.models:
                for mode in [m for m in options.modes if m in MODELS[model].modes]:
                    for threads in options.threads:
                        found = run_pair(python, model, items, mode, threads, options)
                        records = records_of(found, model, items, mode, threads)
                        show(records)
                        append([{**shared, **r} for r in records], options.out or results_file())
                        wrong += records[0]["status"] == "wrong"
    except InputError as error:
        notes.print(
            f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True, highlight=False
        )
        return 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

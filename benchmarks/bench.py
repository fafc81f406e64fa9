"""The runner: finds bench_<op>.py, checks every provider against float64, then times them in turn.

`t4r-fast bench` calls it; `make bench` too.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.case import SETS, Benchmark, Call, Case, Inputs, Missing, Provider, Work
from benchmarks.check import Wrong, check, truth
from benchmarks.peak_memory import measure_in_new_process
from benchmarks.timing import Budget, Timing, time_in_turn
from t4r_fast import backend
from t4r_fast.errors import InputError

FOLDER = Path(__file__).resolve().parent
OPS = Path(backend.__file__).parent / "ops"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
BUDGETS = {
    "quick": Budget(seconds=0.6, least=3, most=9),
    "standard": Budget(seconds=2.0, least=3, most=25, patience=4.0),
    "full": Budget(seconds=6.0, least=7, most=51, patience=10.0),
}

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """What one run measures.

    set      "quick", "standard" or "full"; each includes the one before
    threads  thread counts, each timed separately
    checked  compare outputs with the float64 reference first
    """

    set: str = "standard"
    threads: tuple[int, ...] = (1,)
    dtype: torch.dtype = torch.float32
    checked: bool = True


@dataclasses.dataclass
class Watch:
    """What the runner reports while it runs; every part may be left as it is."""

    started: Callable[[str, int], None] = lambda op, cases: None
    measured: Callable[[str, list[Record]], None] = lambda op, records: None
    finished: Callable[[str], None] = lambda op: None


def available() -> list[str]:
    """The ops that have a bench_<op>.py."""
    names = (path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
    return sorted(name for name in names if (OPS / f"{name}.py").exists())


def load(op: str) -> Benchmark:
    """The Benchmark of an op; InputError with the known ones otherwise."""
    if op not in available():
        known = ", ".join(available())
        raise InputError(f"bench: there is no benchmark of {op!r}; there are {known}")
    return importlib.import_module(f"benchmarks.bench_{op}").BENCHMARK


def included(case: Case, run: str) -> bool:
    return SETS.index(case.set) <= SETS.index(run)


def run(ops: Sequence[str], options: Options, watch: Watch) -> list[Record]:
    """Measure the ops; one record per case, provider and thread count.

    Outputs that are wrong give a record with status "wrong" and no times.
    """
    benchmarks = [load(op) for op in ops]
    previous = torch.get_num_threads()
    floors = {threads: machine.measure_floors(threads) for threads in options.threads}
    shared = {
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "set": options.set,
        "dtype": str(options.dtype).removeprefix("torch."),
        "checked": options.checked,
        **machine.origin(),
    }
    records = []
    try:
        for benchmark in benchmarks:
            cases = [case for case in benchmark.cases if included(case, options.set)]
            watch.started(benchmark.op, len(cases))
            for case in cases:
                found = _Run(benchmark, case, options, floors).records()
                found = [{**shared, **record} for record in found]
                watch.measured(benchmark.op, found)
                records += found
            watch.finished(benchmark.op)
    finally:
        torch.set_num_threads(previous)
    return records


class _Run:
    """One case of one op."""

    def __init__(
        self, benchmark: Benchmark, case: Case, options: Options, floors: dict[int, Any]
    ) -> None:
        self.benchmark, self.case, self.options, self.floors = benchmark, case, options, floors
        self.inputs: Inputs = benchmark.inputs(case, options.dtype)
        self.true = truth(benchmark, case, self.inputs) if options.checked else None

    def records(self) -> list[Record]:
        found: list[Record] = []
        for threads in self.options.threads:
            if threads == self.options.threads[0] or self.case.wide:
                found += self._at(threads)
        return found

    def _at(self, threads: int) -> list[Record]:
        torch.set_num_threads(threads)
        calls: dict[str, Call] = {}
        trouble: dict[str, tuple[str, str]] = {}
        plain = None
        providers = [p for p in self.benchmark.providers if self._takes(p)]
        # The baseline's rounding is the yardstick for ours, so it comes first.
        for provider in sorted(providers, key=lambda p: p.ours):
            status, reason = self._prepare(provider, calls, plain)
            if status != "ok":
                trouble[provider.name] = status, reason
            elif provider is self.benchmark.providers[1] and self.options.checked:
                plain = calls[provider.name](self.inputs)
        del plain
        timings = time_in_turn(
            {name: (lambda call=call: call(self.inputs)) for name, call in calls.items()},
            BUDGETS[self.options.set],
            threads,
        )
        return [
            self._record(p, threads, timings.get(p.name), trouble.get(p.name, ("ok", "")))
            for p in providers
        ]

    def _takes(self, provider: Provider) -> bool:
        among = self.options.set == "full" or (self.options.set == "standard" and self.case.wide)
        return provider.takes(self.case) and (among or not provider.slow)

    def _prepare(self, provider: Provider, calls: dict[str, Call], plain: Any) -> tuple[str, str]:
        try:
            call = provider.make(self.case)
            if self.true is not None:
                yardstick = (plain or {}) if provider.ours else None
                check(call(self.inputs), self.true, yardstick, self.options.dtype)
            else:
                call(self.inputs)
        except Missing as error:
            return "missing", str(error)
        except Wrong as error:
            return "wrong", str(error)
        except Exception as error:
            if provider.ours:
                raise
            # somebody else's code: the run goes on and the table says so
            lines = str(error).strip().splitlines()
            return "missing", f"failed: {type(error).__name__}: {lines[0] if lines else ''}"
        calls[provider.name] = call
        return "ok", ""

    def _record(
        self, provider: Provider, threads: int, timing: Timing | None, state: tuple[str, str]
    ) -> Record:
        op, case = self.benchmark.op, self.case
        record: Record = {
            "op": op,
            "case": case.label,
            "kind": case.kind,
            "sizes": dict(case.sizes),
            "shown": case.shown,
            "provider": provider.name,
            "ours": provider.ours,
            "threads": threads,
            "status": state[0],
        }
        if provider.ours:
            record["backend"] = backend.pick(op, torch.empty(0, dtype=self.options.dtype))
        if state[1]:
            record["reason"] = state[1]
        if timing is None:
            return record
        floors = self.floors[threads]
        work = self.benchmark.work(case, self.options.dtype.itemsize)
        record["floors"] = floors
        record["load"] = os.getloadavg()[0]
        record.update(_numbers(timing, work, machine.rates(floors, self.options.dtype), threads))
        if case.wide and threads == 1 and self.options.set != "quick":
            record["memory"] = measure_in_new_process(op, case, provider, self.options.dtype)
        return record


def _numbers(timing: Timing, work: Work, rates: dict[str, float], threads: int) -> Record:
    # One thread's CPU time is steady on a machine that others use; several threads spin while they
    # wait, so that only wall time tells.
    ms = timing.cpu_ms[1] if threads == 1 else timing.wall_ms[1]
    floor_ms = work.floor_ms(rates)
    names = ("p20", "p50", "p80")
    return {
        "samples": timing.samples,
        "cpu_ms": dict(zip(names, timing.cpu_ms)),
        "wall_ms": dict(zip(names, timing.wall_ms)),
        "gflop_per_s": 1e-6 * work.flop / ms,
        "gbyte_per_s": 1e-6 * work.bytes / ms,
        "floor_ms": floor_ms,
        "floor_share": floor_ms / ms,
    }


def results_file() -> Path:
    """Where this machine's results are kept in the repository."""
    return FOLDER / "results" / f"{machine.machine_name()}.jsonl"


def append(records: Sequence[Record], path: Path) -> None:
    """Add the records to a file, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(_rounded(record)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return value

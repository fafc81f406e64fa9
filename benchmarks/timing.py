"""Times of several calls, taken in turn in one process."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping

# A sample shorter than this is mostly clock: calls are repeated inside it.
LEAST_SAMPLE_S = 2e-3


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long to measure each call: about `seconds`, but `least` to `most` samples.

    A call that takes longer than `patience` seconds gets one sample.
    """

    seconds: float = 3.0
    least: int = 5
    most: int = 25
    patience: float = 6.0

    def samples(self, call_s: float) -> int:
        if call_s > self.patience:
            return 1
        return max(self.least, min(self.most, int(self.seconds / max(call_s, 1e-9))))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds per call at the 20th, 50th and 80th percentile of the samples."""

    samples: int
    cpu_ms: tuple[float, float, float]
    wall_ms: tuple[float, float, float]


def percentiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], statistics.median(values), tenths[7]


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    budget: Budget,
    threads: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time each call; rounds go through all of them, so that a slow minute hits all alike.

    The calls have run before: nothing is compiled or allocated for the first time here. CPU time is
    the calling thread's with one thread, else the whole process's.
    """
    clock = time.thread_time if threads == 1 else time.process_time
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    repeats, wanted = {}, {}

    def sample(name: str, call: Callable[[], object], many: int) -> None:
        wall_start, cpu_start = time.perf_counter(), clock()
        for _ in range(many):
            call()
        cpu_s, wall_s = clock() - cpu_start, time.perf_counter() - wall_start
        cpu[name].append(1e3 * cpu_s / many)
        wall[name].append(1e3 * wall_s / many)
        tick()

    for name, call in calls.items():
        sample(name, call, 1)
        # one preemption would make a short call look long
        while len(wall[name]) < 5 and sum(wall[name]) < 20:
            sample(name, call, 1)
        once = min(wall[name]) / 1e3
        repeats[name] = max(1, math.ceil(LEAST_SAMPLE_S / max(once, 1e-9)))
        wanted[name] = budget.samples(once * repeats[name])
        if wanted[name] > 1:  # these were to find the number; a slow call keeps its one
            cpu[name].clear()
            wall[name].clear()
        else:
            wanted[name] = 0
    rounds = max(wanted.values(), default=0)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name, call in calls.items():
                # spread a call's samples evenly over the rounds
                if i * wanted[name] // rounds == (i + 1) * wanted[name] // rounds:
                    continue
                sample(name, call, repeats[name])
    finally:
        if was_enabled:
            gc.enable()
    return {
        name: Timing(len(cpu[name]), percentiles(cpu[name]), percentiles(wall[name]))
        for name in calls
    }

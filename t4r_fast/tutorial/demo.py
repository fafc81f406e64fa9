"""The demo: a made-up shop small enough for a laptop, whose models really learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from t4r_fast.tutorial.progress import Progress
from t4r_fast.tutorial.windows import TrainingOptions


@dataclasses.dataclass(frozen=True)
class DemoSize:
    """Size of the shop, and the training options in which its models learn.

    items, days, sessions_per_day  of the shop; sessions of one event included
    epochs ... seed                see TrainingOptions
    """

    items: int
    days: int
    sessions_per_day: int
    epochs: int
    batch_size: int
    learning_rate: float
    eval_batch_size: int = 32
    seed: int = 0

    def training(self) -> TrainingOptions:
        return TrainingOptions(
            epochs=self.epochs,
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            learning_rate=self.learning_rate,
            seed=self.seed,
        )


DEMO = DemoSize(
    items=1_000, days=4, sessions_per_day=9_000, epochs=5, batch_size=64, learning_rate=0.001
)
QUICK = DemoSize(
    items=300, days=3, sessions_per_day=2_500, epochs=3, batch_size=64, learning_rate=0.001
)


def make_events(size: DemoSize, out: Path, progress: Progress | None = None) -> Path:
    """OUT/events.csv, written unless an interrupted run left it whole."""
    from t4r_fast.generate import generate_events

    progress = progress or Progress()
    path = out / "events.csv"
    if path.exists():
        return path
    step = "Events of a made-up shop"
    progress.start(step, size.days)
    done = 0

    def tell(_: str, now: int, total: int) -> None:
        nonlocal done
        progress.advance(step, now - done)
        done = now

    made = generate_events(
        path,
        sessions_per_day=size.sessions_per_day,
        days=size.days,
        items=size.items,
        seed=size.seed,
        progress=tell,
    )
    progress.finish(step, f"{made.events:,} events")
    return path

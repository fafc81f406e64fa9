"""A whole training command: events to sessions, models over windows, baselines, report."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections.abc import Iterable
from pathlib import Path

from t4r_fast.compat import get_compat
from t4r_fast.errors import InputError
from t4r_fast.train import models, state
from t4r_fast.train.baselines import evaluate_baselines
from t4r_fast.train.progress import Progress
from t4r_fast.train.report import render
from t4r_fast.train.results import machine, results_text, versions
from t4r_fast.train.sessions import SessionData
from t4r_fast.train.state import ModelState
from t4r_fast.train.windows import TrainingOptions, train_windows

TIE_RULE = (
    "Ties: among the models' scores an equally scored item counts as better than the target when"
    " its id is lower; among counts the lower id stands first. Padding, missing and unknown items"
    " stay in the ranking, as in Transformers4Rec."
)


def run_etl(
    inputs: list[str | os.PathLike[str]],
    out: Path,
    *,
    window: str = "day",
    progress: Progress | None = None,
    **options,
) -> SessionData:
    """OUT/data from events, or as it stands when an earlier run has finished it.

    options  further arguments of `t4r_fast.etl.run`
    """
    from t4r_fast import etl

    _in_one_process()
    progress = progress or Progress()
    if not (out / "data").is_dir():
        tell = _etl_progress(progress)
        etl.run([str(p) for p in inputs], out / "data", window=window, progress=tell, **options)
    return SessionData(out / "data")


def _in_one_process() -> None:
    """Refuse torchrun: its processes would write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"a training command runs in one process and {os.environ['WORLD_SIZE']} were started;"
            " start it without torchrun, or a script with a Trainer, as in docs/recipes.md, with it"
        )


def _etl_progress(progress: Progress):
    reached: dict[str, int] = {}

    def tell(step: str, done: int, total: int) -> None:
        label = f"ETL: {step}"
        if step not in reached:
            progress.start(label, total)
            reached[step] = 0
        progress.advance(label, done - reached[step])
        reached[step] = done
        if done >= total:
            progress.finish(label)

    return tell


def choose_models(names: Iterable[str] | None, data: SessionData) -> tuple[list[str], dict]:
    """(models to train, {model left out: reason}); names None means all that the data allows.

    Raises InputError when a model asked for by name needs columns that the data lacks.
    """
    if names is not None:
        chosen = list(dict.fromkeys(names))
        if not chosen:
            raise InputError(f"name at least one model of {', '.join(models.KINDS)}")
        for name in chosen:
            models.feature_columns(name, data.schema)
        return [name for name in models.KINDS if name in chosen], {}
    missing = models.missing_side_features(data.schema)
    left_out = {
        name: f"it also reads {', '.join(missing)}, which the data does not have."
        for name, kind in models.KINDS.items()
        if kind.side and missing
    }
    return [name for name in models.KINDS if name not in left_out], left_out


def train_and_report(
    data: SessionData,
    out: Path,
    options: TrainingOptions,
    *,
    names: Iterable[str] | None = None,
    first: int | None = None,
    last: int | None = None,
    title: str,
    window: str,
    command: str,
    progress: Progress | None = None,
) -> dict:
    """Train the models over the windows, judge the baselines, write results and report into OUT.

    names        models; None for all that the data allows
    first, last  windows to train on; None for all
    title        what the data is called, for the report
    window       length of a window, for the report
    command      how to repeat the run, for the report
    returns      what OUT/results.json holds
    """
    _in_one_process()
    progress = progress or Progress()
    began = time.perf_counter()
    chosen, left_out = choose_models(names, data)
    for name, reason in left_out.items():
        progress.note(f"{models.KINDS[name].title} is left out: {reason}")
    pairs = data.pairs(first, last)
    overall = "Windows of all models"
    progress.start(overall, len(chosen) * len(pairs))
    states = {
        name: train_windows(name, data, pairs, options, out, progress, overall) for name in chosen
    }
    progress.finish(overall)
    progress.start("Baselines", None)
    baselines = evaluate_baselines(data, pairs)
    progress.finish("Baselines")
    results = {
        "format": 1,
        "command": command,
        "compat": get_compat(),
        "finished": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": _seconds(states, began),
        "versions": versions(),
        "machine": machine(),
        "options": dataclasses.asdict(options),
        "tie_rule": TIE_RULE,
        "data": {"name": title, "window": window, **data.summary()},
        "models": {name: _model_results(name, s) for name, s in states.items()},
        "baselines": {name: {"windows": records} for name, records in baselines.items()},
        "left_out": left_out,
    }
    state.write_text(out / "results.txt", results_text(results["models"]))
    state.write_json(out / "results.json", results)
    state.write_text(out / "report.html", render(results))
    return results


def _seconds(states: dict[str, ModelState], began: float) -> float:
    """Seconds of work: of this process, or of all records when a resumed run did little itself."""
    worked = sum(r["train_seconds"] + r["eval_seconds"] for s in states.values() for r in s.windows)
    return round(max(worked, time.perf_counter() - began), 1)


def _model_results(name: str, done: ModelState) -> dict:
    return {
        "title": models.KINDS[name].title,
        "parameters": done.parameters,
        "windows": done.windows,
    }

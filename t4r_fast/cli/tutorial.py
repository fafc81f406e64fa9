"""Commands that train models and compare them: demo, tutorial, train."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from t4r_fast.cli.console import RichProgress, notes, results
from t4r_fast.cli.options import (
    MODELS_HELP,
    AsPrinted,
    BatchSize,
    CheckpointSteps,
    Compat,
    DModel,
    Dropout,
    EmbeddingStd,
    Epochs,
    EvalBatchSize,
    Heads,
    ItemDim,
    Layers,
    LearningRate,
    Length,
    Out,
    Overwrite,
    Resume,
    SchemaFile,
    Seed,
    listed,
    quiet,
)
from t4r_fast.errors import InputError

if TYPE_CHECKING:
    from t4r_fast.train.sessions import SessionData


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the app."""
    app.command()(demo)
    app.command()(tutorial)
    app.command()(train)


# -- commands --------------------------------------------------------------------------------------


def demo(
    out: Out = Path("demo-out"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A minute: less data, models that learn less.")
    ] = False,
    seed: Seed = 0,
    as_printed: AsPrinted = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Make events of a shop, turn them into sessions, train and compare the models.

    Example: [bold]t4r-fast demo --out demo-out[/bold]
    """
    from t4r_fast.train import state
    from t4r_fast.train.demo import DEMO, QUICK, make_events
    from t4r_fast.train.run import run_etl, train_and_report

    quiet()
    size = (QUICK if quick else DEMO).with_options(seed=seed, as_printed=as_printed)
    options = {"command": "demo", **dataclasses.asdict(size)}
    state.open_output(out, options, resume=resume, overwrite=overwrite)
    with RichProgress() as progress:
        events = make_events(size, out, progress)
        length = size.training.max_sequence_length
        data = run_etl([events], out, window="day", max_length=length, seed=seed, progress=progress)
        found = train_and_report(
            data,
            out,
            size.training,
            title="made-up shop events",
            window="day",
            command=_command(),
            progress=progress,
        )
    _show(found, out)


def tutorial(
    inputs: Annotated[
        list[Path], typer.Argument(help="Event files (CSV, TSV, parquet) or a folder of them.")
    ],
    out: Out,
    window: Annotated[str, typer.Option(help="day, or a duration such as 1h or 30m.")] = "day",
    columns: Annotated[
        str | None,
        typer.Option(
            "--map", help="session=SessionId,item=ItemId,time=Time[,category=..,brand=..]"
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="End of long sessions that stays: last, first.")
    ] = "last",
    event_types: Annotated[
        str | None, typer.Option(help="Keep only these event types, such as view,cart.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(help=MODELS_HELP + " Default: all that the data allows.")
    ] = None,
    epochs: Epochs = 3,
    batch_size: BatchSize = 256,
    eval_batch_size: EvalBatchSize = 32,
    learning_rate: LearningRate = None,
    d_model: DModel = None,
    layers: Layers = None,
    heads: Heads = 4,
    item_dim: ItemDim = 64,
    embedding_std: EmbeddingStd = 0.05,
    dropout: Dropout = 0.3,
    max_length: Length = 20,
    seed: Seed = 0,
    checkpoint_steps: CheckpointSteps = 500,
    as_printed: AsPrinted = False,
    compat: Compat = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Events to sessions, the tutorial's models over sliding windows, a table and a report.

    Example: [bold]t4r-fast tutorial 2019-Oct.csv --window 30m --out OUT[/bold]
    """
    from t4r_fast import etl
    from t4r_fast.train import state
    from t4r_fast.train.run import run_etl, train_and_report
    from t4r_fast.train.windows import TrainingOptions

    quiet()
    level = _compat(compat)
    training = TrainingOptions(
        epochs=epochs,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        learning_rate=learning_rate,
        d_model=d_model,
        n_layer=layers,
        n_head=heads,
        item_dim=item_dim,
        embedding_std=embedding_std,
        dropout=dropout,
        max_sequence_length=max_length,
        seed=seed,
        checkpoint_steps=checkpoint_steps,
        as_printed=as_printed,
    )
    names = _models(models)
    events = {
        "map": etl.parse_map(columns) if columns else None,
        "keep": keep,
        "event_types": listed(event_types),
        "max_length": max_length,
        "seed": seed,
    }
    identity = {
        "command": "tutorial",
        "inputs": _identity(inputs),
        "window": window,
        "models": names,
        "compat": level,
        **events,
        **dataclasses.asdict(training),
    }
    state.open_output(out, identity, resume=resume, overwrite=overwrite)
    with RichProgress() as progress:
        data = run_etl(list(inputs), out, window=window, progress=progress, **events)
        found = train_and_report(
            data,
            out,
            training,
            names=names,
            title=inputs[0].name + (" and others" if len(inputs) > 1 else ""),
            window=window,
            command=_command(),
            progress=progress,
        )
    _show(found, out)


def train(
    data: Annotated[Path, typer.Argument(help="Output folder of `t4r-fast etl`.")],
    out: Out,
    model: Annotated[str, typer.Option(help=MODELS_HELP)] = "xlnet_mlm",
    schema: SchemaFile = None,
    windows: Annotated[
        str | None, typer.Option(help="Windows to train on, such as 1-3. Default: all.")
    ] = None,
    epochs: Epochs = 3,
    batch_size: BatchSize = 256,
    eval_batch_size: EvalBatchSize = 32,
    learning_rate: LearningRate = None,
    d_model: DModel = None,
    layers: Layers = None,
    heads: Heads = 4,
    item_dim: ItemDim = 64,
    embedding_std: EmbeddingStd = 0.05,
    dropout: Dropout = 0.3,
    max_length: Length = 20,
    seed: Seed = 0,
    checkpoint_steps: CheckpointSteps = 500,
    as_printed: AsPrinted = False,
    compat: Compat = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train on sessions by window, evaluate each window on the next one.

    Example: [bold]t4r-fast train OUT/data --model xlnet_mlm --windows 1-3 --out RUN[/bold]
    """
    from t4r_fast.train import state
    from t4r_fast.train.run import train_and_report
    from t4r_fast.train.sessions import SessionData
    from t4r_fast.train.windows import TrainingOptions

    quiet()
    level = _compat(compat)
    training = TrainingOptions(
        epochs=epochs,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        learning_rate=learning_rate,
        d_model=d_model,
        n_layer=layers,
        n_head=heads,
        item_dim=item_dim,
        embedding_std=embedding_std,
        dropout=dropout,
        max_sequence_length=max_length,
        seed=seed,
        checkpoint_steps=checkpoint_steps,
        as_printed=as_printed,
    )
    names = _models(model)
    first, last = _window_range(windows)
    sessions = SessionData(data, schema)
    identity = {
        "command": "train",
        "inputs": _identity(sorted(sessions.folder.glob("*/*.parquet"))),
        "models": names,
        "windows": [first, last],
        "compat": level,
        **dataclasses.asdict(training),
    }
    state.open_output(out, identity, resume=resume, overwrite=overwrite)
    with RichProgress() as progress:
        found = train_and_report(
            sessions,
            out,
            training,
            names=names,
            first=first,
            last=last,
            title=sessions.folder.parent.name,
            window=_etl_window(sessions),
            command=_command(),
            progress=progress,
        )
    _show(found, out)


# -- what they share -------------------------------------------------------------------------------


def _compat(level: str | None) -> str:
    from t4r_fast import get_compat, set_compat

    if level is not None:
        try:
            set_compat(level)
        except ValueError as e:
            raise InputError(f"--compat: {e}") from e
    return get_compat()


def _models(text: str | None) -> list[str] | None:
    from t4r_fast.train.models import kind_of

    if text is None:
        return None
    names = listed(text)
    for name in names:
        kind_of(name)
    return names


def _window_range(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    first, dash, last = text.partition("-")
    if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
        raise InputError(f"--windows: give a window or a range such as 1-3; got {text!r}")
    return int(first), int(last) if dash else int(first)


def _identity(paths: list[Path]) -> list[list]:
    """[name, bytes] of the files: another input may not be resumed with."""
    found = []
    for path in paths:
        size = path.stat().st_size if path.is_file() else None
        found.append([str(path), size])
    return found


def _etl_window(sessions: SessionData) -> str:
    from t4r_fast.train.state import read_json

    summary = sessions.folder.parent / "summary.json"
    return str(read_json(summary).get("window", "unknown")) if summary.is_file() else "unknown"


def _command() -> str:
    return "t4r-fast " + shlex.join(sys.argv[1:])


def _show(found: dict, out: Path) -> None:
    from t4r_fast.train.baselines import BASELINES
    from t4r_fast.train.results import METRIC_TITLES, final_metrics, gain_over_popularity

    table = Table(title="Last window", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("Model", no_wrap=True)
    for heading in ("NDCG@10", "NDCG@20", "Rec.@10", "Rec.@20", "vs pop."):
        table.add_column(heading, justify="right")
    for part in ("models", "baselines"):
        for name, entry in found[part].items():
            gain = gain_over_popularity(found, name)
            table.add_row(
                entry["title"] if part == "models" else BASELINES[name],
                *(f"{final_metrics(entry['windows'])[m]:.4f}" for m in METRIC_TITLES),
                "-" if gain is None else f"{gain:.2f}x",
            )
        table.add_section()
    results.print(table)
    best = max(gain_over_popularity(found, name) or 0.0 for name in found["models"])
    if best < 1 and found["options"]["embedding_std"] < 0.3:
        notes.print(
            "[yellow]note:[/yellow] no model beats the most popular items. The tutorial's settings"
            " are for 100,000 sessions a window. With fewer, models learn faster with --epochs 10"
            " --batch-size 64 --learning-rate 0.004 --embedding-std 0.3"
        )
    results.print(f"Report:  {out / 'report.html'}", soft_wrap=True, highlight=False)
    results.print(f"Results: {out / 'results.txt'}, results.json", soft_wrap=True, highlight=False)

"""Commands that use a saved model: evaluate, recommend, export, serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from t4r_fast.cli.console import notes, results
from t4r_fast.cli.options import EvalBatchSize, SchemaFile, Split, listed, quiet
from t4r_fast.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from t4r_fast.serve import Recommendations

SavedModelFolder = Annotated[
    Path, typer.Argument(help="A saved model: OUT/models/xlnet_mlm, or of Model.save.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the app."""
    app.command()(evaluate)
    app.command()(recommend)
    app.command()(export)
    app.command()(serve)


def evaluate(
    model: SavedModelFolder,
    data: Annotated[Path, typer.Argument(help="Output folder of `t4r-fast etl`.")],
    window: Annotated[int, typer.Option(help="The window to judge on.")],
    split: Split = "valid",
    schema: SchemaFile = None,
    batch_size: EvalBatchSize = 32,
) -> None:
    """Judge a saved model on the sessions of one window.

    Example: [bold]t4r-fast evaluate OUT/models/xlnet_mlm OUT/data --window 4 --split test[/bold]
    """
    from t4r_fast.train import saved_model, saved_use
    from t4r_fast.train.results import METRIC_TITLES
    from t4r_fast.train.sessions import SessionData

    quiet()
    saved = saved_model.load(model)
    sessions = SessionData(data, schema)
    with notes.status("evaluating"):
        found = saved_use.evaluate(saved, sessions, window, split, batch_size)
    title = f"{saved.title}, window {window}, {split}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    metrics = [METRIC_TITLES.get(name, name) for name in found["metrics"]]
    for heading in (*metrics, "Loss", "Sessions", "per s"):
        table.add_column(heading, justify="right")
    table.add_row(
        *(f"{value:.4f}" for value in found["metrics"].values()),
        f"{found['loss']:.4f}",
        f"{found['sessions']:,}",
        f"{found['sessions'] / found['seconds']:,.0f}",
    )
    results.print(table)


def recommend(
    model: SavedModelFolder,
    workflow: Annotated[
        Path | None,
        typer.Option(help="The ETL's workflow. Default: OUT/data/workflow of the model's OUT."),
    ] = None,
    items: Annotated[
        str | None, typer.Option(help="Items of one session in time order, with commas.")
    ] = None,
    sessions: Annotated[
        Path | None,
        typer.Option(help="Events, or a parquet file of the ETL: one answer a session."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many items to recommend, 1 to 128.")] = 10,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen", help="Never recommend an item of the session itself.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write session, rank, item, score to .csv or .parquet."),
    ] = None,
) -> None:
    """Recommend the next items of a session, as item ids of the events with scores.

    Example: [bold]t4r-fast recommend OUT/models/xlnet_mlm --items 1004856,1004767 -k 5[/bold]
    """
    from t4r_fast.etl import Workflow
    from t4r_fast.etl.features import FIRST_ID
    from t4r_fast.serve import Recommender
    from t4r_fast.train import saved_model, saved_use

    quiet()
    if (items is None) == (sessions is None):
        raise InputError("give either --items ID,ID,... or --sessions FILE")
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise InputError(f"out: the file must end in .csv or .parquet; got {out}")
    saved = saved_model.load(model)
    fitted = Workflow.load(workflow if workflow is not None else _workflow_of(model))
    served = Recommender(saved.model, fitted)
    if items is not None:
        values = listed(items)
        given = saved_use.sessions_of_items(saved, fitted, values)
        unknown = [v for v, i in zip(values, fitted.item_ids(values)) if i < FIRST_ID]
        if unknown:
            notes.print(f"[yellow]note:[/yellow] never seen in training: {', '.join(unknown)}")
    else:
        given = saved_use.sessions_of_file(saved, served.workflow, sessions)
    found = served.recommend_encoded(given, k, exclude_seen=exclude_seen)
    if out is not None:
        _write(out, found)
        results.print(f"wrote {out}", soft_wrap=True, highlight=False)
        return
    table = Table(box=SIMPLE_HEAD)
    for heading in ("session", "rank", "item", "score"):
        table.add_column(heading, justify="left" if heading == "session" else "right")
    for key, rank, value, score in _rows(found):
        table.add_row(str(key) if rank == 1 else "", str(rank), str(value), f"{score:.4f}")
    results.print(table)


def _rows(found: Recommendations) -> Iterator[tuple[object, int, object, float]]:
    """Session, rank, item and score of each recommendation."""
    for key, items, scores in zip(found.sessions, found.items, found.scores.tolist()):
        for rank, (item, score) in enumerate(zip(items, scores), 1):
            yield key, rank, item, score


def _write(out: Path, found: Recommendations) -> None:
    import polars as pl

    columns = ["session", "rank", "item", "score"]
    frame = pl.DataFrame(list(_rows(found)), schema=columns, orient="row")
    if out.suffix == ".csv":
        frame.write_csv(out)
    else:
        frame.write_parquet(out)


def export(
    model: SavedModelFolder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The model repository.")],
    workflow: Annotated[
        Path | None,
        typer.Option(help="The ETL's workflow. Default: OUT/data/workflow of the model's OUT."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the served model.")] = "t4r_fast",
    sessions: Annotated[
        str, typer.Option(help="What requests hold: events, or encoded sessions, ragged or padded.")
    ] = "events",
    k: Annotated[int, typer.Option("-k", help="How many items to recommend, 1 to 128.")] = 20,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen", help="Never recommend an item of the session itself.")
    ] = False,
    all_scores: Annotated[
        bool, typer.Option("--all-scores", help="Also an output with the scores of all items.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT/NAME.")] = False,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server.

    Example: [bold]t4r-fast export OUT/models/xlnet_mlm --out repository --name shop[/bold]
    """
    from t4r_fast import serve as serving
    from t4r_fast.etl import Workflow
    from t4r_fast.train import saved_model

    quiet()
    saved = saved_model.load(model)
    fitted = Workflow.load(workflow if workflow is not None else _workflow_of(model))
    folder = serving.export(
        saved.model,
        fitted,
        out,
        name,
        sessions=sessions,
        top_k=k,
        exclude_seen=exclude_seen,
        all_scores=all_scores,
        overwrite=overwrite,
    )
    results.print(f"wrote {folder}", soft_wrap=True, highlight=False)
    notes.print(
        f"serve it with: tritonserver --model-repository={out.resolve()}",
        soft_wrap=True,
        highlight=False,
    )


def serve(
    model: SavedModelFolder,
    workflow: Annotated[
        Path | None,
        typer.Option(help="The ETL's workflow. Default: OUT/data/workflow of the model's OUT."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address; 0.0.0.0 answers other machines.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Serve recommendations over HTTP, with a page to try them; no Triton needed.

    Example: [bold]t4r-fast serve OUT/models/xlnet_mlm --port 8000[/bold]
    """
    from t4r_fast.etl import Workflow
    from t4r_fast.serve import Recommender
    from t4r_fast.serve.web import create_app
    from t4r_fast.train import saved_model

    quiet()
    saved = saved_model.load(model)
    fitted = Workflow.load(workflow if workflow is not None else _workflow_of(model))
    app = create_app(Recommender(saved.model, fitted))
    import uvicorn  # after create_app, which says what is missing

    uvicorn.run(app, host=host, port=port)


def _workflow_of(model: Path) -> Path:
    path = model.resolve().parent.parent / "data" / "workflow"
    if not path.is_dir():
        raise InputError(f"{path}: no workflow there; name the ETL's with --workflow")
    return path

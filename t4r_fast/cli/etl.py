"""Commands that make sessions from events (etl), and events from nothing (generate)."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from t4r_fast.cli.console import RichProgress, results
from t4r_fast.cli.options import listed

if TYPE_CHECKING:
    from t4r_fast.etl import Summary

Seed = Annotated[int, typer.Option(help="Seed; equal input and seed give equal files.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the app."""
    app.command()(etl)
    app.command()(generate)


def etl(
    inputs: Annotated[
        list[Path], typer.Argument(help="Event files (CSV, .csv.gz, TSV, parquet) or a folder.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to make.")],
    window: Annotated[str, typer.Option(help="day, or a duration such as 1h or 30m.")] = "day",
    columns: Annotated[
        str | None,
        typer.Option(
            "--map",
            help="Columns that are not named as in REES46:"
            " session=SessionId,item=ItemId,time=Time[,category=..,brand=..,price=..]."
            " brand= leaves a feature out.",
        ),
    ] = None,
    event_types: Annotated[
        str | None, typer.Option(help="Keep only these event types, such as view,cart.")
    ] = None,
    keep: Annotated[str, typer.Option(help="End of long sessions that stays: last, first.")] = (
        "last"
    ),
    min_length: Annotated[int, typer.Option(help="Fewest events of a session.")] = 2,
    max_length: Annotated[int, typer.Option(help="Most events of a session.")] = 20,
    suffix: Annotated[str, typer.Option(help="Ending of list columns: -list_seq, -list.")] = (
        "-list_seq"
    ),
    text: Annotated[
        str | None,
        typer.Option(help="Ids that are text although they look like numbers: item,session."),
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Of text files, 'tab' for a tab. Default: as the header.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="polars; or nvtabular, in an environment with NVTabular 23.8.")
    ] = "polars",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Turn events into sessions by window, split into train, valid and test.

    Writes OUT/sessions_by_day/1, 2, ..., OUT/schema.pbtxt, OUT/workflow and OUT/summary.json.

    Example: [bold]t4r-fast etl 2019-Oct.csv --out data[/bold]

    Example: [bold]t4r-fast etl clicks.txt --map session=SessionId,item=ItemId,time=Time -o data[/bold]
    """  # noqa: E501  (an example must stay on one line to be copied)
    from t4r_fast.etl import parse_map, run

    with RichProgress() as progress:
        summary = run(
            inputs,
            out,
            map=parse_map(columns) if columns else None,
            window=window,
            min_length=min_length,
            max_length=max_length,
            keep=keep,
            suffix=suffix,
            seed=seed,
            event_types=listed(event_types),
            text=listed(text),
            separator="\t" if separator in ("tab", "\\t") else separator,
            overwrite=overwrite,
            progress=_Steps(progress),
            engine=engine,
        )
    _show(summary)


def generate(
    path: Annotated[Path, typer.Argument(help="File to make; .csv or .parquet.")],
    items: Annotated[int, typer.Option(help="Items of the shop.")] = 1000,
    sessions: Annotated[int, typer.Option(help="Sessions a day.")] = 5000,
    days: Annotated[int, typer.Option(help="Days.")] = 4,
    start: Annotated[str, typer.Option(help="First day.")] = "2019-10-01",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make events of an invented shop, with structure that models can learn, at any size.

    Example: [bold]t4r-fast generate events.csv --items 1000 --sessions 5000 --days 4[/bold]
    """
    from t4r_fast.etl.generate import generate_events

    with RichProgress() as progress:
        steps = _Steps(progress)
        made = generate_events(
            path,
            sessions_per_day=sessions,
            days=days,
            items=items,
            seed=seed,
            start=start,
            overwrite=overwrite,
            progress=steps,
        )
    results.print(
        f"{made.path}: {made.events:,} events, {made.sessions:,} sessions, {made.items:,} items,"
        f" {made.days} days",
        soft_wrap=True,
        highlight=False,
    )
    _next(f"t4r-fast etl {shlex.quote(str(path))} --out data")


class _Steps:
    """Passes (step, done, total) on to the bars: one bar per step."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars, self._step, self._done = bars, "", 0

    def __call__(self, step: str, done: int, total: int) -> None:
        if step != self._step:
            self._bars.start(step, total)
            self._step, self._done = step, 0
        self._bars.advance(step, done - self._done)
        self._done = done
        if done >= total:
            self._bars.finish(step)
            self._step = ""


def _show(summary: Summary) -> None:
    counts = Table(show_header=False, title="Events and sessions", title_justify="left")
    counts.add_column()
    counts.add_column(justify="right")
    for field in dataclasses.fields(summary):
        value = getattr(summary, field.name)
        if isinstance(value, int) and field.name != "seed" and (value or field.name == "items"):
            counts.add_row(field.name.replace("_", " "), f"{value:,}")
    results.print(counts)
    windows = Table(title=f"Windows of {summary.window}", title_justify="left")
    for heading in ("window", "start", "train", "valid", "test"):
        windows.add_column(heading, justify="left" if heading == "start" else "right")
    shown = summary.windows if len(summary.windows) <= 12 else summary.windows[:10]
    for w in shown:
        windows.add_row(str(w.number), w.start, f"{w.train:,}", f"{w.valid:,}", f"{w.test:,}")
    if len(shown) < len(summary.windows):
        windows.add_row("...", f"{len(summary.windows) - len(shown)} more", "", "", "")
    results.print(windows)
    if summary.roles_left_out:
        left_out = ", ".join(summary.roles_left_out)
        results.print(f"Features left out, as the events have no such column: {left_out}")
    small = [str(w.number) for w in summary.windows if not (w.train and w.valid and w.test)]
    if small:
        results.print(
            f"Windows with an empty train, valid or test file: {', '.join(small[:10])}"
            f"{' ...' if len(small) > 10 else ''}; a longer --window avoids them"
        )
    _next(f"t4r-fast train {shlex.quote(summary.out)} --out run")


def _next(command: str) -> None:
    results.print(f"Next: {command}", soft_wrap=True, highlight=False)

"""The command bench: how fast the ops are, beside what else computes the same."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from t4r_fast.cli.console import RichProgress, notes, results
from t4r_fast.errors import InputError

if TYPE_CHECKING:
    from types import ModuleType


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the app."""
    app.command()(bench)


def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(help="Ops to measure, such as tied_softmax_loss.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few small cases in under a minute; keeps no results.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Every size, longer samples; takes an hour.")
    ] = False,
    threads: Annotated[
        str | None, typer.Option(help="Such as 1,2. Default: 1 and all; with --quick: 1.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64.")] = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Append to this file. Default: benchmarks/results/MACHINE.jsonl."
        ),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Time without comparing with float64 first.")
    ] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Measure nothing: write the kept results into README.md and docs."
        ),
    ] = False,
) -> None:
    """Check the ops against float64, then time them beside their rivals.

    Times are CPU milliseconds with one thread and wall milliseconds with more; the floor is what
    this machine's arithmetic or memory allows, measured in the same run.

    Example: t4r-fast bench tied_softmax_loss --threads 1
    """
    if quick and full:
        raise InputError("bench: take --quick or --full, not both")
    load_benchmarks(find_checkout())
    if table:
        _write_tables()
        return
    import torch

    from benchmarks import bench as runner

    if dtype not in runner.DTYPES:
        raise InputError(f"bench: --dtype must be one of {', '.join(runner.DTYPES)}; got {dtype!r}")
    chosen = "quick" if quick else "full" if full else "standard"
    options = runner.Options(
        chosen, _thread_counts(threads, quick), getattr(torch, dtype), not no_check
    )
    known = runner.available()
    for op in ops or []:
        runner.load(op)
    keep = out or (None if quick else runner.results_file())
    with RichProgress() as progress:
        records = runner.run(ops or known, options, _watch(runner, progress, keep))
    if keep is not None:
        results.print(f"Results: {keep}", soft_wrap=True, highlight=False)
    wrong = [record for record in records if record["status"] == "wrong" and record["ours"]]
    for record in wrong:
        notes.print(
            f"[bold red]wrong:[/bold red] {record['op']} {record['case']}:"
            f" {escape(record['reason'])}",
            soft_wrap=True,
            highlight=False,
        )
    if wrong:
        raise typer.Exit(1)


def find_checkout() -> Path:
    """The root of the repository: where the package lies, else around the working directory."""
    import t4r_fast

    here = Path.cwd()
    for folder in (Path(t4r_fast.__file__).resolve().parent.parent, here, *here.parents):
        if (folder / "benchmarks/bench.py").exists() and (folder / "t4r_fast/ops").exists():
            return folder
    raise InputError(
        "bench: the benchmarks are in the repository of t4r_fast and not in the installed package;"
        f" run this inside a checkout, {here} is none"
    )


def load_benchmarks(root: Path | str) -> ModuleType:
    """Import the checkout's `benchmarks` package, whatever else has that name."""
    folder = Path(root) / "benchmarks"
    loaded = sys.modules.get("benchmarks")
    if loaded is not None and str(folder) in getattr(loaded, "__path__", []):
        return loaded
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)
    return module


def _thread_counts(threads: str | None, quick: bool) -> tuple[int, ...]:
    from benchmarks.machine import cores

    if threads is None:
        return (1,) if quick else tuple(dict.fromkeys((1, cores())))
    try:
        counts = tuple(dict.fromkeys(int(part) for part in threads.split(",")))
    except ValueError:
        counts = ()
    most = os.cpu_count() or 1
    if not counts or not all(1 <= count <= most for count in counts):
        raise InputError(
            f"bench: --threads must be numbers from 1 to {most} with commas; got {threads!r}"
        )
    return counts


def _watch(runner: ModuleType, progress: RichProgress, keep: Path | None) -> Any:
    def started(op: str, cases: int) -> None:
        progress.start(op, cases)

    def measured(op: str, records: list[dict[str, Any]]) -> None:
        progress.advance(op)
        _show(op, records)
        # at once: an interrupted run keeps the cases that are done
        if keep is not None:
            runner.append(records, keep)

    return runner.Watch(started, measured, lambda op: progress.finish(op))


def _show(op: str, records: list[dict[str, Any]]) -> None:
    from benchmarks.table import compared, cost, memory_text, ratio_text

    for group in compared(records):
        threads = group[0]["threads"]
        shown = Table(
            title=f"{op} {group[0]['case']}, {threads} thread{'s' * (threads > 1)}",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        shown.add_column("", min_width=26)
        for heading in ("CPU ms" if threads == 1 else "wall ms", "spread", "ours", "rate"):
            shown.add_column(heading, justify="right")
        shown.add_column("floor", justify="right")
        shown.add_column("MiB", justify="right")
        for record in group:
            if record["status"] != "ok":
                shown.add_row(record["provider"], f"[dim]{record['status']}[/dim]")
                continue
            time, flop = cost(record), record["gflop_per_s"]
            ratio = ratio_text(group[0], record).partition(" ")[0]
            shown.add_row(
                record["provider"],
                f"{time['p50']:.4g}",
                "one run"
                if record["samples"] == 1
                else f"{100 * (time['p80'] - time['p20']) / time['p50']:.0f}%",
                f"[red]{ratio}[/red]" if ratio.startswith("0") else ratio,
                f"{flop:.1f} GFLOP/s" if flop else f"{record['gbyte_per_s']:.1f} GB/s",
                f"{100 * record['floor_share']:.0f}%",
                memory_text(record),
            )
        results.print(shown)
    for reason in dict.fromkeys(
        f"{record['provider']}: {record['reason']}" for record in records if "reason" in record
    ):
        notes.print(f"[yellow]note:[/yellow] {escape(reason)}", soft_wrap=True, highlight=False)


def _write_tables() -> None:
    from benchmarks.table import write_tables

    for path in write_tables():
        results.print(f"Written: {path}", soft_wrap=True, highlight=False)

"""The command line `t4r-fast`: one module per group of commands, registered here.

Commands import what they need when they run, so that `t4r-fast --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Annotated

import typer
from rich.markup import escape

from t4r_fast.cli import bench, doctor, etl, serving, tutorial
from t4r_fast.cli.console import notes, show_warning
from t4r_fast.errors import InputError
from t4r_fast.version import __version__

app = typer.Typer(
    name="t4r-fast",
    help="Session-based recommendation at kernel speed: the Transformers4Rec tutorial, end to end.",
    epilog="Start with: [bold]t4r-fast demo[/bold]",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_debug = False


def _version(asked: bool) -> None:
    if asked:
        print(f"t4r-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    global _debug
    _debug = debug
    if not debug:
        warnings.showwarning = show_warning
    if context.invoked_subcommand != "bench":
        # OpenMP threads that wait for each other spin. Where another process takes a core, that
        # made a training step of two threads 9 to 60 times as slow (2 cores, GRU and XLNet);
        # asleep it stays within 1.6 times the step of one thread. Read when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for _group in (tutorial, etl, serving, bench, doctor):
    _group.register(app)


def main() -> None:
    """Run the command line: bad input is one line and status 1, an interrupt is status 130."""
    try:
        app()
    except InputError as e:
        if _debug:
            traceback.print_exc()
        notes.print(
            f"[bold red]error:[/bold red] {escape(str(e))}", soft_wrap=True, highlight=False
        )
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)

"""What the commands print with: results to stdout, notes and progress to stderr."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from t4r_fast.train.progress import Progress

results = Console()
notes = Console(stderr=True)


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Warnings as one quiet line instead of a line of source."""
    notes.print(f"[yellow]note:[/yellow] {escape(str(message))}", soft_wrap=True, highlight=False)


class RichProgress(Progress):
    """Draws running steps as bars on stderr and leaves one line per finished step.

    Off a terminal there are only the lines. Use it as a context manager.
    """

    def __init__(self) -> None:
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=notes,
            disable=not notes.is_terminal,
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> RichProgress:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def start(self, step: str, total: int | None = None) -> None:
        self.tasks[step] = self.bars.add_task(escape(step), total=total)

    def advance(self, step: str, count: int = 1) -> None:
        self.bars.advance(self.tasks[step], count)

    def finish(self, step: str, result: str = "") -> None:
        task = self.tasks.pop(step)
        seconds = self.bars.tasks[self.bars.task_ids.index(task)].elapsed or 0.0
        self.bars.remove_task(task)
        text = escape(f"{step}: {result}" if result else step)
        notes.print(f"[green]done[/green] {text} [dim]{seconds:.1f} s[/dim]", highlight=False)

    def note(self, text: str) -> None:
        notes.print(f"[yellow]note:[/yellow] {escape(text)}", highlight=False)

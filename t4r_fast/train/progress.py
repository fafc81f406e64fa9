"""How long steps tell what they are doing; the command line draws it."""

from __future__ import annotations


class Progress:
    """Told about steps and notes; this one ignores them all. Subclass it to show them."""

    def start(self, step: str, total: int | None = None) -> None:
        """A step begins; `total` counts its units, None when unknown."""

    def advance(self, step: str, count: int = 1) -> None:
        """`count` more units of the step are done."""

    def finish(self, step: str, result: str = "") -> None:
        """The step is over; `result` is a short text such as a metric."""

    def note(self, text: str) -> None:
        """Something the user should know."""

"""Progress in notebooks."""

from __future__ import annotations

import re
from typing import Any

from transformers.utils import is_in_notebook


def show_metrics(trainer: Any) -> None:
    """Let the trainer's progress bars in a notebook show metrics of our names."""
    if not is_in_notebook():
        return
    from transformers.utils.notebook import NotebookProgressCallback

    class NotebookProgress(NotebookProgressCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
            # The parent takes entries out of the dict, which is the one that evaluate() returns,
            # and names columns by what follows the first "_": two of "eval/a/x_at_10" are one.
            shown = {re.sub("_?/", "_", key, count=1): v for key, v in (metrics or {}).items()}
            super().on_evaluate(args, state, control, metrics=shown, **kwargs)

    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(NotebookProgress)

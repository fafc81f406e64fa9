"""Options that several commands share, and what every training command does first."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

MODELS_HELP = "gru_as_printed, gru, xlnet_mlm, xlnet_mlm_side; several with commas."
Epochs = Annotated[int, typer.Option(help="Epochs per window.")]
BatchSize = Annotated[int, typer.Option(help="Sessions per training step.")]
EvalBatchSize = Annotated[
    int, typer.Option(help="Sessions per evaluation step (changes the printed GRU's metrics).")
]
LearningRate = Annotated[
    float | None,
    typer.Option(help="For every model. Default: .00071 for a GRU, .000666 for an XLNet."),
]
DModel = Annotated[
    int | None, typer.Option("--d-model", help="Body width. Default: 128 for a GRU, 192 for XLNet.")
]
Layers = Annotated[
    int | None, typer.Option("--layers", help="Body layers. Default: 1 for a GRU, 2 for XLNet.")
]
Heads = Annotated[int, typer.Option("--heads", help="Attention heads of XLNet.")]
ItemDim = Annotated[int, typer.Option(help="Width of the embedding tables.")]
EmbeddingStd = Annotated[
    float, typer.Option(help="Deviation of fresh embeddings; .3 learns faster on little data.")
]
Dropout = Annotated[float, typer.Option(help="Dropout of XLNet.")]
Length = Annotated[int, typer.Option("--max-length", help="Longest session; the last items stay.")]
Seed = Annotated[int, typer.Option(help="Seed of split, weights, order, masks and dropout.")]
CheckpointSteps = Annotated[
    int, typer.Option(help="Steps between checkpoints inside a window, for --resume.")
]
AsPrinted = Annotated[
    bool,
    typer.Option(
        "--as-printed",
        help="XLNet attends to padding, as in the tutorial; slower, and a prediction changes with"
        " the length to which its session is padded.",
    ),
]
Compat = Annotated[
    str | None,
    typer.Option(help="Behave like Transformers4Rec 0.1 or 23.12. Default: 23.12."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for everything that is written.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in OUT.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in OUT.")]
SchemaFile = Annotated[
    Path | None, typer.Option("--schema", help="Default: schema.pbtxt beside or above the windows.")
]
Split = Annotated[str, typer.Option(help="train, valid or test.")]


def quiet() -> None:
    """Keep the libraries' own talk off the terminal; the commands say what matters."""
    logging.getLogger("t4r_fast").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()


def listed(text: str | None) -> list[str]:
    """The parts of a text with commas; none of None."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]

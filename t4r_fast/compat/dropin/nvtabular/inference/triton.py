"""Export to Triton Inference Server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from t4r_fast.compat import warn_once
from t4r_fast.errors import InputError
from t4r_fast.serve import export


def export_pytorch_ensemble(
    model: Any,
    workflow: Any,
    sparse_max: dict[str, int],
    name: str,
    model_path: str,
    label_columns: Sequence[str] | None = None,
    use_fix_dtypes: bool = True,
    version: int = 1,
    nvtabular_backend: str = "python",
    cats: Sequence[str] | None = None,
    conts: Sequence[str] | None = None,
) -> None:
    """Write the model repository <model_path>/<name> for Triton, as t4r_fast.serve.export does.

    sparse_max     column -> positions that its lists are padded to; one length for all columns
    label_columns  columns of the events that serving does not have; t4r_fast needs none of them

    It is one model, not three: raw events in, `output` with the scores of all items out, as in the
    tutorial, and beside it `session`, `items` and `scores`. An earlier export of the name is
    replaced. The last four options have no effect, with a warning where they are set: cats and
    conts are those of the model's schema. Raises InputError where model, workflow and lengths do
    not fit. Takes the place of nvtabular.inference.triton.export_pytorch_ensemble.
    """
    lengths = set(sparse_max.values())
    if len(lengths) != 1:
        raise InputError(
            f"export_pytorch_ensemble: sparse_max must give one length for all columns; got"
            f" {sparse_max}"
        )
    reads = {column.name for column in model.input_schema or ()}
    missing = sorted(reads - set(sparse_max))
    if missing:
        raise InputError(f"export_pytorch_ensemble: sparse_max has no length for {missing}")
    unusual = {
        "use_fix_dtypes": use_fix_dtypes is not True,
        "nvtabular_backend": nvtabular_backend != "python",
        "cats": cats is not None,
        "conts": conts is not None,
    }
    for option in (n for n, is_set in unusual.items() if is_set):
        warn_once(f"export_pytorch_ensemble {option}", f"{option} has no effect")
    export(
        model,
        workflow,
        model_path,
        name,
        all_scores=True,
        length=lengths.pop(),
        version=version,
        overwrite=True,
    )

"""Export to Triton Inference Server, which is not there yet."""

from __future__ import annotations

from typing import Any, NoReturn


def export_pytorch_ensemble(
    model: Any,
    workflow: Any,
    sparse_max: dict[str, int],
    name: str,
    model_path: str,
    label_columns: list[str] | None = None,
    use_fix_dtypes: bool = True,
    version: int = 1,
    nvtabular_backend: str = "python",
    cats: list[str] | None = None,
    conts: list[str] | None = None,
) -> NoReturn:
    """Not there yet: raises NotImplementedError and writes nothing.

    The arguments are those of nvtabular.inference.triton.export_pytorch_ensemble.
    """
    raise NotImplementedError(
        "export_pytorch_ensemble: t4r_fast does not export to Triton Inference Server yet; nothing"
        f" was written to {model_path}. Keep the weights with torch.save(model.state_dict(), path)"
        " and the workflow with workflow.save(path)"
    )

"""Which packages are there to load data with: `transformers4rec.utils.dependencies`."""

from __future__ import annotations

import importlib


def is_gpu_dataloader_available() -> bool:
    """Are cuDF and CuPy there? Nothing here needs them."""
    return _imports("cudf") and _imports("cupy")


def is_pyarrow_available() -> bool:
    """Is pyarrow there? Always: t4r_fast needs it."""
    return _imports("pyarrow")


def is_merlin_dataloader_available() -> bool:
    """Is Merlin's own loader there? The engine "merlin" does not need it.

    The reference raises UnboundLocalError where it is not.
    """
    return _imports("merlin.dataloader")


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True

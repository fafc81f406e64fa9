"""The root of the package `transformers4rec`."""

from __future__ import annotations

from t4r_fast.compat import get_compat
from t4r_fast.version import __version__ as _ours


def __getattr__(name: str) -> str:
    # asked for anew: the level can be set after the import
    if name == "__version__":
        release = {"0.1": "0.1.0", "23.12": "23.12.0"}[get_compat()]
        return f"{release}+t4r.fast.{_ours}"
    raise AttributeError(f"module 'transformers4rec' has no attribute {name!r}")

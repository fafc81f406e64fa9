"""t4r_fast: session-based recommendation at kernel speed."""

from t4r_fast.compat import get_compat, set_compat
from t4r_fast.version import __version__

__all__ = ["__version__", "get_compat", "set_compat"]

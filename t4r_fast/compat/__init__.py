"""The names of Transformers4Rec: which release they behave like, and warnings given once.

"0.1" is the release of the tutorial (September 2021), "23.12" (the default) the last one. What
differs between them is listed in docs/compatibility.md.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator

LEVELS = ("0.1", "23.12")
DEFAULT_LEVEL = "23.12"

_level: str | None = None
_warned: set[str] = set()


class CompatWarning(UserWarning):
    """The reference's behaviour is followed although it is not what it seems; names the option."""


def _checked(level: str, origin: str) -> str:
    if level not in LEVELS:
        raise ValueError(f"{origin} must be one of {', '.join(LEVELS)}; got {level!r}")
    return level


def set_compat(level: str) -> None:
    """Behave like this release of Transformers4Rec from here on: "0.1" or "23.12".

    Modules read the level when they are built, so set it before building a model.
    Raises ValueError on any other level.
    """
    global _level
    _level = _checked(level, "set_compat: level")


def get_compat() -> str:
    """The compat level in force: set_compat's, else T4R_FAST_COMPAT's, else "23.12"."""
    if _level is not None:
        return _level
    return _checked(os.environ.get("T4R_FAST_COMPAT", DEFAULT_LEVEL), "T4R_FAST_COMPAT")


@contextlib.contextmanager
def compat_level(level: str | None) -> Iterator[None]:
    """Inside, set_compat(level); outside, what it was before. None changes nothing."""
    global _level
    before = _level
    if level is not None:
        set_compat(level)
    try:
        yield
    finally:
        _level = before


def warn_once(option: str, message: str) -> None:
    """Warn about `option` once in the life of the process."""
    if option in _warned:
        return
    _warned.add(option)
    warnings.warn(f"{message} (option: {option})", CompatWarning, stacklevel=3)


def forget_warnings() -> None:
    """Let every one-time warning speak again (for tests and notebooks)."""
    _warned.clear()

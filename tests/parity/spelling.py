"""How names.json spells defaults of arguments. Both sides import it: the standard library only."""

from __future__ import annotations

from enum import Enum
from typing import Any


def plain(value: Any) -> Any:
    """A default as names.json spells it."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, type):
        return {"object": value.__name__}
    return {"object": type(value).__name__}

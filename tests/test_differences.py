"""docs/differences.md names options that are there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import t4r_fast.torch as tr

TEXT = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()


def test_every_option_that_the_document_names_is_there():
    found = re.findall(r"`tr\.(\w+)(?:\.(\w+))?\((\w+)=", TEXT)
    assert len(found) > 12
    for name, method, option in found:
        owner = getattr(tr, name)
        call = getattr(owner, method) if method else owner
        assert option in inspect.signature(call).parameters or option in _of_class(owner), (
            f"{name}.{method or '__init__'} takes no {option}"
        )


def _of_class(owner):
    """Options that from_schema and subclasses hand on."""
    return {n for cls in owner.__mro__ for n in inspect.signature(cls.__init__).parameters}


def test_every_row_is_whole():
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "---" not in line]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 3, row
        # what is wrong by default needs an option
        assert cells[1] or "wrong" not in cells[2], row

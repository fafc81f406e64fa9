"""Modules under the names that they had before: `t4r_fast.torch.masking` is
`t4r_fast.compat.torch.masking`, the same object and never a copy of it."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

# The longest name that fits wins; what is below it moves along.
MOVED = {
    "t4r_fast.config": "t4r_fast.compat.config",
    "t4r_fast.data": "t4r_fast.compat.data",
    "t4r_fast.dropin": "t4r_fast.compat.dropin",
    "t4r_fast.generate": "t4r_fast.etl.generate",
    "t4r_fast.lazy_logits": "t4r_fast.model.next_item",
    "t4r_fast.optim": "t4r_fast.train.optim",
    "t4r_fast.patch": "t4r_fast.compat.accelerate",
    "t4r_fast.reference": "t4r_fast.plain",
    "t4r_fast.serving": "t4r_fast.serve",
    "t4r_fast.torch": "t4r_fast.compat.torch",
    "t4r_fast.torch.architecture": "t4r_fast.model.architecture",
    "t4r_fast.torch.checkpoint": "t4r_fast.train.checkpoint",
    "t4r_fast.torch.data.given": "t4r_fast.train.given",
    "t4r_fast.torch.data.loader": "t4r_fast.train.loader",
    "t4r_fast.torch.data.row_blocks": "t4r_fast.train.row_blocks",
    "t4r_fast.torch.data.sessions": "t4r_fast.train.session_table",
    "t4r_fast.torch.distributed": "t4r_fast.train.distributed",
    "t4r_fast.torch.evaluation": "t4r_fast.train.evaluation",
    "t4r_fast.torch.model.lazy_logits": "t4r_fast.model.next_item",
    "t4r_fast.torch.model.stored": "t4r_fast.model.store",
    "t4r_fast.torch.notebook": "t4r_fast.train.notebook",
    "t4r_fast.torch.trainer": "t4r_fast.train.trainer",
    "t4r_fast.tutorial": "t4r_fast.train",
    "t4r_fast.tutorial.serving": "t4r_fast.train.saved_use",
}


def home(name: str) -> str:
    """Where a module is today; the name itself for one that stayed."""
    # `from t4r_fast.torch import notebook` asks for a module below today's package
    old = name.replace("t4r_fast.compat.torch.", "t4r_fast.torch.")
    old = old.replace("t4r_fast.train.", "t4r_fast.tutorial.")
    known = old
    while known:
        if known in MOVED:
            return MOVED[known] + old.removeprefix(known)
        known = known.rpartition(".")[0]
    return name


class Alias(importlib.abc.Loader):
    """Gives a module under a further name; None: an empty package."""

    def __init__(self, target: str | None) -> None:
        self.target = target

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        if self.target is None:
            return types.ModuleType(spec.name)
        module = importlib.import_module(self.target)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        if self.target is not None:
            # importlib has written the spec of the other name into it
            module.__spec__ = self._spec


def spec_of(name: str, target: str | None) -> importlib.machinery.ModuleSpec | None:
    """The spec by which `name` imports the module `target`; None where there is no such module."""
    found = None if target is None else importlib.util.find_spec(target)
    if target is not None and found is None:
        return None
    package = found is None or found.submodule_search_locations is not None
    return importlib.machinery.ModuleSpec(name, Alias(target), origin=target, is_package=package)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("t4r_fast.") or fullname == "t4r_fast.torch":
            return None  # t4r_fast/torch.py is there for tools that read types
        today = home(fullname)
        if today == fullname:
            return None
        try:
            return spec_of(fullname, today)
        except ModuleNotFoundError:  # the package above it
            return None


def install() -> None:
    """Answer the old names from here on; first, or submodules would be found by path and loaded a
    second time."""
    sys.meta_path.insert(0, _Finder())

"""The import hook: names of the reference to modules of t4r_fast, never to copies of them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence

from t4r_fast.compat import warn_once
from t4r_fast.compat.dropin import names
from t4r_fast.errors import InputError
from t4r_fast.moved import spec_of

_VARIABLE = "T4R_FAST_DROPIN"
_VALUES: dict[str, bool | str] = {"": False, "replace": True, "replace-all": "all"}
# How to replace an installed package that stays in use.
_OPTIONS = {
    "transformers4rec": f"t4r_fast.dropin.install(replace=True), or {_VARIABLE}=replace",
    "nvtabular": f"t4r_fast.dropin.install(replace='all'), or {_VARIABLE}=replace-all",
}


class _Finder(importlib.abc.MetaPathFinder):
    """Answers all imports below some roots."""

    def __init__(self, roots: tuple[str, ...]) -> None:
        self.roots = roots

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.roots:
            return None
        try:
            ours = names.target(fullname)
        except KeyError:
            instead = "; install NVTabular for it" if fullname.startswith("nvtabular.") else ""
            raise ModuleNotFoundError(
                f"t4r_fast.dropin has no module {fullname!r}{instead}; docs/compatibility.md lists"
                " what is there",
                name=fullname,
            ) from None
        return spec_of(fullname, ours)


_finder: _Finder | None = None


def install(replace: bool | str | None = None) -> tuple[str, ...]:
    """Answer the import names of the reference by t4r_fast from here on.

    replace  True: in place of an installed Transformers4Rec, too; "all": in place of an installed
             NVTabular as well; False: what is installed stays in use, with a warning. None: as
             the environment variable T4R_FAST_DROPIN says, "replace", "replace-all" or nothing
    returns  the import roots that are answered

    Importing t4r_fast.dropin calls this; a later call overrides an earlier one. Raises InputError
    on other values, and RuntimeError when modules of the real package are already imported and
    would be mixed with ours.
    """
    global _finder
    if replace is None:
        value = os.environ.get(_VARIABLE, "")
        if value not in _VALUES:
            raise InputError(
                f"{_VARIABLE} must be 'replace' or 'replace-all', or not set; got {value!r}"
            )
        replace = _VALUES[value]
    if replace not in _VALUES.values():
        raise InputError(f"install: replace must be True, False or 'all'; got {replace!r}")
    uninstall()
    roots: list[str] = []
    replaced = {False: (), True: ("transformers4rec",), "all": tuple(names.ROOTS)}[replace]
    for package, owned in names.ROOTS.items():
        if package not in replaced and _installed(package):
            warn_once(
                _OPTIONS[package],
                f"{package} is installed and stays in use under its own name; t4r_fast can answer"
                " in its place",
            )
            continue
        _refuse_imported(owned)
        roots += owned
    _finder = _Finder(tuple(roots))
    # first: behind the others, submodules would be found by path and loaded a second time
    sys.meta_path.insert(0, _finder)
    return answered()


def uninstall() -> None:
    """Let the names mean again what they meant before; what was imported stays as it is."""
    global _finder
    if _finder is None:
        return
    sys.meta_path.remove(_finder)
    for name in list(sys.modules):
        if name.partition(".")[0] in _finder.roots:
            del sys.modules[name]
    _finder = None


def answered() -> tuple[str, ...]:
    """The import roots that t4r_fast answers at present."""
    return () if _finder is None else _finder.roots


def _installed(root: str) -> bool:
    if root in sys.modules:
        return sys.modules[root] is not None
    found = importlib.util.find_spec(root)
    # a folder of that name without an __init__.py is no package of anybody's
    return found is not None and found.origin is not None


def _refuse_imported(roots: tuple[str, ...]) -> None:
    for root in roots:
        if sys.modules.get(root) is not None:
            raise RuntimeError(
                f"t4r_fast.dropin: {root} is already imported from"
                f" {getattr(sys.modules[root], '__file__', 'elsewhere')}; import t4r_fast.dropin"
                " before it, or restart the process"
            )

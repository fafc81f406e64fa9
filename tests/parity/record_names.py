"""Record every public name of the real Transformers4Rec 23.12: tests/parity/names.json.

Run it in an environment that holds transformers4rec 23.12 (not ours):

    python tests/parity/record_names.py

Names, arguments and plain defaults are recorded, no code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import pkgutil
from pathlib import Path

import transformers4rec
from spelling import plain

ROOTS = ("transformers4rec", "merlin_standard_lib")
# Generated code, TensorFlow, and what is not for users.
LEFT_OUT = ("transformers4rec.tf", "transformers4rec._version", "merlin_standard_lib.proto")


def modules() -> list[str]:
    names = []
    for root in ROOTS:
        package = importlib.import_module(root)
        walked = pkgutil.walk_packages(package.__path__, prefix=root + ".", onerror=lambda _: None)
        names += [root, *(m.name for m in walked if not m.name.startswith(LEFT_OUT))]
    return names


def default_of(parameter: inspect.Parameter):
    """A plain default as JSON, {"object": type} for any other, {} for none."""
    value = parameter.default
    if value is parameter.empty:
        return {}
    return plain(value)


def arguments_of(call) -> dict:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):
        return {}
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return {
        stars.get(p.kind, "") + p.name: default_of(p)
        for p in parameters
        if p.name not in ("self", "cls")
    }


def members_of(cls: type) -> dict:
    """Public methods and properties that the class itself defines."""
    found = {}
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        if isinstance(value, property):
            found[name] = None
        elif callable(getattr(cls, name)) and not isinstance(value, type):
            found[name] = arguments_of(getattr(value, "__func__", value))
    return found


def assigned(module) -> set[str]:
    """Names that the module's source assigns or defines at its top."""
    names = set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names.update(t.id for t in targets if isinstance(t, ast.Name))
        names.update([node.name] if isinstance(node, ast.FunctionDef) else [])
    return names


def is_object(value) -> bool:
    """Registries, schemas, data sets, scripted functions; no types, no loggers."""
    where = type(value).__module__.partition(".")[0]
    kinds = ("transformers4rec", "merlin_standard_lib", "merlin", "torch")
    return where in kinds and not isinstance(value, (logging.Logger, type))


def public(module) -> dict:
    found = {name: {} for name in assigned(module) if is_object(getattr(module, name, None))}
    found = {name: value for name, value in found.items() if not name.startswith("_")}
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            found[name] = {"arguments": arguments_of(value.__init__), "members": members_of(value)}
        elif inspect.isfunction(value):
            found[name] = {"arguments": arguments_of(value)}
    return found


def main() -> None:
    found = {}
    failed = []
    for name in modules():
        try:
            module = importlib.import_module(name)
        except Exception as e:  # needs a package that nobody has
            failed.append(f"{name}: {e!r}")
            continue
        if names := public(module):
            found[name] = names
    exported = sorted(importlib.import_module("transformers4rec.torch").__all__)
    recorded = {
        "transformers4rec": transformers4rec.__version__,
        "exported": exported,
        "failed": failed,
        "modules": found,
    }
    path = Path(__file__).with_name("names.json")
    path.write_text(json.dumps(recorded, indent=None, separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{path}: {path.stat().st_size} bytes, {sum(map(len, found.values()))} names; {failed}")


if __name__ == "__main__":
    main()

"""What the compiled code of an op's GPU kernels depends on, as one short digest.

Comments, docstrings and code that runs on the host do not count, so the digest of an op changes
when its kernels have to be compiled again, and seldom else.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

COMMENT = re.compile(r"""//[^\n]*|/\*.*?\*/|("(?:\\.|[^"\\\n])*")""", re.S)
INCLUDE = re.compile(r'#include "([^"]+)"')


def digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def of_triton(variants: Iterable[Any], arch: int) -> str:
    """Of t4r_fast.kernels Variants: types, constants, launch, and all code that they compile."""
    from t4r_fast.kernels._tuning import cap, is_fused

    made = list(variants)
    sources: dict[str, str] = {}
    for variant in made:
        _collect(variant.kernel.fn, sources)
    shown = [
        f"{v.kernel.fn.__name__} {v.label} {v.signature} {v.config} {is_fused(v.kernel)} "
        f"{cap(v, arch)} {sorted((name, str(value)) for name, value in v.constexprs.items())}"
        for v in made
    ]
    return digest([*sorted(shown), *(sources[name] for name in sorted(sources))])


def _collect(function: FunctionType, sources: dict[str, str]) -> None:
    """Source of a kernel, of the device functions that it calls, and the constants it reads."""
    place = f"{function.__module__}.{function.__qualname__}"
    if place in sources:
        return
    sources[place] = without_docstrings(textwrap.dedent(inspect.getsource(function)))
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        called = getattr(value, "fn", None)
        if isinstance(called, FunctionType):
            if not called.__module__.startswith("triton."):
                _collect(called, sources)
        elif isinstance(getattr(value, "value", value), int | float | str):
            sources[f"{place} {name}"] = str(getattr(value, "value", value))


def without_docstrings(source: str) -> str:
    """The tokens of a Python text without comments, docstrings and decorators of functions.

    Not ast.dump, which shows the same code differently in different versions of Python.
    """
    body = source[re.search(r"^def ", source, re.M).start() :]
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(body).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL)
    ]
    starts = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    kept = [
        token
        for before, token, after in zip(tokens, tokens[1:], tokens[2:])
        if not (
            token.type == tokenize.STRING
            and before.type in starts
            and after.type == tokenize.NEWLINE
        )
    ]
    names = {tokenize.INDENT: "{", tokenize.DEDENT: "}", tokenize.NEWLINE: ";"}
    return " ".join(names.get(token.type, token.string) for token in [tokens[0], *kept])


def of_cuda(source: Path) -> str:
    """Of a .cu file and of all files of ours that it includes, without comments and blanks."""
    found: dict[Path, str] = {}
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        text = path.read_text()
        found[path] = " ".join(COMMENT.sub(lambda m: m[1] or " ", text).split())
        for name in INCLUDE.findall(text):
            if (path.parent / name).is_file():  # else the shim's, which nvcc does not see
                waiting.append((path.parent / name).resolve())
    return digest(found[path] for path in sorted(found))

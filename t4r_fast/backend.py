"""Which implementation of an op runs: plain PyTorch, C++, Triton or CUDA.

`pick` chooses per op and device: what is forced, else a native kernel (C++ on a CPU, CUDA on a
GPU), else Triton, else plain PyTorch. `t4r-fast doctor` prints the choice (`table`). Native kernels
live in the dispatcher's namespace `t4r_fast`, Triton's in `t4r_fast_triton`; an op declares their
schemas in Python, once. For tests without a GPU Triton's kernels are interpreted
(TRITON_INTERPRET=1), and the CUDA kernels run from a library of C++ that T4R_FAST_CUDA_ON_CPU
names, in the namespace `t4r_fast_emulated`: both on the CPU, and only where they are forced.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from t4r_fast.errors import InputError

BACKENDS = ("plain", "cpu", "cuda", "triton")
_EMULATED = os.environ.get("T4R_FAST_CUDA_ON_CPU")
_NAMESPACES = {
    "cpu": "t4r_fast",
    "cuda": "t4r_fast_emulated" if _EMULATED else "t4r_fast",
    "triton": "t4r_fast_triton",
}
_DEVICES = {
    "cpu": ("cpu",),
    "cuda": ("cpu",) if _EMULATED else ("cuda",),
    "triton": ("cpu", "cuda"),
}
CPU_LIBRARY, CUDA_LIBRARY = "libt4r_fast_cpu.so", "libt4r_fast_cuda.so"
_BUILD_HINT = "build it with `pip install --no-build-isolation -e .` (or `pip install .`)"

_libraries = {
    name: torch.library.Library(name, "FRAGMENT") for name in sorted(set(_NAMESPACES.values()))
}
_functions: dict[str, list[str]] = {}  # op -> names of its declared functions
_kernels: dict[str, dict[str, tuple[str, ...]]] = {}  # op -> backend -> device types


def _today(name: str) -> str:
    """`reference` is an older name of backend `plain`."""
    if name != "reference":
        return name
    warnings.warn("t4r_fast: backend 'reference' is called 'plain' now", stacklevel=3)
    return "plain"


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise InputError(
            f"backend: name (of `use`, or T4R_FAST_BACKEND) must be one of {', '.join(BACKENDS)}; "
            f"got {name!r}"
        )
    return name


# A plain global and not a ContextVar: Dynamo cannot trace that. A wrong name in the environment is
# refused by the first op, not by the import: `t4r-fast doctor` must be able to say what is wrong.
_forced: str | None = _today(os.environ.get("T4R_FAST_BACKEND", "")) or None


def _load(path: Path, variable: str, build_hint: str) -> str | None:
    """Load a library of kernels; the reason in words if that is not possible.

    variable  the environment variable that may name another build, as `make sanitize` does
    """
    chosen = os.environ.get(variable)
    if chosen:
        path = Path(chosen)
    if not path.exists():
        if chosen:
            return f"{variable} names {path}, which does not exist: correct or unset it"
        return f"{path.name} is not built: {build_hint}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded ({error}): {build_hint}"
    return None


def _load_cpu() -> str | None:
    return _load(Path(__file__).parent / CPU_LIBRARY, "T4R_FAST_CPU_LIBRARY", _BUILD_HINT)


def _load_cuda() -> str | None:
    path = Path(__file__).parent / CUDA_LIBRARY
    if not _EMULATED and not torch.cuda.is_available():
        state = "built" if path.exists() else "not built either"
        return f"no GPU that torch can use ({CUDA_LIBRARY} is {state})"
    return _load(path, "T4R_FAST_CUDA_ON_CPU", f"with nvcc on the path {_BUILD_HINT}")


def _triton_off() -> str | None:
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return "no GPU (set TRITON_INTERPRET=1 before the import to interpret kernels on the CPU)"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


# backend -> why none of its kernels can run here; None when they can
OFF: dict[str, str | None] = {
    "cpu": _load_cpu(),
    "cuda": _load_cuda(),
    "triton": _triton_off(),
}
if OFF["cpu"] is not None and _forced != "plain":
    warnings.warn(
        f"t4r_fast runs its ops in plain PyTorch: {OFF['cpu']}. "
        "Set T4R_FAST_BACKEND=plain to choose plain PyTorch without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )


def declare(op: str, schema: str, fake: Callable[..., Any]) -> None:
    """Declare one function of an op: its schema, its shapes, and which kernels exist for it.

    op      the op's base name; `schema` names its function, `<op>_fwd(...)` or `<op>_bwd(...)`
    schema  as in torch.library.define, without a namespace
    fake    the function on meta tensors: right shapes, dtypes and devices, no data
    """
    function = schema.partition("(")[0]
    for name, library in _libraries.items():
        library.define(schema)
        torch.library.register_fake(f"{name}::{function}", fake, lib=library)
    _functions.setdefault(op, []).append(function)
    _register_triton(op, function)
    _kernels[op] = {
        backend: tuple(device for device in devices if _has_kernels(op, backend, device))
        for backend, devices in _DEVICES.items()
    }


def _register_triton(op: str, function: str) -> None:
    module = f"t4r_fast.kernels.{op}"
    if OFF["triton"] is not None or importlib.util.find_spec("t4r_fast.kernels") is None:
        return
    if importlib.util.find_spec(module) is None:
        return
    launcher = getattr(importlib.import_module(module), function)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    _libraries["t4r_fast_triton"].impl(function, launcher, "CPU" if interpreted else "CUDA")


def _has_kernels(op: str, backend: str, device: str) -> bool:
    namespace, key = _NAMESPACES[backend], device.upper()
    return OFF[backend] is None and all(
        torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{function}", key)
        for function in _functions[op]
    )


def pick(op: str, tensor: torch.Tensor) -> str:
    """The backend that `op` takes for a tensor on this device: one of BACKENDS.

    Raises RuntimeError when a backend is forced that has no kernel for this op and device,
    ValueError when T4R_FAST_BACKEND names no backend.
    """
    return _pick_device(op, tensor.device.type)


def _kernels_of(op: str) -> dict[str, tuple[str, ...]]:
    # The package imports an op when it is first asked for. A compiled caller is an op, so loaded.
    if op not in _kernels and not torch.compiler.is_dynamo_compiling():
        module = f"t4r_fast.ops.{op}"
        if module not in sys.modules and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    return _kernels.get(op, {})


def _pick_device(op: str, device: str) -> str:
    kernels = _kernels_of(op)
    if _forced is not None:
        if _forced == "plain" or device in kernels.get(_forced, ()):
            return _forced
        reason = why_not(op, _check_name(_forced), device)
        raise RuntimeError(f"{op}: backend '{_forced}' is forced, but {reason}")
    if device in kernels.get(device, ()):  # the native backend of a device has its name
        return device
    if device == "cuda" and device in kernels.get("triton", ()):
        return "triton"
    return "plain"


def why_not(op: str, backend: str, device: str) -> str | None:
    """Why `op` cannot take `backend` on `device`, in words; None if it can."""
    if backend == "plain" or device in _kernels_of(op).get(backend, ()):
        return None
    if device not in _DEVICES[backend]:
        return f"that backend does not run on device '{device}'"
    if OFF[backend] is not None:
        return OFF[backend]
    return f"that backend has no kernel of it for device '{device}'; use backend 'plain'"


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Force one backend for all ops: `with backend.use("plain"): ...`.

    name  one of BACKENDS. An op called without a kernel there raises RuntimeError.
    The environment variable T4R_FAST_BACKEND does the same for the whole process.
    A call's backward runs on the backend of its forward.
    """
    global _forced
    previous, _forced = _forced, _check_name(_today(name))
    try:
        yield
    finally:
        _forced = previous


def ops(name: str, plain: ModuleType) -> Any:
    """Where the functions of a backend are: `plain` itself, or the dispatcher's namespace."""
    return plain if name == "plain" else getattr(torch.ops, _NAMESPACES[name])


def forced() -> str | None:
    """The backend that `use` or T4R_FAST_BACKEND forces, if any."""
    return _forced


def table() -> dict[str, dict[str, str]]:
    """The backend of every op per device: {"mask_mlm": {"cpu": "cpu", "cuda": "plain"}, ...}.

    Where a forced backend has no kernel the entry says "error: ..." as the call would.
    """
    from t4r_fast import ops as package

    names = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    rows: dict[str, dict[str, str]] = {}
    for op in sorted(names):
        importlib.import_module(f"t4r_fast.ops.{op}")
        rows[op] = {}
        for device in ("cpu", "cuda"):
            try:
                rows[op][device] = _pick_device(op, device)
            except (RuntimeError, InputError) as error:
                rows[op][device] = f"error: {error}"
    return rows

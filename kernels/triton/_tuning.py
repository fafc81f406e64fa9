"""Block sizes of the Triton kernels: fixed tables, opt-in autotuning, compilation without a GPU.

A kernel's file holds `CONFIGS`: per kernel name some entries in order; the first whose limits hold
for architecture, size of an element, D bucket and N bin is taken. T4R_FAST_AUTOTUNE=1 times the
entries of other N bins as well and keeps the fastest in a file. Exact sizes of a batch are never
looked at: they differ from step to step.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from t4r_fast.kernels._caps import CAPS

# Compute capabilities that kernels are compiled and budgeted for; 0 is the interpreter.
ARCHITECTURES = (80, 86, 90, 100, 120)
INTERPRETER = 0
# A D above the last bucket is worked on in chunks: it has the bucket WIDE.
D_BUCKETS = (16, 32, 64, 128, 256)
WIDE = 512
N_BINS = (128, 1024, 8192, 2**62)
INTERPRETED_PROCESSORS = 2  # so that small tests split their items


class Config(NamedTuple):
    """How to launch a kernel: block sizes by argument name, warps and pipeline stages."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __getitem__(self, name: Any) -> Any:
        """config["BLOCK_N"], and a tuple's numbers."""
        return dict(self.blocks)[name] if isinstance(name, str) else tuple.__getitem__(self, name)


def config(num_warps: int, num_stages: int, **blocks: int) -> Config:
    """config(8, 3, BLOCK_N=128, BLOCK_V=128)"""
    return Config(tuple(blocks.items()), num_warps, num_stages)


class Entry(NamedTuple):
    """A configuration and the limits within which it is good."""

    config: Config
    archs: tuple[int, ...] = (INTERPRETER, *ARCHITECTURES)
    itemsizes: tuple[int, ...] = (2, 4, 8)  # bytes of an element of the inputs
    most_width: int = WIDE  # largest D bucket
    most_rows: int = N_BINS[-1]  # largest N bin
    plain: bool = False  # only without the options that need more registers


Table = Mapping[str, Sequence[Entry]]


class Key(NamedTuple):
    """What a choice may depend on."""

    arch: int
    itemsize: int
    width: int  # D bucket
    rows: int  # N bin
    items: int  # V bucket, in which tables do not look
    device: str
    options: bool = False  # whether it has options that need more registers


class Variant(NamedTuple):
    """One compilation of a kernel; every argument has a type, "constexpr" or "*bf16", "i64", ..."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    config: Config
    label: str


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(tensor: Tensor) -> int:
    """The entry of ARCHITECTURES that serves the tensor's GPU; 0 in the interpreter."""
    if _recording is not None:
        return _recording.arch
    return INTERPRETER if interpreted() else _capability(tensor.device.index)


@functools.cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    found = [arch for arch in ARCHITECTURES if arch <= 10 * major + minor]
    if not found:
        raise RuntimeError(
            f"t4r_fast: Triton kernels must have compute capability 8.0 or newer; GPU {device} has "
            f"{major}.{minor} (use backend 'plain')"
        )
    return found[-1]


def processors(tensor: Tensor) -> int:
    """Streaming multiprocessors of the tensor's GPU."""
    if interpreted() or _recording is not None:
        return INTERPRETED_PROCESSORS
    return _processors(tensor.device.index)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _device_name(tensor: Tensor) -> str:
    if interpreted() or _recording is not None:
        return "none"
    return torch.cuda.get_device_name(tensor.device)


def _bucket(value: int, buckets: Sequence[int]) -> int:
    return next(bucket for bucket in buckets if value <= bucket)


def width_bucket(width: int) -> int:
    """The D bucket of a width."""
    return _bucket(width, D_BUCKETS) if width <= D_BUCKETS[-1] else WIDE


def key(tensor: Tensor, *, rows: int, items: int, width: int, options: bool = False) -> Key:
    """The key of a call; tensor gives device and size of an element."""
    # powers of four: 1.2 and 4.7 million items rarely want different blocks
    v_bucket = 4 ** (max(items - 1, 1).bit_length() // 2 + 1)
    return Key(
        capability(tensor),
        tensor.element_size(),
        width_bucket(width),
        _bucket(rows, N_BINS),
        v_bucket,
        _device_name(tensor),
        options,
    )


def fixed(kernel: str, table: Table, wanted: Key) -> Config:
    """The table's configuration for a key."""
    for entry in table[kernel]:
        if _fits(entry, wanted) and wanted.rows <= entry.most_rows:
            return entry.config
    raise LookupError(f"{kernel}: CONFIGS must have an entry for {wanted}")


def _fits(entry: Entry, wanted: Key) -> bool:
    return (
        wanted.arch in entry.archs
        and wanted.itemsize in entry.itemsizes
        and wanted.width <= entry.most_width
        and not (entry.plain and wanted.options)
    )


def candidates(kernel: str, table: Table, wanted: Key) -> list[Config]:
    """All configurations that may be launched for the key's architecture, element and D bucket."""
    return list(dict.fromkeys(e.config for e in table[kernel] if _fits(e, wanted)))


# -- autotuning ------------------------------------------------------------------------------------


def _seconds(run: Callable[[], None]) -> float:
    return triton.testing.do_bench(run, return_mode="median") * 1e-3


_tuned: dict[str, Config] = {}


def chosen(
    kernel: str,
    table: Table,
    wanted: Key,
    run: Callable[[Config], Any],
    timer: Callable[[Callable[[], None]], float] = _seconds,
) -> Config:
    """The configuration to launch with: `fixed`, or with T4R_FAST_AUTOTUNE=1 the fastest candidate.

    run    launches the kernel with a configuration; it may be called often before the real launch
    timer  seconds of one call of a function
    """
    possible = candidates(kernel, table, wanted)
    if _recording is not None:
        for other in possible:
            run(other)
    if _recording is not None or os.environ.get("T4R_FAST_AUTOTUNE") != "1":
        return fixed(kernel, table, wanted)
    name = _name(kernel, wanted)
    if name not in _tuned:
        stored = _read(cache_file()).get(name)
        found = next((c for c in possible if c.arguments() == stored), None)
        if found is None:
            if not interpreted() and torch.cuda.is_current_stream_capturing():
                return fixed(kernel, table, wanted)  # nothing can be timed inside a capture
            times = [timer(functools.partial(run, c)) for c in possible]
            found = possible[times.index(min(times))]
            _write(cache_file(), name, found.arguments())
        _tuned[name] = found
    return _tuned[name]


def _name(kernel: str, wanted: Key) -> str:
    parts = (
        kernel, wanted.device, f"sm_{wanted.arch}", f"{wanted.itemsize} bytes", f"D {wanted.width}",
        f"N {wanted.rows}", f"V {wanted.items}", "options" if wanted.options else "plain",
        f"torch {torch.__version__}", f"triton {triton.__version__}",
    )  # fmt: skip
    return ", ".join(parts)


def cache_file() -> Path:
    """Where tuned configurations are kept: T4R_FAST_AUTOTUNE_CACHE, or in the user's cache."""
    chosen_path = os.environ.get("T4R_FAST_AUTOTUNE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen_path) if chosen_path else Path(base) / "t4r_fast" / "triton.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"holds a {type(found).__name__}")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        warnings.warn(
            f"t4r_fast: the autotuning cache {path} is not readable ({error}): tuning again",
            RuntimeWarning,
            stacklevel=4,
        )
        return {}
    return found


def _write(path: Path, name: str, value: dict[str, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {**_read(path), name: value}
    # another process may read or write it at the same time: never leave half a file
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(whole, indent=1, sort_keys=True))
    os.replace(new, path)


# -- types -----------------------------------------------------------------------------------------

TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


# dtype of the inputs -> of sums
SUMS = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in TYPES}


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """Type of a product's factors: the inputs'. The interpreter's bfloat16 arithmetic is wrong."""
    narrow = dtype in (torch.float16, torch.bfloat16)
    return tl.float32 if narrow and interpreted() else TYPES[dtype]


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """Type of sums: float32, float64 for float64."""
    return TYPES[SUMS[dtype]]


def precision(dtype: torch.dtype) -> str:
    """input_precision of products: exact to float32 by three tf32 products, tf32 where asked for.

    Asked for by torch.backends.cuda.matmul.allow_tf32 or torch.set_float32_matmul_precision.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# -- launches, and compilation ahead of time -------------------------------------------------------


class _Recording:
    """Where launches go while `recorded` runs: nowhere but into a list."""

    def __init__(self, arch: int, label: str) -> None:
        self.arch, self.label = arch, label
        self.variants: list[Variant] = []


_recording: _Recording | None = None
_unfused: set[str] = set()


def unfused(kernel: Any) -> Any:
    """The kernel itself, to be compiled so that every product is rounded before it is added to.

    What draws ids needs it: they have the same bits on every backend.
    """
    _unfused.add(kernel.fn.__name__)
    return kernel


def is_fused(kernel: Any) -> bool:
    return kernel.fn.__name__ not in _unfused


def launch(kernel: Any, grid: tuple[int, ...], config: Config, **arguments: Any) -> None:
    """kernel[grid](...) on the device of its tensors; while `recorded` runs, note its types."""
    if _recording is not None:
        types, constants = _types(kernel, arguments)
        _recording.variants.append(variant(kernel, types, constants, config, _recording.label))
        return
    if 0 in grid:
        return
    one = next(value for value in arguments.values() if isinstance(value, Tensor))
    guard = torch.cuda.device(one.device) if one.is_cuda else contextlib.nullcontext()
    options = {
        "maxnreg": _launch_cap(kernel, arguments, config, capability(one)),
        "enable_fp_fusion": is_fused(kernel),
    }
    with guard:
        kernel[grid](**arguments, **config.arguments(), **options)


# Left alone, ptxas may rather spill a few registers than hold a block less. A cap on registers,
# once named, is used up, though: at 255, 235 of 615 kernels held fewer blocks. So only compilations
# that spill have one, the smallest that ends it; `make gpu-budget ARGS=--update` finds them.


_launch_caps: dict[tuple[Any, ...], int | None] = {}


def _launch_cap(kernel: Any, arguments: dict[str, Any], config: Config, arch: int) -> int | None:
    name = kernel.fn.__name__
    if (name, arch) not in CAPS:
        return None
    # 10 us for 52 arguments; naming the compilation each time would take 35
    constants = _constant_names(kernel)
    kinds = tuple(
        value.dtype
        if isinstance(value, Tensor)
        else value
        if value is None or argument in constants
        else value >= 2**31
        for argument, value in arguments.items()
    )
    call = (name, arch, config, kinds)
    if call not in _launch_caps:
        types, values = _types(kernel, arguments)
        _launch_caps[call] = cap(variant(kernel, types, values, config, ""), arch)
    return _launch_caps[call]


@functools.cache
def _constant_names(kernel: Any) -> frozenset[str]:
    return frozenset(p.name for p in kernel.params if p.is_constexpr)


def cap(made: Variant, arch: int) -> int | None:
    """The cap on the registers of a compilation; None: ptxas chooses."""
    caps = CAPS.get((made.kernel.fn.__name__, arch))
    return caps.get(compilation(made)) if caps else None


def compilation(made: Variant) -> str:
    """A short name for all that distinguishes a compilation from others of its kernel."""
    kinds = (
        f"{name} {made.constexprs.get(name) if kind == 'constexpr' else kind}"
        for name, kind in made.signature.items()
    )
    launched = f"{made.config.num_warps} {made.config.num_stages}"
    return hashlib.sha256("\n".join([*kinds, launched]).encode()).hexdigest()[:10]


def recorded(arch: int, label: str, launcher: Callable[[], Any]) -> list[Variant]:
    """What a launcher, called with tensors on the meta device, would compile for an architecture.

    All configurations that autotuning could choose are among them.
    """
    global _recording
    _recording = made = _Recording(arch, label)
    try:
        launcher()
    finally:
        _recording = None
    return list({_identity(v): v for v in made.variants}.values())


def cases() -> Iterator[tuple[str, torch.dtype, int, bool]]:
    """Label, dtype, D and "with every option" of the calls that the budget is made of.

    D past the last bucket is worked on in chunks; 100 needs masks in D.
    """
    before = torch.get_float32_matmul_precision()
    try:
        for precision_, dtype, widths in (
            ("highest", torch.bfloat16, (16, 32, 64, 128, 256, 512, 100)),
            ("highest", torch.float16, (64, 128, 256)),
            ("highest", torch.float32, (16, 32, 64, 128, 256, 512)),
            ("high", torch.float32, (64, 256)),
            ("highest", torch.float64, (16, 32, 64, 256)),
        ):
            torch.set_float32_matmul_precision(precision_)
            name = "tf32" if precision_ == "high" else TYPE_NAMES[dtype]
            for width in widths:
                for everything in (False, True):
                    yield f"{name} D{width}{' all' if everything else ''}", dtype, width, everything
    finally:
        torch.set_float32_matmul_precision(before)


def _identity(made: Variant) -> tuple[Any, ...]:
    constants = tuple(sorted((name, str(value)) for name, value in made.constexprs.items()))
    return made.kernel.__name__, tuple(made.signature.items()), constants, made.config


def _types(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Triton types of the arguments as a launch gives them, and the values of constants."""
    types, constants = {}, {}
    for parameter in kernel.params:
        if parameter.name not in arguments:
            continue  # a block size
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            types[parameter.name] = f"*{TYPE_NAMES[value.dtype]}"
        else:
            number = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            types[parameter.name] = parameter.annotation_type or number
    return types, constants


def variant(
    kernel: Any, types: dict[str, str], constexprs: dict[str, Any], config: Config, label: str
) -> Variant:
    """A Variant from the types of the arguments that are not constexpr, whatever their order."""
    constants = {**constexprs, **dict(config.blocks)}
    missing = set(kernel.arg_names) ^ (set(types) | set(constants))
    if missing:
        raise ValueError(f"{kernel.__name__}: arguments without a type or value: {sorted(missing)}")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    return Variant(kernel, signature, constants, config, label)


def compile_ahead(made: Variant, arch: int, registers: int | None = None) -> Any:
    """Compile for an architecture without a GPU; .asm of the result holds ptx and cubin.

    With a cap on its registers, or with none. Pointers, strides and D are taken as multiples of
    16, as they are in a model.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if interpreted():
        raise RuntimeError("compile_ahead: TRITON_INTERPRET must be unset before triton is loaded")
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, (name, kind) in enumerate(made.signature.items())
        if kind.startswith("*") or (kind.startswith("i") and (name == "D" or "stride" in name))
    }
    source = ASTSource(made.kernel, made.signature, made.constexprs, attributes)
    options = {
        "num_warps": made.config.num_warps,
        "num_stages": made.config.num_stages,
        "maxnreg": registers,
        "enable_fp_fusion": is_fused(made.kernel),
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

"""What every GPU kernel costs on every architecture, compiled ahead of time; needs no GPU.

    make gpu-budget                                compile the kept ones, compare with the table
    make gpu-budget ARGS=--every                   compile all variants: does one spill?
    make gpu-budget ARGS="--update target_rank"    the same, cap what spills, keep the new numbers
    make gpu-budget ARGS=--stale                   is it of today's sources? compiles nothing

The table is gpu-budget.json. Fails on a spill, on a kernel that lost its tensor cores, and on
numbers worse than the kept ones.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The path comes first
from benchmarks import kernel_sources, sass  # noqa: E402

KEPT = ROOT / "benchmarks/results/gpu-budget.json"
CAPS = ROOT / "kernels/triton/_caps.py"
DOCUMENT = ROOT / "docs/gpu.md"
BEGIN, END = "<!-- gpu-budget begins -->", "<!-- gpu-budget ends -->"


class Architecture(NamedTuple):
    """Limits of one SM. Source: CUDA C++ Programming Guide, table of compute capabilities."""

    name: str
    shared: int  # bytes
    warps: int
    blocks: int


ARCHITECTURES = {
    80: Architecture("sm_80", 164 * 1024, 64, 32),
    86: Architecture("sm_86", 100 * 1024, 48, 16),
    90: Architecture("sm_90a", 228 * 1024, 64, 32),
    100: Architecture("sm_100", 228 * 1024, 64, 32),
    120: Architecture("sm_120", 100 * 1024, 48, 24),
}
REGISTERS = 65536  # per SM; given to warps in pieces of 256
SYSTEM_SHARED = 1024  # bytes per block that the system takes, from sm_80 on


def blocks_per_sm(arch: int, registers: int, shared: int, warps: int) -> int:
    """How many blocks an SM holds at once."""
    limits = ARCHITECTURES[arch]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // (per_warp * warps) if per_warp else limits.blocks
    by_shared = limits.shared // (shared + SYSTEM_SHARED)
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks)


def row(
    op: str, backend: str, arch: int, kernel: sass.Kernel, shared: int, warps: int
) -> dict[str, Any]:
    blocks = blocks_per_sm(arch, kernel.registers, kernel.shared + shared, warps)
    return {
        "op": op,
        "backend": backend,
        "kernel": kernel.name,
        "arch": ARCHITECTURES[arch].name,
        "warps": warps,
        "registers": kernel.registers,
        "stack": kernel.stack,
        "spills": kernel.spills,
        "shared": kernel.shared + shared,
        "blocks_per_sm": blocks,
        "occupancy": round(blocks * warps / ARCHITECTURES[arch].warps, 3),
        "tensor_core": kernel.tensor_core(),
        "loop": dict(sorted(kernel.mix().items())),
    }


# -- Triton ------------------------------------------------------------------------------------


def triton_ops() -> list[str]:
    folder = ROOT / "kernels/triton"
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


# Dtype and width of the variants that are kept and compared; "all" has every option of the op. The
# others, some 1,400 per architecture, take half an hour: --every.
REPRESENTATIVE = ("bf16 D64", "bf16 D256 all", "fp32 D64")


def representative(label: str) -> bool:
    return label.partition(" k=")[0] in REPRESENTATIVE


@functools.cache  # seconds for hundreds of variants, and a worker compiles many of an op
def distinct(op: str, arch: int, every: bool) -> list[Any]:
    """The variants of an op, each compilation once: launchers share some of their kernels."""
    found: dict[tuple[str, str], Any] = {}
    for variant in importlib.import_module(f"t4r_fast.kernels.{op}").variants(arch):
        if every or representative(variant.label):
            same = (variant.signature, variant.constexprs, variant.config)
            name, number = variant.label, 1
            while (place := (variant.kernel.__name__, name)) in found and found[place][1] != same:
                number += 1
                name = f"{variant.label} #{number}"
            found[place] = (variant._replace(label=name), same)
    return [variant for variant, _ in found.values()]


def larger_caps(arch: int, registers: int, warps: int) -> Iterator[int]:
    """The most registers of a thread with a block less on an SM, with two less, and so on."""
    blocks = blocks_per_sm(arch, registers, 0, warps)
    for fewer in range(blocks - 1, 0, -1):
        most = min(REGISTERS // (fewer * warps) // 256 * 8, 255)
        if most > registers:
            yield most
        if most == 255:
            return


def compile_variant(op: str, arch: int, index: int, every: bool, search: bool) -> dict[str, Any]:
    """The row of one Triton variant; in a process of its own, where triton is not interpreted.

    search    find its cap, None if it spills without one as well as with the largest
    """
    from t4r_fast.kernels import _tuning

    variant = distinct(op, arch, every)[index]
    if not search:
        return compile_with(variant, op, arch, _tuning.cap(variant, arch))
    free = compile_with(variant, op, arch, None)
    if not (free["spills"] or free["stack"]):
        return free
    for cap in larger_caps(arch, free["registers"], free["warps"]):
        found = compile_with(variant, op, arch, cap)
        if not (found["spills"] or found["stack"]):
            return found
    return free


def compile_with(variant: Any, op: str, arch: int, cap: int | None) -> dict[str, Any]:
    from t4r_fast.kernels import _tuning

    compiled = _tuning.compile_ahead(variant, arch, cap)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        (kernel,) = sass.read(path)
    # metadata.shared counts the static part as well
    dynamic = max(compiled.metadata.shared - kernel.shared, 0)
    found = row(op, "triton", arch, kernel, dynamic, compiled.metadata.num_warps)
    return {
        **found,
        "variant": variant.label,
        "blocks": dict(variant.config.blocks),
        "stages": variant.config.num_stages,
        "cap": cap,
        "compilation": _tuning.compilation(variant),
    }


def triton_tasks(ops: list[str], archs: list[int], every: bool) -> Iterator[tuple[str, int, int]]:
    for op in ops:
        for arch in archs:
            for index in range(len(distinct(op, arch, every))):
                yield op, arch, index


def write_caps(rows: list[dict[str, Any]], measured: set[tuple[str, int]]) -> int:
    """The caps of rows, and of the variants of ops that were not measured, to their file."""
    from t4r_fast.kernels import _tuning

    numbers = {limits.name: arch for arch, limits in ARCHITECTURES.items()}
    found: dict[tuple[str, int], dict[str, tuple[int, str]]] = {}
    for op in triton_ops():
        for arch in ARCHITECTURES:
            for variant in [] if (op, arch) in measured else distinct(op, arch, True):
                before = _tuning.cap(variant, arch)
                if before is not None:
                    place = found.setdefault((variant.kernel.__name__, arch), {})
                    place[_tuning.compilation(variant)] = before, variant.label
    for r in rows:
        if r.get("cap") is not None:
            place = found.setdefault((r["kernel"], numbers[r["arch"]]), {})
            place[r["compilation"]] = r["cap"], r["variant"]
    lines = [
        '"""Caps on the registers of kernels: what each is for, _tuning.py says.',
        "",
        "Written by `make gpu-budget ARGS=--update`: kernel and architecture, short name of the",
        "compilation, registers.",
        '"""',
        "",
        "CAPS: dict[tuple[str, int], dict[str, int]] = {",
    ]
    for (kernel, arch), caps in sorted(found.items()):
        lines.append(f'    ("{kernel}", {arch}): {{')
        by_label = sorted(caps.items(), key=lambda item: (item[1][1], item[0]))
        lines += [f'        "{name}": {cap},  # {label}' for name, (cap, label) in by_label]
        lines.append("    },")
    CAPS.write_text("\n".join([*lines, "}", ""]))
    _tuning.CAPS.clear()
    for place, caps in found.items():
        _tuning.CAPS[place] = {name: cap for name, (cap, _) in caps.items()}
    return sum(map(len, found.values()))


# -- CUDA --------------------------------------------------------------------------------------


def cuda_ops() -> list[str]:
    return sorted(p.stem for p in (ROOT / "csrc/cuda").glob("*.cu"))


def compile_cuda(op: str, arch: int) -> list[dict[str, Any]]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc is not on the path; it comes with the CUDA toolkit")
    import torch

    include = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{op}.cubin"
        command = [
            *(nvcc, "-std=c++20", "-O3", "-cubin", f"-arch={ARCHITECTURES[arch].name}"),
            *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"),
            *(f"-I{include}", "-lineinfo", str(ROOT / f"csrc/cuda/{op}.cu"), "-o", str(path)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
        kernels = sass.read(path)
        bounds = launch_bounds(path)
    rows = []
    for kernel in kernels:
        warps = -(-bounds[kernel.name] // 32)
        shown = kernel._replace(name=readable(kernel.name))
        rows.append({**row(op, "cuda", arch, shown, 0, warps), "variant": "", "blocks": {}})
    return rows


def launch_bounds(cubin: Path) -> dict[str, int]:
    """Threads per block by __launch_bounds__, which every kernel of ours states."""
    text = subprocess.run(
        [sass.cuobjdump(), "-elf", str(cubin)], capture_output=True, text=True
    ).stdout
    found = {}
    for name, body in re.findall(
        r"\.nv\.info\.(\S+)\n(.*?)(?=\n\.nv\.info\.|\n\.\w|\Z)", text, re.S
    ):
        match = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+)", body)
        if match:
            found[name] = int(match[1], 16)
    return found


def readable(mangled: str) -> str:
    """`void t4r_fast::(anonymous namespace)::gather<float>(...)` as gather<float>."""
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    if filt is None:
        return mangled
    shown = subprocess.run([filt, mangled], capture_output=True, text=True).stdout.strip()
    shown = re.sub(r"\(anonymous namespace\)::|<unnamed>::|t4r_fast::|^void ", "", shown)
    depth, end = 0, len(shown)
    for i, letter in enumerate(shown):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    return shown[:end]


# -- the table ---------------------------------------------------------------------------------

KEY = ("op", "backend", "kernel", "variant", "arch")
# A newer compiler may allocate a little differently without anybody's fault.
REGISTERS_ALLOWED, SHARED_ALLOWED = 8, 1024


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def sources(ops: list[str], archs: list[int]) -> dict[str, str]:
    """Digest of what was compiled, by backend, op and architecture."""
    found = {}
    for arch in archs:
        name = ARCHITECTURES[arch].name
        for op in triton_ops():
            if op in (ops or [op]):
                made = kernel_sources.of_triton(distinct(op, arch, True), arch)
                found[f"triton {op} {name}"] = made
        for op in cuda_ops():
            if op in (ops or [op]):
                path = ROOT / f"csrc/cuda/{op}.cu"
                found[f"cuda {op} {name}"] = kernel_sources.of_cuda(path)
    return found


def stale(now: dict[str, str], kept: dict[str, str]) -> list[str]:
    """What was changed since its row of the table was compiled, in words."""
    return [
        f"{name}: its sources are not those that the table was compiled from; run make gpu-budget "
        f'ARGS="--update {name.split()[1]}"'
        for name in sorted(now)
        if now[name] != kept.get(name)
    ]


def unknown_caps() -> list[str]:
    """Caps of compilations that no op has any more, in words."""
    from t4r_fast.kernels import _tuning

    known = {
        (variant.kernel.__name__, arch, _tuning.compilation(variant))
        for op in triton_ops()
        for arch in ARCHITECTURES
        for variant in distinct(op, arch, True)
    }
    return [
        f"{kernel} {ARCHITECTURES[arch].name}: no compilation is {name} now: a cap of no use"
        for (kernel, arch), caps in _tuning.CAPS.items()
        for name in caps
        if (kernel, arch, name) not in known
    ]


def uncompiled(op: str, arch: int) -> list[str]:
    """Configurations that the op's table gives a call and that none of its variants has."""
    from t4r_fast.kernels import _scores, _tuning

    module = importlib.import_module(f"t4r_fast.kernels.{op}")
    tables = getattr(module, "CONFIGS", {})
    if op == "target_rank":
        tables = {"_target_rank_fwd_kernel": next(iter(_scores.CONFIGS.values()))}
    found = set()
    for kernel, entries in tables.items():
        known = {v.config for v in distinct(op, arch, True) if v.kernel.__name__ == kernel}
        for itemsize, width, rows, options in itertools.product(
            (2, 4, 8), (*_tuning.D_BUCKETS, _tuning.WIDE), _tuning.N_BINS, (False, True)
        ):
            call = _tuning.Key(arch, itemsize, width, rows, 2**20, "", options)
            chosen = _tuning.fixed(kernel, {kernel: entries}, call)
            if chosen not in known:
                place = f"{kernel} {ARCHITECTURES[arch].name}: {itemsize} bytes, D {width}"
                found.add(f"{place}: {chosen} is of no variant; add a case that has it")
    return sorted(found)


def measure(
    ops: list[str], archs: list[int], jobs: int, every: bool, search: bool
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        known = [op for op in triton_ops() if not ops or op in ops]
        tasks = [
            pool.submit(compile_variant, *task, every, search)
            for task in triton_tasks(known, archs, every)
        ]
        cuda = [op for op in cuda_ops() if not ops or op in ops]
        tasks += [pool.submit(compile_cuda, op, arch) for op in cuda for arch in archs]
        for number, done in enumerate(tasks, 1):
            found = done.result()
            if number % 100 == 0:
                print(f"{number} of {len(tasks)} compiled", file=sys.stderr, flush=True)
            rows += found if isinstance(found, list) else [found]
    return sorted(rows, key=key)


def faults(rows: list[dict[str, Any]], kept: list[dict[str, Any]]) -> list[str]:
    """What is wrong with rows, alone and against the kept ones, in words."""
    before = {key(row): row for row in kept}
    found = []
    for row in rows:
        name = " ".join(filter(None, key(row)))
        if row["spills"] or row["stack"]:
            found.append(f"{name}: {row['spills']} spills, {row['stack']} bytes of stack")
        if row["blocks_per_sm"] == 0:
            found.append(f"{name}: does not fit on an SM")
        old = before.pop(key(row), None)
        if old is None:
            found.append(f"{name}: is new; take it over with --update")
            continue
        if old["tensor_core"] and not row["tensor_core"]:
            found.append(f"{name}: no tensor cores, {old['tensor_core']} before")
        for field, allowed in (("registers", REGISTERS_ALLOWED), ("shared", SHARED_ALLOWED)):
            if row[field] > old[field] + allowed:
                found.append(f"{name}: {field} {row[field]}, {old[field]} before")
        if row["occupancy"] < old["occupancy"]:
            found.append(f"{name}: occupancy {row['occupancy']}, {old['occupancy']} before")
    found += [
        f"{' '.join(filter(None, name))}: is gone; take that over with --update" for name in before
    ]
    return found


def versions() -> dict[str, str]:
    nvcc = shutil.which("nvcc")
    shown = (
        subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    )
    release = re.search(r"V([\d.]+)", shown)
    import triton

    return {"triton": triton.__version__, "nvcc": release[1] if release else "none"}


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per kernel, one column per architecture: the range over its variants."""
    archs = [a.name for a in ARCHITECTURES.values() if any(r["arch"] == a.name for r in rows)]
    lines = ["| kernel | variants | " + " | ".join(archs) + " |", "|---" * (len(archs) + 2) + "|"]
    names = sorted({(row["backend"], row["op"], row["kernel"].partition("<")[0]) for row in rows})
    for backend, op, kernel in names:
        cells, count = [], 0
        for arch in archs:
            own = [
                row
                for row in rows
                if (row["backend"], row["op"], row["arch"]) == (backend, op, arch)
                and row["kernel"].partition("<")[0] == kernel
            ]
            count = max(count, len(own))
            cells.append(cell(own) if own else "")
        lines.append(f"| `{kernel.strip('_')}` ({backend}) | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(rows: list[dict[str, Any]]) -> str:
    def span(values: list[Any]) -> str:
        low, high = min(values), max(values)
        return f"{low}" if low == high else f"{low}-{high}"

    units = sorted({row["tensor_core"].partition(".")[0] for row in rows} - {""})
    shared = span([row["shared"] // 1024 for row in rows])
    return ", ".join(
        [
            f"{span([row['registers'] for row in rows])} r",
            f"{shared} K",
            f"{span([round(100 * row['occupancy']) for row in rows])} %",
            *units,
        ]
    )


def write_document(text: str) -> None:
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def source_of(row: dict[str, Any]) -> str:
    """The row's place in `sources`."""
    return f"{row['backend']} {row['op']} {row['arch']}"


def keep(
    rows: list[dict[str, Any]],
    others: list[dict[str, Any]],
    sources: dict[str, str],
    compiled: dict[str, int],
    capped: int,
) -> None:
    """Write the rows, and the others as they were, to the table and its page.

    compiled    how many kernels were compiled, by place in `sources`
    capped      how many of all have a cap
    """
    rows = sorted([*others, *rows], key=key)
    there = {source_of(r) for r in rows}
    head = {
        "versions": versions(),
        "sources": {name: digest for name, digest in sorted(sources.items()) if name in there},
        "compiled": {name: count for name, count in sorted(compiled.items()) if name in there},
    }
    lines = ",\n".join(json.dumps(r, sort_keys=True) for r in rows)
    KEPT.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n]}}\n')
    count = sum(head["compiled"].values())
    write_document(
        f"{count:,} kernels compiled, {capped} of them with a cap on their registers, because "
        f"without one they spill; 0 spill. {len(rows)} are kept:\n\n{markdown(rows)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="only these ops")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument(
        "--update", action="store_true", help="all variants: cap what spills, keep the new numbers"
    )
    parser.add_argument(
        "--every", action="store_true", help="all variants, half an hour; looks for spills alone"
    )
    parser.add_argument(
        "--stale", action="store_true", help="only ask whether sources changed since --update"
    )
    parser.add_argument("--verbose", action="store_true", help="print a line per variant")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET must not be set: interpreted kernels cannot be compiled")
    archs = options.arch or sorted(ARCHITECTURES)
    table: dict[str, Any] = {"rows": [], "sources": {}, "compiled": {}}
    if KEPT.exists():
        table.update(json.loads(KEPT.read_text()))
    if options.stale:
        now = sources(options.ops, archs)
        found = stale(now, table["sources"]) + unknown_caps()
        found += [words for op in triton_ops() for arch in archs for words in uncompiled(op, arch)]
        print(*found, f"{len(now)} looked at, {len(found)} stale", sep="\n")
        return bool(found)
    every = options.every or options.update
    rows = measure(options.ops, archs, options.jobs, every, options.update)
    names = {ARCHITECTURES[arch].name for arch in archs}
    kept = table["rows"]
    chosen = [r for r in kept if r["arch"] in names and r["op"] in (options.ops or [r["op"]])]
    others = [r for r in kept if r not in chosen]
    if options.verbose:
        for r in rows:
            print(*(f"{k}={v}" for k, v in r.items()), sep="  ")
    found = faults(rows, rows if every else chosen)
    print(*found, sep="\n")
    print(f"{len(rows)} kernels compiled, {len(found)} faults")
    if found:
        return 1
    if options.update:
        measured = {(op, arch) for op in options.ops or triton_ops() for arch in archs}
        capped = write_caps(rows, measured)
        shown = [
            {name: value for name, value in r.items() if name != "compilation"}
            for r in rows
            if r["backend"] == "cuda" or representative(r["variant"].partition(" #")[0])
        ]
        compiled = table["compiled"] | collections.Counter(map(source_of, rows))
        keep(shown, others, table["sources"] | sources(options.ops, archs), compiled, capped)
    return 0


if __name__ == "__main__":
    sys.exit(main())

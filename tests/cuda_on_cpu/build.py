"""`make cuda-on-cpu`: the CUDA ops of csrc/cuda, and probes of the engine, built by g++.

build/cuda-on-cpu/<kind>/libt4r_fast_emulated.so  registers the ops as t4r_fast_emulated, key CPU
build/cuda-on-cpu/<kind>/libprobes.so             probes.cu, for tests/test_cuda_on_cpu.py

<kind> is `plain` or `asan` (AddressSanitizer and UndefinedBehaviorSanitizer). conftest.py points
T4R_FAST_CUDA_ON_CPU at the plain one where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build/cuda-on-cpu"
KINDS = ("plain", "asan")
CXX = "g++"  # its AddressSanitizer: tests/test_cuda_on_cpu.py loads libasan.so first
FLAGS = (
    # -O1: what the optimizer takes out is not checked. Contraction as in csrc/cpu/draws.h's users.
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ftrivial-auto-var-init=pattern"),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"),
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize=vptr")


# Tests of the lane. Those left out call with the same sizes as others.
LANE_TESTS = "(cuda-on-cpu or the_cuda) and not opcheck and not compiles"


def library(kind: str, name: str = "t4r_fast_emulated") -> Path:
    return BUILD / kind / f"lib{name}.so"


def headers() -> list[Path]:
    found = [*HERE.glob("*.h"), *(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cuda").glob("*.cuh")]
    return sorted(found)


def ops() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def is_stale(target: Path, sources: list[Path]) -> bool:
    if not target.exists():
        return True
    built = target.stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > built for path in (*sources, *headers(), Path(__file__)))


def why_not(kind: str, name: str = "t4r_fast_emulated") -> str | None:
    """Why a library cannot be used, in words; None if it is there and up to date."""
    path = library(kind, name)
    sources = ops() if name == "t4r_fast_emulated" else [HERE / "probes.cu"]
    if not is_stale(path, [*sources, HERE / "engine.cpp"]):
        return None
    if (reason := not_here()) is not None:
        return reason
    state = "older than its sources" if path.exists() else "not built"
    return f"{path.relative_to(ROOT)} is {state}: make cuda-on-cpu"


def not_here() -> str | None:
    """Why nothing can be built on this machine, in words."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the engine's fibers are for x86-64; this is {platform.machine()}"
    if shutil.which(CXX) is None:
        return f"{CXX} is not there: apt-get install g++"
    return None


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode != 0:
        sys.exit(f"make cuda-on-cpu: this failed, its messages are above: {' '.join(command)}")


def build(
    target: Path, sources: list[Path], sanitize: bool, jobs: int = 2, flags: Sequence[str] = ()
) -> None:
    """Compile what is older than its sources and put `target` together, in one step for readers."""
    folder = target.parent
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("make cuda-on-cpu: torch is not installed")
    torch = Path(spec.submodule_search_locations[0])
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *(SANITIZE if sanitize else ()), *flags, f"-I{HERE}", "-isystem"]
    flags += [str(torch / "include"), "-x", "c++"]
    objects = {source: folder / f"{source.stem}.o" for source in sources}
    commands = [
        [CXX, *flags, "-c", str(source), "-o", str(object)]
        for source, object in objects.items()
        if is_stale(object, [source])
    ]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, commands))
    new = target.with_suffix(".new")
    link = [*map(str, objects.values()), f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    run([CXX, "-shared", *(SANITIZE if sanitize else ()), *link, "-o", str(new)])
    new.replace(target)


def sanitized_environment(library: Path) -> dict[str, str]:
    """For a process of Python that runs the lane's tests on a library of kind `asan`."""
    preload = []
    for name in ("libasan.so", "libstdc++.so"):  # Python loads no libstdc++, ASan wants it early
        shown = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True)
        preload.append(os.path.realpath(shown.stdout.strip()))
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "T4R_FAST_CUDA_ON_CPU": str(library),
        "T4R_FAST_REQUIRE": "cuda-on-cpu",
    }


def main() -> None:
    if (reason := not_here()) is not None:
        print(f"make cuda-on-cpu: nothing is built, {reason}")
        return
    for kind in KINDS:
        for name, sources in (("t4r_fast_emulated", ops()), ("probes", [HERE / "probes.cu"])):
            if why_not(kind, name) is not None:
                build(library(kind, name), [HERE / "engine.cpp", *sources], kind == "asan")
                print(
                    f"{library(kind, name).relative_to(ROOT)}: {', '.join(s.name for s in sources)}"
                )


if __name__ == "__main__":
    main()

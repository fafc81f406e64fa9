"""`make sanitize`: the C++ ops under AddressSanitizer and UndefinedBehaviorSanitizer.

Run as a program it builds them into build/sanitize and, for every instruction set of this CPU, runs
the tests of all ops that have a kernel in csrc/cpu, and test_cpu_*.py, in a process that loads
that build. Inside that process it is a pytest plugin, which leaves out the other lanes and
fails where an op passed no test of lane `cpu`.
"""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/sanitize"
LIBRARY = BUILD / "lib/t4r_fast/libt4r_fast_cpu.so"
SANITIZERS = "address,undefined,float-cast-overflow"
COMMON = [f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_cpu_*.py"))]
# The peak of memory is not the kernels' own here: freed memory is kept for a while.
LEFT_OUT = "tests/test_cpu_kernels.py::test_memory_beyond_gradients_is_below_64_mib"
OPS = [
    path.stem
    for path in sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    if (ROOT / f"tests/test_{path.stem}.py").exists()
]

passed: collections.Counter[str] = collections.Counter()
of_lane_cpu: set[str] = set()


def pytest_collection_modifyitems(config, items):
    kept = []
    for item in items:
        lane = item.callspec.params.get("lane") if hasattr(item, "callspec") else None
        if lane in (None, "cpu"):
            kept.append(item)
        if lane == "cpu":
            of_lane_cpu.add(item.nodeid)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        file = report.nodeid.partition("::")[0]
        passed[file] += 1
        passed[f"{file} cpu"] += report.nodeid in of_lane_cpu


def without_tests(config) -> list[str]:
    """Ops that passed no test of lane `cpu`; where -k chooses tests, one op's are enough."""
    missing = [op for op in OPS if passed[f"tests/test_{op}.py cpu"] == 0]
    return missing if missing == OPS or not config.option.keyword else []


def pytest_sessionfinish(session):
    if without_tests(session.config):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    missing = without_tests(config)
    for op in OPS:
        file = f"tests/test_{op}.py"
        line = f"{op}: {passed[file]} passed, {passed[f'{file} cpu']} of them of lane 'cpu'"
        terminalreporter.write_line(line + "  <- error: none" * (op in missing))
    for file in COMMON:
        terminalreporter.write_line(f"{file}: {passed[file]} passed")


def stop(message: str) -> None:
    sys.exit(f"make sanitize: {message}")


def runtime(compiler: str, name: str) -> str:
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    path = Path(found.stdout.strip())
    if found.returncode != 0 or not path.is_absolute():
        stop(f"{compiler} has no {name}; it must be GCC's g++ (CXX=g++, apt-get install g++)")
    return str(path.resolve())


def build(compiler: str) -> None:
    folders = [f"--build-lib={BUILD / 'lib'}", f"--build-temp={BUILD / 'temp'}"]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env={
            **os.environ,
            "CXX": compiler,
            "T4R_FAST_SANITIZE": SANITIZERS,
            "T4R_FAST_CUDA": "0",
        },
    )
    if done.returncode != 0:
        stop("the build failed, its messages are above")
    code = LIBRARY.read_bytes()
    for call in (b"__asan_report_load", b"__ubsan_handle"):
        if call not in code:
            stop(f"{LIBRARY} does not call {call.decode()}*: it was built without sanitizers")


def run(isa: str, preload: str) -> bool:
    environment = {
        "LD_PRELOAD": preload,
        # The interpreter leaks on purpose. An abort lets faulthandler name the line of Python. No
        # detect_stack_use_after_return: GCC 12 misaligns 64-byte vectors on the stack it makes.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:handle_segv=2",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "T4R_FAST_BACKEND": "",
        "T4R_FAST_CPU_ISA": isa,
        "T4R_FAST_CPU_LIBRARY": str(LIBRARY),
        "T4R_FAST_REQUIRE": "cpu",
    }
    files = [*(f"tests/test_{op}.py" for op in OPS), *COMMON]
    # --capture=sys: the sanitizers write to the process's own stderr and end it
    options = ["--capture=sys", "-p", "sanitize", "-p", "no:cacheprovider", "-m", "not slow"]
    options += ["--deselect", LEFT_OUT]
    command = [sys.executable, "-m", "pytest", *options, *sys.argv[1:], *files]
    print(f"\n== {isa}: {' '.join(command[1:])}", flush=True)
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode == 0


def main() -> None:
    compiler = os.environ.get("CXX", "g++")
    # libstdc++ too: Python loads none, and ASan looks for its exceptions at the start.
    preload = " ".join(runtime(compiler, name) for name in ("libasan.so", "libstdc++.so"))
    build(compiler)
    from test_cpu_kernels import has

    results = {}
    for isa in filter(has, ("portable", "avx2", "avx512")):
        start = time.monotonic()
        verdict = "passed" if run(isa, preload) else "FAILED, its report is above"
        results[isa] = f"{verdict} ({time.monotonic() - start:.0f} s)"
    print(f"\nmake sanitize ({SANITIZERS}):")
    for isa in ("portable", "avx2", "avx512"):
        print(f"  {isa}: {results.get(isa, 'not run, this CPU does not have it')}")
    if any("FAILED" in result for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

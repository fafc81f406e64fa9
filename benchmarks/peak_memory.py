"""How much memory one call needs, in a process where nothing else has run."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Provider

ROOT = Path(__file__).resolve().parent.parent
_CHILD = (
    "import sys; from t4r_fast.cli.bench import load_benchmarks; load_benchmarks(sys.argv[1]);"
    "from benchmarks.peak_memory import child; child(*sys.argv[2:])"
)


def measure_in_new_process(
    op: str, case: Case, provider: Provider, dtype: torch.dtype
) -> dict[str, Any]:
    """MiB of one call with one thread, after a first call that warms up.

    extra    the most that the call holds above the inputs, with its outputs
    outputs  what of that the caller keeps
    process  the most that the process ever held, with Python, PyTorch and the inputs

    Linux only: elsewhere, or when the process fails, {"reason": ...}.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {"reason": "this system does not tell the peak memory of one call"}
    name = str(dtype).removeprefix("torch.")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHILD, str(ROOT), op, case.label, provider.name,
         name],
        capture_output=True,
        text=True,
        cwd=ROOT / "benchmarks",
    )  # fmt: skip
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        return {"reason": lines[-1] if lines else f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def child(op: str, label: str, provider_name: str, dtype_name: str) -> None:
    """The new process: print the numbers as JSON."""
    from benchmarks.bench import DTYPES, load

    torch.set_num_threads(1)
    benchmark = load(op)
    case = benchmark.case(label)
    inputs = benchmark.inputs(case, DTYPES[dtype_name])
    call = benchmark.provider(provider_name).make(case)
    call(inputs)
    gc.collect()
    _give_back()
    peak = _status("VmHWM")
    before = _status("VmRSS")
    _forget_peak()
    outputs = call(inputs)
    extra = _status("VmHWM") - before
    kept = sum(_bytes(value) for value in outputs.values())
    print(
        json.dumps(
            {
                "extra": round(max(extra, 0.0), 1),
                "outputs": round(kept / 2**20, 1),
                "process": round(max(peak, _status("VmHWM")), 1),
            }
        )
    )


def _status(field: str) -> float:
    """MiB from the kernel's account of this process.

    Not getrusage: its maximum begins with the size of the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _give_back() -> None:
    """Freed memory that the C library keeps would serve the measured call and not be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _bytes(value: torch.Tensor) -> int:
    parts = [value._indices(), value._values()] if value.is_sparse else [value]
    return sum(part.numel() * part.element_size() for part in parts)

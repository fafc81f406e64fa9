"""What was measured where: the machine, the versions, the limits of its arithmetic and memory."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

import t4r_fast

ROOT = Path(__file__).resolve().parent.parent


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_info() -> dict[str, str]:
    """vendor's model name, family, model and flags, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {"model name": platform.processor() or platform.machine()}
    first = path.read_text().split("\n\n")[0]
    return {
        key.strip(): value.strip()
        for key, _, value in (line.partition(":") for line in first.splitlines())
    }


def machine_name() -> str:
    """A file name for the results: the CPU and how many cores, e.g. amd-epyc-25-17-2-cores."""
    info = cpu_info()
    parts = [info.get("model name", platform.machine())]
    parts += [info[key] for key in ("cpu family", "model") if key in info]
    return re.sub(r"[^a-z0-9]+", "-", " ".join([*parts, f"{cores()} cores"]).lower()).strip("-")


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def origin() -> dict[str, Any]:
    """Everything of a record that is the same in the whole run."""
    info = cpu_info()
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": {
            "t4r_fast": t4r_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": info.get("model name", platform.machine()),
            "family": info.get("cpu family"),
            "model": info.get("model"),
            "cores": cores(),
            "flags": [flag for flag in wanted if flag in info.get("flags", "").split()],
            "system": f"{platform.system()} {platform.release()}",
        },
        "command": " ".join(["t4r-fast", *sys.argv[1:]]),
    }


def measure_floors(threads: int) -> dict[str, Any]:
    """The machine's limits for that many threads, see t4r_fast._C.machine_floors.

    Raises RuntimeError where the extension is not built.
    """
    try:
        from t4r_fast import _C
    except ImportError as error:
        raise RuntimeError(
            f"bench: t4r_fast._C, which measures the machine, is not built ({error}): "
            "pip install --no-build-isolation -e ."
        ) from None
    return _C.machine_floors(threads)


def rates(floors: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    """The floors that a time is compared with: CPU time of one thread, wall time of several.

    float64 has half of the lanes.
    """
    found = dict(floors["cpu" if floors["threads"] == 1 else "wall"])
    if dtype == torch.float64:
        found["fma"] /= 2
        found["exp"] /= 2
    return found

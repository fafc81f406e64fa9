"""The command doctor: what is installed and built here, and which backend each op takes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from t4r_fast.cli.console import results

PACKAGES = (
    *("t4r_fast", "torch", "transformers", "accelerate", "triton", "polars", "pyarrow", "numpy"),
    *("safetensors", "typer", "rich"),
)


def register(app: typer.Typer) -> None:
    """Add the command of this module to the app."""
    app.command(
        epilog="Example: [bold]t4r-fast doctor --json | python -m json.tool[/bold]",
    )(doctor)


def doctor(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.")
    ] = False,
) -> None:
    """Show versions, what is built, CPU features, GPUs, and the backend of every op."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)


def collect() -> dict[str, Any]:
    """All facts as plain values.

    returns  {"versions": {name: version or None}, "built": {part: {"ok", "detail"}},
             "cpu": {"model", "cores", "threads", "features"}, "gpus": [{"name", ...}],
             "forced": backend or None, "ops": {op: {"cpu": backend, "cuda": backend}},
             "off": {backend: why}, "missing": {op: {backend: why}}}
    An op's backend reads "error: ..." where the forced one cannot run it.
    """
    from t4r_fast import backend

    ops = backend.table()
    return {
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in PACKAGES}},
        "built": _built(),
        "cpu": _cpu(),
        "gpus": _gpus(),
        "forced": backend.forced(),
        "ops": ops,
        "off": {name: reason for name, reason in backend.OFF.items() if reason is not None},
        "missing": {op: _missing(op) for op in ops if _missing(op)},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name == "t4r_fast":  # run from a checkout that is not installed
            from t4r_fast.version import __version__

            return __version__
        return None


def _missing(op: str) -> dict[str, str]:
    """Backends that could run here but have no kernel of this op."""
    from t4r_fast import backend

    here = "cuda" if _gpus() else "cpu"
    homes = {"cpu": "cpu", "cuda": here, "triton": here}
    return {
        name: reason
        for name, device in homes.items()
        if backend.OFF[name] is None and (reason := backend.why_not(op, name, device)) is not None
    }


def _built() -> dict[str, dict[str, Any]]:
    from t4r_fast import backend

    folder = Path(backend.__file__).parent
    cpu_off, cuda = backend.OFF["cpu"], folder / backend.CUDA_LIBRARY
    host = _host()
    if isinstance(host, str):
        shown = host
    else:
        shown = f"{host.compiler} {host.flags}, instruction sets: {host.variants}"
    return {
        backend.CPU_LIBRARY: {
            "ok": cpu_off is None,
            "detail": cpu_off or str(folder / backend.CPU_LIBRARY),
        },
        backend.CUDA_LIBRARY: {
            "ok": cuda.exists(),
            "detail": str(cuda) if cuda.exists() else "not built: no nvcc, or T4R_FAST_CUDA=0",
        },
        "t4r_fast._C": {"ok": not isinstance(host, str), "detail": shown},
    }


def _host() -> Any:
    """The module t4r_fast._C, or why it is not there."""
    try:
        from t4r_fast import _C
    except ImportError as error:
        return (
            f"not built ({error}): it needs Python.h (apt-get install python3-dev), then reinstall"
        )
    return _C


def _cpu() -> dict[str, Any]:
    import torch

    host = _host()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            model = names[0].partition(":")[2].strip()
    return {
        "model": model,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": None if isinstance(host, str) else dict(host.cpu_features()),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "memory_gib": round(gpu.total_memory / 2**30, 1),
                "multiprocessors": gpu.multi_processor_count,
            }
        )
    return found


def _show(facts: dict[str, Any]) -> None:
    versions = Table("package", "version", title="Versions", title_justify="left")
    for name, version in facts["versions"].items():
        versions.add_row(name, version or "[yellow]not installed[/yellow]")
    results.print(versions)

    machine = Table("part", "state", title="Built, and this machine", title_justify="left")
    for name, part in facts["built"].items():
        mark = "[green]built[/green]" if part["ok"] else "[yellow]missing[/yellow]"
        machine.add_row(name, f"{mark} {escape(part['detail'])}")
    cpu = facts["cpu"]
    machine.add_row("CPU", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} torch threads")
    if cpu["features"] is not None:
        shown = [name if has else f"[dim]no {name}[/dim]" for name, has in cpu["features"].items()]
        machine.add_row("CPU features", ", ".join(shown) or "none known on this architecture")
    for gpu in facts["gpus"]:
        machine.add_row(
            "GPU", f"{gpu['name']}, sm_{gpu['compute_capability']}, {gpu['memory_gib']} GiB"
        )
    if not facts["gpus"]:
        machine.add_row("GPU", "none that torch can use")
    results.print(machine)

    ops = Table("op", "on a CPU", "on a GPU", title="Backend of each op", title_justify="left")
    for op, row in facts["ops"].items():
        ops.add_row(op, _colour(row["cpu"]), _colour(row["cuda"]))
    results.print(ops)
    if facts["forced"]:
        results.print(
            f"Forced by T4R_FAST_BACKEND: {escape(facts['forced'])}. An op marked error cannot run"
            " with it; --json says why.",
            highlight=False,
        )
    for name, reason in facts["off"].items():
        results.print(f"[bold]{name}[/bold] is off: {escape(reason)}", highlight=False)
    for name in ("cpu", "cuda", "triton"):
        without = [op for op, backends in facts["missing"].items() if name in backends]
        if without:
            results.print(
                f"No kernel in [bold]{name}[/bold]: {', '.join(without)}", highlight=False
            )


def _colour(name: str) -> str:
    if name.startswith("error"):
        return "[red]error[/red]"
    return f"[dim]{name}[/dim]" if name == "plain" else f"[green]{name}[/green]"

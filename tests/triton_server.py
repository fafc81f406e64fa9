"""Starts the Triton Inference Server that the wheel nvidia-pytriton carries, on a repository."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

WHEEL = importlib.util.find_spec("pytriton")
ROOT = None if WHEEL is None else Path(WHEEL.submodule_search_locations[0]) / "tritonserver"


def missing() -> str | None:
    """Why there is no server here; None where there is one."""
    for module in ("pytriton", "tritonclient"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; `make test-serving` builds the environment"
    return None


class Server:
    """A running server. http, grpc: addresses; log: its output so far."""

    def __init__(self, process: subprocess.Popen, http: str, grpc: str, log: Path) -> None:
        self.process, self.http, self.grpc, self._log = process, http, grpc, log

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def ready(self, model: str = "") -> bool:
        path = f"v2/models/{model}/ready" if model else "v2/health/ready"
        try:
            with urllib.request.urlopen(f"http://{self.http}/{path}", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def processes(self) -> list[int]:
        """The server and the processes of its models."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [self.process.pid, *(int(p) for c in children for p in c.read_text().split())]

    def resident_mib(self) -> float:
        pages = (Path(f"/proc/{p}/statm").read_text().split()[1] for p in self.processes())
        return sum(map(int, pages)) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def running(repository: Path, folder: Path, seconds: float = 180) -> Iterator[Server]:
    """A server of this repository; `folder` takes its log and the backend's folder.

    Raises RuntimeError with the end of the log where it is not ready in time.
    """
    backends = folder / "backends" / "python"
    backends.mkdir(parents=True)
    for file in (ROOT / "backends" / "python").iterdir():
        (backends / file.name).symlink_to(file)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = ROOT / "python_backend_stubs" / version / "triton_python_backend_stub"
    (backends / stub.name).symlink_to(stub)
    http, grpc = _free_port(), _free_port()
    command = [
        str(ROOT / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends.parent}",
        *("--http-address=127.0.0.1", f"--http-port={http}"),
        *("--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        *("--allow-metrics=false", "--disable-auto-complete-config"),
    ]
    libraries = [ROOT.parents[1] / "nvidia_pytriton.libs", sysconfig.get_config_var("LIBDIR")]
    here = [Path(__file__).parents[1], sysconfig.get_path("purelib"), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PYTHONPATH": ":".join(str(p) for p in here if p),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = folder / "server.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    server = Server(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
    try:
        end = time.monotonic() + seconds
        while not server.ready():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"tritonserver is not ready:\n{server.log[-20000:]}")
            time.sleep(0.2)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

"""The build: what a wheel holds, and one clear line for what is missing."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from harness import ROOT

TOOLS = ("setuptools", "wheel", "cmake", "ninja", "pybind11")
NEEDS = [name for name in TOOLS if not find_spec(name)]
pytestmark = pytest.mark.skipif(bool(NEEDS), reason=f"building needs {', '.join(NEEDS)}")


def build_ext(tmp_path, before="", **environment):
    """setup.py build_ext into tmp_path, after the statements `before`."""
    code = f"{before}\nimport runpy, sys; sys.argv = ['setup.py', *sys.argv[1:]]; "
    code += "runpy.run_path('setup.py', run_name='__main__')"
    folders = [f"--build-lib={tmp_path}/lib", f"--build-temp={tmp_path}/temp"]
    return subprocess.run(
        [sys.executable, "-c", code, "build_ext", *folders],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


HIDE = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {names} else real(name, *a)
"""
OLD_TORCH = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda name: "2.10.1" if name == "torch" else real(name)
"""
NVCC = """
import shutil
real = shutil.which
shutil.which = lambda name, *a, **k: {found} if name == "nvcc" else real(name, *a, **k)
"""
NO_NVCC, NVCC = NVCC.format(found="None"), NVCC.format(found="'/usr/bin/nvcc'")
MISSING = {
    "compiler": ("", {"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler not found): "),
    "torch": (HIDE.format(names=["torch"]), {}, "torch is not installed in the building"),
    "old torch": (OLD_TORCH, {}, "torch 2.10.1 is too old, 2.11 is the oldest: pip install"),
    "cmake": (HIDE.format(names=["cmake"]), {"PATH": "", "CXX": "/bin/true"}, "cmake is not inst"),
    "ninja": (HIDE.format(names=["ninja"]), {"PATH": "", "CXX": "/bin/true"}, "ninja is not inst"),
    "pybind11": (HIDE.format(names=["pybind11"]), {}, "pybind11 is not installed: pip install"),
    "cuda": ("", {"T4R_FAST_CUDA": "yes"}, "T4R_FAST_CUDA must be 0 or 1; got 'yes'"),
    "nvcc": (NO_NVCC, {"T4R_FAST_CUDA": "1"}, "T4R_FAST_CUDA=1, but nvcc is not on the path: add"),
    "archs": (
        NVCC,
        {"T4R_FAST_CUDA_ARCHS": "80;sm_90"},
        "T4R_FAST_CUDA_ARCHS must hold numbers such as 80;90a; got sm_90",
    ),
    "broken compiler": ("", {"CXX": "/bin/true"}, "the step 'configure' failed, its messages are"),
}


@pytest.mark.parametrize(("before", "environment", "message"), MISSING.values(), ids=MISSING.keys())
def test_one_clear_line_says_what_is_missing(tmp_path, before, environment, message):
    done = build_ext(tmp_path, before, **environment)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("t4r_fast cannot be built: ")
    assert message in last
    assert "Traceback" not in done.stderr


def test_without_python_headers_the_ops_are_still_built(monkeypatch):
    """Python.h is for t4r_fast._C alone: a Debian without python3-dev still gets the ops."""
    host_definitions = runpy.run_path(str(ROOT / "setup.py"))["host_definitions"]
    definitions, missing = host_definitions()
    paths = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {**paths, "include": "/nowhere"})
    assert host_definitions() == (
        ["-DT4R_FAST_HOST=OFF"],
        "there is no Python.h: apt-get install python3-dev",
    )
    if missing is None:
        assert definitions[0] == "-DT4R_FAST_HOST=ON"


def test_cuda_ops_are_left_out_without_nvcc_and_the_build_says_so(tmp_path):
    done = build_ext(tmp_path, NO_NVCC, CXX="/bin/true", T4R_FAST_CUDA="")
    assert "libt4r_fast_cuda.so: left out, nvcc is not on the path\n" in done.stdout
    done = build_ext(tmp_path, NVCC, CXX="/bin/true", T4R_FAST_CUDA="0")
    assert "libt4r_fast_cuda.so: left out, T4R_FAST_CUDA=0\n" in done.stdout


def test_architectures_are_those_that_nvcc_knows_or_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("T4R_FAST_CUDA_ARCHS", "")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\necho compute_75; echo compute_80; echo compute_90; echo compute_100"
    )
    nvcc.chmod(0o755)
    cuda_archs = runpy.run_path(str(ROOT / "setup.py"))["cuda_archs"]
    assert cuda_archs(str(nvcc)) == ["80", "90a", "100"]
    monkeypatch.setenv("T4R_FAST_CUDA_ARCHS", "89 120")
    assert cuda_archs(str(nvcc)) == ["89", "120"]


@pytest.mark.slow
def test_wheel_holds_libraries_and_kernels_and_imports_without_a_gpu(tmp_path):
    source, kept = tmp_path / "source", ("csrc", "kernels", "t4r_fast", "*.py", "*.toml", "*.txt")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for path in (p for pattern in (*kept, "LICENSE", "README.md") for p in ROOT.glob(pattern)):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(path, source / path.name, **({"ignore": ignore} if path.is_dir() else {}))
    for path in (source / "csrc/cuda").glob("*.cu"):
        if path.name != "mask_causal.cu":  # one CUDA op shows how they are packed
            path.unlink()
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)],
        cwd=tmp_path,  # from any directory
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull, "T4R_FAST_CUDA_ARCHS": "80"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    libraries = check_wheel(zipfile.ZipFile(wheel))
    for library in libraries.values():
        assert str(source).encode() not in library  # no path of the building machine
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = {"T4R_FAST_CUDA_ON_CPU": "", "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["file"].startswith(str(tmp_path))
    assert facts["op"] == "cpu"
    if "cuda" in libraries:
        assert facts["cuda"] is True
        if not torch.cuda.is_available():
            assert facts["off"] == "no GPU that torch can use (libt4r_fast_cuda.so is built)"


# The CUDA library even loads into a torch without CUDA, though the package does not do that.
IMPORT = """
import json, os, torch, t4r_fast
from t4r_fast import backend
t4r_fast.mask_causal(torch.tensor([[3, 4]]))
path = os.path.join(os.path.dirname(t4r_fast.__file__), backend.CUDA_LIBRARY)
facts = {"file": t4r_fast.__file__, "op": backend.pick("mask_causal", torch.zeros(1))}
if os.path.exists(path):
    torch.ops.load_library(path)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    facts["cuda"] = has("t4r_fast::mask_causal_fwd", "CUDA")
print(json.dumps({**facts, "off": backend.OFF["cuda"]}))
"""


def check_wheel(wheel):
    """All files of the package and nothing else; gives its libraries of ops."""
    names = wheel.namelist()
    if Path(sysconfig.get_paths()["include"], "Python.h").exists():
        assert any(name.startswith("t4r_fast/_C.") for name in names)
    kernels = {p.name for p in (ROOT / "kernels/triton").glob("*.py")}
    assert {f"t4r_fast/kernels/{name}" for name in kernels} <= set(names)
    for op in (ROOT / "t4r_fast/ops").glob("*.py"):
        assert f"t4r_fast/ops/{op.name}" in names
    assert not [name for name in names if name.startswith(("csrc", "kernels", "tests"))]
    libraries = {"cpu": wheel.read("t4r_fast/libt4r_fast_cpu.so")}
    assert b"mask_mlm_fwd" in libraries["cpu"]
    assert ("t4r_fast/libt4r_fast_cuda.so" in names) == (shutil.which("nvcc") is not None)
    if shutil.which("nvcc"):
        libraries["cuda"] = wheel.read("t4r_fast/libt4r_fast_cuda.so")
        assert b"mask_causal_fwd" in libraries["cuda"]
        # needed, so that torch's CUDA part is found from there
        assert b"\0libtorch.so\0" in libraries["cuda"]
    return libraries

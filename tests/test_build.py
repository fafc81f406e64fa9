"""The build: what a wheel holds, and one clear line for what is missing."""

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
MISSING = {
    "compiler": ("", {"CXX": "no-such-compiler"}, "no C++ compiler (no-such-compiler not found): "),
    "torch": (HIDE.format(names=["torch"]), {}, "torch is not installed in the building"),
    "old torch": (OLD_TORCH, {}, "torch 2.10.1 is too old, 2.11 is the oldest: pip install"),
    "cmake": (HIDE.format(names=["cmake"]), {"PATH": "", "CXX": "/bin/true"}, "cmake is not inst"),
    "ninja": (HIDE.format(names=["ninja"]), {"PATH": "", "CXX": "/bin/true"}, "ninja is not inst"),
    "pybind11": (HIDE.format(names=["pybind11"]), {}, "pybind11 is not installed: pip install"),
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


@pytest.mark.slow
def test_wheel_holds_libraries_and_kernels(tmp_path):
    source, kept = tmp_path / "source", ("csrc", "kernels", "t4r_fast", "*.py", "*.toml", "*.txt")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for path in (p for pattern in (*kept, "LICENSE", "README.md") for p in ROOT.glob(pattern)):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(path, source / path.name, **({"ignore": ignore} if path.is_dir() else {}))
    options = ["--no-build-isolation", "--no-deps", "--no-index", "-q", "-w", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)],
        cwd=tmp_path,  # from any directory
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "t4r_fast/libt4r_fast_cpu.so" in names
    if Path(sysconfig.get_paths()["include"], "Python.h").exists():
        assert any(name.startswith("t4r_fast/_C.") for name in names)
    kernels = {p.name for p in (ROOT / "kernels/triton").glob("*.py")}
    assert {f"t4r_fast/kernels/{name}" for name in kernels} <= set(names)
    for op in (ROOT / "t4r_fast/ops").glob("*.py"):
        assert f"t4r_fast/ops/{op.name}" in names
    assert not [name for name in names if name.startswith(("csrc", "kernels", "tests"))]
    library = zipfile.ZipFile(wheel).read("t4r_fast/libt4r_fast_cpu.so")
    assert str(source).encode() not in library  # no path of the building machine
    assert b"mask_mlm_fwd" in library

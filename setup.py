"""Builds the C++ parts by CMake and Ninja; everything else is in pyproject.toml.

t4r_fast/libt4r_fast_cpu.so   the C++ ops; needs a C++17 compiler and the headers of torch >= 2.11
t4r_fast/libt4r_fast_cuda.so  the CUDA ops; needs nvcc as well, and no GPU
t4r_fast/_C.*.so              facts of the machine for `t4r-fast doctor`; needs Python.h

T4R_FAST_CUDA=0|1    leave the CUDA ops out, or refuse to build without nvcc; by default they are
                     built where nvcc is on the path
T4R_FAST_CUDA_ARCHS  the GPUs they are built for, "80;86;90a;100;120" by default as far as nvcc
                     knows them; the last one also as PTX, for later GPUs
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY, CUDA_LIBRARY = "libt4r_fast_cpu.so", "libt4r_fast_cuda.so"
CUDA_ARCHS = ("80", "86", "90a", "100", "120")
HOST = "_C" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")
MIN_TORCH = (2, 11)
MIN_CMAKE = (3, 24)


def stop(message: str) -> None:
    sys.exit(f"t4r_fast cannot be built: {message}")


def version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(int(part) for part in found.groups()) if found else (0, 0)


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        stop("torch is not installed in the building environment: pip install 'torch>=2.11'")
    found = importlib.metadata.version("torch")
    if version(found) < MIN_TORCH:
        stop(f"torch {found} is too old, 2.11 is the oldest: pip install 'torch>=2.11'")
    return Path(spec.submodule_search_locations[0])


def compiler() -> str:
    wanted = os.environ.get("CXX")
    candidates = [wanted] if wanted else ["c++", "g++", "clang++"]
    for name in candidates:
        path = shutil.which(name)
        if path:
            return path
    stop(f"there is no C++ compiler ({', '.join(candidates)} not found): apt-get install g++")
    raise AssertionError


def tool(name: str, folder_name: str) -> str:
    """The program of the PyPI package `name`, else the one of the system."""
    spec = importlib.util.find_spec(name)
    if spec is not None:
        folder = getattr(importlib.import_module(name), folder_name, None)
        if folder and (path := shutil.which(name, path=folder)):
            return path
    path = shutil.which(name)
    if path is None:
        stop(f"{name} is not installed: pip install {name}")
    return str(path)


def cmake() -> str:
    path = tool("cmake", "CMAKE_BIN_DIR")
    shown = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    if version(shown) < MIN_CMAKE:
        stop(f"{path} is {shown.splitlines()[0]}, 3.24 is the oldest: pip install cmake")
    return path


def host_definitions() -> tuple[list[str], str | None]:
    """CMake definitions for t4r_fast._C, or why it is left out."""
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return ["-DT4R_FAST_HOST=OFF"], "there is no Python.h: apt-get install python3-dev"
    if importlib.util.find_spec("pybind11") is None:
        stop("pybind11 is not installed: pip install pybind11")
    import pybind11

    return [
        "-DT4R_FAST_HOST=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ], None


def nvcc() -> tuple[str | None, str]:
    """The compiler of the CUDA ops, or None and why they are left out."""
    wanted = os.environ.get("T4R_FAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        stop(f"T4R_FAST_CUDA must be 0 or 1; got {wanted!r}")
    if wanted == "0":
        return None, "T4R_FAST_CUDA=0"
    path = shutil.which("nvcc")
    if path is None and wanted == "1":
        stop("T4R_FAST_CUDA=1, but nvcc is not on the path: add the bin folder of CUDA to PATH")
    return path, "nvcc is not on the path"


def cuda_archs(path: str) -> list[str]:
    """The architectures of T4R_FAST_CUDA_ARCHS, else those of CUDA_ARCHS that this nvcc knows."""
    wanted = [
        arch for arch in re.split("[;, ]+", os.environ.get("T4R_FAST_CUDA_ARCHS", "")) if arch
    ]
    wrong = [arch for arch in wanted if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong:
        stop(f"T4R_FAST_CUDA_ARCHS must hold numbers such as 80;90a; got {', '.join(wrong)}")
    if wanted:
        return wanted
    shown = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)", shown))
    return [arch for arch in CUDA_ARCHS if arch.rstrip("a") in known] or list(CUDA_ARCHS)


class CMakeBuild(build_ext):
    """One CMake run for all extensions; in the package folder for an editable install."""

    def package_folder(self) -> Path:
        return ROOT / "t4r_fast" if self.inplace else Path(self.build_lib).resolve() / "t4r_fast"

    def run(self) -> None:
        torch_root = torch_folder()
        cxx, cmake_path, ninja_path = compiler(), cmake(), tool("ninja", "BIN_DIR")
        host, host_missing = host_definitions()
        output = self.package_folder()
        sources = sorted(path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
        self.say(f"torch {importlib.metadata.version('torch')} in {torch_root}, compiler {cxx}")
        self.say(f"{output / LIBRARY}: {', '.join(sources)}")
        cuda, cuda_missing = nvcc()
        archs = cuda_archs(cuda) if cuda else []
        kernels = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
        part = f"{', '.join(kernels)} for {', '.join(archs)}" if cuda else cuda_missing
        self.say(f"{output / CUDA_LIBRARY}: {'' if cuda else 'left out, '}{part}")
        if cuda is None:  # not one of an earlier build, whose sources may be others
            (output / CUDA_LIBRARY).unlink(missing_ok=True)
        part = f"left out, {host_missing}" if host_missing else "host.cpp"
        self.say(f"{output / HOST}: {part}")
        build = Path(self.build_temp).resolve() / "cmake"
        configure = [
            # --fresh: an isolated build leaves a cache that names tools of a folder now gone
            *(cmake_path, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={ninja_path}",
            f"-DCMAKE_CXX_COMPILER={cxx}",
            f"-DTORCH_ROOT={torch_root}",
            f"-DT4R_FAST_OUTPUT={output}",
            f"-DT4R_FAST_SANITIZE={os.environ.get('T4R_FAST_SANITIZE', '')}",
            f"-DT4R_FAST_CUDA={cuda or ''}",
            f"-DT4R_FAST_CUDA_ARCHS={';'.join(archs)}",
            *host,
        ]
        self.step("configure", configure)
        self.step("compile", [cmake_path, "--build", str(build)])

    def step(self, name: str, command: list[str]) -> None:
        if subprocess.run(command).returncode != 0:
            stop(f"the step '{name}' failed, its messages are above; it was: {' '.join(command)}")

    def say(self, message: str) -> None:
        print(f"t4r_fast build: {message}", flush=True)

    def get_outputs(self) -> list[str]:
        folder = self.package_folder()
        names = (LIBRARY, CUDA_LIBRARY, HOST)
        return [str(folder / name) for name in names if (folder / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {
            str(Path(self.build_lib) / "t4r_fast" / Path(path).name): path
            for path in self.get_outputs()
        }


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["t4r_fast", "t4r_fast.*"]), "t4r_fast.kernels"],
        # Not a package `kernels` of our own: Hugging Face has one by that name.
        package_dir={"t4r_fast.kernels": "kernels/triton"},
        package_data={"t4r_fast": ["py.typed"], "t4r_fast.serve": ["page.html"]},
        ext_modules=[Extension("t4r_fast._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )

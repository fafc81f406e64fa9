"""The package built, imported and tested by every Python that it supports: `make nox`.

Takes the interpreters that are there and skips the others. Each has an environment in .nox and a
copy of the tracked files there, in which it builds, so that the builds do not meet.
"""

import os
import shutil
import subprocess
from pathlib import Path

import nox

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
TORCH = os.environ.get("TORCH", "torch==2.13.0")
TORCH_INDEX = os.environ.get("TORCH_INDEX", "")

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Build, import, fast tests. Arguments after -- go to pytest in place of the default ones."""
    project = nox.project.load_toml("pyproject.toml")
    copy = copied(Path(session.create_tmp()).resolve() / "t4r_fast")
    index = [f"--extra-index-url={url}" for url in TORCH_INDEX.split()]
    session.install("--retries=1", *index, TORCH)
    build = project["build-system"]["requires"]
    session.install(*(r for r in build if not r.startswith("torch")), "wheel")
    session.chdir(copy)
    # CUDA ops do not depend on the version of Python.
    session.install("--no-build-isolation", "-e", ".", env={"T4R_FAST_CUDA": "0"})
    # A CUDA build of torch brings the triton that it needs, which is not the one of the extra.
    # The extra names t4r_fast's own extras: it must be there before.
    extra = project["project"]["optional-dependencies"]["test"]
    session.install(*(r for r in extra if not r.startswith("triton")))
    session.run("python", "-c", IMPORTS)
    arguments = session.posargs or ["-n", "2", "-m", "not slow"]
    environment = {"OMP_NUM_THREADS": "1", "T4R_FAST_REQUIRE": "cpu"}
    session.run("python", "-m", "pytest", *arguments, env=environment)


def copied(folder: Path) -> Path:
    """A copy of the tracked files, and the folder ../shared that some tests read."""
    shutil.rmtree(folder, ignore_errors=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if Path(name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, folder / name)
    shared = folder.parent / "shared"
    if Path("../shared").is_dir() and not shared.exists():
        shared.symlink_to(Path("../shared").resolve())
    return folder


IMPORTS = """
import pkgutil, sys
import t4r_fast
names = [m.name for m in pkgutil.walk_packages(t4r_fast.__path__, "t4r_fast.")]
# kernels need triton, and the shared libraries of ops are no modules
names = [n for n in names if not n.startswith(("t4r_fast.kernels", "t4r_fast.libt4r"))]
for name in names:
    __import__(name)
print(sys.version.split()[0], "imports", len(names), "modules of t4r_fast", t4r_fast.__version__)
"""

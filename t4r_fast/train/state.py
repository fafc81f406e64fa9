"""What a training command has finished, on disk: written whole or not at all.

OUT/run.json         options of the run; a folder with it is ours
OUT/state/<m>.json   per model: finished windows with their numbers, the checkpoint to go on from
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from t4r_fast.errors import InputError

OWN_NAMES = (
    "run.json",
    "state",
    "events.csv",
    "data",
    "checkpoints",
    "models",
    "results.txt",
    "results.json",
    "report.html",
)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, flush it to disk, and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it into place; nan is written as null."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A value for JSON: nan and infinities are None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def read_json(path: Path) -> Any:
    """The JSON of a file; InputError naming it when it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from e
    except ValueError as e:
        raise InputError(f"{path}: is no JSON ({e}); the file is damaged") from e


def replace_folder(partial: Path, final: Path) -> None:
    """Put the finished folder `partial` in the place of `final`; no moment without a whole one
    is longer than two renames."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    final.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.replace(final, old)
    os.replace(partial, final)
    shutil.rmtree(old, ignore_errors=True)


def open_output(out: Path, options: dict, *, resume: bool, overwrite: bool) -> None:
    """Make OUT ready: a new folder, our own earlier run to go on with, or one to replace.

    options  what must be equal for `resume` to give the numbers of an uninterrupted run
    Raises InputError when OUT holds something and neither `resume` nor `overwrite` says what to do,
    when it is not ours, or when the options differ from those of the run to resume.
    """
    if resume and overwrite:
        raise InputError("--resume goes on with a run and --overwrite drops it; give one of them")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give a folder with --out")
    marker = out / "run.json"
    options = json.loads(json.dumps(finite(options)))
    if out.is_dir() and any(out.iterdir()):
        leftovers = {p.name for p in out.iterdir()} <= {".run.json.partial"}
        if not marker.is_file() and not leftovers:
            raise InputError(
                f"{out}: is not empty and holds no run.json of ours; give another folder with --out"
            )
        if marker.is_file() and resume:
            _same_options(marker, options)
            return
        if marker.is_file() and not overwrite:
            raise InputError(
                f"{out}: holds a run already; --resume goes on with it, --overwrite replaces it"
            )
        remove_run(out)
    write_json(marker, {"format": 1, "options": options})


def _same_options(marker: Path, options: dict) -> None:
    before = read_json(marker).get("options", {})
    differing = [
        f"{name} was {before.get(name)!r} and is {options.get(name)!r} now"
        for name in sorted(before.keys() | options.keys())
        if before.get(name) != options.get(name)
    ]
    if differing:
        raise InputError(
            f"{marker.parent}: cannot resume with other options: {'; '.join(differing)}."
            " Repeat the options of the first run, or start again with --overwrite"
        )


def remove_run(out: Path) -> None:
    """Remove what a run wrote into OUT, the marker last, and nothing else."""
    for name in (*OWN_NAMES[1:], OWN_NAMES[0]):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class ModelState:
    """The finished windows of one model, in OUT/state/<name>.json.

    windows     records of finished windows, in order
    checkpoint  folder to go on from after the last finished window, relative to OUT, or None
    partial     {"window", "seconds"} of a window in training, or None
    done        the final model is saved
    """

    def __init__(self, out: Path, name: str) -> None:
        self.path = out / "state" / f"{name}.json"
        self.windows: list[dict] = []
        self.checkpoint: str | None = None
        self.partial: dict | None = None
        self.done = False
        self.parameters: int | None = None
        if self.path.is_file():
            stored = read_json(self.path)
            for field in ("windows", "checkpoint", "partial", "done", "parameters"):
                setattr(self, field, stored[field])

    def write(self) -> None:
        write_json(
            self.path,
            {
                "windows": self.windows,
                "checkpoint": self.checkpoint,
                "partial": self.partial,
                "done": self.done,
                "parameters": self.parameters,
            },
        )

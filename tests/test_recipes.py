"""The blocks of docs/recipes.md run, from top to bottom, as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import t4r_fast
from t4r_fast.compat import forget_warnings

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
BLOCK = re.compile(r"^```(\w*)(?: file=(\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _run(command: str) -> None:
    """A line of a bash block; its programs are those of this Python's environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        command, shell=True, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr[-4000:]}"


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    t4r_fast.set_compat("23.12")
    forget_warnings()


@pytest.mark.usefixtures("_folder")
def test_the_page_runs(capsys):
    text = PAGE.read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("\n```") // 2
    names: dict = {"__name__": "__main__"}
    for block in blocks:
        language, file, code = block.groups()
        if file:
            Path(file).write_text(code)
        elif language == "python":
            line = text[: block.start()].count("\n") + 1  # errors name the line of the page
            exec(compile("\n" * line + code, str(PAGE), "exec"), names)
        elif language == "bash":
            for command in code.splitlines():
                _run(command)
        else:
            assert language == "text", f"a block is neither python nor bash: {code}"
    assert "Traceback" not in capsys.readouterr().out

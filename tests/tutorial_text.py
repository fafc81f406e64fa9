"""The code cells of the tutorial, as its text prints them, and notebooks of them."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

TEXT = Path(__file__).parents[2] / "shared" / "seed" / "tutorial-03.txt"

# Where a section begins: the heading, as the text has it.
SECTIONS = {
    "introduction": None,
    "3.1": "## 3.1 Training an RNN-based",
    "3.2": "## 3.2. Training a Transformer-based",
    "3.2.3": "###  3.2.3 Train XLNET-MLM",
    "3.2.4": "### 3.2.4 Train XLNET-MLM with Side Information",
    "wrap up": "# Wrap Up",
}


def sections() -> dict[str, list[str]]:
    """The code of each section's cells, in order, without those that restart the kernel."""
    lines = TEXT.read_text().splitlines()
    starts = [
        0 if h is None else next(i for i, line in enumerate(lines) if line.startswith(h))
        for h in SECTIONS.values()
    ]
    ends = [*starts[1:], len(lines)]
    return {
        name: [cell for cell in _cells(lines[start:end]) if "do_shutdown" not in cell]
        for name, start, end in zip(SECTIONS, starts, ends)
    }


def _cells(lines: list[str]) -> list[str]:
    inputs = [i for i, line in enumerate(lines) if re.fullmatch(r"In \[(\d+|None)\]:", line)]
    return [_code(lines[i + 1 : j]) for i, j in zip(inputs, [*inputs[1:], len(lines)])]


def _code(lines: list[str]) -> str:
    """The code at the head of a cell's text, which output and prose follow.

    The text has no mark between them: code are all paragraphs that are Python together, less those
    at the end that hold only a comment (a heading) or only a constant (an output).
    """
    breaks = [i for i, line in enumerate(lines) if not line.strip()]
    code = max(i for i in [*breaks, len(lines)] if _parsed("\n".join(lines[:i])) is not None)
    while True:
        start = max((i for i in breaks if i < code), default=0)
        body = _parsed("\n".join(lines[start:code]))
        if start == 0 or body is None or not all(map(_constant, body)):
            return "\n".join(lines[:code]).rstrip()
        code = start


def _parsed(cell: str) -> list[ast.stmt] | None:
    # to Python, all that follows a cell magic is one string
    cell = re.sub(r"\A%%time\n", "", cell)
    try:
        return ast.parse(TransformerManager().transform_cell(cell)).body
    except SyntaxError:
        return None


def _constant(statement: ast.stmt) -> bool:
    try:
        ast.literal_eval(statement.value)
    except (AttributeError, ValueError):
        return False
    return isinstance(statement, ast.Expr)


def run(cells: list[str], folder: Path, **environment: str) -> list:
    """Run the cells as one notebook, in this folder; returns them with their outputs."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    client = NotebookClient(
        notebook,
        timeout=600,
        startup_timeout=300,  # other tests run beside it
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, "IPYTHONDIR": str(folder / "ipython"), **environment})
    return notebook.cells


def printed(cells: list) -> str:
    """What the cells wrote to stdout and stderr."""
    outputs = [output for cell in cells for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    return text.replace("\r\n", "\n")  # of shell commands


def shown(cells: list) -> str:
    """What the cells displayed, as HTML where they have it."""
    data = [output.data for cell in cells for output in cell.outputs if "data" in output]
    return "\n".join(d.get("text/html", d.get("text/plain", "")) for d in data)

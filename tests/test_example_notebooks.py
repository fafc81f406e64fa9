"""The notebooks of examples/tutorial: without outputs, true to the tutorial's text, and running."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import pytest
import tutorial_text

FOLDER = Path(__file__).parents[1] / "examples" / "tutorial"
PRINTED = {
    "1_gru_as_printed.ipynb": "3.1",
    "2_xlnet_mlm_as_printed.ipynb": "3.2.3",
    "3_side_information_as_printed.ipynb": "3.2.4",
}
METRICS = [f"next-item/{name}_at_{k}:" for name in ("ndcg", "recall") for k in (10, 20)]
# a cell for the end of today.ipynb
LEARNED = """
for name in models:
    assert results[name]["recall_at_20"] > 1.5 * popularity, (name, results)
"""


def cells(name):
    return nbformat.read(FOLDER / name, as_version=4).cells


def code(name):
    return [cell.source for cell in cells(name) if cell.cell_type == "code"]


@pytest.fixture
def folder(tmp_path):
    """A copy of the notebooks' folder to run them in."""
    return Path(shutil.copytree(FOLDER, tmp_path / "tutorial"))


def test_these_are_all():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == {*PRINTED, "today.ipynb"}


@pytest.mark.parametrize("name", [*PRINTED, "today.ipynb"])
def test_notebooks_are_valid_and_hold_no_outputs(name):
    nbformat.validate(nbformat.read(FOLDER / name, as_version=4))
    for cell in cells(name):
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.skipif(
    not tutorial_text.TEXT.exists(), reason="../shared has no text of the tutorial to compare with"
)
@pytest.mark.parametrize(("name", "section"), PRINTED.items())
def test_printed_cells_are_the_tutorials(name, section):
    sections = tutorial_text.sections()
    _, *theirs = code(name)
    expected = [*sections["introduction"], *sections[section]]
    assert theirs == (expected + sections["wrap up"] if section == "3.2.4" else expected)


@pytest.mark.slow
def test_the_printed_notebooks_run_one_after_another(folder):
    for name, section in PRINTED.items():
        # not as printed: a folder at the root of the file system
        printed = [cell.replace('"/workspace/models"', '"models"') for cell in code(name)]
        done = tutorial_text.run(printed, folder, CUDA_VISIBLE_DEVICES="")
        exported = (folder / "models" / "t4r_pytorch" / "config.pbtxt").exists()
        assert exported == (section == "3.2.4")
    lines = [line for line in tutorial_text.printed(done).splitlines() if line][-15:]
    assert lines == [line for line in (folder / "results.txt").read_text().splitlines() if line]
    for title, *values in (lines[:5], lines[5:10], lines[10:]):
        assert title.endswith("accuracy results:")
        assert [value.partition(":")[0] + ":" for value in values] == METRICS
        assert all(0 <= float(value.partition(":")[2]) <= 1 for value in values)


@pytest.mark.slow
def test_todays_notebook_runs_and_its_models_learn(folder):
    # its own cells compare the metrics with the recommendations
    done = tutorial_text.run([*code("today.ipynb"), LEARNED], folder, CUDA_VISIBLE_DEVICES="")
    assert tutorial_text.printed(done).count("-> next [") == 5

"""The cells of the tutorial's third notebook, as they are printed, on real events.

Its text and the events are not part of the repository; without them the tests are skipped.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import textwrap

import numpy as np
import polars as pl
import pytest
import triton_double
import tutorial_text

from t4r_fast.etl import run as etl

EVENTS = tutorial_text.TEXT.parents[1] / "data" / "rees46-2019-Oct-sample.csv"
MISSING = [p.name for p in (tutorial_text.TEXT, EVENTS) if not p.exists()]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not beside the repository, in ../shared: {', '.join(MISSING)}"
)

METRICS = [f"next-item/{name}_at_{k}" for name in ("ndcg", "recall") for k in (10, 20)]
KEYS = [
    "epoch",
    "eval/loss",
    *(f"eval/{name}" for name in METRICS),
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
]
TITLES = {
    "3.1": "GRU accuracy results:",
    "3.2.3": "XLNet-MLM accuracy results:",
    "3.2.4": "XLNet-MLM with side information accuracy results:",
}
WIDTHS = {"3.1": 128, "3.2.3": 192, "3.2.4": 192}

# The last metrics once more, from the file and the formed scores.
AGAIN = """
import json
import pyarrow.parquet as pq

rows = pq.read_table(f"{OUTPUT_DIR}/4/valid.parquet").to_pydict()

def padded(lists, dtype):
    out = torch.zeros(len(lists), 20, dtype=dtype)
    for row, values in zip(out, lists):
        row[: len(values)] = torch.tensor(values)
    return out

ids = {c.name: torch.int64 if c.is_categorical else torch.float32 for c in schema}
model.eval()
places, losses = [], []
with torch.no_grad():
    for i in range(0, len(rows["product_id-list_seq"]), 32):
        batch = {name: padded(rows[name][i : i + 32], dtype) for name, dtype in ids.items()}
        out = model(batch, testing=True)
        scores, labels = out["predictions"].dense(), out["labels"][out["labels"] != 0]
        order = scores.argsort(dim=1, descending=True, stable=True)
        places += (order == labels[:, None]).int().argmax(dim=1).tolist()
        losses += torch.nn.functional.nll_loss(scores, labels, reduction="none").tolist()
print(json.dumps({"places": places, "losses": losses}))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four windows of the sample's last 35 minutes, where nearly all of its events are."""
    folder = tmp_path_factory.mktemp("tutorial")
    header, *events = EVENTS.read_text().splitlines()
    late = [line for line in events if line >= "2019-10-01 02:15:00"]
    assert 16_000 < len(late) < len(events)
    (folder / "events.csv").write_text("\n".join([header, *late]) + "\n")
    etl([folder / "events.csv"], folder / "data", window="10m")
    return folder / "data"


@pytest.fixture
def folder(data, tmp_path):
    """Where a notebook runs: with the schema under the tutorial's name, and the workflow."""
    (tmp_path / "schema_tutorial.pb").write_bytes((data / "schema.pbtxt").read_bytes())
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "workflow_etl").symlink_to(data / "workflow")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("section", TITLES)
def test_a_section_runs_as_it_is_printed(section, data, folder, monkeypatch):
    sections = tutorial_text.sections()
    # the one thing not as printed: a folder at the root of the file system
    cells = [c.replace('"/workspace/models"', '"models"') for c in sections[section]]
    before = f"""
        import t4r_fast.dropin, torch
        INPUT_DATA_DIR = {str(folder / "input")!r}
        torch.manual_seed(1)
    """
    done = tutorial_text.run(
        [textwrap.dedent(before), *cells, AGAIN, *sections["wrap up"]],
        folder,
        T4R_FAST_COMPAT="0.1",
        OUTPUT_DIR=str(data / "sessions_by_day"),
        CUDA_VISIBLE_DEVICES="",
    )
    out = tutorial_text.printed(done)
    projecting = re.search(r"Projecting inputs of NextItemPredictionTask to'64' .*'64'", out)
    assert f"input dimension '{WIDTHS[section]}' to be equal to" in projecting[0]
    # three epochs of 131, 557 and 561 sessions, in batches of 256
    bars = re.findall(r"\[(\d+)/\1 [^\]]*Epoch 3/3\]", tutorial_text.shown(done))
    assert bars == ["3", "9", "9"]

    days = [_metrics(text) for text in out.split("Eval results for day ")[1:]]
    assert [list(found) for found in days] == [KEYS] * 3
    assert re.findall(r"Launch training for day (\d) are:", out) == ["1", "2", "3"]
    assert re.findall(r"Eval results for day (\d) are:", out) == ["2", "3", "4"]
    last = days[-1]
    assert last["epoch"] == 3.0
    assert 5 < last["eval/loss"] < 8.9  # ln of the 6,227 rows of the table is 8.74

    written = (folder / "results.txt").read_text().strip().splitlines()
    assert written == [TITLES[section], *(f"{name}:{last[f'eval/{name}']}" for name in METRICS)]
    assert out.rstrip().endswith("\n".join(written))  # `!cat results.txt`

    again = json.loads(re.search(r'^{"places": .*}$', out, re.MULTILINE)[0])
    assert last["eval/loss"] == pytest.approx(statistics.mean(again["losses"]), rel=1e-5)
    places = again["places"]
    assert len(places) == 63
    for k in (10, 20):
        gains = [1 / math.log2(place + 2) if place < k else 0.0 for place in places]
        hits = [place < k for place in places]
        assert last[f"eval/next-item/ndcg_at_{k}"] == pytest.approx(sum(gains) / 63, rel=1e-5)
        assert last[f"eval/next-item/recall_at_{k}"] == pytest.approx(sum(hits) / 63, rel=1e-5)

    exported = folder / "models" / "t4r_pytorch"
    assert exported.is_dir() == (section == "3.2.4")
    if section == "3.2.4":
        events = pl.read_csv(data.parent / "events.csv").drop_nulls("user_session")
        _serves(exported, events.tail(200), monkeypatch)


def _serves(exported, events, monkeypatch):
    """Raw events get the scores of all items, as the tutorial's next notebook reads them."""
    model = triton_double.load(exported, monkeypatch)
    events = events.with_columns(pl.col("product_id").cast(pl.Int64))
    kinds = {"user_session": "STRING", "event_time": "STRING", "price": "FP64"}
    sent = {
        name: triton_double.column(events[name], kinds.get(name, model._inputs[name]))
        for name in model._inputs
    }
    assert len(sent) == 6
    (answer,) = model.execute([triton_double.Request(sent, ["session", "output"])])
    assert answer.error is None
    assert len(answer.outputs["session"]) == events["user_session"].n_unique()
    assert answer.outputs["output"].shape == (len(answer.outputs["session"]), 6227)
    assert np.isfinite(answer.outputs["output"]).all()


def _metrics(text):
    """The " key = value" lines at the head of a text."""
    lines = re.findall(r"^ (\S+) = (\S+)$", text.partition("Launch training")[0], re.MULTILINE)
    return {key: float(value) for key, value in lines}


def test_the_text_has_all_cells():
    found = tutorial_text.sections()
    assert {name: len(cells) for name, cells in found.items()} == {
        "introduction": 1, "3.1": 12, "3.2": 0, "3.2.3": 9, "3.2.4": 11, "wrap up": 1,
    }  # fmt: skip
    code = "\n".join(cell for cells in found.values() for cell in cells)
    assert "do_shutdown" not in code
    for line in (
        "return inputs",
        "trainer.wipe_memory()",
        "label_columns =[],",
        "!cat results.txt",
    ):
        assert line in code
    for prose in (
        "Training Loss",
        "Wall time",
        "Wrap Up",
        "Define a",
        "{'status'",
        "accuracy metric",
    ):
        assert prose not in code

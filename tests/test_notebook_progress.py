"""Progress in a notebook: the table names every metric, and evaluate() keeps all of its keys."""

from __future__ import annotations

import pytest
import tutorial_cells
from transformers.utils import notebook as stock

import t4r_fast.torch as tr
from t4r_fast.torch import notebook


@pytest.mark.parametrize("prefix", ["eval", "eval_"])
def test_evaluation_shows_all_metrics_and_takes_none_away(tmp_path, monkeypatch, prefix):
    monkeypatch.setattr(notebook, "is_in_notebook", lambda: True)
    tables = []
    monkeypatch.setattr(stock, "text_to_html_table", lambda rows: tables.append(rows) or "")
    args = tr.T4RecTrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = tr.Trainer(
        model=tutorial_cells.gru(tutorial_cells.schema(13), batch_first=True),
        args=args,
        callbacks=[stock.NotebookProgressCallback],
    )
    metrics = {
        f"{prefix}/loss": 2.0,
        f"{prefix}/next-item/ndcg_at_10": 0.25,
        f"{prefix}/next-item/recall_at_10": 0.5,
        "eval_runtime": 3.0,
        "epoch": 1.0,
    }
    before = dict(metrics)
    trainer.callback_handler.on_evaluate(args, trainer.state, trainer.control, metrics)
    assert metrics == before
    shown = dict(zip(*tables[0]))
    assert shown["Validation Loss"] == 2.0
    at_10 = {name: value for name, value in shown.items() if name.endswith("At 10")}
    assert list(at_10.values()) == [0.25, 0.5]

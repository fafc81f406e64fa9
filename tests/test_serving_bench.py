"""make bench-serving on a small catalogue: every way is there, and a wrong answer stops it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("uvicorn", reason="not installed: pip install 't4r_fast[serve]'")
from benchmarks import serving as bench


def test_every_way_is_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("T4R_PEER_PYTHON", raising=False)
    out = tmp_path / "out.jsonl"
    bench.main(["--items", "500", "--batches", "2", "--seconds", "0.01", "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["way"] for r in records][:3] == ["model.recommend", "Recommender", "HTTP"]
    for record in records:
        assert (record["items"], record["batch"]) == (500, 2)
        assert record["samples"] >= 10
        assert 0 < record["wall_ms"]["p50"] <= record["wall_ms"]["p95"] <= record["wall_ms"]["p99"]
        assert ("cpu_ms" in record) == (record["way"] in ("model.recommend", "Recommender"))
    assert "missing: Transformers4Rec" in " ".join(capsys.readouterr().err.split())


def test_a_wrong_answer_is_not_timed(monkeypatch):
    monkeypatch.delenv("T4R_PEER_PYTHON", raising=False)
    worst = lambda self, inputs: -self.answer(inputs, 60, False)[0]  # noqa: E731
    monkeypatch.setattr(bench.serving.Recommender, "scores", worst)
    with pytest.raises(RuntimeError, match=r"recommend and torch\.topk of all scores disagree"):
        bench.run(500, [2], 0.01)

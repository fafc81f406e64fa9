"""The same weights and masks give what the real Transformers4Rec 23.12 gives.

tests/parity/recorded.json was written by tests/parity/record.py beside the real package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import tutorial_cells as cells

from t4r_fast import compat
from t4r_fast.ops._sequence_mask import SequenceMask

HERE = Path(__file__).parent / "parity"
sys.path.insert(0, str(HERE))
import problem  # noqa: E402  # shared with the recording side

RECORDED = json.loads((HERE / "recorded.json").read_text())["models"]


def build(kind):
    schema = cells.schema(*problem.SIZES.values())
    return cells.gru(schema) if kind == "gru" else cells.xlnet(schema, kind == "xlnet_side")


def replay(model, kind, recorded):
    """A draw_mask(step) that makes the model's masking draw the recorded targets."""
    masking = model.heads[0].inputs.masking
    drawn_by_op = masking.draw
    item = problem.columns(kind)[0]

    def draw_mask(step):
        ids = problem.batch(step, [item])[item]
        bits = torch.tensor(recorded["targets_at"][step])[:, None]
        at = ((bits >> torch.arange(ids.shape[1])) & 1).bool()
        if kind == "gru":  # nothing random: the op itself must draw the recorded targets
            mask = drawn_by_op(ids, training=True, testing=False)
            assert torch.equal(mask.targets != 0, at)
            return
        rows = torch.full((ids.numel(),), -1)
        flat = at.flatten().nonzero().flatten()
        rows[: len(flat)] = flat
        mask = SequenceMask(torch.where(at, ids, 0), at, rows, torch.tensor(len(flat)))
        masking.draw = lambda ids, training, testing: (
            mask if training else drawn_by_op(ids, training, testing)
        )

    return draw_mask


@pytest.mark.parametrize("kind", problem.KINDS)
def test_same_numbers_as_transformers4rec(kind, monkeypatch):
    monkeypatch.setattr(compat, "_warned", {"batch_first"})
    recorded = RECORDED[kind]
    model = build(kind)
    problem.set_weights(model)
    found = problem.measure(model, kind, replay(model, kind, recorded))
    for exact in ("parameters", "keys", "eval_labels"):
        assert found[exact] == recorded[exact], exact
    close = {"rtol": 1e-5, "atol": 1e-6}
    for name in ("eval_loss", "eval_predictions", "inference"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(recorded[name]), **close)
    assert found["training_losses"][0] == pytest.approx(recorded["training_losses"][0], rel=1e-5)
    assert found["gradient_norms"] == pytest.approx(recorded["gradient_norms"], rel=1e-4)
    # twenty AdamW steps later
    assert found["training_losses"] == pytest.approx(recorded["training_losses"], rel=1e-3)
    torch.testing.assert_close(
        torch.tensor(found["inference_after"]),
        torch.tensor(recorded["inference_after"]),
        rtol=1e-3,
        atol=1e-3,
    )

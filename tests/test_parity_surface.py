"""Input blocks, maskings and bodies give what the real Transformers4Rec 23.12 gives.

tests/parity/surface.json was written by tests/parity/record_surface.py beside the real package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import t4r_fast.torch as tr
from t4r_fast import compat
from t4r_fast.ops.mask_mlm import SequenceMask
from t4r_fast.ops.mask_permutation import PermutationMask
from t4r_fast.reference._sequence_mask import row_list
from t4r_fast.schema import ColumnSchema, Schema, ValueCount

HERE = Path(__file__).parent / "parity"
sys.path.insert(0, str(HERE))
import surface  # noqa: E402  # shared with the recording side

RECORDED = json.loads((HERE / "surface.json").read_text())


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(compat, "warn_once", lambda *_: None)
    for module in ("masking", "block.transformer", "features.sequence"):
        monkeypatch.setattr(f"t4r_fast.torch.{module}.warn_once", lambda *_: None)
    monkeypatch.setattr("t4r_fast.config.transformer.warn_once", lambda *_: None)


def schema(names):
    count = ValueCount(2, surface.LENGTH)
    columns = []
    for name in names:
        listed = count if name not in ("user",) else None
        if name == "vec":
            columns.append(
                ColumnSchema.create_continuous(
                    name, is_embedding=True, shape=(surface.VECTOR,), value_count=count
                )
            )
        elif name in surface.NUMBERS:
            columns.append(ColumnSchema.create_continuous(name, value_count=listed))
        else:
            tags = ["item_id"] if name == "item" else []
            columns.append(
                ColumnSchema.create_categorical(
                    name, surface.ROWS[name] - 1, value_count=listed, tags=tags
                )
            )
    return Schema(columns)


def assert_close(found, recorded, what):
    """1e-5 of the tensor's norm, which stands first."""
    assert len(found) == len(recorded), what
    found, recorded = torch.tensor(found), torch.tensor(recorded)
    bound = 1e-5 * recorded[0].clamp(min=1e-3)
    assert (found - recorded).abs().max() <= bound, (what, found, recorded)


def assert_gradients(found, recorded):
    # what takes no part has no gradient here, and a gradient of 0 there
    zero = {name for name, g in recorded.items() if g[0] == 0}
    assert set(recorded) - zero <= set(found) <= set(recorded)
    for name, values in found.items():
        # sums of many terms that cancel: float32 differs by more than in the outputs
        bound = 1e-4 * max(recorded[name][0], 1e-3)
        error = (torch.tensor(values) - torch.tensor(recorded[name])).abs().max()
        assert error <= bound, (name, values, recorded[name])


@pytest.mark.parametrize("name", surface.BLOCKS)
def test_blocks(name):
    recorded = RECORDED["blocks"][name]
    columns, build = surface.BLOCKS[name]
    found = surface.measure_block(build(tr, schema), columns)
    assert found["shape"] == recorded["shape"]
    # transformers 4 keeps constants of its Reformer among the weights
    assert found["keys"] == [k for k in recorded["keys"] if "mask_value_float" not in k]
    assert_close(found["output"], recorded["output"], name)
    if "gradients" in recorded:
        assert_gradients(found["gradients"], recorded["gradients"])


def unpacked(bits):
    return ((torch.tensor(bits)[..., None] >> torch.arange(surface.LENGTH)) & 1).bool()


def replay(module, recorded):
    """Let the model's masking draw the recorded targets in training."""
    masking = module.heads[0].inputs.masking
    by_op = masking.draw
    at = unpacked(recorded["targets_at"])

    def draw(ids, training, testing):
        if not training:
            return by_op(ids, training, testing)
        drawn = SequenceMask(torch.where(at, ids, 0), at, *row_list(at))
        if "perm_mask" not in recorded:
            return drawn
        permuted, mapped = unpacked(recorded["perm_mask"]), unpacked(recorded["target_mapping"])
        return PermutationMask(*drawn, permuted.float(), mapped.float())

    if not isinstance(masking, tr.CausalLanguageModeling):
        masking.draw = draw


@pytest.mark.parametrize("name", surface.MODELS)
def test_models(name):
    recorded = RECORDED["models"][name]
    module = surface.model(tr, schema, name)
    found = surface.measure_model(module, lambda: replay(module, recorded))
    masking = module.heads[0].inputs.masking
    # nothing is random in causal masking: the op itself must have drawn these targets
    assert torch.equal(masking.masked_targets != 0, unpacked(recorded["targets_at"]))
    assert found["parameters"] == recorded["parameters"]
    assert found["eval_labels"] == recorded["eval_labels"]
    for number in ("eval_loss", "training_loss"):
        assert found[number] == pytest.approx(recorded[number], rel=1e-5), number
    for tensor in ("eval_predictions", "inference"):
        assert_close(found[tensor], recorded[tensor], tensor)
    assert_gradients(found["gradients"], recorded["gradients"])

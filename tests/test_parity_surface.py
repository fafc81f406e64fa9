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
from t4r_fast.plain._sequence_mask import row_list
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


def assert_close(found, recorded, what, relative=1e-5):
    """Up to a part of the tensor's norm, which stands first."""
    assert len(found) == len(recorded), what
    found, recorded = torch.tensor(found), torch.tensor(recorded)
    bound = relative * recorded[0].clamp(min=1e-3)
    assert (found - recorded).abs().max() <= bound, (what, found, recorded)


def assert_gradients(found, recorded):
    # what takes no part has no gradient here, and a gradient of 0 there
    zero = {name for name, g in recorded.items() if g[0] == 0}
    assert set(recorded) - zero <= set(found) <= set(recorded)
    for name, values in found.items():
        assert_close(values, recorded[name], name)


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
    """A mask_training(step) that lets the model's masking draw the recorded targets."""
    masking = module.heads[0].inputs.masking
    by_op = masking.draw
    ids = surface.batch(["item"])["item"]

    def mask_training(step):
        if isinstance(masking, tr.CausalLanguageModeling):
            return  # nothing random: the op itself must draw them
        at = unpacked(recorded["targets_at"][step])
        drawn = SequenceMask(torch.where(at, ids, 0), at, *row_list(at))
        if "perm_mask" in recorded:
            permuted = unpacked(recorded["perm_mask"][step])
            mapped = unpacked(recorded["target_mapping"][step])
            drawn = PermutationMask(*drawn, permuted.float(), mapped.float())
        masking.draw = lambda ids, training, testing: (
            drawn if training else by_op(ids, training, testing)
        )

    return mask_training


@pytest.mark.parametrize("name", surface.MODELS)
def test_models(name):
    recorded = RECORDED["models"][name]
    module = surface.model(tr, schema, name)
    found = surface.measure_model(module, replay(module, recorded))
    masking = module.heads[0].inputs.masking
    masking.compute_masked_targets(surface.batch(["item"])["item"], training=True)
    assert torch.equal(masking.masked_targets != 0, unpacked(recorded["targets_at"][-1]))
    assert found["parameters"] == recorded["parameters"]
    assert found["eval_labels"] == recorded["eval_labels"]
    assert found["eval_loss"] == pytest.approx(recorded["eval_loss"], rel=1e-5)
    assert found["training_losses"][0] == pytest.approx(recorded["training_losses"][0], rel=1e-5)
    for tensor in ("eval_predictions", "inference"):
        assert_close(found[tensor], recorded[tensor], tensor)
    assert_gradients(found["gradients"], recorded["gradients"])
    # twenty AdamW steps later
    assert found["training_losses"] == pytest.approx(recorded["training_losses"], rel=1e-3)
    assert_close(found["inference_after"], recorded["inference_after"], "after", 1e-3)

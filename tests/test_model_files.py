"""Model.save and load_model: all of a model in JSON and safetensors, nothing that runs code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import test_parity_surface as blocks
import test_parity_tasks as with_targets
import torch
import tutorial_cells as cells
from torch import nn

import t4r_fast.torch as tr
from t4r_fast.compat import compat_level, get_compat
from t4r_fast.errors import InputError
from t4r_fast.optim import for_model
from t4r_fast.torch import architecture
from t4r_fast.torch.ranking_metric import NDCGAt

sys.path.insert(0, str(Path(__file__).parent / "parity"))
import surface
import tasks

NAME = "t4rec_model_class"
SCHEMA = cells.schema(40, 10, 10)
pytestmark = pytest.mark.filterwarnings("ignore::t4r_fast.compat.CompatWarning")


def small(**head):
    schema = SCHEMA.select_by_name([cells.ITEM])
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, masking="clm", d_output=8, embedding_dim_default=8, max_sequence_length=20
    )
    gru = nn.GRU(8, 8, batch_first=True)
    body = tr.SequentialBlock(inputs, tr.MLPBlock([8]), tr.Block(gru, [None, 20, 8]))
    return tr.Model(tr.Head(body, tr.NextItemPredictionTask(weight_tying=True), **head))


def batch(sessions=5):
    torch.manual_seed(3)
    return cells.batch(SCHEMA, sessions)


def same(one, two, inputs):
    with torch.no_grad():
        a, b = one.eval()(inputs), two(inputs)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    return torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "schema", "name"),
    [
        *((surface.model, blocks.schema, name) for name in surface.MODELS),
        *((tasks.model, with_targets.schema, name) for name in tasks.MODELS),
    ],
)
def test_every_body_masking_and_task_comes_back(make, schema, name, tmp_path):
    model = make(tr, schema, name)
    model.save(tmp_path)
    state = torch.get_rng_state()
    loaded = tr.load_model(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert same(model, loaded, surface.batch(["item", "cat"]))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", [n for n in surface.BLOCKS if n != "reformer"])
def test_every_input_block_comes_back(name):
    columns, build = surface.BLOCKS[name]
    block = build(tr, blocks.schema)
    again = architecture.rebuild(json.loads(json.dumps(architecture.describe(block))))
    again.load_state_dict(block.state_dict())
    inputs = surface.batch(columns)
    assert torch.equal(block.eval()(inputs), again.eval()(inputs))


@pytest.mark.parametrize("level", ["0.1", "23.12"])
@pytest.mark.parametrize("kind", ["gru", "xlnet"])
def test_the_tutorials_models_come_back_at_their_level(kind, level, tmp_path):
    with compat_level(level):
        model = cells.gru(SCHEMA) if kind == "gru" else cells.xlnet(SCHEMA, side=True)
    model.save(tmp_path)
    loaded = tr.load_model(tmp_path)
    assert get_compat() == "23.12"
    inputs = batch()
    assert same(model, loaded, inputs)
    torch.manual_seed(0)
    expected = model.train()(inputs, training=True)["loss"]
    torch.manual_seed(0)
    assert loaded.train()(inputs, training=True)["loss"] == expected


def test_what_may_be_set_later_is_kept(tmp_path):
    model = small()
    model.top_k, model.name, model.max_sequence_length = 7, "mine", 10
    model.prediction_tasks[0].pre.requires_grad_(False)
    model.evaluate([batch()], verbose=False)  # leaves traces in the masking, none of them matters
    model.save(tmp_path, "named")
    loaded = tr.Model.load(tmp_path, "named")
    assert (loaded.top_k, loaded.name, loaded.max_sequence_length) == (7, "mine", 10)
    assert repr(loaded).startswith("mine(")
    frozen = {n for n, p in loaded.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in model.named_parameters() if not p.requires_grad} != set()
    written = json.loads((tmp_path / "named.json").read_text())
    assert written["input_schema"] == loaded.input_schema.to_proto_text()
    assert written["output_schema"] == model.output_schema.to_proto_text()
    assert "item_ids" in written["output_schema"]


def test_rows_that_the_table_optimizer_has_not_come_to_are_saved_up_to_date(tmp_path):
    torch.manual_seed(0)
    schema = SCHEMA.select_by_name([cells.ITEM])
    inputs = tr.TabularSequenceFeatures.from_schema(schema, masking="clm")
    task = tr.NextItemPredictionTask(
        weight_tying=True, sampled_softmax=True, max_n_samples=3, sampler="uniform"
    )
    model = tr.Model(tr.Head(tr.SequentialBlock(inputs, tr.MLPBlock([64])), task))
    optimizer = for_model(model, 0.1, "adamw")
    for _ in range(4):
        optimizer.zero_grad()
        model(batch(2), training=True)["loss"].backward()
        optimizer.step()
    model.save(tmp_path)
    expected = task.item_embedding_table.weight
    saved = tr.load_model(tmp_path).prediction_tasks[0].item_embedding_table.weight
    optimizer.flush()
    assert torch.equal(saved, expected)


def test_a_change_after_building_is_found(tmp_path):
    for change, said in (
        (lambda m: setattr(m.heads[0].inputs.masking, "padding_idx", 3), "_masking.padding_idx"),
        (lambda m: m.heads[0].body.append(nn.Tanh()), "body.3"),
        (lambda m: m.double(), "float64"),
        (lambda m: setattr(m.heads[0], "loss_reduction", "sum"), "loss_reduction"),
    ):
        model = small()
        change(model)
        with pytest.raises(InputError, match=said):
            model.save(tmp_path)
    assert not list(tmp_path.iterdir())


class Scaled(nn.Module):
    def __init__(self, factor, cells=()):
        super().__init__()
        self.factor, self.cells = factor, cells

    def forward(self, x):
        return x * self.factor


def scaled_model(module):
    inputs = tr.TabularSequenceFeatures.from_schema(
        SCHEMA.select_by_name([cells.ITEM]), masking="clm", max_sequence_length=20
    )
    body = tr.SequentialBlock(inputs, tr.Block(module, [None, 20, 64]))
    return tr.Model(tr.Head(body, tr.NextItemPredictionTask(weight_tying=True)))


def test_ones_own_classes_can_be_put_on_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(architecture, "_KNOWN", dict(architecture._KNOWN))
    with pytest.raises(InputError, match=r"Model.*module is a Scaled, which is not on the list"):
        scaled_model(Scaled(2.0)).save(tmp_path)
    known = tr.saveable(type("Scaled", (Scaled,), {}))
    model = scaled_model(known(float("inf"), (1, [2.5, None], {"a": tr.Tags.ITEM})))
    model.save(tmp_path)
    module = tr.load_model(tmp_path).heads[0].body[1].module
    assert module.factor == float("inf")
    assert module.cells == (1, [2.5, None], {"a": "item"})
    with pytest.raises(ValueError, match="another class named Scaled"):
        tr.saveable(type("Scaled", (nn.Module,), {}))
    del architecture._KNOWN["Scaled"]
    with pytest.raises(InputError, match="no class 'Scaled' here"):
        tr.load_model(tmp_path)


def test_modules_of_torch_and_losses(tmp_path):
    layers = nn.Sequential(
        nn.Linear(64, 64, bias=False),
        nn.LayerNorm(64, eps=1e-3),
        nn.GELU(approximate="tanh"),
        nn.Dropout(0.2),
        nn.LSTM(64, 32, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1),
    )
    model = scaled_model(layers)
    task = model.prediction_tasks[0]
    task.loss = nn.CrossEntropyLoss(label_smoothing=0.25)
    with pytest.raises(InputError, match="label_smoothing"):
        model.save(tmp_path)
    inputs = model.heads[0].inputs
    task = tr.NextItemPredictionTask(
        loss=nn.CrossEntropyLoss(label_smoothing=0.25), metrics=[NDCGAt([3])], target_dim=77
    )
    model = tr.Model(tr.Head(model.heads[0].body, task, inputs=inputs))
    model.save(tmp_path)
    assert same(model, tr.load_model(tmp_path), batch())
    weighted = nn.CrossEntropyLoss(weight=torch.ones(77))
    task = tr.NextItemPredictionTask(loss=weighted, target_dim=77)
    with pytest.raises(InputError, match="CrossEntropyLoss with weight cannot be saved"):
        tr.Model(tr.Head(model.heads[0].body, task, inputs=inputs)).save(tmp_path)


def damaged(tmp_path, change):
    small().save(tmp_path)
    change(tmp_path / f"{NAME}.json", tmp_path / f"{NAME}.safetensors")
    return tmp_path


def _edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda j, w: w.unlink(), "is missing"),
        (lambda j, w: w.write_bytes(w.read_bytes()[:-4] + b"\0\0\1\2"), "is not the file that"),
        (lambda j, w: j.write_text(j.read_text()[:-40]), "is damaged"),
        (lambda j, w: _edit(j, "t4r_fast model 1", "t4r_fast model 9"), "holds no saved model"),
        (lambda j, w: _edit(j, '"new": "MLPBlock"', '"new": "os.system"'), "no class 'os.system'"),
        (lambda j, w: _edit(j, '"torch": "GRU"', '"torch": "Module"'), "torch.nn.Module is not on"),
        (lambda j, w: j.with_name("two.json").write_text(j.read_text()), "several models"),
        (lambda j, w: j.rename(j.with_suffix(".pkl")), "is a pickle of Transformers4Rec"),
        (lambda j, w: _edit(j, '"hidden_size": 8', '"hidden_size": 9'), "does not fit"),
    ],
)
def test_files_that_are_not_whole_are_named(change, said, tmp_path):
    with pytest.raises(InputError, match=said):
        tr.load_model(damaged(tmp_path, change))


def test_a_name_that_is_not_there(tmp_path):
    small().save(tmp_path)
    with pytest.raises(InputError, match=r"there is no .*other\.json"):
        tr.Model.load(tmp_path, "other")

"""Blocks by the names of the reference: rows of blocks, dense layers, input blocks, heads."""

from __future__ import annotations

import pytest
import torch
import tutorial_cells as cells
from torch import nn

import t4r_fast.torch as tr
from t4r_fast.errors import InputError
from t4r_fast.torch.block.base import SequentialBlock
from t4r_fast.torch.block.mlp import DenseBlock
from t4r_fast.torch.features.base import InputBlock
from t4r_fast.torch.features.embedding import EmbeddingBagWrapper
from t4r_fast.torch.model.base import name_fn

SCHEMA = cells.schema(30, 10, 10)


def inputs(**options):
    return tr.TabularSequenceFeatures.from_schema(
        SCHEMA, max_sequence_length=6, d_output=8, masking="clm", **options
    )


def test_a_block_is_added_and_built_behind_another():
    row = SequentialBlock(inputs())
    added = row.add_module_and_maybe_build("1", tr.MLPBlock([5]), row[0], 1)
    assert row[1] is added
    assert row.output_size() == (-1, 6, 5)
    row.add_module_and_maybe_build("2", nn.ReLU(), added, 2)
    last = row.add_module_and_maybe_build("3", tr.MLPBlock([4]), row[2], 3)
    assert last[0][0].in_features == 5
    batch = cells.batch(SCHEMA, 3, 6)
    assert row(batch, training=True).shape == (3, 6, 4)
    assert row.inputs is row[0]
    names = SequentialBlock()
    names.add_module_and_maybe_build("0", ["a"], None, 0)
    assert list(names({"a": 1, "b": 2})) == ["a"]
    with pytest.raises(ValueError, match=r"block 1 \(MLPBlock\) must follow a block"):
        SequentialBlock(nn.GRU(2, 2)).add_module_and_maybe_build("1", tr.MLPBlock(3), None, 1)


def test_modules_that_torch_appends_take_part():
    row = SequentialBlock(tr.Block(nn.Linear(2, 3), [-1, 3]))
    row.append(nn.Linear(3, 4))
    assert row(torch.zeros(1, 2)).shape == (1, 4)
    assert row.output_size() == (-1, 4)
    assert SequentialBlock(*row, output_size=[None, 7]).output_size() == (-1, 7)


def test_children_by_the_name_of_their_class():
    merged = tr.MergeTabular(tr.AsTabular("a"), tr.AsTabular("b"))
    row = SequentialBlock(merged, nn.Dropout(0.1), nn.ReLU())
    found = SequentialBlock.get_children_by_class_name
    assert found(row, "AsTabular") == list(merged.to_merge)
    assert found(row, "Dropout", "MergeTabular") == [merged, row[1]]
    assert found(row, "Linear") == []


def test_dense_layers_are_those_of_an_mlp(tmp_path):
    layer = DenseBlock([-1, 20, 8], 8, 4, normalization="batch_norm", dropout=0.1)
    assert list(layer.state_dict()) == [
        "0.weight", "0.bias", "2.weight", "2.bias", "2.running_mean", "2.running_var",
        "2.num_batches_tracked",
    ]  # fmt: skip
    assert layer.output_size() == layer.forward_output_size((-1, 20, 8)) == (-1, 20, 4)
    assert layer(torch.zeros(2, 20, 8)).shape == (2, 20, 4)
    built = tr.MLPBlock([8, 4], activation=None, use_bias=False).build((-1, 16))
    assert [type(b) for b in built] == [DenseBlock, DenseBlock]
    assert list(built.state_dict()) == ["0.0.weight", "1.0.weight"]
    with pytest.raises(ValueError, match="DenseBlock: normalization must be None or 'batch_norm'"):
        DenseBlock([-1, 2], 2, 2, normalization="layer_norm")
    block = inputs()
    body = SequentialBlock(block, DenseBlock((-1, 6, 8), 8, 16, activation=nn.Tanh))
    model = tr.Model(tr.Head(body, tr.NextItemPredictionTask(weight_tying=True)))
    model.save(tmp_path)
    batch = cells.batch(SCHEMA, 3, 6)
    with torch.no_grad():
        assert torch.equal(tr.Model.load(tmp_path).eval()(batch), model.eval()(batch))


def test_a_tabular_block_becomes_a_module_for_what_comes_before_it():
    block = tr.AsTabular("h").to_module((-1, 3))
    assert block.output_size() == {"h": (-1, 3)}
    behind = tr.AsTabular("h").to_module(nn_block := tr.Block(nn.Linear(2, 5), [-1, 5]), "meta")
    assert behind.output_size() == {"h": nn_block.output_size()}
    embedding = tr.EmbeddingFeatures.from_schema(SCHEMA, automatic_build=False)
    sizes = dict.fromkeys(SCHEMA.column_names, (-1,))
    moved = embedding.to_module(sizes, device="meta")
    assert next(moved.parameters()).device.type == "meta"
    with pytest.raises(ValueError, match="GRU does not know its output size"):
        tr.AsTabular("h").to_module(nn.GRU(2, 2))


def test_blocks_that_read_columns_are_input_blocks():
    block = inputs()
    assert isinstance(block.categorical_module, InputBlock)
    assert isinstance(tr.ContinuousFeatures(["x"]), InputBlock)
    assert issubclass(tr.PretrainedEmbeddingFeatures, InputBlock)
    assert issubclass(tr.SoftEmbeddingFeatures, InputBlock)
    assert not isinstance(block, InputBlock)
    assert block.masking.forward_output_size((-1, 6, 8)) == (-1, 6, 8)


def test_bags_take_one_id_per_session():
    bag = EmbeddingBagWrapper(5, 3, mode="sum")
    one, two = bag(torch.tensor([1, 2])), bag(torch.tensor([[1, 2]]))
    assert one.shape == (2, 3)
    torch.testing.assert_close(two[0], one.sum(0))
    ragged = bag(torch.tensor([1, 2, 3]), offsets=torch.tensor([0, 2]))
    torch.testing.assert_close(ragged[0], two[0])
    weighted = bag(torch.tensor([1, 2]), per_sample_weights=torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(weighted, one * torch.tensor([[2.0], [1.0]]))
    (table,) = tr.EmbeddingFeatures.from_schema(
        SCHEMA.select_by_name([cells.ITEM])
    ).embedding_tables.values()
    assert isinstance(table, EmbeddingBagWrapper)


def test_a_head_is_built_again_with_fresh_layers():
    body = SequentialBlock(inputs(), tr.MLPBlock([8]))
    head = tr.Head(body, [tr.RegressionTask("price"), tr.BinaryClassificationTask("bought")])
    before = head.prediction_task_dict["price/regression_task"].pre[0].weight
    head.build(inputs=body.inputs, task_blocks=tr.MLPBlock([4]))
    task = head.prediction_task_dict["price/regression_task"]
    assert task.pre[0].weight is not before
    assert task.task_block.output_size() == (-1, 6, 4)
    head.build(device="meta")
    assert {p.device.type for p in head.parameters()} == {"meta"}
    assert head.task_blocks["price/regression_task"] is None
    with pytest.raises(ValueError, match=r"task_blocks for \['x'\], the tasks are \['price/"):
        head.build(task_blocks={"x": tr.MLPBlock([4])})
    head.body = nn.GRU(2, 2)
    with pytest.raises(ValueError, match="GRU does not know its output size"):
        head.build()


def test_keys_of_metrics_are_joined():
    assert name_fn("a", "x") == "a/x"
    assert name_fn(None, "x") is None
    task = tr.RegressionTask("price")
    assert task.task_name == "price/regression_task"
    assert task.child_name("mse") == "price/regression_task/mse"


def test_a_function_in_a_model_cannot_be_saved(tmp_path):
    from t4r_fast.dropin.torch_utils import LambdaModule

    body = SequentialBlock(inputs(), LambdaModule(lambda x: x), output_size=[-1, 6, 8])
    model = tr.Model(tr.Head(body, tr.NextItemPredictionTask()))
    with pytest.raises(InputError, match="LambdaModule, which is not on the list"):
        model.save(tmp_path)

"""The names of transformers4rec.torch.utils.torch_utils; numbers are those of the real package."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
import tutorial_cells as cells
from torch import nn

import t4r_fast.torch as tr
from t4r_fast.dropin import torch_utils as utils
from t4r_fast.schema import ColumnSchema, Schema, Tags, ValueCount
from t4r_fast.torch.block import transformer
from t4r_fast.torch.masking import CausalLanguageModeling, MaskedLanguageModeling

A, B = torch.arange(6).reshape(2, 3), torch.arange(4).reshape(1, 4)


def test_rows_are_joined_and_padded():
    first, second = {"x": [A, np.ones((1, 2))]}, {"x": [B, np.zeros((1, 3))]}
    tensor, array = utils.nested_concat(first, second, padding_index=-1)["x"]
    assert tensor.tolist() == [[0, 1, 2, -1], [3, 4, 5, -1], [0, 1, 2, 3]]
    assert array.tolist() == [[1, 1, -1], [0, 0, 0]]
    assert utils.torch_pad_and_concatenate(A, B)[:2, 3].tolist() == [-100, -100]
    assert utils.nested_concat(torch.tensor(1.0), torch.tensor(2.0)).tolist() == [1, 2]
    assert utils.numpy_pad_and_concatenate(np.array(1), np.array([2, 3])).tolist() == [1, 2, 3]
    wide = utils.numpy_pad_and_concatenate(np.ones((1, 2, 5)), np.ones((2, 1, 5)), 0)
    assert wide.shape == (3, 2, 5)
    assert wide[1:, 1].sum() == 0
    with pytest.raises(TypeError, match="must be of one type; got list and tuple"):
        utils.nested_concat([A], (A,))
    with pytest.raises(
        TypeError, match="two tensors or two arrays in each place; got Tensor and n"
    ):
        utils.nested_concat([A], [A.numpy()])


def test_nested_values_are_detached_cut_and_taken_to_numpy():
    leaf = torch.ones(3, requires_grad=True)
    pair = collections.namedtuple("Pair", "left right")(leaf * 2, {"x": [leaf * 3]})
    cut = utils.nested_detach(pair)
    assert type(cut) is type(pair)
    assert not cut.left.requires_grad
    assert not cut.right["x"][0].requires_grad
    assert utils.nested_truncate(pair, 2).right["x"][0].tolist() == [3, 3]
    half = utils.nested_numpify((torch.tensor([1.5], dtype=torch.bfloat16), leaf))
    assert half[0].dtype == np.float32
    assert half[1].tolist() == [1, 1, 1]
    assert utils.atleast_1d(np.float32(3)).shape == utils.atleast_1d(torch.tensor(3)).shape == (1,)


def test_labels_in_the_order_of_a_ranking():
    scores, labels = torch.tensor([[0.1, 0.5, 0.3]]), torch.tensor([[0, 0, 1]])
    values, order, found = utils.extract_topk([1, 2], scores, labels)
    torch.testing.assert_close(values, torch.tensor([[0.5, 0.3]]))
    assert (order.tolist(), found.tolist()) == ([[1, 2]], [[0, 1]])
    ties = utils.extract_topk([2], torch.zeros(1, 300), torch.zeros(1, 300))
    assert ties[1].tolist() == [[0, 1]]
    assert utils.check_inputs([2], scores, labels) == ([2], scores, labels)
    for ks, one, other in (([], scores, labels), ([1], scores[0], labels), ([1], scores, A)):
        with pytest.raises(ValueError, match=r"^check_inputs: .* must be"):
            utils.check_inputs(ks, one, other)
    with pytest.raises(ValueError, match="from 1 to the number of items, 3; got 4"):
        utils.extract_topk([4], scores, labels)


def test_one_hot_labels():
    labels = torch.tensor([[1, 0], [2, 2]], dtype=torch.int32)
    rows = [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert utils.tranform_label_to_onehot(labels, 3).tolist() == rows
    exact = utils.one_hot_1d(torch.tensor([2]), 3, dtype=torch.int64)
    assert (exact.tolist(), exact.dtype) == ([[0, 0, 1]], torch.int64)
    assert utils.create_output_placeholder(torch.ones(2, 5), [1, 2, 3]).tolist() == [[0] * 3] * 2
    with pytest.raises(TypeError, match=r"int64 tensor; got torch\.int32"):
        utils.one_hot_1d(labels[0], 3)
    with pytest.raises(ValueError, match=r"must be \(N,\); got shape \(2, 2\)"):
        utils.one_hot_1d(labels.long(), 3)
    with pytest.raises(ValueError, match="num_classes must be >= 1; got 0"):
        utils.one_hot_1d(torch.tensor([0]), 0)


def test_sizes_of_columns():
    count, vectors = ValueCount(1, 7), {"tags": [Tags.EMBEDDING], "properties": {"shape": (16,)}}
    schema = Schema(
        [
            ColumnSchema("a", "INT"),
            ColumnSchema.create_continuous("n"),
            ColumnSchema.create_categorical("l", 10, value_count=count),
            ColumnSchema("e", "FLOAT", value_count=count, **vectors),
            ColumnSchema("v", "FLOAT", **vectors),
        ]
    )
    found = utils.get_output_sizes_from_schema(schema)
    assert found == {"a": (-1,), "n": (-1,), "l": (-1, 7), "e": (-1, 7, 16), "v": (-1, 16)}
    assert isinstance(found["a"], torch.Size)
    found = utils.get_output_sizes_from_schema(schema, 3, max_sequence_length=20)
    assert (found["l"], found["e"], found["n"]) == ((3, 20), (3, 20, 16), (3,))
    assert utils.calculate_batch_size_from_input_size(found) == 3
    assert utils.calculate_batch_size_from_input_size([5, 1]) == 5


def test_modules_of_functions_and_where_they_are():
    double = utils.LambdaModule(lambda x: 2 * x)
    assert tr.SequentialBlock(nn.Linear(2, 2), double)(torch.zeros(1, 2)).shape == (1, 2)
    assert not utils.check_gpu(double)
    assert not utils.check_gpu(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="lambda_fn must be a function; got 3"):
        utils.LambdaModule(3)


def test_the_transformer_block_reads_the_mapping(monkeypatch):
    mapping = utils.MappingTransformerMasking
    assert mapping is transformer.MappingTransformerMasking
    body = tr.GPT2Config.build(16, 2, 1, 8)
    masking = MaskedLanguageModeling(16)
    with pytest.raises(ValueError, match="MaskedLanguageModeling is not supported by GPT2Config"):
        tr.TransformerBlock(body, masking=masking)
    monkeypatch.setattr(mapping, "GPT2Config", [CausalLanguageModeling, MaskedLanguageModeling])
    tr.TransformerBlock(body, masking=masking)
    monkeypatch.setattr(mapping, "XLNetConfig", [CausalLanguageModeling])
    with pytest.raises(ValueError, match="can be trained with CausalLanguageModeling"):
        tr.TransformerBlock(tr.XLNetConfig.build(16, 2, 1, 8), masking=masking)


# -- what blocks, heads and models are -------------------------------------------------------------


class Halved(utils.OutputSizeMixin, nn.Module):
    def forward(self, inputs):
        return inputs[..., : inputs.shape[-1] // 2]

    def forward_output_size(self, input_size):
        return (*input_size[:-1], input_size[-1] // 2)


@utils.requires_schema
class NeedsSchema(Halved):
    pass


def test_a_module_of_ones_own_tells_its_size():
    block = Halved()
    assert block.output_size() is None
    assert block.output_size((-1, 8)) == (-1, 4)
    schema = cells.schema(20)
    assert block.build((-1, 6), schema=schema).output_size() == (-1, 3)
    assert block.schema is schema
    row = tr.SequentialBlock(tr.Block(nn.Linear(2, 8), [-1, 8]), Halved(), tr.MLPBlock([5]))
    assert row.output_size() == (-1, 5)
    assert isinstance(tr.TabularBlock(), utils.OutputSizeMixin)
    assert isinstance(tr.ConcatFeatures(), utils.OutputSizeMixin)
    with pytest.raises(ValueError, match="NeedsSchema requires a schema"):
        NeedsSchema().build((-1, 4))
    with pytest.raises(NotImplementedError, match="BlockBase does not know its output size"):
        tr.BlockBase().output_size((1, 2))


def test_compute_loss_is_the_loss_of_a_batch():
    schema = cells.schema(30)
    model = cells.xlnet(schema).eval()
    batch = cells.batch(model.input_schema, 6)
    want = model(batch, testing=True)
    loss = model.compute_loss(batch, None)
    torch.testing.assert_close(loss, want["loss"])
    found = model.compute_metrics()
    model.reset_metrics()
    model.calculate_metrics(want["predictions"].detach(), want["labels"])
    assert found == model.compute_metrics()
    model.reset_metrics()
    (head,) = model.heads
    of_head = head.compute_loss(batch, None, compute_metrics=False, call_body=True)
    torch.testing.assert_close(of_head, want["loss"])
    assert all(v.isnan() for v in model.compute_metrics().values())
    (task,) = model.prediction_tasks
    for one in (model, head, task):
        assert isinstance(one, utils.LossMixin)
        assert isinstance(one, utils.MetricsMixin)
    model.train().compute_loss(batch, None).backward()
    assert model.heads[0].body[0].masking.masked_item_embedding.grad is not None


def test_mixins_name_what_is_missing():
    class Own(nn.Module, utils.MetricsMixin):
        pass

    for call in (lambda m: m.calculate_metrics(1, 2), Own.compute_metrics, Own.reset_metrics):
        with pytest.raises(NotImplementedError, match="Own must define"):
            call(Own())

"""Model.fit, Model.evaluate, ragged inputs and what a model says of its inputs and outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tutorial_cells as cells
from torch import nn

import t4r_fast.torch as tr
from t4r_fast.compat import CompatWarning, compat_level
from t4r_fast.optim import for_model
from t4r_fast.schema import Tags
from t4r_fast.torch.padding import pad_batch, pad_inputs

SCHEMA = cells.schema(40, 10, 10).select_by_name([cells.ITEM])


def model(dropout=0.0, masking="clm", **arguments):
    torch.manual_seed(0)
    inputs = tr.TabularSequenceFeatures.from_schema(
        SCHEMA, masking=masking, d_output=16, max_sequence_length=20
    )
    body = tr.SequentialBlock(inputs, tr.MLPBlock([16], dropout=dropout))
    return tr.Model(tr.Head(body, tr.NextItemPredictionTask(weight_tying=True)), **arguments)


def batches(n=3, sessions=16):
    torch.manual_seed(1)
    return [(cells.batch(SCHEMA, sessions), None) for _ in range(n)]


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        torch.optim.SGD,
        lambda p: torch.optim.Adam(p, lr=0.01),
        "instance",
        "table",
    ],
)
def test_fit_learns_with_any_optimizer(optimizer):
    one = model()
    if optimizer == "instance":
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
    if optimizer == "table":
        optimizer = for_model(one, 0.01, "adamw")
    losses = one.fit(batches(), optimizer=optimizer, num_epochs=4, verbose=False)
    assert losses.shape == (4,)
    assert losses.dtype == np.float64
    assert (np.diff(losses) < 0).all()


def test_fit_takes_the_models_optimizer_and_counts_the_last_epoch():
    seen = []

    class Noting(torch.optim.Adam):
        def __init__(self, parameters):
            seen.append(self)
            super().__init__(parameters, lr=0.01)

    one = model(optimizer=Noting)
    data = batches()
    losses = one.fit(data, num_epochs=2, verbose=False)
    assert len(seen) == 1
    found = one.compute_metrics()
    rows = int(one.prediction_tasks[0].metrics[0].rows)
    assert rows == sum(int((x[cells.ITEM][:, 1:] != 0).sum()) for x, _ in data)
    assert 0 <= found["next-item/recall_at_20"] <= 1
    one.fit(data, train=False, compute_metric=False, verbose=False)
    assert one.compute_metrics()["next-item/recall_at_20"].isnan()
    assert losses[1] < losses[0]


def test_fit_without_training_changes_nothing():
    one = model(dropout=0.5)
    before = {n: p.clone() for n, p in one.named_parameters()}
    loss = one.fit(batches(), num_epochs=2, train=False, verbose=False)
    assert loss[0] == loss[1]
    assert all(torch.equal(p, before[n]) for n, p in one.named_parameters())
    assert one.training


def test_fit_in_half_precision():
    losses = model().fit(batches(), num_epochs=3, amp=True, verbose=False)
    assert losses[-1] < losses[0]


def test_fit_prints_and_evaluates(capsys):
    one = model()
    one.fit(batches(1), eval_dataloader=batches(2), num_epochs=1)
    out = capsys.readouterr().out
    assert out.count("next-item/ndcg_at_10") == 2
    assert int(one.prediction_tasks[0].metrics[0].rows) == 32  # the evaluation's sessions


def test_evaluate_is_without_dropout_and_gradients():
    one = model(dropout=0.5)
    one.train()
    before = one.evaluate(batches(), verbose=False)
    assert before == one.evaluate(batches(), verbose=False)
    assert one.training
    alone = tr.Model(one.heads[0]).eval()
    for inputs, _ in batches():
        out = alone(inputs, testing=True)
        alone.calculate_metrics(out["predictions"].detach(), out["labels"])
    assert one.compute_metrics() == before
    with pytest.warns(CompatWarning, match="batches bring theirs"):
        one.evaluate(batches(1), targets=torch.zeros(1), verbose=False)


def test_fit_with_targets_of_several_tasks():
    inputs = tr.TabularSequenceFeatures.from_schema(SCHEMA, d_output=16, max_sequence_length=20)
    tasks = [tr.BinaryClassificationTask("bought"), tr.RegressionTask("price")]
    one = tr.Model(tr.Head(tr.SequentialBlock(inputs, tr.MLPBlock([16])), tasks))
    targets = {"bought": torch.arange(16) % 2, "price": torch.randn(16)}
    data = [(x, targets) for x, _ in batches()]
    losses = one.fit(data, num_epochs=5, verbose=False)
    assert losses[-1] < losses[0]
    found = one.evaluate(data, verbose=False)
    assert set(found) == {"eval_bought/binary_classification_task", "eval_price/regression_task"}


def test_wrong_batches():
    with pytest.raises(TypeError, match="gave Tensor"):
        model().fit([torch.zeros(2)], verbose=False)
    with pytest.raises(ValueError, match="no batches"):
        model().fit([], verbose=False)


# -- ragged inputs ---------------------------------------------------------------------------------


def ragged(rows, name="x", column=False):
    values = torch.tensor([v for row in rows for v in row])
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in rows]).tolist()])
    if column:
        values, offsets = values[:, None], offsets[:, None]
    return {f"{name}__values": values, f"{name}__offsets": offsets}


ROWS = [[4, 5, 6, 7, 8], [9], [], [10, 11]]


@pytest.mark.parametrize("column", [False, True])
def test_ragged_columns_are_padded_on_the_right(column):
    found = pad_inputs({**ragged(ROWS, column=column), "user": torch.arange(4)})
    expected = [[4, 5, 6, 7, 8], [9, 0, 0, 0, 0], [0] * 5, [10, 11, 0, 0, 0]]
    assert found["x"].tolist() == expected
    assert found["user"].tolist() == [0, 1, 2, 3]


def test_a_cut_keeps_the_newest_and_at_01_the_oldest():
    assert pad_inputs(ragged(ROWS), 3)["x"].tolist()[0] == [6, 7, 8]
    with compat_level("0.1"):
        assert pad_inputs(ragged(ROWS), 3)["x"].tolist()[0] == [4, 5, 6]
    assert pad_inputs(ragged(ROWS), 3, keep_newest=False)["x"].tolist()[3] == [10, 11, 0]
    assert pad_inputs(ragged(ROWS), 9)["x"].shape == (4, 5)


def test_vectors_and_dense_columns_get_their_length():
    vectors = {"v__values": torch.arange(6.0).view(3, 2), "v__offsets": torch.tensor([0, 1, 3])}
    found = pad_batch({**vectors, "d": torch.ones(2, 4)}, {"v": 3, "d": 2})
    assert found["v"].tolist() == [[[0, 1], [0, 0], [0, 0]], [[2, 3], [4, 5], [0, 0]]]
    assert found["d"].shape == (2, 2)
    assert pad_batch({"d": torch.ones(2, 4)}, {"d": 6})["d"].sum() == 8


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"x__offsets": torch.tensor([0, 1])}, "comes without 'x__values'"),
        ({"x__values": torch.tensor([1])}, "comes without 'x__offsets'"),
        (ragged(ROWS, "y"), "no length for column 'y'"),
    ],
)
def test_halves_of_ragged_columns(batch, said):
    with pytest.raises(ValueError, match=said):
        pad_batch(batch, {"x": 3})


def test_a_model_reads_ragged_inputs_as_padded_ones():
    one = model(max_sequence_length=20).eval()
    rows = [torch.randint(3, 40, (n,)).tolist() for n in (2, 7, 5)]
    given = ragged(rows, cells.ITEM)
    padded = {cells.ITEM: nn.functional.pad(pad_inputs(given)[cells.ITEM], (0, 13))}
    with torch.no_grad():
        torch.testing.assert_close(one(given), one(padded))
    assert set(given) == {f"{cells.ITEM}__values", f"{cells.ITEM}__offsets"}


# -- schemas ---------------------------------------------------------------------------------------


def test_schemas_of_inputs_and_outputs():
    one = model()
    assert one.input_schema.column_names == [cells.ITEM]
    (scores,) = one.output_schema
    assert (scores.name, scores.type, scores.value_count.max) == ("next-item", "FLOAT", 40)
    one.top_k = 5
    scores, ids = one.output_schema
    assert (scores.name, ids.name) == ("item_id_scores", "item_ids")
    assert scores.value_count.max == ids.value_count.max == 5
    assert ids.int_domain.max == 39
    assert Tags.CATEGORICAL in ids.tags
    found = one.eval()({cells.ITEM: torch.tensor([[3, 4, 0]])})
    assert [tuple(t.shape) for t in found] == [(1, 5), (1, 5)]
    regression = tr.RegressionTask("price").to_model(one.heads[0].body)
    assert regression.output_schema.column_names == ["price/regression_task"]

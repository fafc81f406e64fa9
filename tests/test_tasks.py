"""Tasks with one target per session, several tasks, and what the reference gets wrong there."""

from __future__ import annotations

import pytest
import torch
import tutorial_cells as cells
from torch import nn

import t4r_fast.torch as tr
from t4r_fast import compat
from t4r_fast.compat import CompatWarning
from t4r_fast.schema import ColumnSchema, Schema
from t4r_fast.torch.session_metric import BinaryPrecision, BinaryRecall, MeanSquaredError

SCHEMA = cells.schema(50, 10, 10).select_by_name([cells.ITEM])
WIDTH = 16


def body(masking=None, **arguments):
    inputs = tr.TabularSequenceFeatures.from_schema(
        SCHEMA, d_output=WIDTH, max_sequence_length=8, masking=masking, **arguments
    )
    return tr.SequentialBlock(inputs, tr.MLPBlock([WIDTH])), inputs


def batch(sessions=6, length=8):
    torch.manual_seed(0)
    targets = {"bought": torch.arange(sessions) % 2, "price": torch.randn(sessions)}
    return cells.batch(SCHEMA, sessions, length), targets


def model(*tasks, masking=None, **head):
    return tr.Model(tr.Head(body(masking)[0], list(tasks), **head))


def summary(hidden, item, **options):
    task = tr.PredictionTask(nn.MSELoss(), **options)
    inputs = body()[1]
    task.build(nn.Identity(), (-1, *hidden.shape[1:]), inputs)
    inputs.categorical_module.item_seq = item
    return task.summary(hidden)


@pytest.mark.parametrize("extra", [0, 1])  # masked modelling appends a position at inference
def test_summaries_with_and_without_padding(extra, monkeypatch):
    monkeypatch.setattr(compat, "_warned", set())
    hidden = torch.randn(3, 4 + extra, 5)
    item = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
    assert torch.equal(summary(hidden, item, summary_type="first"), hidden[:, 0])
    with pytest.warns(CompatWarning, match="ignore_padding"):
        assert torch.equal(summary(hidden, item, summary_type="last"), hidden[:, -1])
    last = summary(hidden, item, summary_type="last", ignore_padding=True)
    assert torch.equal(last, torch.stack([hidden[0, 3], hidden[1, 1], hidden[2, 0]]))
    mean = summary(hidden, item, summary_type="mean", ignore_padding=True)
    expected = [hidden[0, :4].mean(0), hidden[1, :2].mean(0), hidden[2, 0]]
    torch.testing.assert_close(mean, torch.stack(expected))
    assert summary(hidden, item, summary_type=None) is hidden


def test_longer_padding_changes_a_mean_unless_it_is_ignored():
    found = {}
    for ignore in (False, True):
        torch.manual_seed(1)
        one = model(tr.RegressionTask("price", summary_type="mean", ignore_padding=ignore)).eval()
        inputs, _ = batch(length=5)
        longer = {n: nn.functional.pad(c, (0, 3)) for n, c in inputs.items()}
        with torch.no_grad():
            found[ignore] = (one(inputs) - one(longer)).abs().max()
    assert found[False] > 1e-4
    assert found[True] < 1e-7


def test_losses_learn_and_metrics_agree_with_what_they_mean():
    one = model(tr.BinaryClassificationTask("bought"), tr.RegressionTask("price"))
    inputs, targets = batch(32)
    optimizer = torch.optim.Adam(one.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        out = one(inputs, targets=targets, training=True)
        out["loss"].backward()
        optimizer.step()
    assert out["loss"] < 0.1
    one.calculate_metrics(out["predictions"], out["labels"])
    found = one.compute_metrics()
    binary = "bought/binary_classification_task"
    said = out["predictions"][binary].round() == targets["bought"]
    assert found[binary][f"{binary}/binary_accuracy"] == said.float().mean() > 0.9
    error = (out["predictions"]["price/regression_task"] - targets["price"]).square().mean()
    key = "price/regression_task/mean_squared_error"
    assert found["price/regression_task"][key] == pytest.approx(float(error), rel=1e-6)


def test_binary_metrics_over_batches():
    precision, recall, squares = BinaryPrecision(), BinaryRecall(), MeanSquaredError()
    said, true = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 1, 0, 1])
    for part in (slice(0, 3), slice(3, 5)):
        for metric in (precision, recall, squares):
            metric(said[part], true[part])
    assert precision.compute() == pytest.approx(2 / 3)
    assert recall.compute() == pytest.approx(2 / 3)
    assert squares.compute() == pytest.approx(2 / 5)
    precision.reset()
    assert precision.compute() == 0
    assert BinaryRecall()(torch.zeros(2), torch.zeros(2)) == 0
    with pytest.raises(ValueError, match=r"shape of preds, \(2,\)"):
        precision(torch.zeros(2), torch.zeros(2, 1))


def test_metrics_of_two_tasks_are_not_shared():
    one, two = tr.BinaryClassificationTask("a"), tr.BinaryClassificationTask("b")
    one.calculate_metrics(torch.ones(3), torch.ones(3))
    assert one.compute_metrics()["a/binary_classification_task/binary_recall"] == 1
    assert two.compute_metrics()["b/binary_classification_task/binary_recall"] == 0


def test_next_item_and_session_targets_train_together():
    one = model(
        tr.NextItemPredictionTask(weight_tying=True),
        tr.BinaryClassificationTask("bought", summary_type="mean", ignore_padding=True),
        masking="mlm",
        task_weights=[1.0, 0.5],
        loss_reduction="sum",
    )
    inputs, targets = batch()
    out = one(inputs, targets=targets, testing=True)
    parts = {t.task_name: t for t in one.prediction_tasks}
    hidden = one.heads[0].body(inputs, testing=True)
    next_item = parts["next-item"](hidden, testing=True)["loss"]
    bought = nn.functional.binary_cross_entropy(
        out["predictions"]["bought/binary_classification_task"], targets["bought"].float()
    )
    torch.testing.assert_close(out["loss"], next_item + 0.5 * bought)
    one.top_k = 3
    scores, ids = one.eval()(inputs)["next-item"]
    assert scores.shape == ids.shape == (6, 3)


def test_blocks_of_a_head_are_copies():
    block = tr.MLPBlock([4]).build((-1, 8, WIDTH))
    head = tr.Head(
        body()[0],
        [tr.BinaryClassificationTask("bought"), tr.RegressionTask("price")],
        task_blocks=block,
    )
    one, two = head.task_blocks.values()
    assert one is not two
    assert one is not block


def test_positions_can_be_targets():
    one = model(tr.RegressionTask("price", summary_type=None))
    inputs, _ = batch()
    wanted = torch.randn(6, 8)
    out = one(inputs, targets=wanted, training=True)
    torch.testing.assert_close(out["loss"], (out["predictions"] - wanted).square().mean())


def test_class_targets_stay_integers():
    one = model(tr.PredictionTask(nn.CrossEntropyLoss(), pre=tr.MLPBlock([3], activation=None)))
    inputs, _ = batch()
    out = one(inputs, targets=torch.tensor([0, 1, 2, 0, 1, 2]), training=True)
    assert out["predictions"].shape == (6, 3)
    assert out["labels"].dtype == torch.int64
    out["loss"].backward()


def test_half_precision_trains():
    one = model(tr.BinaryClassificationTask("bought"))
    inputs, targets = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = one(inputs, targets=targets, training=True)
    assert out["loss"].dtype == torch.float32
    out["loss"].backward()


def test_names_and_ways_to_a_model():
    task = tr.RegressionTask("price")
    assert task.task_name == "price/regression_task"
    assert tr.BinaryClassificationTask().task_name == "binary_classification_task"
    assert tr.RegressionTask("price", task_name="cost").child_name("x") == "cost/x"
    one = task.to_model(body()[0], top_k=5)
    assert isinstance(one, tr.Model)
    assert one.top_k == 5
    inputs, targets = batch()
    both = {**inputs, **targets}
    assert one.heads[0].pop_labels(both)["price/regression_task"] is targets["price"]
    assert set(both) == {cells.ITEM, "bought"}


def _plain(tags):
    return Schema([ColumnSchema.create_categorical("bought", 1, tags=tags)])


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: tr.RegressionTask(summary_type="attn"), "summary_type must be one of"),
        (lambda: tr.RegressionTask(ignore_padding=True), "goes with summary_type"),
        (lambda: model(), "at least one prediction task"),
        (lambda: model(tr.RegressionTask(), tr.RegressionTask()), "different names"),
        (lambda: model(tr.RegressionTask(), task_weights=[1, 2]), "as many task_weights"),
        (lambda: model(tr.RegressionTask(), task_blocks={"x": None}), "task_blocks for"),
        (lambda: tr.Head.from_schema(_plain([]), body()[0]), "no column carries a tag"),
        (
            lambda: tr.Head.from_schema(
                _plain(["binary_classification"]), body()[0], task_weight_dict={"x": 1}
            ),
            "names \\['x'\\]",
        ),
        (
            lambda: tr.Model(
                model(tr.RegressionTask()).heads[0], model(tr.RegressionTask()).heads[0]
            ),
            "over all heads",
        ),
        (lambda: tr.Head(nn.Linear(4, 4), tr.RegressionTask()), "output size"),
        (lambda: model(tr.RegressionTask("price"))(batch()[0], training=True), "no 'price'"),
        (
            lambda: model(tr.RegressionTask("price", summary_type=None))(*batch(), training=True),
            r"must be \(sessions, positions\)",
        ),
    ],
)
def test_errors(build, said):
    with pytest.raises((ValueError, TypeError), match=said):
        build()

"""What the reference gets wrong in training and evaluation: its result beside ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_case import (
    BATCH,
    ITEM,
    LENGTH,
    ROWS,
    SCHEMA,
    make_model,
    make_trainer,
    write_sessions,
)
from transformers import TrainerCallback

from t4r_fast.torch.data import ParquetDataLoader


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sessions(tmp_path_factory.mktemp("data") / "train.parquet")


def key(found, name):
    return next(v for k, v in found.items() if k.endswith(name))


def test_the_loss_is_the_mean_over_targets(tmp_path, data):
    """90 sessions in batches of 16: the last ten are no full batch."""
    model = make_model().eval()
    losses, sizes = [], []
    with torch.no_grad():
        for inputs, _ in ParquetDataLoader(data, SCHEMA, BATCH, LENGTH):
            losses.append(float(model(inputs, testing=True)["loss"]))
            sizes.append(len(inputs[ITEM]))
    assert sizes[-1] == ROWS % BATCH < BATCH
    trainer = make_trainer(tmp_path, data, model)
    found = key(trainer.evaluate(), "/loss")
    assert found == pytest.approx(np.average(losses, weights=sizes), rel=1e-6)
    every_batch_alike = np.mean(losses)
    assert found != pytest.approx(every_batch_alike, rel=1e-6)


def test_two_models_count_for_themselves(tmp_path, data):
    first, second = make_model(seed=1), make_model(seed=2)
    alone = make_trainer(tmp_path, data, second).evaluate()
    make_trainer(tmp_path, data, first).evaluate()
    inputs, _ = next(iter(ParquetDataLoader(data, SCHEMA, BATCH, LENGTH)))
    for model in (first, second):
        output = model.eval()(inputs, testing=True)
        model.calculate_metrics(output["predictions"], output["labels"])
    rows = [model.prediction_tasks[0].metrics[0].rows for model in (first, second)]
    assert [int(r) for r in rows] == [ROWS + BATCH] * 2
    assert key(make_trainer(tmp_path, data, second).evaluate(), "ndcg_at_10") == key(
        alone, "ndcg_at_10"
    )
    # the reference: one set of metrics, in which the rows of both stand
    shared = first.prediction_tasks[0].metrics
    second.prediction_tasks[0].metrics = shared
    before = int(shared[0].rows)
    output = second(inputs, testing=True)
    second.calculate_metrics(output["predictions"], output["labels"])
    assert int(first.prediction_tasks[0].metrics[0].rows) == before + BATCH


def test_no_metrics_are_computed_when_none_are_wanted(tmp_path, data):
    trainer = make_trainer(tmp_path, data, trainer_options={"compute_metrics": False})
    for _ in range(2):
        assert not any("ndcg" in k for k in trainer.evaluate())
    assert int(trainer.model.prediction_tasks[0].metrics[0].rows) == 0
    wanted = make_trainer(tmp_path, data, trainer.model)
    for _ in range(2):
        assert any("ndcg" in k for k in wanted.evaluate())
        assert int(trainer.model.prediction_tasks[0].metrics[0].rows) == ROWS


def test_callbacks_are_not_added_to_the_callers_list(tmp_path, data):
    class Silent(TrainerCallback):
        pass

    mine = [Silent()]
    options = {"incremental_logging": True}
    first = make_trainer(tmp_path, data, callbacks=mine, trainer_options=options)
    assert len(mine) == 1
    second = make_trainer(tmp_path, data, trainer_options=options)
    kinds = [type(c) for c in second.callback_handler.callbacks]
    assert Silent in [type(c) for c in first.callback_handler.callbacks]
    assert Silent not in kinds
    assert len(kinds) == len(set(kinds))


def test_the_callers_dict_stays_as_it_is():
    torch.manual_seed(0)
    inputs = {ITEM: torch.randint(3, 40, (4, LENGTH))}
    inputs["price_log_norm-list_seq"] = torch.rand(4, LENGTH, dtype=torch.float64)
    before = {k: (id(v), v.dtype, v.clone()) for k, v in inputs.items()}
    make_model().eval()(inputs)
    for name, (identity, kind, values) in before.items():
        assert id(inputs[name]) == identity
        assert inputs[name].dtype == kind
        assert torch.equal(inputs[name], values)


def test_shuffling_needs_no_buffer_size(data):
    def order(shuffle, seed=0):
        loader = ParquetDataLoader(data, SCHEMA, ROWS, LENGTH, shuffle=shuffle, seed=seed)
        return next(iter(loader))[0][ITEM]

    stored, shuffled = order(False), order(True)
    assert not torch.equal(stored, shuffled)
    assert torch.equal(stored.sort(0).values, shuffled.sort(0).values)

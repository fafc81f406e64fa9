"""The Trainer: evaluation, schedules, data sources, options. Resuming: test_trainer_resume.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from training_case import BATCH, ITEM, ROWS, make_model, make_trainer, write_sessions
from transformers import TrainerCallback

import t4r_fast
import t4r_fast.torch as tr
from t4r_fast.compat import CompatWarning, forget_warnings
from t4r_fast.errors import InputError
from t4r_fast.torch import LazyLogits
from t4r_fast.torch.data import ParquetDataLoader
from t4r_fast.torch.trainer import (
    DatasetMock,
    IncrementalLoggingCallback,
    Trainer,
    process_metrics,
)

STEPS = 18  # three epochs of six batches


@pytest.fixture(autouse=True)
def _level():
    yield
    t4r_fast.set_compat("23.12")
    forget_warnings()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sessions(tmp_path_factory.mktemp("data") / "train.parquet")


class Each(TrainerCallback):
    """Keeps what `look` sees at the end of every step."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.look(kwargs))


def rates():
    """The learning rate of each step to come."""
    return Each(lambda kwargs: kwargs["lr_scheduler"].get_last_lr()[0])


# -- evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "prefix"), [("0.1", "eval"), ("23.12", "eval_")])
def test_evaluate_gives_floats_under_the_keys_of_the_level(tmp_path, data, level, prefix):
    t4r_fast.set_compat(level)
    trainer = make_trainer(tmp_path, data)
    found = trainer.evaluate(metric_key_prefix="eval")
    names = ("loss", "next-item/ndcg_at_10", "next-item/recall_at_20")
    speeds = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    assert {f"{prefix}/{n}" for n in names} | speeds <= set(found)
    assert all(type(v) is float for k, v in found.items() if k != "epoch")
    assert abs(found[f"{prefix}/loss"] - math.log(40)) < 0.1
    last = trainer.model.compute_metrics()
    assert found[f"{prefix}/next-item/ndcg_at_10"] == last["next-item/ndcg_at_10"].item()
    assert trainer.state.log_history[-1][f"{prefix}/loss"] == found[f"{prefix}/loss"]


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, data):
    """The last batch of 7 holds 6 sessions: a mean of batch means would differ."""
    model = make_model()
    a = make_trainer(tmp_path, data, model, per_device_eval_batch_size=7).evaluate()
    b = make_trainer(tmp_path, data, model, per_device_eval_batch_size=ROWS).evaluate()
    for key in [k for k in a if "/" in k]:
        assert a[key] == pytest.approx(b[key], abs=1e-6), key


def test_evaluations_start_from_zero_and_leave_dropout_off(tmp_path, data):
    trainer = make_trainer(tmp_path, data)
    trainer.train()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert {k: v for k, v in first.items() if "/" in k} == {
        k: v for k, v in second.items() if "/" in k
    }
    assert not trainer.model.training


@pytest.mark.parametrize("bf16", [False, True], ids=["f32", "bf16"])
def test_scores_of_all_items_are_never_formed(tmp_path, data, monkeypatch, bf16):
    def formed(self):
        raise AssertionError("the N x V scores were formed")

    monkeypatch.setattr(LazyLogits, "dense", formed)
    trainer = make_trainer(tmp_path, data, num_train_epochs=1, bf16=bf16)
    trainer.train()
    found = trainer.evaluate()
    assert abs(found["eval_/loss"] - math.log(40)) < 0.2
    trainer.predict(data)


@pytest.mark.parametrize("wanted", [None, False])
def test_without_compute_metrics_there_is_the_loss_alone(tmp_path, data, wanted):
    model = make_model()
    make_trainer(tmp_path, data, model).evaluate()
    before = model.compute_metrics()["next-item/ndcg_at_10"]
    trainer = make_trainer(tmp_path, data, model, trainer_options={"compute_metrics": wanted})
    assert [k for k in trainer.evaluate() if "/" in k] == ["eval_/loss"]
    assert model.compute_metrics()["next-item/ndcg_at_10"] == before


def test_metrics_can_be_counted_on_every_nth_batch(tmp_path, data):
    trainer = make_trainer(tmp_path, data, compute_metrics_each_n_steps=2)
    calls = []
    count = trainer.model.calculate_metrics
    trainer.model.calculate_metrics = lambda p, t: calls.append(len(t)) or count(p, t)
    trainer.evaluate()
    assert calls == [BATCH] * 3  # batches 0, 2, 4 of 6


def test_evaluation_on_the_train_set_is_bounded(tmp_path, data):
    trainer = make_trainer(tmp_path, data, eval_steps_on_train_set=2)
    loop = trainer.evaluation_loop
    bounded = loop(trainer.get_train_dataloader(), "Evaluation", metric_key_prefix="train")
    assert bounded.num_samples == 2 * BATCH
    assert loop(trainer.get_eval_dataloader(), "Evaluation").num_samples == ROWS


def test_predict_at_01_ranks_the_items_for_each_last_item(tmp_path, data):
    t4r_fast.set_compat("0.1")
    trainer = make_trainer(tmp_path, data, predict_top_k=5)
    found = trainer.predict(data)
    ids, scores = found.predictions
    assert ids.shape == scores.shape == (ROWS, 5)
    assert found.metrics["test/next-item/recall_at_10"] > 0
    loader = ParquetDataLoader(data, trainer.schema, ROWS, 6)
    (inputs,) = loader
    length = (inputs[ITEM] > 0).sum(1)
    assert found.label_ids.tolist() == inputs[ITEM][torch.arange(ROWS), length - 1].tolist()
    with torch.no_grad():
        dense = trainer.model(inputs, testing=True)["predictions"].dense()
    expected = dense.topk(5)
    np.testing.assert_allclose(scores, expected.values.numpy(), atol=1e-5)
    assert (ids == expected.indices.numpy()).mean() > 0.99
    trainer.args.predict_top_k = 0
    np.testing.assert_allclose(trainer.predict(data).predictions, dense.numpy(), atol=1e-6)


def test_predict_recommends_what_comes_after_the_last_item(tmp_path, data):
    trainer = make_trainer(tmp_path, data, predict_top_k=5)
    trainer.model.top_k = 3
    found = trainer.predict(data)
    assert trainer.model.top_k == 3
    ids, scores = found.predictions
    assert ids.shape == scores.shape == (ROWS, 5)
    assert found.label_ids is None
    assert {k.partition("_")[0] for k in found.metrics} == {"test"}
    ((inputs, _),) = ParquetDataLoader(data, trainer.schema, ROWS, 6)
    trainer.model.top_k = None
    with torch.no_grad():
        dense = trainer.model(inputs)
    expected = dense.topk(5)
    np.testing.assert_allclose(scores, expected.values.numpy(), rtol=1e-5, atol=1e-7)
    assert (ids == expected.indices.numpy()).mean() > 0.99
    trainer.args.predict_top_k = 0
    np.testing.assert_allclose(trainer.predict(data).predictions, dense.numpy(), atol=1e-6)


def test_predict_gives_every_task(tmp_path, data):
    head = make_model().heads[0]
    tasks = [
        tr.NextItemPredictionTask(weight_tying=True),
        tr.RegressionTask("price", summary_type="mean", ignore_padding=True),
    ]
    model = tr.Model(tr.Head(head.body, tasks, inputs=head.inputs))
    found = make_trainer(tmp_path, data, model, predict_top_k=4).predict(data).predictions
    assert [a.shape for a in found["next-item"]] == [(ROWS, 4)] * 2
    assert found["price/regression_task"].shape == (ROWS,)


def test_get_scheduler_gives_cycles_to_the_schedules_that_wave():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    cosine = Trainer.get_scheduler("cosine", optimizer, 2, 10, num_cycles=1.0)
    assert cosine.lr_lambdas[0](6) == pytest.approx(0.0, abs=1e-7)
    assert Trainer.get_scheduler("linear", optimizer, 2, 10).lr_lambdas[0](6) == 0.5
    assert Trainer.get_scheduler("constant", optimizer).lr_lambdas[0](6) == 1
    with pytest.raises(ValueError, match="num_training_steps"):
        Trainer.get_scheduler("linear", optimizer, 2)


def test_a_checkpoint_with_its_model_is_read_without_building_one(tmp_path, data):
    trainer = make_trainer(tmp_path, data)
    trainer.train()
    trainer._save_model_and_checkpoint(save_model_class=True)
    folder = tmp_path / f"checkpoint-{trainer.state.global_step}"
    expected = trainer.evaluate()["eval_/loss"]
    other = make_trainer(tmp_path / "other", data, model=make_model())
    other.load_model_trainer_states_from_checkpoint(folder)
    assert other.evaluate()["eval_/loss"] == expected
    assert other.state.global_step == trainer.state.global_step
    assert tr.load_model(folder).training is False
    other.train()
    (folder / "t4rec_model_class.json").unlink()
    with pytest.raises(InputError, match="there is no"):
        other.load_model_trainer_states_from_checkpoint(folder)


def test_predictions_are_logged_where_a_callback_is_set(tmp_path, data):
    trainer = make_trainer(tmp_path, data, log_predictions=True, predict_top_k=3)
    with pytest.warns(CompatWarning, match="log_predictions_callback is not set"):
        trainer.evaluate()
    logged = []
    trainer.log_predictions_callback = lambda **batch: logged.append(batch)
    trainer.evaluate()
    assert len(logged) == 6
    assert logged[0]["pred_item_ids"].shape == logged[0]["pred_item_scores"].shape == (BATCH, 3)
    assert logged[0]["labels"].shape == (BATCH,)
    assert "next-item/ndcg_at_10" in logged[0]["metrics"]
    assert logged[0]["dataset_type"] == "eval"


def test_the_best_model_is_found_by_a_metric_of_the_model(tmp_path, data):
    trainer = make_trainer(
        tmp_path, data, eval_strategy="steps", eval_steps=6, save_steps=6, num_train_epochs=3,
        load_best_model_at_end=True, metric_for_best_model="next-item/ndcg_at_20",
        greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    history = [h for h in trainer.state.log_history if "eval_/next-item/ndcg_at_20" in h]
    best = max(h["eval_/next-item/ndcg_at_20"] for h in history)
    assert len(history) == 3
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_/next-item/ndcg_at_20"] == pytest.approx(best, abs=1e-6)


# -- training --------------------------------------------------------------------------------------


def test_training_lowers_the_loss(tmp_path, data):
    trainer = make_trainer(tmp_path, data, num_train_epochs=10, save_strategy="no")
    before = trainer.evaluate()["eval_/loss"]
    trainer.train()
    assert trainer.evaluate()["eval_/loss"] < before - 0.1


def test_train_can_be_called_again_as_in_the_tutorial(tmp_path, data):
    """Moments are kept, the schedule starts anew, a changed global_step does no harm."""
    look = Each(
        lambda k: (
            k["lr_scheduler"].get_last_lr()[0],
            int(next(iter(k["optimizer"].state.values()))["step"]),
        )
    )
    trainer = make_trainer(tmp_path, data, callbacks=[look])
    for _ in range(2):
        trainer.reset_lr_scheduler()
        assert trainer.train().global_step == STEPS
        trainer.state.global_step += 1
        trainer.evaluate(metric_key_prefix="eval")
        trainer.wipe_memory()
    trainer.train()
    rate, step = zip(*look.seen)
    assert step == tuple(range(1, 3 * STEPS + 1))
    assert rate[:STEPS] == rate[STEPS : 2 * STEPS] == rate[2 * STEPS :]
    assert rate[0] == pytest.approx(1e-2 * (STEPS - 1) / STEPS)
    assert rate[STEPS - 1] == 0


def test_cosine_schedules_wave_by_epochs(tmp_path, data):
    look = rates()
    make_trainer(tmp_path, data, callbacks=[look], lr_scheduler_type="cosine").train()
    cycles = 1.25 * 3
    wave = [
        1e-2 * max(0, 0.5 * (1 + math.cos(math.pi * cycles * 2 * i / STEPS)))
        for i in range(1, STEPS + 1)
    ]
    assert look.seen == pytest.approx(wave)


def test_warmup_ratio_is_honoured(tmp_path, data):
    look = rates()
    make_trainer(tmp_path, data, callbacks=[look], warmup_ratio=0.5).train()
    assert look.seen[:9] == pytest.approx([1e-2 * i / 9 for i in range(1, 10)])
    assert look.seen[-1] == 0


def test_incremental_logging_counts_on(tmp_path, data):
    logs = []

    class Steps(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            logs.append(state.global_step)

    trainer = make_trainer(
        tmp_path, data, callbacks=[Steps()], num_train_epochs=1, logging_steps=3,
        trainer_options={"incremental_logging": True},
    )  # fmt: skip
    for _ in range(2):
        trainer.train()
        trainer.evaluate()
    assert logs == [3, 6, 6, 6, 9, 12, 12, 12]


def test_a_callback_counts_logged_steps_on(tmp_path, data):
    trainer = make_trainer(tmp_path, data, num_train_epochs=1, logging_steps=3)
    trainer.add_callback(IncrementalLoggingCallback(trainer))
    for _ in range(2):
        trainer.train()
    assert [line["step"] for line in trainer.state.log_history] == [9, 12, 12]
    counting = make_trainer(tmp_path, data, trainer_options={"incremental_logging": True})
    kinds = [type(c) for c in counting.callback_handler.callbacks]
    assert kinds.count(IncrementalLoggingCallback) == 1
    assert IncrementalLoggingCallback not in [
        type(c) for c in make_trainer(tmp_path, data).callback_handler.callbacks
    ]


def test_metrics_are_flat():
    nested = {"t": {"a": torch.tensor(1.5)}, "b": torch.tensor(2)}
    assert process_metrics(nested, prefix="eval_/") == {"eval_/a": 1.5, "eval_/b": 2}
    assert process_metrics(nested, to_cpu=False)["a"] is nested["t"]["a"]


def test_a_data_set_of_a_length_alone_stands_beside_a_loader(tmp_path, data):
    found = make_trainer(tmp_path, data)
    loader = found.get_train_dataloader()
    trainer = make_trainer(tmp_path, None)
    trainer.train_dataset, trainer.train_dataloader = DatasetMock(nsteps=7), loader
    assert len(trainer.train_dataset) == 7
    trainer.args.max_steps = 2
    assert trainer.train().global_step == 2


# -- data ------------------------------------------------------------------------------------------


class Batches:
    """What a user may bring: an iterable of batches with `_batch_size`."""

    def __init__(self, batches):
        self.batches, self._batch_size = batches, BATCH

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


@pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "dicts"])
def test_loaders_of_the_user_are_taken(tmp_path, data, pairs):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    batches = list(ParquetDataLoader(data, trainer.schema, BATCH, 6))
    trainer.train_dataloader = Batches(batches if pairs else [x for x, _ in batches])
    trainer.eval_dataloader = trainer.train_dataloader
    assert trainer.train().global_step == 6
    found = trainer.evaluate()
    same = make_trainer(tmp_path, data, trainer.model).evaluate()
    assert found["eval_/loss"] == pytest.approx(same["eval_/loss"], abs=1e-6)


def test_a_loader_wins_over_files_and_an_argument_over_both(tmp_path, data):
    trainer = make_trainer(tmp_path, data)
    few = ParquetDataLoader(data, trainer.schema, 45, 6)
    trainer.eval_dataloader = few
    assert trainer.get_eval_dataloader() is few
    assert trainer.num_examples(few) == ROWS
    assert trainer.num_examples(Batches([{}, {}])) == 2 * BATCH
    assert trainer.get_eval_dataloader(data) is not few


def test_several_evaluation_sets_are_named(tmp_path, data):
    trainer = make_trainer(tmp_path, data)
    trainer.eval_dataset_or_path = {"day": data, "night": [data]}
    found = trainer.evaluate()
    assert found["eval_day_/loss"] == found["eval_night_/loss"]


def test_order_follows_seed_epoch_and_strategy(tmp_path, data):
    def first_ids(**arguments):
        loader = make_trainer(tmp_path, data, **arguments).get_train_dataloader()
        return next(iter(loader))[0][ITEM].tolist()

    stored = next(iter(ParquetDataLoader(data, make_trainer(tmp_path).schema, BATCH, 6)))
    assert first_ids() == first_ids() != first_ids(data_seed=7)
    assert first_ids(train_sampling_strategy="sequential") == stored[0][ITEM].tolist()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: t.train(), "no train data; set trainer.train_dataset_or_path"),
        (lambda t: t.evaluate(), "no eval data"),
        (lambda t: t.predict(), "no test data"),
        (lambda t: t.train(resume_from_checkpoint=True), "there is none in"),
        (lambda t: t.train(resume_from_checkpoint="gone"), "there is no folder gone"),
        (lambda t: t.load_checkpoint("gone"), "there is no folder gone"),
    ],
)
def test_what_is_missing_is_named(tmp_path, spoil, says):
    with pytest.raises(InputError, match=says):
        spoil(make_trainer(tmp_path))


def test_files_without_a_schema_are_refused(tmp_path, data):
    trainer = make_trainer(tmp_path, data)
    trainer.schema = None
    with pytest.raises(InputError, match="give a schema"):
        trainer.train()


def test_batches_of_another_form_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train_dataloader = Batches([[torch.zeros(2)]])
    with pytest.raises(TypeError, match="must be a dict of tensors"):
        trainer.train()


def test_foreign_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args must be T4RecTrainingArguments"):
        Trainer(make_model(), transformers.TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(TypeError, match="compute_metrics must be True, False or None"):
        make_trainer(tmp_path, trainer_options={"compute_metrics": lambda p: {}})
    with pytest.raises(TypeError, match="data_collator is not supported"):
        make_trainer(tmp_path, trainer_options={"data_collator": list})
    for name, value in (("label_smoothing_factor", 0.1), ("bf16_full_eval", True)):
        with pytest.raises(InputError, match=f"{name} is not supported"):
            make_trainer(tmp_path, **{name: value})
    with pytest.warns(CompatWarning, match="dataloader_num_workers has no effect"):
        make_trainer(tmp_path, dataloader_num_workers=2)


def test_one_of_several_gpus_is_used(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args._n_gpu = 2
    with pytest.warns(CompatWarning, match="one of 2 GPUs is used"):
        again = Trainer(trainer.model, trainer.args)
    assert again.args.train_batch_size == BATCH

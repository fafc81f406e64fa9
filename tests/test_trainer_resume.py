"""Checkpoints: what is in them, and that an interrupted run ends like an uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_case
from safetensors import safe_open
from training_case import KillAt, make_model, make_trainer, write_sessions
from transformers import TrainerCallback

from t4r_fast.errors import InputError
from t4r_fast.torch.checkpoint import load_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sessions(tmp_path_factory.mktemp("data") / "train.parquet")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted run."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), data)
    return trainer, trainer.train()


class Stop(Exception):
    pass


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise Stop


def assert_same_weights(a, b):
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values()):
        assert torch.equal(x, y), name
    mine, theirs = a.optimizer.state_dict()["state"], b.optimizer.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for key, state in mine.items():
        assert all(torch.equal(v, theirs[key][name]) for name, v in state.items())


def assert_same_run(resumed, whole, result):
    assert_same_weights(resumed, whole[0])
    assert result.global_step == whole[1].global_step
    assert result.training_loss == whole[1].training_loss

    def curve(trainer):
        return [(h["step"], h["loss"]) for h in trainer.state.log_history if "loss" in h]

    assert curve(resumed) == curve(whole[0])
    for key, value in whole[0].evaluate().items():
        if "/" in key:
            assert resumed.evaluate()[key] == value


# Checkpoints stand at 5, 10, 15: inside epochs 1, 2 and 3. A stop at 17 resumes at 15.
@pytest.mark.parametrize("stop", [6, 12, 17])
def test_a_stopped_run_ends_as_if_it_had_not_been(tmp_path, data, whole, stop):
    with pytest.raises(Stop):
        make_trainer(tmp_path, data, callbacks=[StopAt(stop)]).train()
    resumed = make_trainer(tmp_path, data, model=make_model(seed=9))
    result = resumed.train(resume_from_checkpoint=True)
    assert_same_run(resumed, whole, result)


def test_resuming_at_the_end_of_an_epoch(tmp_path, data, whole):
    with pytest.raises(Stop):
        make_trainer(tmp_path, data, callbacks=[StopAt(8)], save_steps=6).train()
    resumed = make_trainer(tmp_path, data, model=make_model(seed=9))
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same_run(resumed, whole, result)


def test_resuming_with_gradient_accumulation(tmp_path, data):
    options = {"gradient_accumulation_steps": 2, "save_steps": 4, "logging_steps": 1}
    trainer = make_trainer(tmp_path / "whole", data, **options)
    whole = trainer, trainer.train()
    with pytest.raises(Stop):
        make_trainer(tmp_path, data, callbacks=[StopAt(6)], **options).train()
    resumed = make_trainer(tmp_path, data, model=make_model(seed=9), **options)
    assert_same_run(resumed, whole, resumed.train(resume_from_checkpoint=True))


def test_a_killed_process_resumes_exactly(tmp_path, data, whole):
    script = Path(training_case.__file__)
    here = os.pathsep.join([str(script.parent.parent), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(
        [sys.executable, str(script), data, str(tmp_path), "13"],
        env={**os.environ, "PYTHONPATH": here},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    resumed = make_trainer(tmp_path, data, model=make_model(seed=9))
    assert_same_run(resumed, whole, resumed.train(resume_from_checkpoint=True))
    assert KillAt(13).step == 13


def test_a_loader_of_the_user_is_resumed_inside_its_epoch(tmp_path, data):
    class Fixed:
        def __init__(self, batches):
            self.batches, self._batch_size = batches, training_case.BATCH

        def __iter__(self):
            return iter(self.batches)

        def __len__(self):
            return len(self.batches)

    batches = list(make_trainer(tmp_path, data).get_train_dataloader())

    def trainer(out, **more):
        made = make_trainer(out, **more)
        made.train_dataloader = made.eval_dataloader = Fixed(batches)
        return made

    whole = trainer(tmp_path / "whole")
    result = whole.train()
    with pytest.raises(Stop):
        trainer(tmp_path, callbacks=[StopAt(9)]).train()
    resumed = trainer(tmp_path, model=make_model(seed=9))
    assert_same_run(resumed, (whole, result), resumed.train(resume_from_checkpoint=True))


def test_save_and_load_carry_everything_into_the_next_train(tmp_path, data):
    """Between two windows of a sliding run: moments, random state, logged steps."""
    a = make_trainer(tmp_path / "a", data, trainer_options={"incremental_logging": True})
    a.train()
    a.save_checkpoint(tmp_path / "state")
    b = make_trainer(
        tmp_path / "b", data, make_model(seed=9), trainer_options={"incremental_logging": True}
    )
    b.load_checkpoint(tmp_path / "state")
    assert_same_weights(a, b)
    random = torch.rand(3)
    b.load_checkpoint(tmp_path / "state")
    assert torch.equal(torch.rand(3), random)
    a.load_checkpoint(tmp_path / "state")
    a.train()
    b.load_checkpoint(tmp_path / "state")
    b.train()
    assert_same_weights(a, b)
    assert a.state.log_history[-1]["step"] == b.state.log_history[-1]["step"] == 36


# -- the folder ------------------------------------------------------------------------------------


def test_shared_tensors_are_stored_once_and_loaded_everywhere(tmp_path, data, whole):
    folder = whole[0].save_checkpoint(tmp_path / "state")
    with safe_open(Path(folder) / "model.safetensors", "pt") as file:
        stored = {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
    tables = [k for k, shape in stored.items() if shape == [training_case.ITEMS, 8]]
    assert len(tables) == 1
    model = make_model(seed=9)
    load_weights(model, folder)
    for name, value in whole[0].model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    table = model.heads[0].body[0].categorical_module.embedding_tables[training_case.ITEM].weight
    assert model.prediction_tasks[0].pre.module.items is table


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_the_reference_are_read(tmp_path, prefix):
    source = make_model(seed=3)
    state = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = make_model(seed=9)
    load_weights(model, tmp_path)
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_weights_of_another_model_are_refused(tmp_path, whole):
    folder = whole[0].save_checkpoint(tmp_path / "state")
    with pytest.raises(InputError, match="is of another model"):
        load_weights(torch.nn.Linear(2, 2), folder)
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        load_weights(make_model(), tmp_path)


def test_a_failed_save_leaves_the_former_checkpoint(tmp_path, data, monkeypatch):
    trainer = make_trainer(tmp_path, data, num_train_epochs=1)
    trainer.train()
    trainer.save_checkpoint(tmp_path / "state")
    before = {f.name: f.read_bytes() for f in (tmp_path / "state").iterdir()}

    def full(folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="no space"):
        trainer.save_checkpoint(tmp_path / "state")
    assert {f.name: f.read_bytes() for f in (tmp_path / "state").iterdir()} == before


def test_a_checkpoint_killed_while_it_was_replaced_is_found(tmp_path, whole):
    folder = Path(whole[0].save_checkpoint(tmp_path / "state"))
    folder.rename(tmp_path / ".state.former")
    other = make_trainer(tmp_path, model=make_model(seed=9))
    other.load_checkpoint(tmp_path / "state")
    assert_same_weights(other, whole[0])


def test_old_checkpoints_are_removed(tmp_path, data):
    make_trainer(tmp_path, data, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-15", "checkpoint-18"]

"""The sliding windows: numbers, files, interruption and resumption, on a few hundred sessions."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from session_files import walks, write_windows

from t4r_fast.errors import InputError
from t4r_fast.tutorial import models, saved_model, state
from t4r_fast.tutorial.run import train_and_report
from t4r_fast.tutorial.sessions import SessionData
from t4r_fast.tutorial.windows import TrainingOptions, train_windows

ITEMS = 43
SMALL = TrainingOptions(
    epochs=2, batch_size=16, d_model=16, n_layer=1, n_head=2, item_dim=16, learning_rate=0.01
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    windows = {
        w: {"train": walks(w, 150, ITEMS), "valid": walks(10 + w, 40, ITEMS)} for w in (1, 2, 3)
    }
    return SessionData(write_windows(tmp_path_factory.mktemp("data"), windows, ITEMS, side=True))


def numbers(records):
    """What must be equal however often a run was interrupted: all but the seconds."""
    return [{k: v for k, v in r.items() if "second" not in k} for r in records]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    found = train_and_report(
        data, out, SMALL, title="walks", window="day", command="t4r-fast train walks"
    )
    return out, found


def test_a_run_leaves_results_models_and_nothing_else(finished, data):
    out, found = finished
    assert list(found["models"]) == list(models.KINDS)
    names = {p.name for p in out.iterdir()}
    assert names == {"state", "checkpoints", "models", "results.txt", "results.json", "report.html"}
    assert list((out / "checkpoints").iterdir()) == []
    assert {p.name for p in (out / "models").iterdir()} == set(models.KINDS)
    for name in models.KINDS:
        files = {p.name for p in (out / "models" / name).iterdir()}
        assert files == {"t4rec_model_class.json", "t4rec_model_class.safetensors"}
    stored = json.loads((out / "results.json").read_text())
    assert stored == json.loads(json.dumps(found))
    for entry in stored["models"].values():
        assert [(r["train_window"], r["eval_window"]) for r in entry["windows"]] == [(1, 2), (2, 3)]
        for r in entry["windows"]:
            assert r["steps"] == 2 * -(-150 // 16)
            assert r["loss_curve"][-1][0] == r["steps"]
            assert r["train_sessions_per_second"] > 0
            assert r["eval_sessions_per_second"] > 0
            assert 0 <= r["metrics"]["ndcg_at_10"] <= r["metrics"]["ndcg_at_20"] <= 1
            assert r["metrics"]["recall_at_10"] <= r["metrics"]["recall_at_20"] <= 1


def test_results_text_holds_the_last_window(finished):
    out, found = finished
    text = (out / "results.txt").read_text()
    for name, kind in models.KINDS.items():
        last = found["models"][name]["windows"][-1]["metrics"]
        lines = "".join(f"next-item/{k}:{v}\n" for k, v in last.items())
        assert f"{kind.results_title}\n{lines}" in text


def test_a_saved_model_gives_the_numbers_of_its_run(finished, data):
    from t4r_fast.tutorial.serving import evaluate

    out, found = finished
    for name in models.KINDS:
        saved = saved_model.load(out / "models" / name)
        again = evaluate(saved, data, window=3)
        last = found["models"][name]["windows"][-1]
        assert again["metrics"] == last["metrics"]
        assert again["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
        assert again["sessions"] == 40


def test_a_run_repeats_to_the_last_digit(data, finished, tmp_path):
    done = train_windows("xlnet_mlm_side", data, data.pairs(), SMALL, tmp_path)
    assert numbers(done.windows) == numbers(finished[1]["models"]["xlnet_mlm_side"]["windows"])


@pytest.mark.parametrize("name", ["gru", "xlnet_mlm"])
def test_going_on_after_a_finished_window_changes_nothing(data, finished, tmp_path, name):
    pairs = data.pairs()

    class Interrupt(Exception):
        pass

    class AfterFirstWindow(state.ModelState):
        def write(self):
            super().write()
            if len(self.windows) == 1 and self.partial is None:
                raise Interrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("t4r_fast.tutorial.windows.ModelState", AfterFirstWindow)
        with pytest.raises(Interrupt):
            train_windows(name, data, pairs, SMALL, tmp_path)
    assert (tmp_path / state.ModelState(tmp_path, name).checkpoint).is_dir()
    done = train_windows(name, data, pairs, SMALL, tmp_path)
    assert numbers(done.windows) == numbers(finished[1]["models"][name]["windows"])
    assert not (tmp_path / "checkpoints" / name).exists()


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    from t4r_fast.tutorial.sessions import SessionData
    from t4r_fast.tutorial.progress import Progress
    from t4r_fast.tutorial.windows import TrainingOptions, train_windows

    from t4r_fast.tutorial import windows

    folder, out, name, kill_at = sys.argv[1:5]
    options = TrainingOptions(**eval(sys.argv[5]))

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if kill_at == "evaluation":
        windows._Run._evaluate = die

    class Killer(Progress):
        steps = 0

        def advance(self, step, count=1):
            self.steps += count
            if str(self.steps) == kill_at:
                die()

    data = SessionData(folder)
    train_windows(name, data, data.pairs(), options, Path(out), Killer())
    """
)


@pytest.mark.parametrize("kill_at", [33, "evaluation"])
def test_sigkill_and_resume_equal_an_uninterrupted_run(data, finished, tmp_path, kill_at):
    """Killed in the second window, some steps after a checkpoint, or before the evaluation."""
    options = dataclasses.replace(SMALL, checkpoint_steps=5)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    out = tmp_path / "out"
    folder = data.folder.parent
    arguments = [
        str(folder),
        str(out),
        "xlnet_mlm",
        str(kill_at),
        repr(dataclasses.asdict(options)),
    ]
    ran = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    before = state.ModelState(out, "xlnet_mlm")
    assert before.partial is not None
    assert len(before.windows) == (1 if kill_at == 33 else 0)
    done = train_windows("xlnet_mlm", data, data.pairs(), options, out)
    assert numbers(done.windows) == numbers(finished[1]["models"]["xlnet_mlm"]["windows"])
    resumed = saved_model.load(out / "models" / "xlnet_mlm").model.state_dict()
    whole = saved_model.load(finished[0] / "models" / "xlnet_mlm").model.state_dict()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


def test_torchrun_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process and 2 were started"):
        train_and_report(data, tmp_path, SMALL, title="walks", window="day", command="t4r-fast")

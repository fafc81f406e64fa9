"""The tutorial's models as its cells build them, saved, read back, and asked for items."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from session_files import ITEM, session_schema, write_windows

import t4r_fast.torch as tr
from t4r_fast import compat, etl
from t4r_fast.errors import InputError
from t4r_fast.serve import Recommender, recommender
from t4r_fast.tutorial import models, saved_model, serving, state
from t4r_fast.tutorial.run import choose_models
from t4r_fast.tutorial.sessions import SessionData


def only(model, kind):
    found = [m for m in model.modules() if isinstance(m, kind)]
    assert len(found) == 1
    return found[0]


def test_the_models_have_the_sizes_of_the_tutorial():
    schema = session_schema(118_335, side=False)
    with compat.compat_level("0.1"):
        model = models.build("xlnet_mlm", schema)
    assert sum(p.numel() for p in model.parameters()) == 8_718_079
    gru = only(models.build("gru", session_schema(50)), torch.nn.GRU)
    assert (gru.input_size, gru.hidden_size, gru.num_layers) == (128, 128, 1)


def test_only_the_corrected_gru_runs_over_time_and_sees_the_history():
    schema = session_schema(50)
    with compat.compat_level("0.1"):
        printed, corrected = (models.build(n, schema) for n in ("gru_as_printed", "gru"))
    assert not only(printed, torch.nn.GRU).batch_first
    assert only(corrected, torch.nn.GRU).batch_first

    def last_scores(model, first_item):
        ids = torch.tensor([[first_item, 8, 9, 10, 0], [7, 11, 12, 13, 14]])
        with torch.no_grad():
            return model.eval()({ITEM: ids}, testing=True)["predictions"].dense()[0]

    for model, sees in ((printed, False), (corrected, True)):
        differs = not torch.equal(last_scores(model, 5), last_scores(model, 6))
        assert differs == sees


def test_side_features_are_read_and_missed():
    with_side, without = session_schema(50, side=True), session_schema(50)
    columns = models.feature_columns("xlnet_mlm_side", with_side)
    assert columns[0] == ITEM
    assert len(columns) == 8
    assert models.feature_columns("gru", with_side) == [ITEM]
    with pytest.raises(InputError, match="the data has no category_id, brand"):
        models.build("xlnet_mlm_side", without)
    with pytest.raises(InputError, match="no model 'bert'; the models are gru_as_printed"):
        models.build("bert", without)
    with pytest.raises(InputError, match="multiple of the 5 attention heads; got 192"):
        models.build("xlnet_mlm", without, n_head=5)


def test_models_are_chosen_in_one_order(tmp_path):
    folder = write_windows(tmp_path, {1: {"train": [[3, 4]]}}, items=9)
    data = SessionData(folder)
    names, left_out = choose_models(None, data)
    assert names == ["gru_as_printed", "gru", "xlnet_mlm"]
    assert "does not have" in left_out["xlnet_mlm_side"]
    assert choose_models(["xlnet_mlm", "gru", "gru"], data) == (["gru", "xlnet_mlm"], {})


@pytest.fixture
def saved(tmp_path):
    """A GRU that would rather recommend padding, nulls and unknown items than anything else."""
    schema = session_schema(30)
    options = {"d_model": 8, "item_dim": 8, "max_sequence_length": 6}
    with compat.compat_level("0.1"):
        model = models.build("gru", schema, **options)
        bias = model.prediction_tasks[0].pre.module.output_layer_bias
        with torch.no_grad():
            bias[:3] = 100.0
            bias[3:] = torch.linspace(50, 1, 27)
        saved_model.save(tmp_path / "gru", "gru", model, schema, options)
    return saved_model.load(tmp_path / "gru")


@pytest.fixture
def served(saved):
    return Recommender(saved.model, workflow_of(range(27)))


def workflow_of(values):
    """A workflow that knows these products, with ids from 3 in this order."""
    values = list(values)
    events = pl.DataFrame(
        {
            "user_session": [str(v) for v in values],
            "product_id": values,
            "event_time": [1_600_000_000 + v for v in values],
        }
    )
    return etl.Workflow.fit(events, min_length=1)


def test_no_padding_null_or_unknown_item_is_recommended(served):
    sessions = pl.DataFrame({ITEM: [[3, 4], [9], [5, 1, 2, 7, 8, 9, 10, 11]]})
    found = served.recommend_encoded(sessions, 4)
    assert found.ids.tolist() == [[3, 4, 5, 6]] * 3
    assert found.items == [[0, 1, 2, 3]] * 3
    assert found.sessions == [1, 2, 3]
    assert (np.diff(found.scores, axis=1) <= 0).all()
    ids = served.recommend_encoded(sessions, 4, exclude_seen=True).ids
    # the model reads the last 6 items of the third session: 2, 7, 8, 9, 10, 11 (5 and 1 are cut)
    assert ids.tolist() == [[5, 6, 7, 8], [3, 4, 5, 6], [3, 4, 5, 6]]
    found = served.recommend_encoded(sessions.head(1), 40)
    assert sorted(found.ids[0][:27]) == list(range(3, 30))
    assert (found.ids[0][27:] == -1).all()
    assert np.isneginf(found.scores[0][27:]).all()


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_answers_have_1_to_128_items_whether_seen_ones_are_left_out_or_not(served, exclude_seen):
    sessions = pl.DataFrame({ITEM: [[3, 4], [9]], "user_session": ["a", "b"]})
    for k in (1, 128):
        found = served.recommend_encoded(sessions, k, exclude_seen=exclude_seen)
        assert found.ids.shape == (2, k)
        assert found.sessions == ["a", "b"]
    assert [len(items) for items in found.items] == ([25, 26] if exclude_seen else [27, 27])
    for k in (0, 129, True):
        with pytest.raises(InputError, match=f"a whole number from 1 to 128; got {k}"):
            served.recommend_encoded(sessions, k, exclude_seen=exclude_seen)


def test_answers_are_of_one_pass_however_many_sessions(served, monkeypatch):
    sessions = pl.DataFrame({ITEM: [[3 + n % 9, 4] for n in range(7)]})
    whole = served.recommend_encoded(sessions, 3)
    monkeypatch.setattr(recommender, "SESSIONS", 3)
    parts = served.recommend_encoded(sessions, 3)
    assert parts.scores.tolist() == whole.scores.tolist()
    assert parts.items == whole.items
    assert served.recommend_encoded(sessions.head(0), 3).items == []


def test_recommend_refuses_what_it_cannot_answer(served):
    with pytest.raises(InputError, match=r"session 1 \(counted from 0\) has no items"):
        served.recommend_encoded(pl.DataFrame({ITEM: [[3], []]}))
    with pytest.raises(InputError, match="lack the columns"):
        served.recommend_encoded(pl.DataFrame({"x": [[3]]}))
    with pytest.raises(InputError, match="id 30 is no row of the table"):
        served.recommend_encoded(pl.DataFrame({ITEM: [[30]]}))


def test_a_damaged_model_folder_is_named(saved, tmp_path):
    (tmp_path / "gru" / "t4rec_model_class.safetensors").write_bytes(b"no")
    with pytest.raises(
        InputError, match=r"is not the file that t4rec_model_class\.json was written"
    ):
        saved_model.load(tmp_path / "gru")
    with pytest.raises(InputError, match="holds no saved model"):
        saved_model.load(tmp_path)


def test_a_run_says_in_the_file_how_the_model_came_about(saved, tmp_path):
    assert saved.name == "gru"
    assert saved.title == "GRU over time"
    assert saved.compat == "0.1"
    assert saved.max_sequence_length == 6
    assert saved.trained["options"] == {"d_model": 8, "item_dim": 8, "max_sequence_length": 6}
    assert saved.schema.to_proto_text() == session_schema(30).to_proto_text()
    assert tr.load_model(tmp_path / "gru").max_sequence_length == 6
    saved.model.save(tmp_path / "again")
    again = saved_model.load(tmp_path / "again")
    assert (again.name, again.trained, again.title) == (None, {}, "Model")
    assert again.max_sequence_length == 6
    assert again.schema.column_names == [ITEM]


def test_a_model_of_other_tasks_is_not_judged_by_the_next_item(saved):
    body, task = saved.model.heads[0].body, tr.BinaryClassificationTask("x", summary_type="mean")
    for tasks, said in (
        ([task], "evaluate: the model must have one NextItemPredictionTask; it has 0"),
        ([tr.NextItemPredictionTask(weight_tying=True), task], "evaluate: the model has several"),
    ):
        other = dataclasses.replace(saved, model=tr.Model(tr.Head(body, tasks)))
        with pytest.raises(InputError, match=said):
            serving.evaluate(other, None, 1)


OLD = Path(__file__).parent / "saved"  # written before there was one format, at cf9751c


@pytest.mark.parametrize("name", ["gru", "xlnet_mlm"])
def test_folders_of_three_files_are_still_read(name, tmp_path):
    saved = saved_model.load(OLD / name)
    assert saved.name == name
    assert saved.trained["trained_on"] == [1]
    blocks = [m for m in saved.model.modules() if isinstance(m, tr.TransformerBlock)]
    assert [b.attend_padding for b in blocks] == ([True] if name == "xlnet_mlm" else [])
    answers = json.loads((OLD / name / "answers.json").read_text())
    sessions = pl.DataFrame({ITEM: answers["sessions"]})
    for model in (saved.model, tr.load_model(OLD / name), tr.Model.load(OLD / name)):
        found = Recommender(model, workflow_of(range(27))).recommend_encoded(sessions, 4)
        assert found.ids.tolist() == answers["ids"]
        np.testing.assert_allclose(found.scores, answers["scores"], rtol=1e-5, atol=1e-6)
    saved.model.save(tmp_path)
    again = tr.Model.load(tmp_path).state_dict()
    assert all(torch.equal(again[key], value) for key, value in saved.model.state_dict().items())


def test_an_old_folder_that_is_not_whole_is_named(tmp_path):
    shutil.copytree(OLD / "gru", tmp_path / "gru")
    (tmp_path / "gru" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"model\.safetensors: does not hold the weights"):
        tr.load_model(tmp_path / "gru")
    config = tmp_path / "gru" / "config.json"
    config.write_text(config.read_text().replace('"model": "gru"', '"model": "lstm"'))
    with pytest.raises(InputError, match="model 'lstm'; this version knows gru_as_printed, gru"):
        saved_model.load(tmp_path / "gru")
    config.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        saved_model.load(tmp_path / "gru")


def test_output_folders_are_ours_or_refused(tmp_path):
    out = tmp_path / "out"
    state.open_output(out, {"seed": 1}, resume=True, overwrite=False)
    (out / "models").mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(InputError, match="holds a run already"):
        state.open_output(out, {"seed": 1}, resume=False, overwrite=False)
    with pytest.raises(InputError, match="seed was 1 and is 2 now"):
        state.open_output(out, {"seed": 2}, resume=True, overwrite=False)
    with pytest.raises(InputError, match="give one of them"):
        state.open_output(out, {"seed": 1}, resume=True, overwrite=True)
    state.open_output(out, {"seed": 1}, resume=True, overwrite=False)
    assert (out / "models").is_dir()
    state.open_output(out, {"seed": 2}, resume=False, overwrite=True)
    assert not (out / "models").exists()
    assert (out / "mine.txt").read_text() == "kept"
    (out / "run.json").unlink()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        state.open_output(out, {"seed": 2}, resume=False, overwrite=True)


def test_pairs_skip_windows_without_sessions(tmp_path):
    some = [[3, 4]]
    windows = {
        1: {"train": some, "valid": some},
        2: {"train": some},
        4: {"valid": some},
        5: {"train": some, "valid": some},
    }
    data = SessionData(write_windows(tmp_path, windows, items=9))
    assert [(p.train, p.evaluate) for p in data.pairs()] == [(1, 4), (2, 4)]
    assert [(p.train, p.evaluate) for p in data.pairs(first=2)] == [(2, 4)]
    with pytest.raises(InputError, match="none of windows 5 to 5"):
        data.pairs(5, 5)
    with pytest.raises(InputError, match="there is no window 3; there are 1, 2, 4, 5"):
        data.file(3, "train")

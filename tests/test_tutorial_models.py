"""The tutorial's models as its cells build them, saved, read back, and asked for items."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from session_files import ITEM, session_schema, write_windows

from t4r_fast import compat
from t4r_fast.errors import InputError
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


def test_no_padding_null_or_unknown_item_is_recommended(saved):
    sessions = pl.DataFrame({ITEM: [[3, 4], [9], [5, 1, 2, 7, 8, 9, 10, 11]]})
    ids, scores = serving.recommend(saved, sessions, k=4)
    assert ids.tolist() == [[3, 4, 5, 6]] * 3
    assert (np.diff(scores, axis=1) <= 0).all()
    ids, _ = serving.recommend(saved, sessions, k=4, exclude_seen=True)
    # the model reads the last 6 items of the third session: 2, 7, 8, 9, 10, 11 (5 and 1 are cut)
    assert ids.tolist() == [[5, 6, 7, 8], [3, 4, 5, 6], [3, 4, 5, 6]]
    ids, scores = serving.recommend(saved, sessions.head(1), k=40)
    assert sorted(ids[0][:27]) == list(range(3, 30))
    assert (ids[0][27:] == 0).all()
    assert np.isneginf(scores[0][27:]).all()


def test_recommend_refuses_what_it_cannot_answer(saved):
    with pytest.raises(InputError, match=r"session 1 \(counted from 0\) has no items"):
        serving.recommend(saved, pl.DataFrame({ITEM: [[3], []]}))
    with pytest.raises(InputError, match="lack the columns"):
        serving.recommend(saved, pl.DataFrame({"x": [[3]]}))
    with pytest.raises(InputError, match="k must lie between 1 and 125; got 126"):
        serving.recommend(saved, pl.DataFrame({ITEM: [[3]]}), k=126)


def test_a_damaged_model_folder_is_named(saved, tmp_path):
    (tmp_path / "gru" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="does not hold the weights of this model"):
        saved_model.load(tmp_path / "gru")
    with pytest.raises(InputError, match="is no saved model"):
        saved_model.load(tmp_path)


def test_padded_lists_keep_the_last_values():
    lists = pl.Series([[1, 2, 3], [], [4], None], dtype=pl.List(pl.Int64))
    assert serving.padded(lists, 2, False).tolist() == [[2, 3], [0, 0], [4, 0], [0, 0]]


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

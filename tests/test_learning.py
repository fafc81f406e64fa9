"""On generated events the models learn: all beat popularity by far, side features and memory pay.

The size of `t4r-fast demo --quick`: two training windows of some 4,100 sessions, 500 items.
"""

from __future__ import annotations

import pytest

from t4r_fast.tutorial.demo import QUICK, make_events
from t4r_fast.tutorial.results import final_metrics, gain_over_popularity
from t4r_fast.tutorial.run import run_etl, train_and_report


@pytest.mark.slow
def test_the_models_learn(tmp_path):
    training = QUICK.training
    events = make_events(QUICK, tmp_path)
    data = run_etl([events], tmp_path, max_length=training.max_sequence_length)
    found = train_and_report(
        data, tmp_path, training, title="shop", window="day", command="t4r-fast demo --quick"
    )
    score = {n: final_metrics(m["windows"])["ndcg_at_20"] for n, m in found["models"].items()}
    for name in score:
        assert gain_over_popularity(found, name) > 2, score
    assert score["xlnet_mlm_side"] > 1.05 * score["xlnet_mlm"], score
    assert score["gru"] > 1.05 * score["gru_as_printed"], score
    for model in found["models"].values():
        first, *_, last = [loss for w in model["windows"] for _, loss in w["loss_curve"]]
        assert last < 0.9 * first

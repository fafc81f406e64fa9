"""Recommendations: what options leave out, and that metrics are those of the recommendations."""

from __future__ import annotations

import pytest
import torch
import tutorial_cells as cells

import t4r_fast
import t4r_fast.torch as tr
from t4r_fast.optim import for_model

ITEMS, LENGTH, WIDTH = 40, 8, 16
SCHEMA = cells.schema(ITEMS, 10, 10).select_by_name([cells.ITEM])
ROWS = SCHEMA[cells.ITEM].cardinality


@pytest.fixture(autouse=True)
def _level():
    yield
    t4r_fast.set_compat("23.12")


def make_model(masking="mlm", seed=0, weight_tying=True, attend_padding=False, **task):
    torch.manual_seed(seed)
    inputs = tr.TabularSequenceFeatures.from_schema(
        SCHEMA, d_output=WIDTH, max_sequence_length=LENGTH, masking=masking
    )
    attention = "uni" if masking == "clm" else "bi"
    config = tr.XLNetConfig.build(
        WIDTH, 2, 1, LENGTH, attn_type=attention, dropout=0.0, initializer_range=0.5
    )
    block = tr.TransformerBlock(config, masking=inputs.masking, attend_padding=attend_padding)
    task = tr.NextItemPredictionTask(weight_tying=weight_tying, **task)
    return tr.Model(tr.Head(tr.SequentialBlock(inputs, block), task, inputs=inputs)).eval()


def sessions(count=16):
    torch.manual_seed(3)
    items = torch.randint(3, ROWS, (count, LENGTH))
    items[torch.arange(LENGTH) >= torch.randint(2, LENGTH + 1, (count, 1))] = 0
    return {cells.ITEM: items}


def prefer_padding(model):
    """Make the scores of ids 0, 1, 2 the highest: their vectors are those of what is read."""
    task = model.prediction_tasks[0]
    with torch.no_grad():
        task.pre.module.items[:3] = 1.0
        task.task_block[0][0].weight.zero_()
        task.task_block[0][0].bias.fill_(1.0)


def test_padding_is_recommended_by_default_and_left_out_by_option():
    batch = sessions()
    for task, first in (({}, 0), ({"score_padding": False}, 1), ({"recommend_from": 3}, 3)):
        model = make_model(**task)
        prefer_padding(model)
        model.top_k = 5
        scores, ids = model(batch)
        assert (ids[:, 0] == first).all() == (first < 3)
        assert ids.min() >= first
        model.top_k = None
        formed = model(batch)
        assert formed[:, :first].isneginf().all()
        assert formed[:, first:].isfinite().all()
        torch.testing.assert_close(formed.gather(1, ids), scores)


@pytest.mark.parametrize("masking", ["mlm", "clm", "plm"])
@pytest.mark.parametrize("compat", ["0.1", "23.12"])
def test_seen_items_are_left_out_by_option(masking, compat):
    t4r_fast.set_compat(compat)
    batch = sessions()
    model = make_model(masking, recommend_seen=False, recommend_from=1)
    as_it_is = make_model(masking)
    model.top_k = as_it_is.top_k = 30

    def seen(ids):
        return (ids[:, :, None] == batch[cells.ITEM][:, None, :]).any(2)

    assert seen(as_it_is(batch)[1]).any()
    scores, ids = model(batch)
    assert not seen(ids).any()
    model.top_k = None
    formed = model(batch)
    own = batch[cells.ITEM] != 0
    assert formed.gather(1, batch[cells.ITEM])[own].isneginf().all()
    kept = formed.isfinite().sum(1)
    distinct = torch.tensor([len(set(row[row > 0].tolist())) for row in batch[cells.ITEM]])
    assert torch.equal(kept, ROWS - 1 - distinct)
    torch.testing.assert_close(formed.gather(1, ids), scores)


def test_fewer_items_than_asked_for():
    model = make_model(recommend_from=ROWS - 2)
    model.top_k = 4
    scores, ids = model(sessions())
    assert sorted(ids[0].tolist()) == [-1, -1, ROWS - 2, ROWS - 1]
    assert scores[0, 2:].isneginf().all()


# -- padding out of the softmax --------------------------------------------------------------------


@pytest.mark.parametrize("table_optimizer", [False, True])
@pytest.mark.parametrize("weight_tying", [False, True])
def test_padding_is_trained_by_default_and_left_alone_by_option(weight_tying, table_optimizer):
    if table_optimizer and not weight_tying:
        return
    for scored in (True, False):
        model = make_model("clm", weight_tying=weight_tying, score_padding=scored)
        task = model.prediction_tasks[0]
        items = task.pre.module.items
        before = items.detach().clone()
        if table_optimizer:
            optimizer = for_model(model, lr=0.1, table="adamw", weight_decay=0.0)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        output = model(sessions(), training=True)
        output["loss"].backward()
        optimizer.step()
        assert torch.equal(items[0], before[0]) != scored
        assert not torch.equal(items[3:], before[3:])


def test_the_loss_without_padding_is_that_over_the_items():
    batch = sessions()
    output = make_model("clm", score_padding=False)(batch, training=True)
    scores = make_model("clm")(batch, training=True)["predictions"].dense()
    labels = output["labels"][output["labels"] != 0]
    expected = torch.nn.functional.cross_entropy(scores[:, 1:], labels - 1)
    torch.testing.assert_close(output["loss"], expected)


def test_padding_above_the_target_counts_by_default_only():
    batch, ranks = sessions(), []
    for task in ({}, {"score_padding": False}):
        model = make_model(**task)
        prefer_padding(model)
        ranks.append(model(batch, testing=True)["predictions"].target_rank().above)
    assert torch.equal(ranks[0], ranks[1] + 1)


def test_options_that_do_not_go_together():
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match="does not go with score_padding=False"):
        tr.NextItemPredictionTask(loss=smooth, score_padding=False)
    with pytest.raises(ValueError, match="recommend_from must be >= 0"):
        tr.NextItemPredictionTask(recommend_from=-1)
    t4r_fast.set_compat("0.1")
    with pytest.raises(ValueError, match=r"set_compat\('23.12'\)"):
        tr.NextItemPredictionTask(score_padding=False)


# -- offline and online ----------------------------------------------------------------------------


def metrics(model, batch):
    output = model(batch, testing=True)
    model.reset_metrics()
    model.calculate_metrics(output["predictions"], output["labels"])
    return {k.split("/")[1]: float(v) for k, v in model.compute_metrics().items()}


def recomputed(model, batch, more_padding=0):
    """The metrics from what the model recommends after each session's items but the last."""
    items = batch[cells.ITEM]
    lengths = (items != 0).sum(1)
    last = items.gather(1, lengths[:, None] - 1)[:, 0]
    prefix = items.masked_fill(torch.arange(LENGTH) >= lengths[:, None] - 1, 0)[:, :-1]
    prefix = torch.nn.functional.pad(prefix, (0, more_padding))
    model.top_k = 20
    hit = (model({cells.ITEM: prefix})[1] == last[:, None]).double()
    place = torch.arange(1, 21, dtype=torch.float64)
    found = {}
    for k in (10, 20):
        found[f"recall_at_{k}"] = float(hit[:, :k].sum(1).mean())
        found[f"ndcg_at_{k}"] = float((hit / torch.log2(place + 1))[:, :k].sum(1).mean())
        found[f"avg_precision_at_{k}"] = float((hit / place)[:, :k].sum(1).mean())
    return found


@pytest.mark.parametrize("masking", ["mlm", "clm"])
def test_metrics_are_those_of_the_recommendations(masking):
    batch = sessions(400)
    with torch.no_grad():
        model = make_model(masking)
        offline = metrics(model, batch)
        assert 0.3 < offline["recall_at_20"] < 0.7  # some targets stand among the 20, some do not
        for more in (0, 5):
            assert recomputed(model, batch, more) == pytest.approx(offline, abs=1e-6)
        if masking == "mlm":  # attended padding: served with more of it the ranking is another
            model = make_model(masking, attend_padding=True)
            assert recomputed(model, batch, 5) != pytest.approx(metrics(model, batch), abs=1e-6)

"""Model.recommend: what forward() recommends, with checked columns."""

from __future__ import annotations

import pytest
import torch
from serving_case import ITEM, LENGTH, make_model, shop

from t4r_fast.errors import InputError


@pytest.fixture(scope="module")
def workflow(tmp_path_factory):
    return shop(str(tmp_path_factory.mktemp("shop")))[1]


def sessions(workflow, count=9):
    torch.manual_seed(1)
    items = torch.randint(3, workflow.num_items, (count, LENGTH))
    items[torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (count, 1))] = 0
    return {ITEM: items}


def test_it_is_what_forward_recommends_and_leaves_the_model_as_it_was(workflow):
    model, batch = make_model(workflow), sessions(workflow)
    expected = make_model(workflow, recommend_from=3, recommend_seen=False)
    expected.top_k = 7
    model.train()
    model.top_k = 3
    scores, ids = model.recommend(batch, 7, recommend_from=3, recommend_seen=False)
    assert model.training
    assert model.top_k == 3
    assert model.prediction_tasks[0].recommend_from == 0
    assert model.prediction_tasks[0].recommend_seen
    with torch.no_grad():
        want_scores, want_ids = expected(batch)
    assert torch.equal(ids, want_ids)
    assert torch.equal(scores, want_scores)
    assert not (ids[:, :, None] == batch[ITEM][:, None, :]).any()


def test_ragged_columns(workflow):
    model, batch = make_model(workflow), sessions(workflow)
    items = batch[ITEM]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (items != 0).sum(1).cumsum(0)])
    ragged = {f"{ITEM}__values": items[items != 0], f"{ITEM}__offsets": offsets}
    for ours, theirs in zip(model.recommend(ragged, 5), model.recommend(batch, 5)):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("bad", [-1, 10**12, "rows"])
def test_ids_outside_the_table_are_refused_by_name(workflow, bad):
    model, batch = make_model(workflow), sessions(workflow)
    bad = workflow.num_items if bad == "rows" else bad
    batch[ITEM][4, 0] = bad
    message = rf"column 'product_id-list_seq', session 4: id {bad} is no row of the table, 0 <= id"
    with pytest.raises(InputError, match=message):
        model.recommend(batch)


def test_other_bad_columns(workflow):
    model, batch = make_model(workflow), sessions(workflow)
    with pytest.raises(InputError, match=r"inputs lack the columns \['product_id-list_seq'\]"):
        model.recommend({})
    with pytest.raises(InputError, match=r"must hold whole numbers; got torch.float32"):
        model.recommend({ITEM: batch[ITEM].float()})
    batch[ITEM][2] = 0
    with pytest.raises(InputError, match=r"session 2 .counted from 0. has no items"):
        model.recommend(batch)
    side = make_model(workflow, side=True)
    columns = {
        c.name: torch.ones(2, 3, dtype=torch.float32 if c.type == "FLOAT" else torch.int64)
        for c in side.input_schema
    }
    side.recommend(columns)
    columns["brand-list_seq"] = columns["brand-list_seq"][:, :2]
    with pytest.raises(InputError, match="'brand-list_seq' must have the sessions and positions"):
        side.recommend(columns)

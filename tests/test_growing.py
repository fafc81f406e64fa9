"""New products in an old model: Workflow.update, Model.grow_items, and training on."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
import torch
import tutorial_cells
from serving_case import ITEM, LENGTH, latest, lists, make_model, shop

import t4r_fast.torch as tr
from t4r_fast.compat import compat_level
from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow
from t4r_fast.serving import Recommender
from t4r_fast.torch.model.growing import grow_items


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Events, the workflow of the first half of the products, and later events of all."""
    events, workflow = shop(str(tmp_path_factory.mktemp("shop")))
    few = workflow.vocabularies["item"]["value"].head(40)
    early = events.filter(pl.col("product_id").is_in(few.implode()))
    return early, Workflow.fit(early, max_length=12), events


def test_the_updated_workflow_keeps_old_ids_and_appends_new_ones(case):
    early, old, events = case
    before = {r: v.clone() for r, v in old.vocabularies.items()}
    new = old.update(events)
    fresh = Workflow.fit(events, max_length=12)
    for role, vocabulary in new.vocabularies.items():
        assert old.vocabularies[role].equals(before[role])
        known = before[role]
        assert vocabulary.columns == known.columns
        head = vocabulary.head(known.height)
        assert head.drop("count").equals(known.drop("count"))
        counts = dict(fresh.vocabularies[role].select("value", "count").rows())
        added = (head["count"] - known["count"]).to_list()
        assert added == [counts.get(v, 0) for v in head["value"]]
        tail = vocabulary.tail(vocabulary.height - known.height)
        assert vocabulary["id"].to_list() == list(range(3, 3 + vocabulary.height))
        expected = fresh.vocabularies[role].join(known.select("value"), on="value", how="anti")
        assert tail.drop("id").equals(expected.sort("id").drop("id"))
    assert new.num_items > old.num_items
    assert (new.moments, new.price_means) == (old.moments, old.price_means)
    ours, theirs = new.transform(early, 1), old.transform(early, 1)
    assert ours.equals(theirs)


def test_it_is_saved_like_any_other(case, tmp_path):
    _, old, events = case
    new = old.update(events)
    new.save(tmp_path)
    assert Workflow.load(tmp_path).transform(events, 1).equals(new.transform(events, 1))


def test_ids_of_another_kind_are_refused(case):
    _, old, events = case
    text = events.with_columns(product_id="p" + events["product_id"].cast(str))
    with pytest.raises(InputError, match="'product_id' holds text, and the workflow was fitted on"):
        old.update(text)


@pytest.mark.parametrize("side", [False, True], ids=["items", "side"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_grown_model_scores_old_items_as_before(case, side, tied):
    _, old, events = case
    model, new = make_model(old, side=side), old.update(events)
    if not tied:
        task = tr.NextItemPredictionTask(weight_tying=False)
        head = model.heads[0]
        model = tr.Model(tr.Head(head.body, task, inputs=head.inputs)).eval()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    grown = model.grow_items(new.schema())
    for name, tensor in grown.state_dict().items():
        assert torch.equal(tensor[: len(state[name])] if tensor.dim() else tensor, state[name])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    _, inputs = Recommender(model, old, LENGTH).encode(latest(case[0], 30))
    with torch.no_grad():
        before, after = model(inputs), grown(inputs)
    assert before.shape[1] == old.num_items
    assert after.shape[1] == new.num_items
    assert torch.allclose(after[:, : old.num_items], before, atol=1e-6)
    assert after[:, old.num_items :].std() > 0.1 * before.std()
    assert not grown.training


def test_a_grown_model_is_saved_and_grows_again(case, tmp_path):
    _, old, events = case
    model = make_model(old, recommend_from=3)
    for parameter in model.heads[0].body.parameters():
        parameter.requires_grad_(False)
    grown = model.grow_items(old.num_items + 5).grow_items(old.num_items + 9)
    grown.save(tmp_path)
    loaded = tr.load_model(tmp_path)
    assert loaded.input_schema[ITEM].cardinality == old.num_items + 9
    assert loaded.prediction_tasks[0].recommend_from == 3
    frozen = [n for n, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad]
    batch = lists(latest(events, 9), old)
    for a, b in zip(loaded.recommend(batch, 9), grown.recommend(batch, 9)):
        assert torch.equal(a, b)


def test_the_grown_model_learns_new_products(case):
    early, old, events = case
    new = old.update(events)
    schema = new.schema().select_by_name([ITEM])
    model = make_model(old)
    sessions = new.transform(events, 2)
    loader = tr.ParquetDataLoader(sessions, schema, batch_size=64, max_sequence_length=LENGTH)
    batches = [inputs for inputs, _ in loader]
    unknown = next(x for x in batches if (x[ITEM] >= old.num_items).any())
    with pytest.raises(InputError, match=f"'{ITEM}', .* is no row of the table, 0 <= id <"):
        model.recommend(unknown, 5)
    grown = model.grow_items(schema)
    torch.manual_seed(0)
    losses = grown.fit(loader, num_epochs=6, verbose=False, compute_metric=False,
                       optimizer=lambda p: torch.optim.Adam(p, lr=0.02))  # fmt: skip
    assert losses[-1] < 0.8 * losses[0]
    found = Recommender(grown.eval(), new, LENGTH).recommend(latest(events, 60), 10)
    assert (np.concatenate(found.ids) >= old.num_items).any()
    with pytest.raises(InputError, match="they are of different ETL runs"):
        Recommender(grown, old)
    assert early.height < events.height


def test_more_than_the_table_depends_on_the_number_of_items(case):
    _, old, events = case
    sampled = make_model(old, sampled_softmax=True, max_n_samples=10, sampler="log_uniform")
    padded = make_model(old, score_padding=False)
    rows = old.num_items + 7
    for model in (sampled, padded):
        grown = model.grow_items(rows)
        assert grown.prediction_tasks[0].target_dim == rows
        inputs = lists(latest(events, 9), old)
        assert torch.isfinite(grown(inputs, training=True)["loss"])
    with torch.no_grad():
        assert (padded.grow_items(rows)(inputs)[:, 0] == -torch.inf).all()


def test_models_of_compat_01_grow(case):
    schema = case[1].schema()
    with compat_level("0.1"):
        model = tutorial_cells.xlnet(schema).eval()
    grown = model.grow_items(case[1].num_items + 4)
    assert grown._level == "0.1"
    bias = model.state_dict()["heads.0.prediction_task_dict.next-item.pre.module.output_layer_bias"]
    more = grown.state_dict()["heads.0.prediction_task_dict.next-item.pre.module.output_layer_bias"]
    assert len(more) == len(bias) + 4
    assert torch.equal(more[: len(bias)], bias)
    assert torch.allclose(more[len(bias) :], bias.mean())


def test_what_grow_items_refuses(case):
    _, old, events = case
    model = make_model(old)
    with pytest.raises(InputError, match=f"has {old.num_items} rows and cannot shrink to 5"):
        model.grow_items(5)
    with pytest.raises(InputError, match=r"the schema lacks the model's columns \['product_id"):
        model.grow_items(tr.Schema())
    with pytest.raises(TypeError, match="must be a schema or a number of rows; got a str"):
        grow_items(model, json.dumps(5))
    same = model.grow_items(old.num_items)
    batch = lists(latest(events, 3), old)
    assert torch.equal(same.recommend(batch, 5)[0], model.recommend(batch, 5)[0])


@pytest.mark.parametrize("table_optimizer", [None, "adamw"])
def test_the_trainer_goes_on_with_a_grown_model(case, table_optimizer, tmp_path):
    _, old, events = case
    new = old.update(events)
    schema = new.schema().select_by_name([ITEM])
    new.transform(events, 2).write_parquet(tmp_path / "train.parquet")
    grown = make_model(old).grow_items(schema)
    before = grown.heads[0].inputs.item_embedding_table.weight.detach().clone()
    arguments = tr.T4RecTrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=16, learning_rate=0.01,
        max_sequence_length=LENGTH, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", table_optimizer=table_optimizer,
    )  # fmt: skip
    path = str(tmp_path / "train.parquet")
    tr.Trainer(grown, arguments, schema=schema, train_dataset_or_path=path).train()
    grown.eval()
    # rows that a table optimizer has put off are caught up before they are copied
    again = grown.grow_items(new.num_items + 2)
    after = again.heads[0].inputs.item_embedding_table.weight.detach()
    assert (after[3 : new.num_items] != before[3:]).any(dim=1).all()
    batch = lists(latest(events, 9), new)
    for a, b in zip(again.recommend(batch, 5, recommend_from=3), grown.recommend(batch, 5)):
        assert a.shape == b.shape
    with torch.no_grad():
        assert torch.allclose(again(batch)[:, : new.num_items], grown(batch), atol=1e-5)

"""The tutorial's models: parameters, loss, what may see what, shapes, errors."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import warnings

import pytest
import torch
import tutorial_cells as cells
from harness import CountedCalls

import t4r_fast
import t4r_fast.torch as tr
from t4r_fast import compat
from t4r_fast.model.sessions import ROW_BLOCK
from t4r_fast.schema import Schema

SMALL = {"items": 60, "categories": 8, "brands": 9}
KINDS = {
    "gru": lambda s: cells.gru(s, batch_first=True),
    "xlnet": cells.xlnet,
    "side": lambda s: cells.xlnet(s, side=True),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(compat, "_warned", {"batch_first", "attn_type"})
    torch.manual_seed(0)


@pytest.fixture
def level(request):
    before = t4r_fast.get_compat()
    t4r_fast.set_compat(request.param)
    yield request.param
    t4r_fast.set_compat(before)


def keys(model):
    return [k for k, _ in model.named_parameters()]


@pytest.mark.parametrize("level", ["0.1"], indirect=True)
def test_parameters_and_first_loss_at_the_tutorials_scale(level):
    items = 118_335
    model = cells.xlnet(cells.schema(items))
    assert sum(p.numel() for p in model.parameters()) == 8_718_079
    batch = cells.batch(model.input_schema, 24)
    loss = model(batch, training=True)["loss"].item()
    assert loss == pytest.approx(math.log(items), rel=0.01)
    side = cells.xlnet(cells.schema(items), side=True)
    assert sum(p.numel() for p in side.parameters()) == 8_948_927


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["0.1", "23.12"], indirect=True)
def test_trains_evaluates_recommends(kind, level):
    schema = cells.schema(**SMALL)
    model = KINDS[kind](schema)
    batch = cells.batch(model.input_schema, 7)
    before = {k: v.clone() for k, v in batch.items()}
    out = model(batch, training=True)
    out["loss"].backward()
    used = [k for k, p in model.named_parameters() if p.grad is None]
    # XLNet's own token table and segment parameters take no part; everything else learns
    assert all("transformer" in k for k in used), used
    model.eval()
    with torch.no_grad():
        out = model(batch, testing=True)
        scores = model(batch)
        model.top_k = 4
        best, ids = model(batch)
    assert out["labels"].shape == (7,)
    assert torch.equal(out["labels"], last_items(batch))
    assert out["predictions"].shape == (7, 60)
    want = torch.nn.functional.cross_entropy(out["predictions"].dense(), out["labels"])
    torch.testing.assert_close(out["loss"], want)
    assert scores.shape == (7, 60)
    if level == "0.1":
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(7))
    torch.testing.assert_close(best, scores.topk(4).values)
    assert torch.equal(ids, scores.topk(4).indices)
    assert all(torch.equal(batch[k], before[k]) for k in batch)


def last_items(batch):
    ids = batch[cells.ITEM]
    return ids.gather(1, (ids != 0).sum(1, keepdim=True) - 1).flatten()


@pytest.mark.parametrize("level", ["0.1", "23.12"], indirect=True)
def test_compat_decides_on_bias_and_relu(level):
    model = cells.xlnet(cells.schema(**SMALL))
    task = "heads.0.prediction_task_dict.next-item"
    assert (f"{task}.pre.module.output_layer_bias" in keys(model)) == (level == "0.1")
    has_relu = any(isinstance(m, torch.nn.ReLU) for m in model.prediction_tasks[0].task_block[0])
    assert has_relu == (level == "0.1")


def test_checkpoint_keys_are_the_references():
    state = cells.xlnet(cells.schema(**SMALL), side=True).state_dict()
    head, table = "heads.0", "product_id-list_seq.weight"
    task = f"{head}.prediction_task_dict.next-item"
    shared = [
        f"{head}.body.0.to_merge.categorical_module.embedding_tables.{table}",
        f"{task}.embeddings.embedding_tables.{table}",
        f"{task}.item_embedding_table.weight",
        f"{task}.pre.module.item_embedding_table.weight",
    ]
    assert len({state[key].data_ptr() for key in shared}) == 1
    for key in (
        f"{head}.body.0.projection_module.0.0.weight",
        f"{head}.body.0._masking.masked_item_embedding",
        f"{head}.body.1.0.0.bias",
        f"{head}.body.2.transformer.layer.1.rel_attn.r_w_bias",
        f"{task}.task_block.0.0.weight",
    ):
        assert key in state
    gru = cells.gru(cells.schema(**SMALL)).state_dict()
    assert f"{head}.body.2.module.weight_ih_l0" in gru


def test_features_join_in_the_order_of_their_names():
    schema = cells.schema(**SMALL)
    inputs = tr.TabularSequenceFeatures.from_schema(schema, aggregation="concat")
    batch = cells.batch(schema, 3)
    x = inputs(batch)
    at = 0
    for name in sorted(schema.column_names):
        if schema[name].is_categorical:
            table = inputs.categorical_module.embedding_tables[name].weight
            want = table[batch[name]]
        else:
            want = batch[name].unsqueeze(-1)
        assert torch.equal(x[..., at : at + want.shape[-1]], want), name
        at += want.shape[-1]
    assert at == x.shape[-1] == inputs.output_size()[-1]


def test_continuous_projection_and_sum():
    schema = cells.schema(**SMALL)
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, continuous_projection=[16, 64], aggregation="element-wise-sum", masking="mlm"
    )
    batch = cells.batch(schema, 3)
    numbers = inputs.continuous_module(batch)["continuous_projection"]
    tables = inputs.categorical_module.embedding_tables
    want = numbers + sum(tables[n].weight[batch[n]] for n in tables)
    inputs._masking = None
    torch.testing.assert_close(inputs(batch), want)
    assert "to_merge.continuous_module.1.0.0.weight" in inputs.state_dict()
    with pytest.raises(ValueError, match="ElementwiseSum: features must have one width"):
        tr.TabularSequenceFeatures.from_schema(
            schema, aggregation="element-wise-sum", masking="mlm"
        )


def test_user_columns_are_repeated_over_the_session():
    schema = cells.schema(**SMALL)
    inputs = tr.TabularSequenceFeatures.from_schema(schema, aggregation="concat")
    batch = cells.batch(schema, 3)
    brand = "brand-list_seq"
    batch[brand] = torch.tensor([3, 4, 5])
    x = inputs(batch)
    table = inputs.categorical_module.embedding_tables[brand].weight
    assert torch.equal(x[:, :, :64], table[batch[brand]][:, None].expand(3, 20, 64))


def changed_by_history(model, batch):
    """Whether a prediction moves when the first items of its own, and of another, session do."""
    model.eval()
    with torch.no_grad():
        base = model(batch)
        own = {k: v.clone() for k, v in batch.items()}
        own[cells.ITEM][0, 0] = 59
        moved = model(own)
    return not torch.equal(base[0], moved[0]), not torch.equal(base[1:], moved[1:])


def test_the_printed_gru_mixes_sessions_and_the_corrected_one_does_not():
    schema = cells.schema(**SMALL)
    batch = cells.batch(schema.select_by_name([cells.ITEM]), 5)
    batch[cells.ITEM][:, :4] = torch.randint(3, 50, (5, 4))
    printed = changed_by_history(cells.gru(schema), batch)
    corrected = changed_by_history(cells.gru(schema, batch_first=True), batch)
    assert printed[0] is False  # its own past does not reach the prediction
    assert corrected == (True, False)


def test_the_printed_gru_warns_once_with_the_option(monkeypatch):
    monkeypatch.setattr(compat, "_warned", set())
    schema = cells.schema(**SMALL)
    with pytest.warns(compat.CompatWarning, match=r"recurs over the sessions .*batch_first=True"):
        cells.gru(schema)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells.gru(schema)
    monkeypatch.setattr(compat, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cells.gru(schema, batch_first=True)


def test_causal_xlnet_leaks_when_bidirectional_and_warns(monkeypatch):
    monkeypatch.setattr(compat, "_warned", set())
    schema = cells.schema(**SMALL)
    batch = cells.batch(schema.select_by_name([cells.ITEM]), 4, length=9)
    batch[cells.ITEM][:] = torch.randint(3, 60, (4, 9))
    seen = {}
    for attn_type in ("bi", "uni"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = cells.xlnet(schema, masking="clm", attn_type=attn_type).eval()
        assert any("attn_type" in str(w.message) for w in said) == (attn_type == "bi")
        # all positions are evaluated: position 3 must not see item 4, its target
        model.heads[0].inputs.masking.eval_on_last_item_seq_only = False
        moved = {k: v.clone() for k, v in batch.items()}
        moved[cells.ITEM][:, 4] = 3 + (moved[cells.ITEM][:, 4] - 2) % 50
        with torch.no_grad():
            # eight of the nine items of a session have a target
            base = model(batch, testing=True)["predictions"].hidden[:32].view(4, 8, -1)[:, 3]
            after = model(moved, testing=True)["predictions"].hidden[:32].view(4, 8, -1)[:, 3]
        seen[attn_type] = not torch.equal(base, after)
    assert seen == {"bi": True, "uni": False}


def test_metrics_belong_to_one_model_and_add_up():
    schema = cells.schema(**SMALL)
    one, two = cells.gru(schema, True).eval(), cells.gru(schema, True).eval()
    batch = cells.batch(one.input_schema, 12)
    with torch.no_grad():
        out = one(batch, testing=True)
        half = one({k: v[:6] for k, v in batch.items()}, testing=True)
        rest = one({k: v[6:] for k, v in batch.items()}, testing=True)
    one.calculate_metrics(out["predictions"], out["labels"])
    whole = one.compute_metrics()
    assert next(iter(whole)) == "next-item/ndcg_at_10"
    assert all(v.dim() == 0 for v in whole.values())
    assert all(v.isnan() for v in two.compute_metrics().values())
    one.reset_metrics()
    for o in (half, rest):
        one.calculate_metrics(o["predictions"], o["labels"])
    assert {k: v.item() for k, v in one.compute_metrics().items()} == pytest.approx(
        {k: v.item() for k, v in whole.items()}
    )


def test_default_metrics_are_not_shared():
    a, b = tr.NextItemPredictionTask(), tr.NextItemPredictionTask()
    assert [m.name for m in a.metrics] == ["ndcg_at", "avg_precision_at", "recall_at"]
    assert not {id(m) for m in a.metrics} & {id(m) for m in b.metrics}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_other_than_the_fused_one_get_formed_scores(smoothing):
    schema = cells.schema(**SMALL)
    seen = []

    class Shifted(torch.nn.Module):
        def forward(self, scores, labels):
            seen.append(scores.shape)
            return torch.nn.functional.cross_entropy(scores, labels) + 1

    losses = [torch.nn.CrossEntropyLoss(label_smoothing=smoothing), Shifted()]
    batch = cells.batch(schema.select_by_name([cells.ITEM]), 6)
    found = []
    for loss in losses:
        torch.manual_seed(3)
        model = cells.gru(schema, True)
        model.prediction_tasks[0].loss = loss
        found.append(model(batch, training=True))
    targets = (batch[cells.ITEM] != 0).sum() - 6
    assert seen == [(targets, 60)]
    labels = found[0]["labels"]
    want = losses[0](found[0]["predictions"].dense(), labels[labels != 0])
    torch.testing.assert_close(found[0]["loss"], want)
    if not smoothing:
        torch.testing.assert_close(found[1]["loss"], want + 1)


@pytest.mark.parametrize("level", ["0.1", "23.12"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_makes_scores_once(kind, level):
    """The ranks that forward counted travel with the predictions; training is as before."""
    model = KINDS[kind](cells.schema(**SMALL)).eval()
    task = model.prediction_tasks[0]
    batch = cells.batch(model.input_schema, 12)
    ops = ("target_rank_fwd", "tied_softmax_loss_fwd")

    def evaluated(**options):
        torch.manual_seed(1)  # masks
        model.reset_metrics()
        with CountedCalls() as seen:
            out = model(batch, **options)
            found = model.calculate_metrics(out["predictions"], out["labels"])
        return out["loss"], found, tuple(seen.calls[op] for op in ops)

    for reduction in ("mean", "sum"):
        task.loss.reduction = reduction
        loss, metrics, passes = evaluated(testing=True)  # with gradients
        assert passes == (1, 1)
        with torch.no_grad():
            found = evaluated(testing=True)
        assert found[2] == (1, 0)
        torch.testing.assert_close(found[0], loss)
        assert {k: v.item() for k, v in found[1].items()} == {
            k: v.item() for k, v in metrics.items()
        }
    with torch.no_grad():
        assert evaluated(training=True)[2] == (1, 1)
        task.loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
        assert evaluated(testing=True)[2] == (1, 1)


def test_untied_weights_and_temperature():
    schema = cells.schema(**SMALL)
    model = cells.gru(schema, True)
    inputs = model.heads[0].inputs
    task = tr.NextItemPredictionTask(softmax_temperature=2.0)
    untied = tr.Model(tr.Head(model.heads[0].body, task)).eval()
    batch = cells.batch(schema.select_by_name([cells.ITEM]), 4)
    assert untied.prediction_tasks[0].pre.module.items.shape == (60, 128)
    with torch.no_grad():
        out = untied(batch, testing=True)
        task.softmax_temperature = 1.0
        plain = untied(batch, testing=True)
    torch.testing.assert_close(out["predictions"].dense() * 2, plain["predictions"].dense())
    assert inputs is untied.heads[0].inputs


def sampled(schema, sampler, samples=2000):
    torch.manual_seed(3)
    model = cells.gru(schema, True)
    task = tr.NextItemPredictionTask(
        weight_tying=True, sampled_softmax=True, max_n_samples=samples, sampler=sampler
    )
    torch.manual_seed(4)
    return tr.Model(tr.Head(model.heads[0].body, task))


def test_sampled_softmax_trains_towards_the_full_one():
    schema = cells.schema(**SMALL)
    batch = cells.batch(schema.select_by_name([cells.ITEM]), 30)
    model = sampled(schema, "log_uniform")
    drawn = [model(batch, training=True)["loss"].item() for _ in range(4)]
    assert len(set(drawn)) == 4
    logits = model(batch, training=True)["predictions"]
    # the exact softmax over the ids that can be drawn: all but padding
    labels = logits.labels[logits.labels != 0]
    exact = torch.nn.functional.cross_entropy(logits.dense()[:, 1:], labels - 1).item()
    assert sum(drawn) / 4 == pytest.approx(exact, rel=0.01)
    model(batch, training=True)["loss"].backward()
    assert model.heads[0].inputs.item_embedding_table.weight.grad.abs().sum() > 0
    full = model.eval()(batch, testing=True)
    want = torch.nn.functional.cross_entropy(full["predictions"].dense(), full["labels"])
    torch.testing.assert_close(full["loss"], want)


def test_sampled_softmax_follows_the_reference_with_a_warning(monkeypatch):
    monkeypatch.setattr(compat, "_warned", set())
    schema = cells.schema(**SMALL)
    with pytest.warns(compat.CompatWarning, match="rare items are never drawn"):
        task = tr.NextItemPredictionTask(sampled_softmax=True)
    assert task.sampler == "t4rec"
    assert task.max_n_samples == 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled(schema, "uniform")


def test_says_that_it_projects(caplog):
    with caplog.at_level(logging.WARNING, logger="t4r_fast"):
        cells.gru(cells.schema(**SMALL))
    assert "Projecting inputs of NextItemPredictionTask to'64'" in caplog.text


def test_body_compiles_to_one_graph():
    model = cells.xlnet(cells.schema(**SMALL), n_layer=1).eval()
    block = model.heads[0].body[1]
    x = torch.randn(2, 5, 192)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize(
    ("build", "error", "said"),
    [
        (
            lambda s: tr.TabularSequenceFeatures.from_schema(s, aggregation="stacked"),
            ValueError,
            "aggregation must be one of concat",
        ),
        (
            lambda s: tr.TabularSequenceFeatures.from_schema(
                s, d_output=8, projection=tr.MLPBlock([8])
            ),
            ValueError,
            "give projection or d_output, not both",
        ),
        (
            lambda s: tr.TabularSequenceFeatures.from_schema(s, maskin="mlm"),
            TypeError,
            r"unknown arguments \['maskin'\]",
        ),
        (
            lambda s: tr.TabularSequenceFeatures.from_schema(
                s.remove_by_name(cells.ITEM), masking="mlm"
            ),
            ValueError,
            "needs a column tagged item_id",
        ),
        (
            lambda s: tr.TabularSequenceFeatures.from_schema(Schema(), masking="mlm"),
            ValueError,
            "selects no feature",
        ),
        (
            lambda s: tr.TabularSequenceFeatures.from_schema(s, embedding_dims={"x": 3}),
            ValueError,
            r"must name id features.*got \['x'\]",
        ),
        (
            lambda s: tr.Head(
                tr.SequentialBlock(tr.TabularSequenceFeatures.from_schema(s)),
                tr.NextItemPredictionTask(),
            ),
            ValueError,
            "needs a masking",
        ),
        (lambda s: tr.NextItemPredictionTask(softmax_temperature=0), ValueError, "must be > 0"),
        (lambda s: tr.NextItemPredictionTask(sampled=True), TypeError, "sampled"),
        (lambda s: tr.NextItemPredictionTask(sampler="uniform"), ValueError, "needs sampled_softm"),
        (lambda s: tr.NextItemPredictionTask(sparse=True), ValueError, "sparse=True needs sampled"),
        (
            lambda s: tr.NextItemPredictionTask(sampled_softmax=True, sampler="alias"),
            ValueError,
            "sampler must be one of log_uniform, uniform, t4rec; got 'alias'",
        ),
        (
            lambda s: tr.NextItemPredictionTask(sampled_softmax=True, max_n_samples=0),
            ValueError,
            "max_n_samples must be >= 1",
        ),
        (
            lambda s: tr.NextItemPredictionTask(
                loss=torch.nn.CrossEntropyLoss(label_smoothing=0.1), sampled_softmax=True
            ),
            ValueError,
            "without class weights or label smoothing",
        ),
        (lambda s: tr.MLPBlock([]), ValueError, "dimensions must be positive"),
        (lambda s: tr.SequentialBlock(tr.MLPBlock([3])), ValueError, "known output size"),
        (lambda s: tr.XLNetConfig.build(10, 3, 1, 5), ValueError, "multiple of n_head, 3; got 10"),
        (lambda s: tr.TransformerBlock("xlnet"), TypeError, "must be a transformers config"),
        (lambda s: tr.Model(), ValueError, "one Head or several"),
    ],
)
def test_errors(build, error, said):
    with pytest.raises(error, match=said):
        build(cells.schema(**SMALL))


def test_a_missing_column_is_named():
    model = cells.xlnet(cells.schema(**SMALL), side=True)
    batch = cells.batch(model.input_schema, 2)
    del batch["brand-list_seq"]
    with pytest.raises(KeyError, match="lacks the column 'brand-list_seq'"):
        model(batch, training=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sampled", [False, True], ids=["full", "sampled"])
@pytest.mark.parametrize("kind", ["printed", "gru", "xlnet"])
def test_the_loss_is_given_the_rows_that_have_a_target(kind, sampled, reduction, monkeypatch):
    """With the loss, up to the order of its sum, of all positions with padding ignored."""
    name = "sampled_softmax_loss" if sampled else "tied_softmax_loss"
    module = importlib.import_module("t4r_fast.model.next_item")
    function, given = getattr(module, name), []

    def watched(*args, rows, **options):
        given.append(rows)
        if sampled:
            options["seed"] = torch.tensor([1, 2])
        loss = function(*args, rows=rows, **options)
        torch.testing.assert_close(loss, function(*args, **options))
        return loss

    monkeypatch.setattr(module, name, watched)
    make = functools.partial(cells.gru, batch_first=False) if kind == "printed" else KINDS[kind]
    model = make(cells.schema(**SMALL))
    task = model.prediction_tasks[0]
    task.loss = torch.nn.CrossEntropyLoss(reduction=reduction)
    if sampled:
        task.sampler, task.max_n_samples = "log_uniform", 9
    out = model(cells.batch(model.input_schema, 7), training=True)
    (rows,) = given
    has_target = (out["labels"] != 0).nonzero()[:, 0]
    if rows is None:  # the body has run at the rows with a target alone, in whole blocks
        assert torch.equal(has_target, torch.arange(len(has_target)))
        assert 0 <= len(out["labels"]) - len(has_target) < ROW_BLOCK
    else:
        assert rows.shape == out["labels"].shape
        assert torch.equal(rows[: len(has_target)], has_target)
        assert (rows[len(has_target) :] == -1).all()
    assert (rows is None) == (kind != "printed")

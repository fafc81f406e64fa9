"""Transformations, aggregations and what nests them: names, call arguments, sizes, errors."""

from __future__ import annotations

import pytest
import torch

import t4r_fast.torch as tr
from t4r_fast import compat
from t4r_fast.schema import ColumnSchema, Schema, ValueCount
from t4r_fast.torch.experimental import PostContextFusion
from t4r_fast.torch.tabular.base import (
    tabular_aggregation_registry,
    tabular_transformation_registry,
)

COUNT = ValueCount(1, 4)


def columns(*names):
    made = {
        "item": ColumnSchema.create_categorical("item", 29, value_count=COUNT, tags=["item_id"]),
        "cat": ColumnSchema.create_categorical("cat", 9, value_count=COUNT),
        "user": ColumnSchema.create_categorical("user", 5),
        "x": ColumnSchema.create_continuous("x", value_count=COUNT),
        "vec": ColumnSchema.create_continuous(
            "vec", value_count=COUNT, is_embedding=True, shape=(6,)
        ),
    }
    return Schema([made[name] for name in names])


def batch():
    generator = torch.Generator().manual_seed(0)
    keep = torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    ids = torch.randint(1, 10, (2, 3, 4), generator=generator) * keep
    return {
        "item": ids[0],
        "cat": ids[1],
        "user": torch.tensor([1, 5, 2]),
        "x": torch.randn(3, 4, generator=generator) * keep,
        "vec": torch.randn(3, 4, 6, generator=generator),
    }


@pytest.fixture(autouse=True)
def _seeded(monkeypatch):
    monkeypatch.setattr(compat, "_warned", set())
    torch.manual_seed(0)


FEATURES = {"b": torch.ones(2, 3, 4), "a": 2 * torch.ones(2, 3, 4), "u": 3 * torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("aggregation", "shape", "first"),
    [
        ("concat", (2, 3, 12), [2.0, 2, 2, 2, 1]),
        ("sequential-concat", (2, 3, 12), [2.0, 2, 2, 2, 1]),
        ("stack", (2, 3, 4, 3), [2.0, 1, 3, 2, 1]),
        (tr.StackFeatures(axis=0), (3, 2, 3, 4), [2.0] * 5),
        ("element-wise-sum", (2, 3, 4), [6.0] * 4),
    ],
    ids=str,
)
def test_aggregations(aggregation, shape, first):
    module = tr.TabularAggregation.parse(aggregation)
    given = dict(FEATURES)
    out = module(given)
    assert out.shape == shape
    assert out.flatten()[: len(first)].tolist() == first
    sizes = {name: tuple(value.shape) for name, value in FEATURES.items()}
    assert module.forward_output_size(sizes) == shape
    session = {name: value[:, 0] if value.dim() == 3 else value for name, value in FEATURES.items()}
    size = module.forward_output_size({n: tuple(v.shape) for n, v in session.items()})
    assert module(session).shape == size


def test_item_times_the_sum_of_the_others():
    schema = columns("item", "cat", "user")
    module = tr.ElementwiseSumItemMulti(schema)
    features = {
        "item": torch.randn(2, 3, 4),
        "cat": torch.randn(2, 3, 4),
        "user": torch.randn(2, 4),
    }
    want = features["item"] * (features["cat"] + features["user"][:, None])
    torch.testing.assert_close(module(dict(features)), want)
    with pytest.raises(ValueError, match="ElementwiseSumItemMulti requires a schema"):
        tr.ElementwiseSumItemMulti()(dict(features))
    with pytest.raises(ValueError, match="needs a feature beside the item id 'item'"):
        module({"item": features["item"]})


@pytest.mark.parametrize("aggregation", ["element-wise-sum", "element-wise-sum-item-multi"])
def test_an_aggregation_of_the_features_is_what_the_one_pass_does(aggregation):
    schema = columns("item", "cat", "user")
    build = tr.TabularSequenceFeatures.from_schema
    block = build(schema, aggregation=aggregation, embedding_dim_default=8)
    fast = block(batch())
    block._modules.pop("_aggregation")
    features = block(batch())
    assert {n: v.dim() for n, v in features.items()} == {"item": 3, "cat": 3, "user": 2}
    slow = block(batch(), aggregation=tr.TabularAggregation.parse(aggregation).set_schema(schema))
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize(
    ("aggregation", "width"), [("concat", 24), ("element-wise-sum-item-multi", 8)]
)
def test_masking_in_one_pass_is_masking_in_two(aggregation, width):
    """Without a projection the op writes [MASK]; for a subclass it is a second step."""

    class Same(tr.MaskedLanguageModeling):
        pass

    outs = []
    for kind in (tr.MaskedLanguageModeling, Same):
        torch.manual_seed(3)
        block = tr.TabularSequenceFeatures.from_schema(
            columns("item", "cat", "user"),
            aggregation=aggregation,
            embedding_dim_default=8,
            masking=kind(width),
        )
        outs.append(block(batch(), training=True))
    assert torch.equal(*outs)


class Doubled(tr.TabularTransformation):
    def forward(self, inputs, **kwargs):
        return {name: 2 * value for name, value in inputs.items()}


def test_transformations_by_name_as_modules_and_per_call():
    block = tr.TabularBlock(pre=["dropout", Doubled()], post=Doubled())
    given = {"a": torch.ones(2, 3)}
    assert torch.equal(block(given)["a"], 4 * torch.ones(2, 3))
    assert torch.equal(given["a"], torch.ones(2, 3))
    assert torch.equal(block(given, pre=[Doubled()] * 3, post=["dropout"])["a"], 8 * given["a"])
    other = {"b": torch.zeros(2, 3)}
    joined = tr.TabularBlock()(given, merge_with=[Doubled(), other], aggregation="concat")
    assert joined.tolist() == [[2, 2, 2, 0, 0, 0]] * 2
    block.post = None
    block.pre.append(Doubled())
    assert torch.equal(block(given)["a"], 4 * given["a"])


def test_filter_merge_and_as_tabular():
    kept = tr.FilterFeatures(["a"], pop=True)
    given = dict(FEATURES)
    assert list(kept(given)) == ["a"]
    assert sorted(given) == ["b", "u"]
    picked = tr.TabularBlock.from_features(["a", "b"], pre=Doubled(), aggregation="concat")
    assert picked(FEATURES)[0, 0].tolist() == [4.0] * 4 + [2.0] * 4
    merged = tr.TabularBlock(pre=tr.FilterFeatures(["a"])) + tr.TabularBlock(
        pre=[tr.FilterFeatures(["u"]), Doubled()]
    )
    assert isinstance(merged, tr.MergeTabular)
    out = merged(FEATURES)
    assert sorted(out) == ["a", "u"]
    assert out["u"][0, 0] == 6
    row = ["a", "b"] >> tr.TabularBlock(aggregation="concat")
    assert row(FEATURES).shape == (2, 3, 8)
    named = tr.Block(torch.nn.Linear(4, 2), (-1, 2)).as_tabular("h")
    assert named(torch.ones(5, 4))["h"].shape == (5, 2)
    assert named.output_size() == {"h": (-1, 2)}


def test_own_names():
    try:

        @tabular_transformation_registry.register("doubled")
        class Twice(Doubled):
            pass

        @tabular_aggregation_registry.register("largest")
        class Largest(tr.TabularAggregation):
            def forward(self, inputs):
                self._expand_non_sequential_features(inputs)  # in place, as in the reference
                return torch.stack(list(inputs.values())).amax(0)

            def forward_output_size(self, input_size):
                return self._get_agg_output_size(input_size, 4)

        block = tr.TabularBlock(pre="doubled", aggregation="largest")
        assert torch.equal(block(FEATURES), 6 * torch.ones(2, 3, 4))
        assert FEATURES["u"].dim() == 2
        with pytest.raises(KeyError, match=r"\['largest'\] are registered already"):
            tabular_aggregation_registry.register("largest")(Largest)
    finally:
        tabular_transformation_registry._classes.pop("doubled", None)
        tabular_aggregation_registry._classes.pop("largest", None)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: tr.TabularBlock(pre="no"), "transformation must be one of dropout, layer-norm"),
        (lambda: tr.TabularBlock(aggregation="no"), "aggregation must be one of concat, element"),
        (lambda: tr.MergeTabular(), "give at least one module"),
        (lambda: tr.MergeTabular(3), "must be modules, or dicts of modules"),
        (lambda: tr.ElementwiseSum()({"a": torch.ones(2, 3), "b": torch.ones(2, 4)}), "one shape"),
        (
            lambda: tr.ConcatFeatures()({"a": torch.ones(2, 3, 1), "b": torch.ones(2, 4, 1)}),
            "must share",
        ),
        (lambda: tr.TableConfig(0, 3), "vocabulary_size must be an int >= 1"),
        (lambda: tr.TableConfig(3, 3, combiner="max"), "combiner must be one of mean, sum"),
        (lambda: tr.SoftEmbedding(0, 3), "must be >= 1"),
        (lambda: tr.StochasticSwapNoise(replacement_prob=2), "must be from 0 to 1"),
        (
            lambda: tr.PretrainedEmbeddingFeatures(["v"], sequence_combiner="median"),
            "sequence_combiner must be one of mean, sum, max, min",
        ),
    ],
)
def test_errors(build, said):
    with pytest.raises(ValueError, match=said):
        build()


# -- swap noise ------------------------------------------------------------------------------------


def swapped(noise, sessions=400):
    noise.train()
    ids = torch.arange(1, 1 + 5 * sessions).view(sessions, 5)
    ids[:, 3:] = torch.where(torch.arange(sessions)[:, None] % 2 == 0, 0, ids[:, 3:])
    inputs = {"item": ids, "cat": 10 * ids, "x": ids.float(), "user": ids[:, 0]}
    return inputs, noise(inputs)


def test_swap_noise_swaps_items_for_items_at_the_given_rate():
    noise = tr.StochasticSwapNoise(columns("item"), replacement_prob=0.3, noise_targets=False)
    inputs, out = swapped(noise)
    item = inputs["item"] != 0
    for name in ("item", "cat", "x"):
        assert torch.equal(out[name][~item], inputs[name][~item])
        assert (out[name][item] != 0).all()
        rate = (out[name] != inputs[name])[item].float().mean()
        assert 0.26 < rate < 0.34  # 1,600 places: one in a hundred of them is 0.01
        # drawn without replacement from the batch's values
        changed = out[name][out[name] != inputs[name]]
        assert len(changed.unique()) == len(changed)
        assert torch.isin(changed, inputs[name]).all()
    assert ((out["user"] != inputs["user"]).float().mean() - 0.3).abs() < 0.1
    # columns are swapped on their own
    assert not torch.equal(out["cat"], 10 * out["item"])
    assert noise.eval()(inputs) is inputs


def test_swap_noise_of_one_column_with_a_mask_or_without():
    noise = tr.StochasticSwapNoise(replacement_prob=1.0, noise_targets=False).train()
    ids = torch.arange(1, 61).view(10, 6)
    assert torch.equal(noise(ids).flatten().sort().values, ids.flatten())
    mask = torch.arange(6) < torch.arange(10)[:, None]
    out = noise({"item": ids}, input_mask=mask)["item"]
    assert torch.equal(out[~mask], ids[~mask])
    assert torch.equal(out[mask].sort().values, ids[mask])
    vectors = torch.randn(10, 6, 3)
    out = noise({"v": vectors}, input_mask=mask)["v"]
    rows = {tuple(v) for v in vectors[mask].tolist()}
    assert {tuple(v) for v in out[mask].tolist()} == rows
    with pytest.raises(ValueError, match="together=True needs schema or input_mask"):
        tr.StochasticSwapNoise(noise_targets=False, together=True).train()({"item": ids})


def test_swap_noise_may_keep_an_item_and_its_side_features_together():
    noise = tr.StochasticSwapNoise(columns("item"), noise_targets=False, together=True)
    inputs, out = swapped(noise)
    assert not torch.equal(out["item"], inputs["item"])
    assert torch.equal(out["cat"], 10 * out["item"])
    assert torch.equal(out["user"], inputs["user"])


@pytest.mark.parametrize("noise_targets", [None, False])
def test_swap_noise_and_the_items_to_predict(noise_targets):
    schema = columns("item", "cat")

    def build():
        noise = tr.StochasticSwapNoise(replacement_prob=0.9, noise_targets=noise_targets)
        return tr.TabularSequenceFeatures.from_schema(schema, masking="clm", pre=noise)

    if noise_targets is None:
        with pytest.warns(compat.CompatWarning, match="noise_targets=False to predict the true"):
            block = build()
    else:
        block = build()
    inputs = {n: torch.randint(1, 9, (40, 4)) for n in ("item", "cat")}
    block.train()(inputs, training=True)
    true = torch.equal(block.masking.masked_targets[:, :-1], inputs["item"][:, 1:])
    assert true == (noise_targets is False)
    # as pre of the whole block it is the same
    whole = tr.TabularSequenceFeatures.from_schema(schema, masking="clm")
    whole.pre = tr.StochasticSwapNoise(schema, replacement_prob=0.9, noise_targets=noise_targets)
    whole.train()(inputs, training=True)
    true = torch.equal(whole.masking.masked_targets[:, :-1], inputs["item"][:, 1:])
    assert true == (noise_targets is False)


# -- input blocks ----------------------------------------------------------------------------------


def test_without_aggregation_the_features_come_out_by_name():
    block = tr.TabularSequenceFeatures.from_schema(columns("item", "x", "vec"))
    out = block(batch())
    assert {n: tuple(v.shape) for n, v in out.items()} == {
        "item": (3, 4, 64),
        "x": (3, 4, 1),
        "vec": (3, 4, 6),
    }
    assert block.output_size() == {"item": (-1, 4, 64), "x": (-1, 4, 1), "vec": (-1, 4, 6)}
    normed = block(batch(), post=[tr.TabularLayerNorm({"vec": 6})], aggregation="concat")
    assert normed.shape == (3, 4, 71)
    assert normed[..., 64:70].mean(-1).abs().max() < 1e-5


def test_options_reach_the_parts_and_unknown_ones_are_named():
    block = tr.TabularSequenceFeatures.from_schema(
        columns("item", "x", "vec"),
        continuous_soft_embeddings=True,
        soft_embedding_cardinality_default=3,
        soft_embedding_dim_default=5,
        embedding_dims={"item": 16},
        pretrained_output_dims={"vec": 2},
        embeddings_initializers={"item": torch.nn.init.ones_, "x": torch.nn.init.zeros_},
        masking="clm",
        mlm_probability=0.4,  # another masking's: left out, as in the reference
        train_on_last_item_seq_only=True,
    )
    assert block.output_size() == (-1, 4, 16 + 5 + 2)
    assert block.continuous_module.embedding_tables["x"].embedding_table.weight.shape == (3, 5)
    assert (block.item_embedding_table.weight == 1).all()
    assert block.masking.train_on_last_item_seq_only
    with pytest.raises(TypeError, match=r"unknown arguments \['soft_dims'\]"):
        tr.TabularSequenceFeatures.from_schema(columns("item"), soft_dims=3)
    bare = Schema([*columns("item"), ColumnSchema.create_continuous("v", is_embedding=True)])
    with pytest.raises(ValueError, match="tagged embedding but has no shape"):
        tr.TabularSequenceFeatures.from_schema(bare)


@pytest.mark.parametrize("combiner", ["mean", "sum", "max", "min"])
def test_given_vectors_are_combined(combiner):
    block = tr.TabularFeatures.from_schema(
        columns("cat", "vec"), aggregation="concat", sequence_combiner=combiner
    )
    out = block(batch())
    reduce = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}
    assert torch.equal(out[:, 64:], reduce[combiner](batch()["vec"], 1))
    assert block.output_size() == (-1, 70)
    (block >> tr.MLPBlock([3]))(batch())


def test_mlp_over_chosen_features():
    features = tr.TabularFeatures.from_schema(columns("cat", "user"), embedding_dim_default=4)
    body = tr.SequentialBlock(features, tr.MLPBlock([3], filter_features=["user"]))
    given = {name: batch()[name] for name in ("cat", "user")}
    assert body(given).shape == (3, 3)
    assert torch.equal(body(given), body({**given, "cat": given["cat"] * 0}))
    with pytest.raises(ValueError, match="filter_features goes with a block in front"):
        tr.MLPBlock([3]).build(features.output_size())
    with pytest.raises(ValueError, match="filter_features goes with a block in front"):
        tr.MLPBlock([3], filter_features=["user"]).build((-1, 4))


def test_given_weights_of_a_table_stay_unless_trainable():
    weights = torch.randn(30, 8)
    for trainable in (False, True):
        block = tr.TabularSequenceFeatures.from_schema(
            columns("item"),
            embedding_dim_default=8,
            masking="mlm",
            embeddings_initializers={
                "item": tr.PretrainedEmbeddingsInitializer(weights, trainable=trainable)
            },
        )
        table = block.item_embedding_table.weight
        assert torch.equal(table, weights)
        task = tr.NextItemPredictionTask(weight_tying=True)
        model = tr.Model(tr.Head(tr.SequentialBlock(block, tr.MLPBlock([8])), task))
        model({"item": batch()["item"]}, training=True)["loss"].backward()
        assert (table.grad is not None) == trainable
    with pytest.raises(ValueError, match=r"shape of the table, \(30, 8\); got \(3, 8\)"):
        tr.PretrainedEmbeddingsInitializer(weights[:3])(torch.empty(30, 8))


def test_one_table_config_is_one_table_on_request():
    table = tr.TableConfig(12, 4)
    config = {name: tr.FeatureConfig(table) for name in ("a", "b")}
    for share in (False, True):
        features = tr.SequenceEmbeddingFeatures(config, share_tables=share)
        a, b = features.embedding_tables["a"], features.embedding_tables["b"]
        assert (a.weight is b.weight) == share
        assert sorted(features.state_dict()) == [f"embedding_tables.{n}.weight" for n in "ab"]


def test_padding_row_and_padding_id_of_tables():
    schema = columns("item")
    build = tr.TabularSequenceFeatures.from_schema
    assert build(schema).item_embedding_table.weight[0].norm() > 0
    assert build(schema, zero_padding_row=True).item_embedding_table.weight[0].norm() == 0
    ids = {"item": torch.tensor([[3, 4, 7, 7]])}
    for table_padding_idx in (0, 7):
        block = build(schema, masking="clm", padding_idx=7, table_padding_idx=table_padding_idx)
        assert block.masking.padding_idx == 7
        block(ids, training=True).sum().backward()
        assert (block.item_embedding_table.weight.grad[3] != 0).any()
        block.item_embedding_table.weight.grad = None
        block.set_masking(None)
        block(ids).sum().backward()
        touched = bool((block.item_embedding_table.weight.grad[7] != 0).any())
        assert touched == (table_padding_idx == 0)


def test_post_of_a_masked_block_is_dropped_unless_asked_for():
    outs = []
    for option in (None, True):
        torch.manual_seed(0)
        block = tr.TabularSequenceFeatures.from_schema(columns("item", "cat"), d_output=8)
        block.post, block.post_before_aggregation = Doubled(), option
        if option is None:
            with pytest.warns(compat.CompatWarning, match="post_before_aggregation=True"):
                outs.append(block(batch()))
        else:
            outs.append(block(batch()))
    assert not torch.allclose(*outs)
    block.post = None
    torch.testing.assert_close(outs[0], block(batch()))


def test_post_of_soft_embeddings_is_dropped_unless_asked_for():
    config = {"x": tr.FeatureConfig(tr.TableConfig(4, 3))}
    with pytest.warns(compat.CompatWarning, match="keep_post=True or layer_norm=False"):
        dropped = tr.SoftEmbeddingFeatures(config, post=Doubled())
    kept = tr.SoftEmbeddingFeatures(config, post=Doubled(), keep_post=True)
    kept.embedding_tables.load_state_dict(dropped.embedding_tables.state_dict())
    x = {"x": batch()["x"]}
    torch.testing.assert_close(kept(x)["x"], 2 * dropped(x)["x"])


def test_soft_embedding_is_a_mixture():
    soft = tr.SoftEmbedding(5, 3)
    x = torch.randn(2, 4)
    weights = (
        x[..., None] * soft.projection_layer.weight[:, 0] + soft.projection_layer.bias
    ).softmax(-1)
    torch.testing.assert_close(soft(x), weights @ soft.embedding_table.weight)


def test_features_in_half_precision_join_tables_in_float32():
    for names in (("item", "x", "vec"), ("x", "vec")):
        block = tr.TabularSequenceFeatures.from_schema(
            columns(*names),
            aggregation="concat",
            continuous_soft_embeddings=True,
            layer_norm=False,
            pretrained_output_dims=4,
        )
        given = {name: batch()[name] for name in names}
        with torch.autocast("cpu", torch.bfloat16):
            half = block(given)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, block(given), atol=0.03, rtol=0.03)


def test_multi_hot_ids_may_be_ragged():
    config = {"a": tr.FeatureConfig(tr.TableConfig(9, 4, combiner="sum"))}
    block = tr.EmbeddingFeatures(config)
    values = torch.tensor([[1], [2], [5]])
    out = block({"a": (values, torch.tensor([[0], [2]]))})["a"]
    table = block.embedding_tables["a"].weight
    torch.testing.assert_close(out, torch.stack([table[1] + table[2], table[5]]))


@pytest.mark.parametrize("kind", ["elementwise-mul", "elementwise-sum", "concat"])
def test_a_context_of_the_session_joins_every_position(kind):
    sequence = tr.SequentialBlock(
        tr.TabularSequenceFeatures.from_schema(columns("item"), masking="mlm", d_output=8),
        tr.MLPBlock([8]),
    )
    context = tr.TabularFeatures.from_schema(columns("user"), aggregation="concat")
    block = PostContextFusion(sequence, context, kind)
    given = {name: batch()[name] for name in ("item", "user")}
    out = block(given)  # inference appends a position
    assert out.shape == (3, 5, 72 if kind == "concat" else 8) == (3, 5, block.output_size()[-1])
    hidden, user = sequence(given), context(given)[:, None].expand(-1, 5, -1)
    if kind == "concat":
        want = torch.cat([hidden, user], -1)
    elif kind == "elementwise-mul":
        want = hidden * (1 + block.context_projection(user))
    else:
        want = hidden + block.context_projection(user)
    torch.testing.assert_close(out, want)
    task = tr.NextItemPredictionTask(weight_tying=True)
    model = tr.Model(tr.Head(block, task, inputs=block.inputs))
    model(given, training=True)["loss"].backward()
    with pytest.raises(ValueError, match="fusion_aggregation must be one of"):
        PostContextFusion(sequence, context, "elementwise")


def test_schema_text_keeps_the_width_of_vectors():
    schema = columns("item", "vec")
    again = Schema().from_proto_text(schema.to_proto_text())
    assert again["vec"].properties["shape"] == (6,)
    block = tr.TabularSequenceFeatures.from_schema(again, aggregation="concat")
    assert block(batch()).shape == (3, 4, 70)

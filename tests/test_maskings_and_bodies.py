"""Permutation and replacement masking, maskings of one's own, and the bodies they train."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import transformers

import t4r_fast.torch as tr
from t4r_fast import compat
from t4r_fast.schema import ColumnSchema, Schema, ValueCount
from t4r_fast.torch.block.transformer import TransformerPrepare
from t4r_fast.torch.masking import MaskingInfo, build_masking, gumbel
from t4r_fast.torch.model import replaced_item_task

ITEMS, LENGTH, WIDTH = 30, 6, 8
IDS = torch.tensor(
    [[4, 5, 6, 0, 0, 0], [7, 8, 9, 10, 11, 12], [13, 0, 0, 0, 0, 0], [14, 15, 16, 17, 0, 0]]
)
CURES = {
    "append_mask": "append_mask=True",
    "map_permuted": "map_permuted=True",
    "eval_all_items": "eval_all_items='masked'",
    "attend_padding": "attend_padding=False",
    "apply_dropout": "apply_dropout=True",
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(compat, "_warned", {*CURES, "attn_type", "ReplacedItemPredictionTask"})
    torch.manual_seed(0)


@pytest.fixture
def said(monkeypatch):
    """The warnings of a test, each option's once."""
    monkeypatch.setattr(compat, "_warned", set())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in found if w.category is compat.CompatWarning]


def inputs_of(masking, length=LENGTH, side=False, **arguments):
    count = ValueCount(1, length)
    columns = [
        ColumnSchema.create_categorical("item", ITEMS - 1, value_count=count, tags=["item_id"])
    ]
    if side:
        columns.append(ColumnSchema.create_categorical("cat", 9, value_count=count))
    return tr.TabularSequenceFeatures.from_schema(
        Schema(columns),
        masking=masking,
        max_sequence_length=length,
        embedding_dim_default=WIDTH,
        d_output=WIDTH,
        **arguments,
    )


def model_of(inputs, config, task=None, **options):
    block = tr.TransformerBlock(config, masking=inputs.masking, **options)
    task = task or tr.NextItemPredictionTask(weight_tying=True)
    return tr.Model(tr.Head(tr.SequentialBlock(inputs, block), task, inputs=inputs))


def xlnet(**arguments):
    return tr.XLNetConfig.build(WIDTH, 2, 2, LENGTH, **{"initializer_range": 0.5, **arguments})


@torch.no_grad()
def scores(model, ids=IDS):
    return model.eval()({"item": ids})


def changed(ids, row, position):
    """The ids with one item replaced by another."""
    ids = ids.clone()
    ids[row, position] = 3 + (ids[row, position] - 2) % (ITEMS - 4)
    return ids


# -- permutation ---------------------------------------------------------------------------------


def test_permutation_predicts_the_known_last_item_unless_a_mask_is_appended(said):
    after = changed(IDS, 1, 5)
    moved = {}
    for append_mask in (None, True):
        model = model_of(inputs_of("plm", append_mask=append_mask), xlnet())
        moved[append_mask] = not torch.allclose(scores(model)[1], scores(model, after)[1])
        others = scores(model)[[0, 2, 3]]
        torch.testing.assert_close(others, scores(model, after)[[0, 2, 3]])
    assert moved == {None: False, True: True}
    assert sum("append_mask=True" in m for m in said()) == 1


def test_permutation_at_inference_reads_behind_the_last_item():
    masking = tr.PermutationLanguageModeling(2, append_mask=True)
    x = masking(torch.randn(4, 6, 2), IDS)
    n = (IDS != 0).sum(1)
    assert x.shape == (4, 7, 2)
    assert torch.equal(masking.rows[:4], torch.arange(4) * 7 + n)
    assert torch.equal(x[torch.arange(4), n], masking.masked_item_embedding.expand(4, 2))
    reference = tr.PermutationLanguageModeling(2)
    given = torch.randn(4, 6, 2)
    assert torch.equal(reference(given, IDS), given)
    assert torch.equal(reference.rows[:4], torch.arange(4) * 6 + n - 1)


def test_permute_all_sees_nothing_unless_positions_are_mapped(said):
    learns = {}
    for map_permuted in (None, True):
        inputs = inputs_of("plm", permute_all=True, map_permuted=map_permuted)
        model = model_of(inputs, xlnet()).eval()
        hidden = []
        ids = IDS
        for _ in range(2):
            torch.manual_seed(4)
            hidden.append(model({"item": ids}, training=True)["predictions"].hidden)
            # now another item at the only place that is not predicted
            (free,) = (inputs.masking.masked_targets[1] == 0).nonzero().flatten().tolist()
            ids = changed(IDS, 1, free)
        learns[map_permuted] = not torch.allclose(*hidden)
    assert learns == {None: False, True: True}
    assert sum("map_permuted=True" in m for m in said()) == 1


def test_permutation_evaluates_every_position_from_its_history():
    inputs = inputs_of("plm", eval_on_last_item_seq_only=False)
    model = model_of(inputs, xlnet()).eval()

    def hidden(ids):
        out = model({"item": ids}, testing=True)
        assert torch.equal(out["labels"].view(4, 6)[:, :-1], ids[:, 1:])
        return out["predictions"].hidden.view(4, 6, -1)[1]

    base, after = hidden(IDS), hidden(changed(IDS, 1, 3))
    torch.testing.assert_close(base[:3], after[:3])
    assert all(not torch.allclose(base[i], after[i]) for i in (3, 4))


def test_permutation_draws_by_its_arguments():
    few = tr.PermutationLanguageModeling(2, plm_probability=0.05, max_span_length=1)
    many = tr.PermutationLanguageModeling(2, permute_all=True, map_permuted=True)
    ids = torch.ones(50, 30, dtype=torch.int64)
    x = torch.randn(50, 30, 2)
    out = few(x, ids, training=True)
    rate = (few.masked_targets != 0).float().mean()
    assert 0.02 < rate < 0.1
    assert torch.equal((out == few.masked_item_embedding).all(-1), few.masked_targets != 0)
    many(x, ids, training=True)
    assert ((many.masked_targets != 0).sum(1) == 29).all()
    assert set(few.transformer_required_arguments()) == {"target_mapping", "perm_mask"}
    with pytest.raises(ValueError, match="plm_probability must be > 0"):
        tr.PermutationLanguageModeling(2, plm_probability=0)
    with pytest.raises(ValueError, match="max_span_length must be >= 1"):
        tr.PermutationLanguageModeling(2, max_span_length=0)


# -- masked --------------------------------------------------------------------------------------


def test_masked_evaluation_of_all_items(said):
    """In the reference's way no evaluated item sees another: the session does not matter."""
    sees = {}
    for rule in (None, "masked"):
        inputs = inputs_of("mlm", eval_on_last_item_seq_only=False, eval_all_items=rule)
        masking = inputs.masking
        x = torch.randn(4, 6, WIDTH)
        masked = (masking(x, IDS, testing=True) == masking.masked_item_embedding).all(-1)
        known = (IDS != 0) & ~masked
        sees[rule] = bool((known.sum(1)[[0, 1, 3]] > 1).any())
        assert torch.equal(masked, masking.masked_targets != 0)
    assert sees == {None: False, "masked": True}
    assert sum("eval_all_items='masked'" in m for m in said()) == 1
    with pytest.raises(ValueError, match="eval_all_items must be 'shifted' or 'masked'"):
        tr.MaskedLanguageModeling(2, eval_all_items="all")


# -- replacement ---------------------------------------------------------------------------------


def replaced_task(**options):
    return tr.ReplacedItemPredictionTask(weight_tying=True, **options)


def test_replacement_honours_mlm_probability():
    masking = build_masking("rtd", hidden_size=2, mlm_probability=0.9)
    ids = torch.ones(200, 20, dtype=torch.int64)
    masking(torch.randn(200, 20, 2), ids, training=True)
    assert (masking.masked_targets != 0).float().mean() > 0.85


def test_replacement_alone_trains_as_masked_and_says_so(said):
    inputs = inputs_of("rtd")
    model = model_of(inputs, xlnet(dropout=0.0), attend_padding=False)
    torch.manual_seed(1)
    loss = model({"item": IDS}, training=True)["loss"]
    assert sum("use ReplacedItemPredictionTask" in m for m in said()) == 1
    plain = tr.MaskedLanguageModeling(WIDTH)
    plain.load_state_dict(inputs.masking.state_dict())
    inputs.set_masking(plain)
    model.prediction_tasks[0].masking = plain
    model.heads[0].body[1].masking = plain
    torch.manual_seed(1)
    torch.testing.assert_close(model({"item": IDS}, training=True)["loss"], loss)


def test_replaced_items_are_detected_and_both_models_learn(said, monkeypatch):
    inputs = inputs_of("rtd", side=True)
    config = xlnet(initializer_range=0.05, dropout=0.0)
    model = model_of(inputs, config, replaced_task(discriminator_weight=2.0))
    task = model.prediction_tasks[0]
    batch = {"item": IDS, "cat": IDS.clamp(max=9)}
    torch.manual_seed(3)
    out = model(batch, training=True)
    generator = torch.nn.functional.cross_entropy(
        out["predictions"].dense(), out["labels"][out["labels"] != 0]
    )
    detection = (out["loss"] - generator) / 2.0
    assert detection > 0
    out["loss"].backward()
    assert task.detector[0].weight.grad.norm() > 0
    assert not any("ReplacedItem" in m for m in said())
    # the state that the head and the Trainer read is that of the true batch
    assert torch.equal(inputs.categorical_module.item_seq, IDS)
    assert torch.equal(inputs.masking.item_ids, IDS)
    # guesses that are never right are easy to tell
    monkeypatch.setattr(
        replaced_item_task, "_sample", lambda hidden, *_: torch.full((len(hidden),), 25)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        out = model(batch, training=True)
        losses.append(task.detection_loss(out["predictions"]).item())
        out["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0], losses
    assert model(batch, testing=True)["predictions"].shape == (4, ITEMS)


def test_detection_loss_is_that_of_the_corrupted_batch(monkeypatch):
    inputs = inputs_of("rtd")
    discriminator = tr.Block(torch.nn.Linear(WIDTH, 5), (-1, LENGTH, 5))
    model = model_of(inputs, xlnet(), replaced_task(discriminator=discriminator)).eval()
    task = model.prediction_tasks[0]
    guesses = lambda hidden, *_: torch.arange(len(hidden)) % 3 + 20  # noqa: E731
    monkeypatch.setattr(replaced_item_task, "_sample", guesses)
    out = model({"item": IDS}, training=True)
    at = (out["labels"] != 0).nonzero()[:, 0]
    corrupted = IDS.clone().flatten()
    corrupted[at] = torch.arange(len(at)) % 3 + 20
    x = inputs.projection_module(inputs.item_embedding_table(corrupted.view(4, 6)))
    p = task.detector(discriminator(x)).squeeze(-1).sigmoid()[IDS != 0]
    wrong = (corrupted.view(4, 6) != IDS)[IDS != 0]
    want = -torch.where(wrong, p, 1 - p).log().mean()
    torch.testing.assert_close(task.detection_loss(out["predictions"]), want)
    keys = [k for k in model.state_dict() if "prediction_task_dict" in k and "transformer" in k]
    assert keys == []  # the body is not this task's once more


@pytest.mark.parametrize("tile", [4096, 7])
def test_guesses_follow_the_softmax(tile, monkeypatch):
    monkeypatch.setattr(replaced_item_task, "_TILE", tile)
    hidden, items, bias = torch.randn(1, 4), torch.randn(20, 4), torch.randn(20)
    drawn = replaced_item_task._sample(hidden.expand(40_000, 4), items, bias, 1.5)
    share = torch.bincount(drawn, minlength=20) / 40_000
    want = ((hidden @ items.T + bias) / 1.5).softmax(-1)[0]
    error = (share - want).abs() / (want * (1 - want) / 40_000).sqrt()
    assert error.max() < 4.5


def test_fake_tokens_of_given_scores():
    masking = tr.ReplacementLanguageModeling(2)
    target = torch.where(torch.tensor([[0, 1, 1], [1, 0, 0]]).bool(), IDS[:2, :3], 0).flatten()
    certain = torch.full((3, ITEMS), -1e4)
    certain[torch.arange(3), torch.tensor([20, 6, 21])] = 1e4
    corrupted, replaced, drawn = masking.get_fake_tokens(IDS[:2, :3], target, certain)
    assert corrupted.tolist() == [[4, 20, 6], [21, 8, 9]]
    assert replaced.tolist() == [[False, True, False], [True, False, False]]
    assert drawn == []
    masking.sample_from_batch = True
    of_batch = torch.full((3, 3), -1e4)
    of_batch[torch.arange(3), torch.tensor([2, 1, 0])] = 1e4
    corrupted, replaced, drawn = masking.get_fake_tokens(IDS[:2, :3], target, of_batch)
    assert corrupted.tolist() == [[4, 7, 6], [5, 8, 9]]
    assert drawn.tolist() == [2, 1, 0]
    noise = gumbel(torch.empty(20_000))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.05)
    assert noise.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.05)


def test_guesses_may_come_from_the_batch():
    inputs = inputs_of("rtd", sample_from_batch=True)
    model = model_of(inputs, xlnet(), replaced_task())
    predictions = model({"item": IDS}, training=True)["predictions"]
    at, guesses = model.prediction_tasks[0]._guesses(predictions)
    assert torch.isin(guesses, predictions.labels[at]).all()


def test_replaced_item_task_errors():
    with pytest.raises(ValueError, match="masking must be 'rtd'; got MaskedLanguageModeling"):
        model_of(inputs_of("mlm"), xlnet(), replaced_task())
    with pytest.raises(ValueError, match="discriminator_weight must be > 0"):
        replaced_task(discriminator_weight=0)


# -- maskings of one's own -----------------------------------------------------------------------


class EveryOther(tr.MaskSequence):
    """Written as for the reference: targets at odd positions, replaced by [MASK]."""

    def __init__(self, hidden_size, padding_idx=0, eval_on_last_item_seq_only=True, start=1, **kw):
        super().__init__(hidden_size, padding_idx, eval_on_last_item_seq_only, kwargs=kw)
        self.start = start

    def _compute_masked_targets(self, item_ids, training=False, testing=False):
        if not training and not testing:
            return MaskingInfo(item_ids != self.padding_idx, item_ids)
        at = torch.zeros_like(item_ids, dtype=torch.bool)
        at[:, self.start :: 2] = True
        at &= item_ids != self.padding_idx
        return MaskingInfo(at, torch.where(at, item_ids, self.padding_idx))


def test_a_masking_of_ones_own():
    try:
        tr.masking_registry.register("every-other")(EveryOther)
        inputs = inputs_of("every-other", start=2)
    finally:
        tr.masking_registry._classes.pop("every-other", None)
    assert inputs.masking.start == 2
    model = model_of(inputs, xlnet()).eval()
    want = IDS[:, 2::2][IDS[:, 2::2] != 0]
    for mode in ("training", "testing"):
        out = model({"item": IDS}, **{mode: True})
        assert torch.equal(out["labels"][out["labels"] != 0], want)
        assert out["predictions"].shape == (len(want), ITEMS)
        dense = torch.nn.functional.cross_entropy(out["predictions"].dense(), want)
        torch.testing.assert_close(out["loss"], dense)
    assert scores(model).shape == (4, ITEMS)
    n = (IDS != 0).sum(1)
    assert torch.equal(inputs.masking.rows, torch.arange(4) * 6 + n - 1)
    with pytest.raises(NotImplementedError, match="must define _compute_masked_targets"):
        tr.MaskSequence(2)(torch.randn(4, 6, 2), IDS, training=True)


def test_the_last_column_stays_unseen_when_only_the_last_item_is_trained():
    """Without a projection too, where masks are usually written by the lookup itself."""
    masking = tr.CausalLanguageModeling(WIDTH, train_on_last_item_seq_only=True)
    count = ValueCount(1, LENGTH)
    item = ColumnSchema.create_categorical("item", ITEMS - 1, value_count=count, tags=["item_id"])
    inputs = tr.TabularSequenceFeatures.from_schema(
        Schema([item]), masking=masking, embedding_dim_default=WIDTH
    )
    assert (inputs({"item": IDS}, training=True)[1, 5] == 0).all()


# -- bodies --------------------------------------------------------------------------------------

BODIES = {
    "albert": "mlm",
    "bert": "mlm",
    "electra": "mlm",
    "gpt2": "clm",
    "longformer": "mlm",
    "reformer": "mlm",
    "roberta": "mlm",
    "xlnet": "mlm",
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_by_name_train_evaluate_and_recommend(name):
    length = 22 if name == "reformer" else LENGTH  # a multiple of 4, less 2, in training
    inputs = inputs_of(BODIES[name], length)
    block = tr.TransformerBlock.from_registry(name, WIDTH, 2, 2, length, inputs.masking)
    body = tr.SequentialBlock(inputs, block)
    model = tr.Model(tr.Head(body, tr.NextItemPredictionTask(weight_tying=True)))
    ids = torch.nn.functional.pad(IDS, (0, length + 2 - 6 if name == "reformer" else 0))
    model.train()({"item": ids}, training=True)["loss"].backward()
    assert block.transformer.training
    with torch.no_grad():
        out = model.eval()({"item": ids}, testing=True)
        assert out["predictions"].shape == (len(out["labels"][out["labels"] != 0]), ITEMS)
        assert scores(model, ids[:, :20]).isfinite().all()
    assert body.output_size() == (-1, length, 16 if name == "reformer" else WIDTH)


@pytest.mark.parametrize("name", ["bert", "roberta", "longformer"])
def test_dropout_and_feed_forward_width_are_forgotten_unless_asked_for(name, said):
    build = tr.transformer_registry[name].build
    config = build(WIDTH, 2, 2, LENGTH)
    assert (config.hidden_dropout_prob, config.intermediate_size) == (0.1, 3072)
    assert sum("apply_dropout=True and intermediate_size" in m for m in said()) == 1
    config = build(WIDTH, 2, 2, LENGTH, apply_dropout=True, intermediate_size=4 * WIDTH)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.3
    assert config.intermediate_size == 32
    assert config.to_huggingface_torch_model().config.hidden_dropout_prob == 0.3


def test_what_gpt2_and_electra_forget_can_be_given():
    assert tr.GPT2Config.build(8, 2, 2, 6).layer_norm_epsilon == 1e-5
    assert tr.GPT2Config.build(8, 2, 2, 6, layer_norm_epsilon=0.03).layer_norm_epsilon == 0.03
    assert tr.ElectraConfig.build(8, 2, 2, 6).attention_probs_dropout_prob == 0.1
    given = tr.ElectraConfig.build(8, 2, 2, 6, attention_probs_dropout_prob=0.3)
    assert given.attention_probs_dropout_prob == 0.3


@pytest.mark.parametrize("name", ["albert", "bert", "electra", "longformer", "roberta", "xlnet"])
def test_padding_longer_changes_a_prediction_unless_padding_is_not_attended(name, said):
    moved = {}
    for attend_padding in (None, False):
        torch.manual_seed(1)
        inputs = inputs_of("mlm", 12)
        config = tr.transformer_registry[name].build(WIDTH, 2, 2, 12, initializer_range=0.5)
        model = model_of(inputs, config, attend_padding=attend_padding)
        short = scores(model)
        long = scores(model, torch.nn.functional.pad(IDS, (0, 5)))
        moved[attend_padding] = not torch.allclose(short, long, rtol=1e-4, atol=1e-5)
    assert moved == {None: True, False: False}
    assert sum("attend_padding=False" in m for m in said()) == 1


def test_permutation_and_padding():
    inputs = inputs_of("plm", 12, append_mask=True)
    model = model_of(inputs, xlnet(), attend_padding=False)
    long = torch.nn.functional.pad(IDS, (0, 5))
    torch.testing.assert_close(scores(model), scores(model, long), rtol=1e-4, atol=1e-5)
    assert scores(model, torch.zeros_like(IDS)).isfinite().all()


def test_causal_bodies_do_not_see_what_they_predict(said):
    for config in (tr.GPT2Config.build(WIDTH, 2, 2, LENGTH), xlnet(attn_type="uni")):
        inputs = inputs_of("clm", eval_on_last_item_seq_only=False)
        model = model_of(inputs, config).eval()
        hidden = [
            # two of the first session's three items have a target, five of the second's six
            model({"item": ids}, testing=True)["predictions"].hidden[2:7]
            for ids in (IDS, changed(IDS, 1, 3))
        ]
        torch.testing.assert_close(hidden[0][:3], hidden[1][:3])
        assert not torch.allclose(hidden[0][3], hidden[1][3])
    assert said() == []
    config = tr.LongformerConfig.build(WIDTH, 2, 2, LENGTH, apply_dropout=True)
    model_of(inputs_of("clm"), config, attend_padding=False)
    assert "LongformerModel under causal masking attends to the item" in said()[0]


def test_allowed_pairs():
    with pytest.raises(ValueError, match="MaskedLanguageModeling is not supported by GPT2Config"):
        model_of(inputs_of("mlm"), tr.GPT2Config.build(WIDTH, 2, 2, LENGTH))
    bert = tr.BertConfig.build(WIDTH, 2, 2, LENGTH)
    for masking in ("clm", "plm"):
        with pytest.raises(ValueError, match="not supported by BertConfig"):
            model_of(inputs_of(masking), bert)
    with pytest.raises(ValueError, match="requires a Transformer that takes perm_mask, target_map"):
        model_of(inputs_of("plm"), tr.AlbertConfig.build(WIDTH, 2, 2, LENGTH))
    with pytest.raises(ValueError, match="attend_padding=False needs masking"):
        tr.TransformerBlock(bert, attend_padding=False)
    with pytest.raises(ValueError, match="transformer must be one of albert, bert"):
        tr.TransformerBlock.from_registry("xlm", WIDTH, 2, 2, LENGTH)
    with pytest.raises(RuntimeError, match="has no Transformer-XL any more"):
        tr.TransformerBlock.from_registry("transfo-xl", WIDTH, 2, 2, LENGTH)
    model_of(inputs_of(EveryOther(WIDTH)), bert)  # only our own maskings are checked


def test_models_and_prepare_modules_of_ones_own():
    class Halved(TransformerPrepare):
        def forward(self, inputs_embeds):
            return {"inputs_embeds": inputs_embeds / 2, "unknown_to_the_model": 1}

    hf = transformers.BertConfig(hidden_size=WIDTH, num_attention_heads=2, num_hidden_layers=1)
    model = transformers.BertModel(hf).eval()
    x = torch.randn(2, 3, WIDTH)
    block = tr.TransformerBlock(
        model, prepare_module=Halved, output_fn=lambda out: out.last_hidden_state + 1
    )
    torch.testing.assert_close(block(x), model(inputs_embeds=x / 2)[0] + 1)
    by_config = tr.TransformerBlock(hf)
    assert type(by_config.transformer) is transformers.BertModel


def test_a_config_makes_a_model():
    model = xlnet().to_torch_model(
        inputs_of("mlm"), tr.NextItemPredictionTask(weight_tying=True), top_k=3
    )
    assert scores(model)[1].shape == (4, 3)
    with pytest.raises(ValueError, match="input_features must be a TabularSequenceFeatures"):
        xlnet().to_torch_model(torch.nn.Linear(1, 1), tr.NextItemPredictionTask())
    body = tr.SequentialBlock(inputs_of("mlm"), tr.TransformerBlock(xlnet()))
    model = body.to_model(tr.NextItemPredictionTask(weight_tying=True), top_k=2)
    assert scores(model)[1].shape == (4, 2)

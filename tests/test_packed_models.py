"""Sessions without padding: what padded sessions with an attention mask give, and nothing else."""

import copy

import pytest
import torch
import transformers
import tutorial_cells as cells
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import t4r_fast.torch as tr
from t4r_fast.compat.torch.model import passes
from t4r_fast.model import sessions
from t4r_fast.model.bodies import self_attention, xlnet
from t4r_fast.ops._seed import check_seed

WIDTH, ITEMS, LONGEST = 32, 300, 300
KINDS = ("xlnet", "xlnet_uni", "gpt2", "bert", "gru")
MASKING = dict(zip(KINDS, ("mlm", "clm", "clm", "mlm", "clm")))
pytestmark = pytest.mark.filterwarnings("ignore::t4r_fast.compat.CompatWarning")


def config(kind, dropout=0.0, **more):
    if kind == "gpt2":
        return tr.GPT2Config.build(WIDTH, 4, 2, LONGEST, dropout=dropout, **more)
    if kind == "bert":
        options = {"max_position_embeddings": LONGEST + 1, "apply_dropout": True}
        return tr.BertConfig.build(WIDTH, 4, 2, LONGEST, dropout=dropout, **options, **more)
    attn_type = "uni" if kind == "xlnet_uni" else "bi"
    return tr.XLNetConfig.build(WIDTH, 4, 2, dropout=dropout, attn_type=attn_type, **more)


def build(kind, dropout=0.0, attend_padding=False, side=False):
    torch.manual_seed(0)
    schema = cells.schema(items=ITEMS)
    schema = schema if side else schema.select_by_name([cells.ITEM])
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, d_output=WIDTH, aggregation="concat", masking=MASKING[kind]
    )
    if kind == "gru":
        gru = nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True)
        body = tr.Block(gru, [None, LONGEST, WIDTH])
    else:
        body = tr.TransformerBlock(
            config(kind, dropout), masking=inputs.masking, attend_padding=attend_padding
        )
    row = tr.SequentialBlock(inputs, tr.MLPBlock([WIDTH]), body)
    task = tr.NextItemPredictionTask(weight_tying=True)
    return tr.Model(tr.Head(row, task, inputs=inputs))


def sessions_of(lengths, width=None, seed=1):
    lengths = torch.tensor(lengths, dtype=torch.int64).reshape(-1, 1)
    width = (int(lengths.max()) if len(lengths) else 1) if width is None else width
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, ITEMS, (len(lengths), LONGEST), generator=generator)[:, :width]
    return {cells.ITEM: torch.where(torch.arange(width) < lengths, ids, 0)}


@pytest.fixture
def padded(monkeypatch):
    """Turns off packing: the modules of transformers and torch run on padded sessions."""
    return lambda: monkeypatch.setattr(passes, "session_model", lambda *_: None)


def step(model, batch):
    torch.manual_seed(7)
    model.zero_grad()
    loss = model(batch, training=True)["loss"]
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def judge(model, batch):
    with torch.no_grad():
        found = model(batch, testing=True)
        rank = found["predictions"].target_rank().above
        return found["loss"], rank[rank >= 0], model(batch), model.recommend(batch, 7)


@pytest.mark.parametrize("attend_padding", [False, True], ids=["packed", "attends"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_the_padded_modules(kind, attend_padding, padded):
    model = build(kind, attend_padding=attend_padding)
    found = passes.session_model(model.heads[0].body, model.heads[0].prediction_task_dict)
    assert found is not None
    assert found[1] == (attend_padding and kind in ("xlnet", "bert"))
    batch = sessions_of([4, 1, 20, 2, 7, 20, 3, 5, 1], 20)
    loss, grads = step(model.train(), batch)
    masked = model.heads[0].inputs.masking.masked_targets.clone()
    judged = judge(model.eval(), batch)
    padded()
    wanted, wanted_grads = step(model.train(), batch)
    assert torch.equal(masked, model.heads[0].inputs.masking.masked_targets)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        scale = float(wanted_grads[name].abs().max())
        # the gradient of a bias in front of a softmax over keys is 0 up to rounding
        torch.testing.assert_close(grad, wanted_grads[name], rtol=0, atol=1e-5 * scale + 1e-8)
    for a, b in zip(judged[:3], judge(model.eval(), batch)[:3]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gru"])
def test_bodies_in_float64_are_those_of_transformers(kind):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config(kind)).double().train()
    function = {"gpt2": self_attention.gpt2, "bert": self_attention.bert}.get(kind, xlnet.xlnet)
    lengths = torch.tensor([3, 1, 9, 4])
    x = torch.randn(4, 9, WIDTH, dtype=torch.float64)
    there = torch.arange(9) < lengths[:, None]
    results = []
    for packed in (True, False):
        model.zero_grad()
        given = x.clone().requires_grad_()
        if packed:
            batch = sessions.pack({"x": given}, lengths)
            layout = sessions.layout_of(batch)
            found = function(model, batch.columns["x"], layout, None, None)[: int(lengths.sum())]
        else:
            options = {} if kind == "xlnet_uni" else {"attention_mask": there.double()}
            found = model(inputs_embeds=given, **options)[0][there]
        (found * torch.linspace(-1, 1, WIDTH, dtype=torch.float64)).square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([found.detach(), given.grad[there], *grads])
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * scale + 1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_all_items(kind):
    """To the bit: the last layer at some rows gives what it gives among all."""
    model = build(kind).eval()
    packed, _ = passes.session_model(model.heads[0].body, model.heads[0].prediction_task_dict)
    batch = sessions.pack(sessions_of([5, 2, 11]), torch.tensor([5, 2, 11]))
    layout = sessions.layout_of(batch)
    x = torch.randn(batch.rows, WIDTH)
    rows = torch.tensor([0, 4, 6, 9, 17, -1, -1, -1])
    with torch.no_grad():
        every = packed.body(x, layout, None, None)
        some = packed.body(x, layout, rows, None)
    assert torch.equal(some[:5], every[rows[:5]])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.lists(
        st.one_of(st.integers(1, 20), st.integers(1, LONGEST)), min_size=1, max_size=6
    ),
    wider=st.integers(0, 9),
    others=st.sampled_from([0, 17]),
    fixed=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_a_prediction_depends_on_its_session_alone(kind, lengths, wider, others, fixed, order):
    """Not a bit on the batch around it, its order, the padded length or the capacity."""
    model = model_of(kind)
    width = min(max(lengths) + wider, LONGEST)
    batch = sessions_of([*lengths, *[min(4, width)] * others], width)
    ids = batch[cells.ITEM]
    with torch.no_grad():
        scores, items = model.recommend(batch, 9)
        all_scores = model(batch)
        shuffled = list(range(len(lengths)))
        order.shuffle(shuffled)
        for chosen in (shuffled, shuffled[:1], shuffled[: len(shuffled) // 2]):
            if not chosen:
                continue
            part = {cells.ITEM: ids[chosen, : max(lengths[n] for n in chosen)]}
            with pytest.MonkeyPatch.context() as patch:
                if fixed and kind != "gru":  # which takes another way then, and other sums
                    patch.setattr(sessions, "fixed_capacity", lambda _: True)
                found = model.recommend(part, 9)
            assert torch.equal(found[1], items[chosen])
            assert torch.equal(found[0], scores[chosen])
            assert torch.equal(model(part), all_scores[chosen])


_MODELS = {}


def model_of(kind):
    if kind not in _MODELS:
        _MODELS[kind] = build(kind).eval()
    return _MODELS[kind]


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_does_not_depend_on_the_number_of_threads(kind, threads):
    model, batch = model_of(kind), sessions_of([7, 20, 1, 3])
    before, want = torch.get_num_threads(), model.recommend(batch, 9)
    torch.set_num_threads(threads)
    try:
        found = model.recommend(batch, 9)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_and_empty_sessions(kind):
    model = model_of(kind)
    with torch.no_grad():
        nobody = {cells.ITEM: torch.zeros(0, 5, dtype=torch.int64)}
        assert model(nobody).shape == (0, ITEMS)
        assert model({cells.ITEM: torch.zeros(3, 5, dtype=torch.int64)}).isfinite().all()
        some = sessions_of([0, 4, 0])
        assert torch.equal(model(some)[1:2], model({cells.ITEM: some[cells.ITEM][1:2]}))
        for options in ({"training": True}, {"testing": True}):
            assert model(nobody, **options)["labels"].numel() == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xlnet", "gru"])
def test_the_same_weights_after_200_steps(kind, padded):
    """The same sessions, packed and padded, without dropout."""
    generator = torch.Generator().manual_seed(3)
    batches = [
        sessions_of(torch.randint(1, 13, (16,), generator=generator).tolist(), 12, seed=n)
        for n in range(20)
    ]
    first = build(kind)
    second = copy.deepcopy(first)

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model.train()
        losses = []
        for number in range(200):
            torch.manual_seed(number)
            optimizer.zero_grad()
            losses.append(model(batches[number % 20], training=True)["loss"])
            losses[-1].backward()
            optimizer.step()
        return torch.stack(losses).detach()

    packed_losses = train(first)
    padded()
    padded_losses = train(second)
    assert packed_losses[-20:].mean() < 0.99 * packed_losses[:20].mean()  # it has learned
    torch.testing.assert_close(packed_losses[:20], padded_losses[:20], rtol=1e-5, atol=0)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gru"])
def test_dropout_depends_on_seed_and_place_alone(kind, monkeypatch):
    model, batch = build(kind, dropout=0.3).train(), sessions_of([4, 9, 2, 1, 6])

    def loss(seed=5):
        torch.manual_seed(seed)
        return model(batch, training=True)["loss"].detach()

    first = loss()
    assert torch.equal(first, loss())
    assert not torch.allclose(first, loss(6), rtol=1e-4)
    monkeypatch.setattr(sessions, "fixed_capacity", lambda _: True)
    torch.testing.assert_close(loss(), first, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gru"])
def test_dropout_keeps_the_mean(kind):
    """The mean over many draws is, nearly, the pass without dropout."""
    torch.manual_seed(1)
    module = transformers.AutoModel.from_config(config(kind, dropout=0.05)).train()
    function = {"gpt2": self_attention.gpt2, "bert": self_attention.bert}.get(kind, xlnet.xlnet)
    batch = sessions.pack({"x": torch.randn(2, 6, WIDTH)}, torch.tensor([6, 3]))
    layout, x = sessions.layout_of(batch), batch.columns["x"]
    with torch.no_grad():
        still = function(module, x, layout, None, None)[:9]
        drawn = torch.stack(
            [
                function(module, x, layout, None, check_seed("", None, x.device))[:9]
                for _ in range(300)
            ]
        )
    assert (drawn.std(0) > 0).float().mean() > 0.99
    assert float((drawn.mean(0) - still).abs().mean() / drawn.std(0).mean()) < 0.3


def test_side_features_travel_with_their_items(padded):
    model = build("xlnet", side=True).eval()
    batch = cells.batch(model.input_schema, 12)
    assert passes.session_model(model.heads[0].body, model.heads[0].prediction_task_dict)
    found = judge(model, batch)
    padded()
    for a, b in zip(found[:3], judge(model, batch)[:3]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"testing": True}, {"training": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left_is_refused(kind, options):
    batch = {cells.ITEM: torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])}
    with pytest.raises(ValueError, match=r"padding"):
        model_of(kind)(batch, **options)


def test_what_is_not_known_runs_padded():
    def runs_packed(model):
        head = model.heads[0]
        return passes.session_model(head.body, head.prediction_task_dict) is not None

    model = build("xlnet")
    assert runs_packed(model)
    handle = model.heads[0].body[2].register_forward_hook(lambda *_: None)
    assert not runs_packed(model)
    handle.remove()
    assert runs_packed(model)

    model.heads[0].body[2].train(not model.training)  # a frozen body drops nothing
    assert not runs_packed(model)
    model.heads[0].body[2].train(model.training)
    assert runs_packed(model)

    class Own(nn.Linear):
        pass

    model.heads[0].body[1][0].append(Own(WIDTH, WIDTH))
    assert not runs_packed(model)

    class OwnTask(tr.NextItemPredictionTask):
        pass

    model = build("xlnet")
    model.heads[0].prediction_task_dict["next-item"].__class__ = OwnTask
    assert not runs_packed(model)
    model = build("xlnet")
    model.heads[0].inputs.post = "layer-norm"
    assert not runs_packed(model)

"""torch.compile(fullgraph=True) of the tutorial's models: one graph, with eager's results."""

import pytest
import torch
from session_files import CATEGORICAL, CONTINUOUS, ITEM, session_schema
from torch._dynamo.testing import CompileCounterWithBackend

from t4r_fast.optim import for_model
from t4r_fast.torch.model.lazy_logits import LazyLogits
from t4r_fast.tutorial import models

ITEMS, LENGTH = 60, 8


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    # torch does not trace torch.nn.GRU unless it is told to
    with torch._dynamo.config.patch(allow_rnn=True):
        torch._dynamo.reset()
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Shapes of packed sessions depend on no value, as on a GPU and under torch.compile."""
    monkeypatch.setattr("t4r_fast.model.sessions.fixed_capacity", lambda _: True)


def batch(sessions, seed=0):
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (sessions, 1), generator=generator)

    def ids(below):
        return torch.randint(3, below, (sessions, LENGTH), generator=generator).where(real, 0)

    columns = {ITEM: ids(ITEMS), **{name: ids(12) for name in CATEGORICAL}}
    for name in CONTINUOUS:
        columns[name] = torch.randn(sessions, LENGTH, generator=generator).where(real, 0.0)
    return columns


def build(kind, **options):
    torch.manual_seed(0)
    return models.build(kind, session_schema(ITEMS, side=True), **options)


def train(call, model, inputs):
    """Loss, labels and gradients of a call, and whether the state is as it was."""
    torch.manual_seed(1)
    found = call(inputs, targets=None, training=True)
    assert isinstance(found["predictions"], LazyLogits)
    found["loss"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found["loss"].detach(), found["labels"], gradients


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("gru", "aot_eager"),
        ("gru_as_printed", "eager"),
        ("xlnet_mlm", "eager"),
        ("xlnet_mlm_side", "aot_eager"),
    ],
)
def test_training_is_one_graph(kind, backend):
    """Masks drawn inside, dropout and all: bit for bit what eager gives."""
    model = build(kind, n_layer=1)
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for seed in (0, 1):  # the second without a new graph
        inputs = batch(5, seed)
        loss, labels, gradients = train(compiled, model, inputs)
        wanted = train(model, model, inputs)
        assert torch.equal(loss, wanted[0])
        assert torch.equal(labels, wanted[1])
        assert gradients.keys() == wanted[2].keys()
        assert all(torch.equal(gradients[name], wanted[2][name]) for name in gradients)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("mode", [{"testing": True}, {}], ids=["evaluation", "inference"])
@pytest.mark.parametrize("kind", ["gru", "xlnet_mlm_side"])
def test_evaluation_and_inference_are_one_graph(kind, mode):
    model = build(kind).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found, wanted = (call(batch(5), **mode) for call in (compiled, model))
    if mode:
        assert torch.equal(found["loss"], wanted["loss"])
        found, wanted = found["predictions"].target_rank(), wanted["predictions"].target_rank()
        assert all(map(torch.equal, found, wanted))
    else:
        assert torch.equal(found, wanted)


def test_new_sizes_of_a_batch_take_one_more_graph():
    model = build("gru")
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for sessions in (5, 6, 7, 9):
        loss, *_ = train(compiled, model, batch(sessions))
        assert torch.equal(loss, train(model, model, batch(sessions))[0])
    assert graphs.frame_count == 2


def test_a_managed_table_breaks_the_graph_and_says_why():
    """Recording for t4r_fast.optim is a side effect: compile without fullgraph then."""
    model = build("gru")
    optimizer = for_model(model)
    assert optimizer.tables
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"t4r_fast\.optim"):
        compiled(batch(5), training=True)

"""Several threads on one model: each gets the answers that it would get alone.

And why: what a call leaves on the modules of a model.
"""

from __future__ import annotations

import copy
import sys
import threading

import polars as pl
import pytest
import test_maskings_and_bodies as small
import torch
import tutorial_cells as cells
from serving_case import ITEM, LENGTH, latest, shop

import t4r_fast.torch as tr
from t4r_fast.serve import Recommender
from t4r_fast.train import models

THREADS, CALLS = 8, 200


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return shop(str(tmp_path_factory.mktemp("shop")))


def make(kind: str, workflow) -> tr.Model:
    name, _, printed = kind.partition(", ")
    torch.manual_seed(1)
    options = {"d_model": 16, "n_head": 2, "item_dim": 16, "embedding_std": 0.5}
    return models.build(
        name,
        workflow.schema(),
        max_sequence_length=LENGTH,
        attend_padding=bool(printed),
        **options,
    ).eval()


def batches(model: tr.Model, items: int) -> list[dict[str, torch.Tensor]]:
    """Of other sizes, so that a row of another batch would not fit."""
    found = []
    for sessions in (3, 5, 8):
        torch.manual_seed(sessions)
        lengths = torch.randint(2, LENGTH + 1, (sessions, 1))
        ids = torch.randint(3, items, (sessions, LENGTH))
        found.append({ITEM: torch.where(torch.arange(LENGTH) < lengths, ids, 0)})
    return found


def calls(model: tr.Model, served: Recommender, events: pl.DataFrame) -> list:
    """Functions without arguments, of every kind that may run at the same time."""
    given = batches(model, served.workflow.num_items)
    parts = [latest(events, n) for n in (1, 4)]

    def judged(batch):
        found = model(batch, testing=True)
        return found["loss"], found["labels"], found["predictions"].target_rank()

    def products(part, k, unseen):
        found = served.recommend(part, k, exclude_seen=unseen)
        return torch.from_numpy(found.scores), torch.from_numpy(found.ids), found.items

    return [
        *(lambda b=b, k=k: model.recommend(b, k) for b, k in zip(given, (1, 5, 20))),
        *(lambda b=b: model.recommend(b, 7, recommend_seen=False) for b in given),
        lambda: model.recommend(given[0], 4, recommend_from=3),
        *(lambda b=b: (model(b),) for b in given),
        *(lambda b=b: judged(b) for b in given),
        lambda: (torch.from_numpy(served.scores(given[1])),),
        *(lambda p=p, k=k, u=u: products(p, k, u) for p, k, u in zip(parts, (3, 9), (False, True))),
    ]


def same(one, two) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two))
    return one == two


def in_threads(work, threads: int = THREADS) -> list[BaseException]:
    """What the threads raised that ran work(number)."""
    raised, start = [], threading.Barrier(threads)

    def run(number):
        try:
            start.wait()
            work(number)
        except BaseException as e:
            raised.append(e)

    all_of_them = [threading.Thread(target=run, args=(n,)) for n in range(threads)]
    for thread in all_of_them:
        thread.start()
    for thread in all_of_them:
        thread.join()
    return raised


@pytest.mark.parametrize("kind", ["xlnet_mlm", "xlnet_mlm, printed", "gru", "gru_as_printed"])
def test_threads_on_one_model_get_the_answers_of_each_alone(kind, case):
    events, workflow = case
    model = make(kind, workflow)
    served = Recommender(model, workflow)
    ask = calls(model, served, events)
    with torch.no_grad():
        alone = [call() for call in ask]
    assert len({tuple(a[0].shape) for a in alone}) > 5
    wrong = []

    @torch.no_grad()
    def work(number):
        for n in range(CALLS):
            at = (n * (2 * number + 1) + number) % len(ask)
            if not same(ask[at](), alone[at]):
                wrong.append((number, n, at))

    assert in_threads(work) == []
    assert wrong == []


@pytest.fixture(autouse=True)
def _threads_take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def test_a_models_own_top_k_is_not_touched(case):
    _, workflow = case
    model = make("xlnet_mlm", workflow)
    served = Recommender(model, workflow)
    (batch, *_) = batches(model, workflow.num_items)
    every = model(batch)
    model.top_k = 4
    assert torch.equal(torch.from_numpy(served.scores(batch)), every)
    assert model.recommend(batch, 9)[0].shape[1] == 9
    assert model.top_k == 4
    assert model(batch)[1].shape[1] == 4


def test_it_serves_a_model_that_was_in_training(case):
    events, workflow = case
    model = make("xlnet_mlm", workflow)
    expected = Recommender(model, workflow).recommend(latest(events, 3), 5)
    model.train()
    found = Recommender(model, workflow).recommend(latest(events, 3), 5)
    assert found.scores.tolist() == expected.scores.tolist()
    assert not model.training


# -- what a call leaves behind ---------------------------------------------------------------------

# Kept for code that reads them after a forward, as it can in Transformers4Rec; no pass reads them.
NOTES = ("item_seq", "_noted", "noted_columns")


def attributes(model: tr.Model) -> dict[str, object]:
    """Everything on the modules but parameters, buffers and submodules; containers copied, so that
    an entry more or less shows."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules", *NOTES):
                continue
            found[f"{path}.{name}"] = copy.copy(value)
            if isinstance(value, (list, tuple)):  # metrics, say
                for n, part in enumerate(value):
                    for key, inner in getattr(part, "__dict__", {}).items():
                        found[f"{path}.{name}[{n}].{key}"] = copy.copy(inner)
        for name, value in [*module._buffers.items(), *module._parameters.items()]:
            found[f"{path}.{name} (which tensor)"] = id(value)
    return found


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """The names whose values differ; of other objects than modules their attributes count."""

    def differs(one, two, inside=True):
        if one is two:
            return False
        if type(one) is not type(two):
            return True
        if isinstance(one, torch.Tensor):
            return one.shape != two.shape or not torch.equal(one, two)
        if inside and hasattr(one, "__dict__"):
            one, two = vars(one), vars(two)
            return one.keys() != two.keys() or any(differs(one[n], two[n], False) for n in one)
        return one != two

    names = {*before, *after}
    return sorted(
        n for n in names if n not in before or n not in after or differs(before[n], after[n])
    )


def tutorial(kind, **options):
    schema = cells.schema(60, 7, 9)
    model = getattr(cells, kind)(schema, **options)
    return model, cells.batch(schema, 5)


def body(config, masking, task=None, **options):
    model = small.model_of(small.inputs_of(masking), config, task, **options)
    return model, {"item": small.IDS}


KINDS = {
    "printed GRU": lambda: tutorial("gru"),
    "GRU over time": lambda: tutorial("gru", batch_first=True),
    "XLNet, printed": lambda: tutorial("xlnet", n_layer=1),
    "XLNet, side features": lambda: tutorial("xlnet", side=True, n_layer=1),
    "XLNet, packed": lambda: body(xlnet(), "mlm", attend_padding=False),
    "XLNet, permuted": lambda: body(xlnet(), "plm"),
    "XLNet, causal": lambda: body(xlnet(attn_type="uni"), "clm"),
    "GPT-2": lambda: body(tr.GPT2Config.build(8, 2, 1, small.LENGTH), "clm"),
    "BERT": lambda: body(tr.BertConfig.build(8, 2, 1, small.LENGTH), "mlm"),
    "ELECTRA, replaced": lambda: body(tr.ElectraConfig.build(8, 2, 1, small.LENGTH), "rtd"),
    "sampled softmax": lambda: body(
        xlnet(),
        "mlm",
        tr.NextItemPredictionTask(
            weight_tying=True, sampled_softmax=True, max_n_samples=5, sampler="log_uniform"
        ),
    ),
}


def xlnet(**options):
    return tr.XLNetConfig.build(8, 2, 1, small.LENGTH, **options)


@pytest.mark.filterwarnings("ignore::t4r_fast.compat.CompatWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_leaves_nothing_on_the_modules(kind):
    torch.manual_seed(0)
    model, batch = KINDS[kind]()
    model.eval()
    start = attributes(model)
    assert len(start) > 50
    with torch.no_grad():
        model(batch)
        assert changes(start, attributes(model)) == []
        model(batch, testing=True)
        assert changes(start, attributes(model)) == []
        model.recommend(batch, 5, recommend_from=3, recommend_seen=False)
        assert changes(start, attributes(model)) == []
    model.train()
    start = attributes(model)
    model(batch, training=True)["loss"].backward()
    assert changes(start, attributes(model)) == []
    model.recommend(batch, 5)
    assert changes(start, attributes(model)) == []
    # it would notice
    model.heads[0].body[0].last_batch = 1
    assert changes(start, attributes(model)) == ["heads.0.body.0.last_batch"]

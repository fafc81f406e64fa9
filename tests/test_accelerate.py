"""t4r_fast.accelerate and restore.

On models of the real Transformers4Rec 23.12 where it is: importable, or by the python that
T4R_PEER_PYTHON names. Everywhere on a stand-in with its class names: what is found, what is named,
what comes back.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from harness import CountedCalls
from torch import nn

import t4r_fast
import t4r_fast.torch as tr
from t4r_fast import patch
from t4r_fast.lazy_logits import LazyLogits

HERE = Path(__file__).parent
CASES = re.findall(r"^def case_(\w+)\(", (HERE / "accelerate_case.py").read_text(), re.M)


# -- the real package ------------------------------------------------------------------------------


def _python() -> str | None:
    """An interpreter that has transformers4rec; t4r_fast.dropin's answer is not it."""
    try:
        importlib.metadata.distribution("transformers4rec")
    except importlib.metadata.PackageNotFoundError:
        return os.environ.get("T4R_PEER_PYTHON")
    return sys.executable


@pytest.fixture(scope="module")
def said():
    python = _python()
    if python is None:
        pytest.skip("Transformers4Rec 23.12 is not here; T4R_PEER_PYTHON may name a python with it")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [python, "-W", "ignore", str(HERE / "accelerate_case.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return run.stdout.splitlines(), run.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_models_of_the_real_package(said, case):
    lines, errors = said
    assert f"{case} ok" in lines, errors


# -- a stand-in ------------------------------------------------------------------------------------

V, D, L = 40, 8, 5


def named(cls, module="transformers4rec.torch.model.prediction_task"):
    """The class as if it were defined in that module."""
    cls.__module__ = module
    return cls


@named
class NextItemPredictionTask(nn.Module):
    """The attributes and the formula of the reference's task."""

    def __init__(self, loss=None, metrics=(), temperature=1.0, sampled=False):
        super().__init__()
        table = nn.Embedding(V, D)
        scorer = SimpleNamespace(
            weight_tying=True,
            item_embedding_table=table,
            softmax_temperature=temperature,
            sampled_softmax=sampled,
            sampler=SimpleNamespace(max_n_samples=4),
        )
        self.table, self.pre = table, SimpleNamespace(module=scorer)
        self.task_block = nn.Sequential(nn.Linear(D, D), nn.ReLU())
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.metrics = nn.ModuleList(metrics)
        self.padding_idx, self.target_name = 0, None
        ids = torch.randint(1, V, (3, L)) * (torch.arange(L) < torch.tensor([[5], [2], [3]]))
        self.embeddings = SimpleNamespace(item_seq=ids)
        self.masking = nn.Module()
        self.masking.masked_targets = ids * (torch.arange(L) % 2)

    def forward(self, inputs, targets=None, training=False, testing=False, top_k=None):
        x = self.task_block(inputs)
        labels = self.masking.masked_targets.flatten()
        if not training and not testing:
            last = (self.embeddings.item_seq != 0).sum(1) - 1
            return x[torch.arange(len(last)), last] @ self.table.weight.T
        scores = x.flatten(0, 1)[labels != 0] @ self.table.weight.T
        y = labels[labels != 0]
        return {"loss": self.loss(scores, y), "labels": y, "predictions": scores}

    def calculate_metrics(self, predictions, targets):
        return {"theirs": predictions.sum()}

    def metric_name(self, metric):
        return type(metric).__name__

    def forward_to_prediction_fn(self, x):
        return x


def model(**options):
    torch.manual_seed(0)
    found = nn.Module()
    found.body, found.task = nn.Linear(D, D), NextItemPredictionTask(**options)
    return found


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, L, D)


def test_a_task_is_swapped_and_comes_back(x):
    one = model()
    keys, before = list(one.state_dict()), one.task(x, testing=True)
    told = one.task(x)
    report = t4r_fast.accelerate(one)
    assert report == patch.Acceleration(("task",), {})
    assert str(report) == "fused ops in task"
    assert isinstance(one.task, NextItemPredictionTask)
    assert type(one.task).__name__ == "NextItemPredictionTask"
    assert list(one.state_dict()) == keys
    assert t4r_fast.accelerate(one) == report
    for found in (one, copy.deepcopy(one)):
        out = found.task(x, testing=True)
        assert isinstance(out["predictions"], LazyLogits)
        torch.testing.assert_close(out["loss"], before["loss"])
        torch.testing.assert_close(out["predictions"].dense(), before["predictions"])
        torch.testing.assert_close(found.task(x), told)
        scores, ids = found.task(x, top_k=3)
        torch.testing.assert_close(scores, told.topk(3).values)
        assert torch.equal(ids, told.topk(3).indices)
    assert t4r_fast.restore(one) == ("task",)
    assert type(one.task) is NextItemPredictionTask
    assert torch.equal(one.task(x, testing=True)["loss"], before["loss"])
    assert t4r_fast.restore(one) == ()


def test_evaluation_makes_scores_once(x):
    one = model(metrics=[])
    with torch.no_grad():
        before = one.task(x, testing=True)["loss"]
    t4r_fast.accelerate(one)
    with torch.no_grad(), CountedCalls() as seen:
        out = one.task(x, testing=True)
        one.task.calculate_metrics(out["predictions"].detach(), out["labels"])
    assert seen.calls == {"target_rank_fwd": 1}
    torch.testing.assert_close(out["loss"], before)
    with CountedCalls() as seen:
        one.task.calculate_metrics(one.task(x, testing=True)["predictions"], None)
    assert seen.calls == {"tied_softmax_loss_fwd": 1, "target_rank_fwd": 1}


def test_gradients_are_those_of_the_formula(x):
    one = model(loss=nn.CrossEntropyLoss(label_smoothing=0.1), temperature=1.0)
    one.task(x, training=True)["loss"].backward()
    expected = {n: p.grad.clone() for n, p in one.named_parameters() if p.grad is not None}
    one.zero_grad()
    t4r_fast.accelerate(one)
    one.task(x, training=True)["loss"].backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(one.named_parameters())[name].grad, gradient)


def test_metrics_take_the_rank_or_the_formed_scores(x):
    @named
    class RecallAt(nn.Module):
        top_ks, labels_onehot, _update_count, _computed = (1, V), True, 0, 7

        def __init__(self):
            super().__init__()
            self.metric_mean = []

    class Largest(nn.Module):
        def forward(self, scores, targets):
            return scores.max()

    recall = RecallAt()
    one = model(metrics=[recall, Largest()])
    with pytest.warns(patch.AccelerateWarning, match=r"task.metrics\[1\] stays .* Largest is comp"):
        report = t4r_fast.accelerate(one)
    assert list(report.kept) == ["task.metrics[1]"]
    out = one.task(x, testing=True)
    found = one.task.calculate_metrics(out["predictions"], out["labels"])
    assert found["RecallAt"][1] == 1
    assert found["Largest"] == out["predictions"].dense().max()
    (rows,) = recall.metric_mean
    hit = out["predictions"].dense().argmax(1) == out["labels"]
    assert torch.equal(rows[:, 0], hit.float())
    assert (recall._update_count, recall._computed) == (1, None)
    assert one.task.calculate_metrics(torch.ones(2), None) == {"theirs": 2.0}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: setattr(t, "loss", nn.NLLLoss()), "its loss is NLLLoss"),
        (lambda t: setattr(t.loss, "weight", torch.ones(V)), "class weights"),
        (lambda t: setattr(t.loss, "reduction", "none"), "'none'"),
        (lambda t: setattr(t, "pre", None), "put it into a Head first"),
        (lambda t: setattr(t.pre.module, "output_layer_bias", 0), "not that of release 23.12"),
        (
            lambda t: (
                setattr(t.pre.module, "sampled_softmax", True),
                setattr(t.loss, "label_smoothing", 0.1),
            ),
            "sampled softmax with label smoothing",
        ),
    ],
)
def test_what_stays_is_named(change, why):
    one = model()
    change(one.task)
    with pytest.warns(patch.AccelerateWarning, match=re.escape(why)):
        report = t4r_fast.accelerate(one)
    assert report.replaced == ()
    assert why in report.kept["task"]
    assert "task as it is: " in str(report)
    assert type(one.task) is NextItemPredictionTask


def test_a_subclass_with_a_forward_of_its_own_stays():
    class Mine(NextItemPredictionTask):
        def forward(self, *args, **kwargs):
            return 1

    one = nn.Sequential(Mine())
    with pytest.warns(patch.AccelerateWarning, match="Mine has a forward of its own"):
        t4r_fast.accelerate(one)
    assert one[0]() == 1


def test_a_subclass_without_one_is_taken(x):
    class Mine(NextItemPredictionTask):
        pass

    one = nn.Sequential(Mine())
    assert t4r_fast.accelerate(one).replaced == ("0",)
    assert isinstance(one[0], Mine)


def test_a_sampled_loss_is_near_that_over_all_items(x):
    one = model(sampled=True)
    one.task.pre.module.sampler.max_n_samples = V
    t4r_fast.accelerate(one)
    sampled, exact = (one.task(x, training=t, testing=not t)["loss"] for t in (True, False))
    assert sampled != exact
    assert 0.2 < sampled / exact < 3
    sampled.backward()


# -- a body --


@named
class CausalLanguageModeling(nn.Module):
    """One target per session, hidden, which is enough here."""

    padding_idx = 0

    def forward(self, x, item_ids, predicts):
        self.masked_targets = torch.zeros_like(item_ids)
        last = (item_ids != 0).sum(1, keepdim=True) - 1
        self.masked_targets.scatter_(1, last, item_ids.gather(1, last))
        if predicts:
            return torch.where((self.masked_targets != 0).unsqueeze(2), 0.5, x)
        self.masked_targets = item_ids
        return x


@named
class TabularSequenceFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.categorical_module = nn.Embedding(V, D)
        self.masking = CausalLanguageModeling()

    def forward(self, item_ids, training=False, testing=False):
        self.categorical_module.item_seq = item_ids
        x = self.categorical_module(item_ids)
        return self.masking(x, item_ids, training or testing)


@named
class TransformerBlock(nn.Module):
    def __init__(self, masking, output_fn=lambda outputs: outputs[0]):
        super().__init__()
        config = transformers.XLNetConfig(
            vocab_size=9, d_model=D, n_layer=2, n_head=2, d_inner=16, dropout=0.0
        )
        self.transformer = transformers.XLNetModel(config)
        self.masking, self.output_fn, self.prepare_module = masking, output_fn, None

    def forward(self, inputs_embeds):
        return self.output_fn(self.transformer(inputs_embeds=inputs_embeds))


@named
class SequentialBlock(nn.Sequential):
    def forward(self, input, training=False, testing=False, **kwargs):
        x = self[0](input, training=training, testing=testing)
        for block in list(self)[1:]:
            x = block(x)
        return x


@named
class Head(nn.Module):
    def __init__(self):
        super().__init__()
        inputs = TabularSequenceFeatures()
        self.body = SequentialBlock(inputs, TransformerBlock(inputs.masking), nn.Linear(D, D))
        task = NextItemPredictionTask()
        task.masking, task.embeddings = inputs.masking, inputs.categorical_module
        self.prediction_task_dict = nn.ModuleDict({"next": task})

    def forward(self, item_ids, **modes):
        x = self.body(item_ids, **modes)
        return self.prediction_task_dict["next"](x, **modes)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return Head()


@pytest.fixture
def item_ids(head):
    torch.manual_seed(2)
    keep = torch.arange(L) < torch.tensor([[L], [1], [3], [2]])
    return torch.where(keep, torch.randint(1, V, (4, L)), 0)


def gradients(head, item_ids):
    """Of a weighted sum of what the body makes where something is predicted."""
    torch.manual_seed(3)
    x = head.body(item_ids, training=True)[head.body[0].masking.masked_targets != 0]
    (x * torch.randn(x.shape)).sum().backward()
    found = {n: p.grad for n, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()
    return found


def test_a_body_runs_where_something_is_predicted(head, item_ids):
    body, exact = head.body, copy.deepcopy(head).double()
    before, told = head(item_ids, training=True)["loss"], head(item_ids)
    full, expected = exact.body(item_ids, training=True), gradients(exact, item_ids)
    keys = list(head.state_dict())
    report = t4r_fast.accelerate(head)
    assert report == patch.Acceleration(("body", "prediction_task_dict.next"), {})
    assert isinstance(body, SequentialBlock)
    assert list(head.state_dict()) == keys
    for found in (head, copy.deepcopy(head)):
        torch.testing.assert_close(found(item_ids, training=True)["loss"], before)
        torch.testing.assert_close(found(item_ids), told)
    assert t4r_fast.accelerate(exact) == report
    made = gradients(exact, item_ids)
    assert made.keys() == expected.keys()
    for name, gradient in expected.items():
        tolerance = 1e-12 * float(gradient.abs().max())
        torch.testing.assert_close(made[name], gradient, rtol=1e-10, atol=tolerance)
    x = exact.body(item_ids, training=True)
    at = exact.body[0].masking.masked_targets != 0
    torch.testing.assert_close(x[at], full[at], rtol=1e-10, atol=1e-12)
    assert torch.equal(x[~at], exact.body[2].bias.expand_as(x[~at]))  # what follows from zeros
    assert t4r_fast.restore(head) == report.replaced
    assert torch.equal(head(item_ids), told)


def test_a_body_without_padding_does_not_see_the_batch(head, item_ids):
    t4r_fast.accelerate(head, attend_padding=False)
    told = head(item_ids)
    for n in range(4):
        length = int((item_ids[n] != 0).sum())
        torch.testing.assert_close(head(item_ids[n : n + 1, :length])[0], told[n])
    t4r_fast.accelerate(head)  # as they have it
    assert (head(item_ids[1:2, :1])[0] - told[1]).abs().max() < 1e-5
    assert (head(item_ids)[1] - told[1]).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda h: h.body.append(nn.Softmax(1)), "Softmax may mix rows"),
        (lambda h: h.body[1].register_forward_hook(print), "hooks on its parts"),
        (lambda h: setattr(h.body[1], "output_fn", sum), "output_fn"),
        (lambda h: setattr(h.body[1], "prepare_module", nn.Identity()), "prepare_module Identity"),
        (lambda h: setattr(h.body[1].transformer.config, "clamp_len", 1), "clamp_len"),
        (lambda h: setattr(h.body[1], "masking", CausalLanguageModeling()), "is not that of its"),
        (lambda h: setattr(h.body[0], "masking", nn.Identity()), "labels of another input block"),
    ],
)
def test_a_body_that_stays_is_named(head, change, why):
    change(head)
    with pytest.warns(patch.AccelerateWarning, match=re.escape(why)):
        report = t4r_fast.accelerate(head, attend_padding=False)
    assert report.replaced == ("prediction_task_dict.next",)
    assert report.kept["body"].endswith("it attends to padding")
    assert type(head.body) is SequentialBlock


def test_models_that_are_not_theirs():
    schema = tr.data.music_streaming_testing_data.schema.select_by_name(["item_id"])
    inputs = tr.TabularSequenceFeatures.from_schema(schema, masking="clm")
    task = tr.NextItemPredictionTask(weight_tying=True)
    ours = task.to_model(tr.SequentialBlock(inputs, tr.MLPBlock([64])))
    with pytest.raises(ValueError, match="have the fused ops already"):
        t4r_fast.accelerate(ours)
    with pytest.raises(ValueError, match="holds no NextItemPredictionTask of transformers4rec"):
        t4r_fast.accelerate(nn.Linear(2, 2))
    for call in (t4r_fast.accelerate, t4r_fast.restore):
        with pytest.raises(TypeError, match="got list"):
            call([])


def test_neither_their_package_nor_our_model_layer_is_imported():
    code = (
        "import sys, t4r_fast; t4r_fast.accelerate; "
        "print([m for m in sys.modules if m.startswith(('transformers', 't4r_fast.torch'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_warning_where_all_is_replaced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = t4r_fast.accelerate(model())
    assert not report.kept

"""TiedTableOptimizer and for_model against torch.optim on the formed gradient."""

import copy
import gc
import io
import math
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from harness import LargestTensor
from torch import nn
from training_case import make_model, make_trainer, write_sessions
from transformers import TrainerCallback

from t4r_fast import optim
from t4r_fast.compat import compat_level
from t4r_fast.errors import InputError
from t4r_fast.ops._table import recorder_of
from t4r_fast.ops.item_topk import item_topk
from t4r_fast.ops.sampled_softmax_loss import sampled_softmax_loss
from t4r_fast.ops.sequence_embedding import sequence_embedding
from t4r_fast.ops.target_rank import target_rank
from t4r_fast.ops.tied_softmax_loss import tied_softmax_loss
from t4r_fast.torch.model.lazy_logits import LazyLogits

V, D = 60, 8
KINDS = ["sgd", "adagrad", "adamw"]


class Tied(nn.Module):
    """Lookup, a body, and a loss against the same table; `formed` in plain PyTorch."""

    def __init__(self, formed=False, dtype=torch.float64, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(V, D, dtype=dtype) * 0.3)
        self.body = nn.Linear(D, D, dtype=dtype)
        self.bias = nn.Parameter(torch.zeros(V, dtype=dtype)) if bias else None
        self.formed = formed

    def hidden(self, ids):
        if self.formed:
            x = F.embedding(ids, self.table, 0)
        else:
            x = sequence_embedding([ids], [self.table])
        return torch.tanh(self.body(x)).flatten(0, 1)

    def forward(self, ids, target, **options):
        h = self.hidden(ids)
        if self.formed:
            z = h @ self.table.T
            return F.cross_entropy(z if self.bias is None else z + self.bias, target)
        return tied_softmax_loss(h, self.table, target, bias=self.bias, **options)

    def sampled(self, ids, target, seed):
        """The loss over 1 + 5 candidates: only their rows take part."""
        options = {"num_negatives": 5, "sampler": "uniform", "seed": torch.tensor([seed, 0])}
        return sampled_softmax_loss(
            self.hidden(ids), self.table, target, bias=self.bias, sparse=False, **options
        )


def batches(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randint(0, V, (3, 4), generator=g), torch.randint(0, V, (12,), generator=g)


def plain_optimizer(model, kind, lr=0.05, **options):
    rule = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adamw": torch.optim.AdamW}
    table = rule[kind]([model.table], lr=lr, **options)
    rest = [p for p in model.parameters() if p is not model.table]
    return [table, torch.optim.AdamW(rest, lr=lr, weight_decay=options.get("weight_decay", 0.01))]


def ours(model, kind="adamw", lr=0.05, bias=False, **options):
    items = [model.bias, model.table] if bias else model.table
    return optim.for_model(model, lr, kind, items=items, **options)


def assert_same(a, b, atol=1e-12):
    for (name, x), y in zip(a.named_parameters(), b.parameters()):
        torch.testing.assert_close(x, y, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_torch_optim(kind):
    """Accumulated micro-batches, a scheduler, and clipping by the norm of all gradients."""
    a, b = Tied(), Tied(formed=True)
    mine, theirs = ours(a, kind, weight_decay=0.1), plain_optimizer(b, kind, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(mine, 2, 0.5)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in theirs]
    for i, (ids, target) in enumerate(batches(12)):
        (a(ids, target) / 2).backward()
        (b(ids, target) / 2).backward()
        assert a.table.grad is None
        if i % 2:
            norm = mine.clip_grad_norm_(0.2)
            torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(b.parameters(), 0.2))
            assert norm > 0.2  # it did clip
            for optimizer in (mine, *theirs):
                optimizer.step()
                optimizer.zero_grad()
            for s in (schedule, *schedules):
                s.step()
    assert schedule.get_last_lr()[-1] == schedules[0].get_last_lr()[0] == 0.05 / 8
    assert_same(a, b)


@pytest.mark.parametrize("kind", ["adamw", "rowwise_adamw", "rowwise_adagrad", "adagrad", "sgd"])
def test_touched_rows_equal_dense_steps(kind):
    """Sampled softmax alone: rows that took no part get what they missed when they are read."""
    a, b = Tied(), Tied()
    mine, dense = ours(a, kind, bias=True, weight_decay=0.1), ours(b, kind, weight_decay=0.1)
    for i, (ids, target) in enumerate(batches(40)):
        for model, optimizer in ((a, mine), (b, dense)):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + math.sin(i))
            model.sampled(ids, target, i).backward()
            assert model.table.grad is None
            assert (model.bias.grad is None) == (model is a)
            if i % 5 == 4:
                optimizer.clip_grad_norm_(0.1)
            if model is b:  # a dense gradient of 0 makes the step a dense one
                b.table.grad = torch.zeros_like(b.table)
            optimizer.step()
            optimizer.zero_grad()
    assert [behind.table.shape for behind in mine.tables] == [(V, D), (V,)]
    for behind in mine.tables:
        assert behind._history.length == 40
        assert len(behind._last.unique()) > 3  # rows are at different steps
    assert not torch.allclose(a.table, b.table)
    assert not torch.allclose(a.bias, b.bias)
    mine.flush()
    assert_same(a, b)
    for behind in mine.tables:
        assert behind._history.length == 0
    a(*next(batches(1))).backward()  # and dense steps go on from there
    b(*next(batches(1))).backward()
    mine.step()
    dense.step()
    assert_same(a, b)


def test_every_reader_brings_the_bias_up_to_date():
    def behind():
        model = Tied()
        optimizer = ours(model, lr=0.1, bias=True)
        for i, (ids, target) in enumerate(batches(3)):
            model.sampled(ids % 20, target % 20, i).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.tables[1]._history.length == 3
        return model, optimizer

    model, optimizer = behind()
    stale = model.bias.detach().clone()
    optimizer.flush()
    truth, table = model.bias.detach().clone(), model.table.detach()
    assert len((truth != stale).nonzero()) > 5
    hidden, target = torch.ones(1, D, dtype=torch.float64), torch.tensor([7])
    logits = {"labels": target, "padding_idx": 0}
    for read in (
        lambda bias: tied_softmax_loss(hidden, table, target, bias=bias),
        lambda bias: item_topk(hidden, table, 5, bias=bias)[0],
        lambda bias: target_rank(hidden, table, target, bias=bias)[0],
        lambda bias: LazyLogits(hidden, table, bias=bias, **logits).dense(),
        lambda bias: LazyLogits(hidden, table, bias=bias, **logits).detach().bias,
    ):
        model, optimizer = behind()
        with torch.no_grad():
            found = read(model.bias)
            assert optimizer.tables[1]._history.length == 0
            assert torch.equal(found, read(truth))


def test_a_bias_goes_on_after_a_full_softmax():
    """Its gradient is dense then; no warning, as it is no V x D."""
    a, b = Tied(), Tied(formed=True)
    mine, theirs = ours(a, bias=True), plain_optimizer(b, "adamw")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ids, target in batches(3):
            for model, optimizers in ((a, [mine]), (b, theirs)):
                model(ids, target).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    assert_same(a, b)
    assert mine.state_dict()["state"][3]["exp_avg"].shape == (V,)


def test_every_reader_brings_its_rows_up_to_date():
    def behind():
        model = Tied()
        optimizer = ours(model, lr=0.1)
        for i, (ids, target) in enumerate(batches(3)):
            model.sampled(ids % 20, target % 20, i).backward()
            optimizer.step()
            optimizer.zero_grad()
        fresh = copy.deepcopy(model)
        assert recorder_of(fresh.table) is None
        assert optimizer.tables[0]._history.length == 3
        return model, optimizer

    model, optimizer = behind()
    stale = model.table.detach().clone()
    optimizer.flush()
    truth = model.table.detach().clone()
    moved = (truth != stale).any(1).nonzero()[:, 0]
    assert len(moved) > 5
    hidden, ids = torch.ones(1, D, dtype=torch.float64), moved[None, :5]

    model, optimizer = behind()
    read = sequence_embedding([ids], [model.table])
    assert torch.equal(read.detach()[0], truth[ids[0]])
    assert optimizer.tables[0]._history.length == 3  # only these rows
    assert torch.equal(model.table[moved[5:]], stale[moved[5:]])

    loss = tied_softmax_loss(hidden, truth, ids[0, :1])
    for reader in (
        lambda m: tied_softmax_loss(hidden, m.table, ids[0, :1]),
        lambda m: torch.tensor(0.0, dtype=torch.float64) + item_topk(hidden, m.table, 3)[0][0, 0],
    ):
        model, optimizer = behind()
        with torch.no_grad():
            value = reader(model)
        assert optimizer.tables[0]._history.length == 0
        assert torch.equal(model.table.detach(), truth)
        assert value == loss or value == item_topk(hidden, truth, 3)[0][0, 0]

    model, optimizer = behind()
    assert torch.equal(model.state_dict()["table"], truth)


def test_a_flush_between_forward_and_backward_keeps_the_graph():
    found = []
    for between in (True, False):
        model = Tied()
        optimizer = ours(model)
        for i, (ids, target) in enumerate(batches(3)):
            model.sampled(ids % 20, target % 20, i).backward()
            optimizer.step()
            optimizer.zero_grad()
        before = model.table.detach().clone()
        loss = model.sampled(*next(batches(1, 9)), 7)
        if between:
            optimizer.flush()
        loss.backward()
        optimizer.step()
        optimizer.flush()
        assert not torch.equal(model.table.detach(), before)
        found.append(model)
    assert_same(*found)


def test_changed_numbers_apply_from_their_step_on():
    a, b = Tied(), Tied()
    mine, dense = ours(a, weight_decay=0.1), ours(b, weight_decay=0.1)
    for i, (ids, target) in enumerate(batches(8)):
        for model, optimizer in ((a, mine), (b, dense)):
            if i == 4:
                optimizer.param_groups[-1].update(weight_decay=0.3, betas=(0.5, 0.9))
            model.sampled(ids % 20, target % 20, i).backward()
            if model is b:
                b.table.grad = torch.zeros_like(b.table)
            optimizer.step()
            optimizer.zero_grad()
    mine.flush()
    assert_same(a, b)


def test_gradients_of_other_code_are_added():
    a, b = Tied(), Tied(formed=True)
    mine, theirs = ours(a), plain_optimizer(b, "adamw")
    for ids, target in batches(3):
        for model, optimizers in ((a, [mine]), (b, theirs)):
            extra = 0.1 * model.table[ids[0]].square().sum()
            (model(ids, target) + extra).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_same(a, b)
    ids = torch.tensor([[3, 3, 5]])
    for model, optimizers in ((a, [mine]), (b, theirs)):
        sparse = model is a
        F.embedding(ids, model.table, sparse=sparse).sum().backward()
        assert model.table.grad.is_sparse == sparse
        for optimizer in optimizers:
            optimizer.step()
    mine.flush()
    assert_same(a, b)


def test_a_step_without_a_gradient_changes_nothing():
    model = Tied()
    optimizer = ours(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    model(*next(batches(1))).backward()
    optimizer.zero_grad()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert optimizer.step(lambda: model(*next(batches(1)))).requires_grad


def test_bfloat16_table_keeps_float32_moments_through_a_checkpoint():
    model = Tied(dtype=torch.bfloat16, bias=False)
    optimizer = optim.TiedTableOptimizer(model.table, lr=0.1)
    model(*next(batches(1))).backward()
    optimizer.step()
    state = optimizer.state_dict()
    other = optim.TiedTableOptimizer(nn.Parameter(model.table.detach().clone()), lr=0.3)
    other.load_state_dict(state)
    mine, theirs = optimizer.state[model.table], other.state[other.table]
    assert mine["exp_avg"].dtype == theirs["exp_avg"].dtype == torch.float32
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert other.param_groups[0]["lr"] == 0.1


def save(model, optimizer):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "rowwise_adamw", "adagrad"])
def test_a_resumed_run_is_bit_for_bit_the_same(kind, sampled):
    def train(model, optimizer, first, last, checkpoint=None):
        for i, (ids, target) in enumerate(batches(10)):
            if not first <= i < last:
                continue
            loss = model.sampled(ids, target, i) if sampled else model(ids, target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return save(model, optimizer)

    a = Tied(dtype=torch.float32)
    mine = ours(a, kind, bias=sampled)
    saved = train(a, mine, 0, 5)
    b = Tied(dtype=torch.float32)
    with torch.no_grad():
        b.table.zero_()
    resumed = ours(b, kind, lr=1.0, bias=sampled)
    b.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    end, other = train(a, mine, 5, 10), train(b, resumed, 5, 10)
    for name, value in end["model"].items():
        assert torch.equal(value, other["model"][name])
    assert end["optimizer"]["param_groups"] == other["optimizer"]["param_groups"]
    for place, values in end["optimizer"]["state"].items():
        for name, value in values.items():
            assert torch.equal(value, other["optimizer"]["state"][place][name])


def test_the_state_of_torch_optim_is_taken_over():
    a, b = Tied(), Tied(formed=True)
    theirs = torch.optim.AdamW([b.table], lr=0.05)
    mine = optim.TiedTableOptimizer(a.table, lr=0.05)
    for i, (ids, target) in enumerate(batches(6)):
        b(ids, target).backward()
        theirs.step()
        theirs.zero_grad()
        if i == 2:
            a.load_state_dict(b.state_dict())
            mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
        if i > 2:
            a(ids, target).backward()
            mine.step()
    torch.testing.assert_close(a.table, b.table, rtol=0, atol=1e-12)


def test_nothing_of_the_size_of_the_table_is_made():
    model = Tied(dtype=torch.float32)
    model.table = nn.Parameter(torch.randn(5000, D))
    model.bias = None
    optimizer = ours(model)
    ids, target = (part[: 1 if part.dim() == 2 else 4] for part in next(batches(1)))
    model(ids, target).backward()
    optimizer.step()  # makes the moments
    optimizer.zero_grad()
    with LargestTensor() as seen:
        for i, full in enumerate([True, False, True]):
            loss = model(ids, target) if full else model.sampled(ids, target, i)
            loss.backward()
            optimizer.clip_grad_norm_(0.1)
            optimizer.step()
            optimizer.zero_grad()
    # the scores of the reference's chunks, 4 rows to an item; a gradient would be D = 8
    assert seen.elements <= 4 * 5000
    assert model.table.grad is None


def test_two_models_and_threads_keep_to_themselves():
    models = [Tied() for _ in range(4)]
    optimizers = [ours(m) if i < 3 else None for i, m in enumerate(models)]

    def train(model, optimizer):
        for ids, target in batches(5):
            model(ids, target).backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

    threads = [threading.Thread(target=train, args=pair) for pair in zip(models, optimizers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(models[0], models[1], atol=0)
    assert_same(models[0], models[2], atol=0)
    assert models[3].table.grad is not None
    assert all(m.table.grad is None for m in models[:3])


def test_a_table_is_free_when_its_optimizer_is_gone():
    model = Tied()
    optimizer = ours(model)
    assert recorder_of(model.table) is not None
    copied = pickle.loads(pickle.dumps(model))
    copied(*next(batches(1))).backward()
    assert copied.table.grad is not None
    assert copied.state_dict().keys() == model.state_dict().keys()
    optimizer.release()
    with pytest.raises(RuntimeError, match=r"release\(\) was called"):
        optimizer.step()
    optimizer = ours(model)
    del optimizer
    gc.collect()
    assert recorder_of(model.table) is None
    model(*next(batches(1))).backward()
    assert model.table.grad is not None


def test_compiled_models():
    """A managed table breaks the graph and is right; others compile as ever."""
    a, b = Tied(), Tied()
    mine, theirs = ours(a), ours(b)
    compiled, free = torch.compile(a, backend="aot_eager"), Tied()
    full = torch.compile(free, backend="aot_eager", fullgraph=True)
    for ids, target in batches(2):
        compiled(ids, target).backward()
        b(ids, target).backward()
        full(ids, target).backward()
        assert a.table.grad is None
        mine.step()
        theirs.step()
    assert_same(a, b)
    assert free.table.grad is not None
    torch._dynamo.reset()
    strict = torch.compile(a, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"t4r_fast\.optim"):
        strict(*next(batches(1)))


def test_errors_of_a_step():
    model = Tied()
    optimizer = ours(model)
    model(*next(batches(1))).backward()
    with torch.no_grad():
        model.table.mul_(2)
    with pytest.raises(RuntimeError, match="table was changed between backward and step"):
        optimizer.step()
    optimizer.zero_grad()
    model(*next(batches(1))).backward()
    with torch.no_grad():
        model.bias.add_(1)
    with pytest.raises(RuntimeError, match="step the table before the optimizer of the bias"):
        optimizer.step()


ERRORS = {
    "kind": ({"kind": "adam"}, "kind must be one of sgd, .*got 'adam'"),
    "lr": ({"lr": -1.0}, "lr must be >= 0; got -1"),
    "eps": ({"eps": -1.0}, "eps must be >= 0"),
    "weight_decay": ({"weight_decay": -1.0}, "weight_decay must be >= 0"),
    "betas": ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
    "momentum": ({"momentum": 0.9}, "momentum must be 0 for 'adamw'"),
    "table": (
        {"table": nn.Parameter(torch.zeros(3, 1, 1))},
        r"contiguous parameter \(V, D\) or \(V,\); got \(3, 1, 1\)",
    ),
    "bias": (
        {"table": nn.Parameter(torch.zeros(3)), "kind": "rowwise_adamw"},
        r"kind must be sgd, adagrad or adamw for a bias \(V,\); got 'rowwise_adamw'",
    ),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(options, message):
    arguments = {"table": nn.Parameter(torch.zeros(3, 2)), **options}
    with pytest.raises(ValueError, match=f"TiedTableOptimizer: .*{message}"):
        optim.TiedTableOptimizer(**arguments)


def test_errors_of_for_model():
    model = Tied()
    with pytest.raises(ValueError, match="items must name the item table"):
        optim.for_model(model)
    with pytest.raises(ValueError, match="no_decay must name parameters of the model; got"):
        optim.for_model(model, items=model.table, no_decay=["nobody"])
    with pytest.raises(ValueError, match="items must be trainable parameters of the model"):
        optim.for_model(model, items=Tied().table)
    optimizer = optim.for_model(model, items=model.table, no_decay=["body.bias"])
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.01, 0.0, 0.01]
    state = optimizer.state_dict()
    state["param_groups"][-1]["kind"] = "sgd"
    with pytest.raises(ValueError, match="state is of another model or rule"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match="make a new one by for_model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


PEAK = """
import torch
from t4r_fast import optim, sampled_softmax_loss, sequence_embedding, tied_softmax_loss
V, D = 200_000, 64
table = torch.nn.Parameter(torch.zeros(V, D))
bias = torch.nn.Parameter(torch.zeros(V))
optimizer = optim.for_model(torch.nn.ParameterList([table, bias]), items=[table, bias])
hidden = torch.randn(64, D, requires_grad=True)
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before, target = peak() + 2 * table.nbytes, torch.arange(64)
for _ in range(3):
    x = hidden + sequence_embedding([target[None]], [table])[0]
    sampled_softmax_loss(x, table, target, num_negatives=100, bias=bias).backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
sampled = peak() - before
for _ in range(2):
    tied_softmax_loss(hidden, table, target).backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
print(sampled, peak() - before, table.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc: not Linux")
def test_peak_memory_in_a_new_process():
    """Sampled steps, then full ones: moments and some buffers; a gradient would be 51 MB more."""
    root = str(Path(optim.__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sampled, extra, table = map(int, done.stdout.split())
    assert sampled <= extra < 40e6 < table


# -- in the Trainer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_sessions(tmp_path_factory.mktemp("data") / "train.parquet")


def assert_same_weights(a, b, **tolerance):
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values()):
        torch.testing.assert_close(x, y, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.0])
def test_the_trainer_ends_with_the_weights_of_its_usual_optimizer(tmp_path, data, max_grad_norm):
    """Schedule, weight decay, clipping, accumulation: the same meaning as without."""
    options = {
        "max_grad_norm": max_grad_norm,
        "weight_decay": 0.1,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    usual = make_trainer(tmp_path / "a", data, **options)
    usual.train()
    mine = make_trainer(tmp_path / "b", data, table_optimizer="adamw", **options)
    mine.train()
    table = mine.model.prediction_tasks[0].pre.module.items
    assert table.grad is None
    assert set(mine._model_optimizer().state[table]) == {"step", "exp_avg", "exp_avg_sq"}
    assert_same_weights(mine, usual, rtol=1e-4, atol=1e-5)
    logged = [
        [h["grad_norm"] for h in t.state.log_history if "grad_norm" in h] for t in (mine, usual)
    ]
    if max_grad_norm:
        assert max(logged[0]) > max_grad_norm
        assert logged[0] == pytest.approx(logged[1], rel=1e-3)
    else:
        assert logged[0] == []


def sampling_model(seed=0):
    model = make_model(seed=seed)
    task = model.prediction_tasks[0]
    task.sampler, task.max_n_samples = "uniform", 5
    return model


@pytest.mark.parametrize("level", ["23.12", "0.1"])
def test_sampled_training_in_the_trainer(tmp_path, data, level):
    """Rows left behind are brought up to date for evaluation, checkpoints and the end.

    The same weights as by dense steps of the usual optimizer, the bias of the scores (0.1) too.
    """
    options = {"max_grad_norm": 0.5, "weight_decay": 0.1, "learning_rate": 1e-3}
    options |= {"eval_strategy": "steps", "eval_steps": 6, "num_train_epochs": 2, "save_steps": 7}
    behind = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            first, *others = (t._history.length for t in mine._model_optimizer().tables)
            behind.append(first)
            assert others == [first] * (level == "0.1")

        def on_evaluate(self, args, state, control, **kwargs):
            assert mine._model_optimizer().tables[0]._history.length == 0

    with compat_level(level):
        models = sampling_model(), sampling_model()
    usual = make_trainer(tmp_path / "a", data, models[0], **options)
    usual.train()
    mine = make_trainer(
        tmp_path / "b", data, models[1], [Look()], table_optimizer="adamw", **options
    )
    mine.train()
    # flushed by the evaluations after steps 6 and 12 and the checkpoint after step 7
    assert behind == [1, 2, 3, 4, 5, 6, 1, 1, 2, 3, 4, 5]
    assert_same_weights(mine, usual, rtol=1e-4, atol=1e-5)
    a, b = mine.evaluate(), usual.evaluate()
    assert a["eval_/loss"] == pytest.approx(b["eval_/loss"], rel=1e-4)


def test_formed_scores_and_recommendations_are_up_to_date(tmp_path, data):
    options = {"table_optimizer": "adamw", "max_steps": 3, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, data, sampling_model(), **options)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch

    def scores(look):
        trainer.train()
        optimizer = trainer._model_optimizer()
        model = trainer.model.eval()
        table = optimizer.tables[0]
        assert table._history.length == 3
        with torch.no_grad():
            seen = look(model)
            assert table._history.length == 0
            assert torch.equal(seen, look(model))

    scores(lambda model: model(inputs))
    scores(lambda model: model(inputs, testing=True)["predictions"].dense())
    scores(lambda model: model(inputs, testing=True)["predictions"].detach().topk(3)[0])


@pytest.mark.parametrize(
    ("rule", "level", "sampled"),
    [
        ("rowwise_adamw", "23.12", False),
        ("adamw", "23.12", False),
        ("rowwise_adamw", "0.1", True),
        ("adamw", "23.12", True),
    ],
)
def test_a_stopped_training_resumes_bit_for_bit(tmp_path, data, rule, level, sampled):
    def model(seed=0):
        with compat_level(level):
            return sampling_model(seed) if sampled else make_model(seed=seed)

    class Stop(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 8:
                raise KeyboardInterrupt

    options = {"table_optimizer": rule, "num_train_epochs": 2}
    whole = make_trainer(tmp_path / "whole", data, model(), **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, data, model(), callbacks=[Stop()], **options).train()
    resumed = make_trainer(tmp_path, data, model(seed=9), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed, whole, rtol=0, atol=0)
    mine, theirs = (t.optimizer.state_dict()["state"] for t in (resumed, whole))
    for place, values in mine.items():
        assert all(torch.equal(value, theirs[place][name]) for name, value in values.items())


def test_a_training_that_broke_off_leaves_no_gradient_behind(tmp_path, data):
    class Stop(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, data, callbacks=[Stop()], table_optimizer="sgd")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    optimizer = trainer._model_optimizer()
    assert optimizer.tables[0]._records
    trainer.remove_callback(Stop)
    seen = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append(len(optimizer.tables[0]._records.softmax))

    trainer.add_callback(Look())
    trainer.train()
    assert set(seen) == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table_optimizer": "adam"}, "table_optimizer must be one of sgd, .*; got 'adam'"),
        ({"table_optimizer": "adamw", "optim": "sgd"}, "optim='.*sgd' does not go with"),
        ({"table_optimizer": "adamw", "fp16": True}, "fp16 does not go with table_optimizer"),
    ],
    ids=["rule", "optim", "fp16"],
)
def test_errors_of_the_arguments(tmp_path, data, options, message):
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, data, **options)

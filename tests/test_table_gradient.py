"""The gradient of a table that is looked up and is the softmax's: one tensor of its size."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tutorial_cells as cells
from harness import LargestTensor, run_on
from session_files import session_schema, walks, write_windows
from torch import nn

from t4r_fast.config.trainer import T4RecTrainingArguments
from t4r_fast.ops.sequence_embedding import sequence_embedding
from t4r_fast.ops.tied_softmax_loss import tied_softmax_loss
from t4r_fast.torch.trainer import Trainer
from t4r_fast.tutorial import models

V, D = 300, 8


class Tied(nn.Module):
    """A table, a layer, and the table again; `plain` by PyTorch's own functions."""

    def __init__(self, plain=False, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.table = nn.Parameter(torch.randn(V, D, generator=g).to(dtype))
        self.layer = nn.Parameter(torch.randn(D, D, generator=g).to(dtype))
        self.plain = plain

    def forward(self, ids, target, table=None):
        table = self.table if table is None else table
        if self.plain:
            hidden = F.embedding(ids, table).flatten(0, 1) @ self.layer
            return F.cross_entropy(hidden @ table.T, target)
        hidden = sequence_embedding([ids], [table], padding_idx=-1).flatten(0, 1) @ self.layer
        return tied_softmax_loss(hidden, table, target)


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (4, 5), generator=g), torch.randint(V, (20,), generator=g)


@pytest.fixture(autouse=True)
def cpu_kernels():
    with run_on("cpu", "tied_softmax_loss"):
        pass  # they are there; ops without one may run as well


def tables_made(run):
    with LargestTensor() as seen:
        run()
    return sum(made >= V * D for made in seen.made)


def test_one_gradient_is_formed():
    model = Tied()
    loss = model(*batch())
    assert tables_made(loss.backward) == 1
    assert model.table.grad.layout == torch.strided
    assert model.table.grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_sum_has_the_bits_of_two_gradients(dtype):
    """The table under two names is two tables to the ops, whose gradients autograd adds."""
    model, apart = Tied(dtype=dtype), Tied(dtype=dtype)
    ids, target = batch()
    model(ids, target).backward()
    hidden = sequence_embedding([ids], [apart.table.view_as(apart.table)], padding_idx=-1)
    tied_softmax_loss(hidden.flatten(0, 1) @ apart.layer, apart.table, target).backward()
    assert torch.equal(model.table.grad, apart.table.grad)
    assert torch.equal(model.layer.grad, apart.layer.grad)


def accumulated(model):
    for seed in range(3):
        model(*batch(seed)).backward()
    return model.table.grad


def two_losses(model):
    (model(*batch(1)) + 2 * model(*batch(2))).backward()
    return model.table.grad


def retained(model):
    loss = model(*batch())
    loss.backward(retain_graph=True)
    loss.backward()
    return model.table.grad


def asked_for(model):
    layer, table = torch.autograd.grad(model(*batch()), [model.layer, model.table])
    assert layer.shape == (D, D)
    return table


def not_asked_for(model):
    torch.autograd.grad(model(*batch()), model.layer)
    assert model.table.grad is None
    return asked_for(model)


def not_a_leaf(model):
    model(*batch(), table=2 * model.table).backward()
    return model.table.grad


def changed_between(model):
    """The lookup's table is not the softmax's, though it is the same tensor."""
    table = 1 * model.table
    ids, target = batch()
    if model.plain:
        hidden = F.embedding(ids, table)
        table = table * 3
    else:
        hidden = sequence_embedding([ids], [table], padding_idx=-1)
        table.mul_(3)
    hidden = hidden.flatten(0, 1) @ model.layer
    if model.plain:
        loss = F.cross_entropy(hidden @ table.T, target)
    else:
        loss = tied_softmax_loss(hidden, table, target)
    loss.backward()
    return model.table.grad


def with_hooks(model):
    model.table.register_hook(lambda g: 3 * g)
    seen = []
    model.table.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model(*batch()).backward()
    assert torch.equal(seen[0], model.table.grad)
    return seen[0]


def softmax_node(node):
    """The node of tied_softmax_loss, whose post-hooks are given the gradient it formed."""
    if "TiedSoftmax" in node.name():
        return node
    found = (softmax_node(before) for before, _ in node.next_functions if before is not None)
    return next((node for node in found if node is not None), None)


def in_a_third_sum(model):
    """Autograd puts the formed gradient into another tensor before the lookup's turn."""
    ids, target = batch()
    (model(ids, target) + model.table[ids].sum() + 0.5 * (model.table**2).sum()).backward()
    return model.table.grad


def looked_up_twice(model):
    ids, target = batch()
    others = batch(7)[0]
    if model.plain:
        hidden = F.embedding(ids, model.table) + F.embedding(others, model.table)
        hidden = hidden + F.embedding(ids.flip(1), model.table)
    else:
        hidden = sequence_embedding(
            [ids, others], [model.table] * 2, aggregation="sum", padding_idx=-1
        )
        hidden = hidden + sequence_embedding([ids.flip(1)], [model.table], padding_idx=-1)
    hidden = hidden.flatten(0, 1) @ model.layer
    if model.plain:
        loss = F.cross_entropy(hidden @ model.table.T, target)
    else:
        loss = tied_softmax_loss(hidden, model.table, target)
    loss.backward()
    return model.table.grad


def checkpointed(model):
    from torch.utils.checkpoint import checkpoint

    checkpoint(model, *batch(), use_reentrant=False).backward()
    return model.table.grad


WAYS = [
    accumulated,
    two_losses,
    retained,
    asked_for,
    not_asked_for,
    not_a_leaf,
    changed_between,
    with_hooks,
    in_a_third_sum,
    looked_up_twice,
    checkpointed,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("watched", [False, True], ids=["as it is", "under a mode"])
def test_any_way_to_the_gradient(way, watched):
    """Under a mode autograd adds gradients out of place."""
    found = [way(Tied(plain=True, dtype=torch.float64))]
    model = Tied(dtype=torch.float64)
    if watched:
        with LargestTensor():
            found.append(way(model))
    else:
        found.append(way(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "keep",
    [lambda t: t, lambda t: t.view(-1), lambda t: t.detach(), lambda t: t.numpy()],
    ids=["itself", "view", "detached", "numpy"],
)
def test_a_gradient_that_a_hook_keeps_is_not_changed(keep):
    model, kept = Tied(), []

    def hook(gradients, _):
        kept.append(keep(gradients[1]))
        kept.append(gradients[1].clone())

    loss = model(*batch())
    softmax_node(loss.grad_fn).register_hook(hook)
    loss.backward()
    held, copy = (torch.as_tensor(t).view(V, D) for t in kept)
    assert torch.equal(held, copy)
    plain = Tied(plain=True)
    plain(*batch()).backward()
    torch.testing.assert_close(model.table.grad, plain.table.grad)


def test_second_derivatives_are_refused():
    with pytest.raises(RuntimeError, match="first derivatives only"):
        Tied()(*batch()).backward(create_graph=True)


def test_threads_with_one_table():
    """Each backward pass knows its own gradients only."""
    model = Tied(dtype=torch.float64)
    batches = [batch(seed) for seed in range(8)]
    alone = [torch.autograd.grad(model(*b), model.table)[0] for b in batches]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda b: torch.autograd.grad(model(*b), model.table)[0], batches * 4)
        for gradient, expected in zip(found, alone * 4):
            assert torch.equal(gradient, expected)


def test_distributed_data_parallel(tmp_path):
    """Its hooks get the whole gradient."""
    plain, model = (Tied(plain=p, dtype=torch.float64) for p in (True, False))
    plain(*batch()).backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(*batch()).backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(model.table.grad, plain.table.grad, rtol=1e-12, atol=1e-12)


def test_training_is_the_plain_models():
    """AdamW and clipping, step by step."""
    pair = [Tied(plain=p, dtype=torch.float64) for p in (True, False)]
    for model in pair:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
        for seed in range(5):
            model(*batch(seed)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(pair[1].table, pair[0].table, rtol=1e-9, atol=1e-9)


def test_a_tutorial_step_makes_one_gradient_of_the_table_and_no_scores():
    """GRU, V = 5,000, about 80 target rows: a step, and what N x V and V x D it makes."""
    items = 5000
    schema = cells.schema(items)
    model = cells.gru(schema)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    torch.manual_seed(0)
    for step in range(3):
        sessions = cells.batch(schema, 16)
        targets = int((sessions[cells.ITEM] > 0).sum()) - 16
        assert targets > 64  # so that rows of scores are more than the table's gradient
        optimizer.zero_grad()
        with LargestTensor() as seen:
            model(sessions, training=True)["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        size = items * 64
        made = [m for m in seen.made if m >= size]
        # the first step makes two moments of it as well
        assert made == [size] * (3 if step == 0 else 1)


def test_evaluation_makes_no_scores(tmp_path):
    items = 10_000  # so that 40 rows of scores are the largest tensor of all
    write_windows(tmp_path, {1: {"train": walks(0, 40, items)}}, items)
    schema = session_schema(items)
    model = models.build("gru", schema)
    arguments = T4RecTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_sequence_length=20,
        per_device_eval_batch_size=40,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        schema=schema.select_by_name(models.feature_columns("gru", schema)),
        compute_metrics=True,
    )
    with LargestTensor() as seen:
        found = trainer.evaluate(str(tmp_path / "sessions_by_day/1/train.parquet"))
    assert found["eval_/next-item/ndcg_at_10"] >= 0
    assert "target_rank_fwd" in seen.calls
    assert seen.elements < 40 * items

"""Output layers of the tasks by the names of the reference, and its sampler."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import tutorial_cells as cells
from torch import nn

import t4r_fast.torch as tr
from t4r_fast.compat import compat_level
from t4r_fast.torch.model import lightning
from t4r_fast.torch.model.prediction_task import (
    BinaryClassificationTask,
    LogUniformSampler,
    NextItemPredictionPrepareBlock,
    RegressionTask,
)

V, D = 40, 6


@pytest.fixture
def table():
    torch.manual_seed(0)
    return nn.Embedding(V, D)


def test_scores_of_a_tied_table_and_of_its_own(table):
    x, y = torch.randn(5, D), torch.arange(5)
    block = NextItemPredictionPrepareBlock(V, True, table, softmax_temperature=2.0).build((-1, D))
    scores, targets = block(x, targets=y, training=True)
    torch.testing.assert_close(scores, x @ table.weight.T / 2)
    assert targets is y
    assert block.output_size() == (-1, V)
    assert list(block.state_dict()) == ["module.item_embedding_table.weight"]
    own = NextItemPredictionPrepareBlock(V).build((-1, D))
    scores, targets = own(x)
    torch.testing.assert_close(scores, x @ own.module.output_layer.T)
    assert targets is None
    assert list(own.state_dict()) == ["module.output_layer"]
    with compat_level("0.1"):
        old = NextItemPredictionPrepareBlock(V, True, table).build((-1, D))
    with torch.no_grad():
        old.module.output_layer_bias.copy_(torch.randn(V))
    want = (x @ table.weight.T + old.module.output_layer_bias).log_softmax(-1)
    torch.testing.assert_close(old(x)[0], want)


def test_sampled_scores_are_those_of_the_reference(table):
    x, y = torch.randn(5, D), torch.tensor([1, 2, 3, 20, 39])
    block = NextItemPredictionPrepareBlock(V, True, table, 2.0, True, 8, 1).build((-1, D))
    assert list(block.state_dict())[-2:] == [
        "module.sampler.dist", "module.sampler.unique_sampling_dist",
    ]  # fmt: skip
    assert block(x, targets=y, testing=True)[0].shape == (5, V)
    torch.manual_seed(3)
    ids, _, _ = LogUniformSampler(8, V, 1, keep_lowest=True).sample(y)
    torch.manual_seed(3)
    scores, targets = block(x, targets=y, training=True)
    assert targets.tolist() == [0] * 5
    assert scores.shape == (5, 1 + len(ids))
    c = torch.arange(V, dtype=torch.float64) - 1
    q = torch.log1p(1 / (c.clamp(min=0) + 1)) / math.log(V) * (c >= 0)
    lowered = x @ table.weight.T - torch.log(1 - (1 + q) ** -16 + 1e-16).float()
    want = torch.where(ids == y[:, None], -655.04, lowered[:, ids])
    assert (ids == y[:, None]).any()
    want = torch.cat([lowered.gather(1, y[:, None]), want], dim=1) / 2
    torch.testing.assert_close(scores, want, rtol=1e-5, atol=1e-5)
    F.cross_entropy(scores, targets).backward()
    assert table.weight.grad.isfinite().all()


def test_what_an_output_layer_refuses(table):
    with pytest.raises(ValueError, match="weight_tying needs item_embedding_table"):
        NextItemPredictionPrepareBlock(V, weight_tying=True)
    with pytest.raises(ValueError, match="must be the item table's rows, 40; got 41"):
        NextItemPredictionPrepareBlock(V + 1, True, table)
    with pytest.raises(ValueError, match="inputs must be as wide as the item table, 6; got 7"):
        NextItemPredictionPrepareBlock(V, True, table).build((-1, 7))


def test_the_task_has_this_layer():
    model = cells.xlnet(cells.schema(30)).eval()
    (task,) = model.prediction_tasks
    batch = cells.batch(model.input_schema, 4)
    with torch.no_grad():
        predictions = model(batch, testing=True)["predictions"]
        hidden = predictions.hidden[predictions.labels != 0]
        scores, _ = task.pre(hidden, testing=True)
    torch.testing.assert_close(scores, predictions.dense())


def test_rows_that_have_a_target():
    task = tr.NextItemPredictionTask()
    x = torch.arange(12.0).reshape(2, 3, 2)
    mask = torch.tensor([True, False, False, False, True, True])
    assert torch.equal(task.remove_pad_3d(x, mask), x.reshape(6, 2)[[0, 4, 5]])


@pytest.mark.parametrize(
    ("task", "kind"), [(BinaryClassificationTask, nn.BCELoss), (RegressionTask, nn.MSELoss)]
)
def test_default_losses(task, kind):
    assert type(task.DEFAULT_LOSS) is kind
    assert type(task("y").loss) is kind
    assert task("y").loss is not task.DEFAULT_LOSS

    class Absolute(task):
        DEFAULT_LOSS = nn.L1Loss()

    assert type(Absolute("y").loss) is nn.L1Loss


# -- the sampler -----------------------------------------------------------------------------------


def test_distributions_of_the_sampler():
    sampler = LogUniformSampler(5, 10, 1, keep_lowest=True)
    dist = sampler.get_log_uniform_distr(10, 1)
    want = [0, 0.3010, 0.1761, 0.1249, 0.0969, 0.0792, 0.0669, 0.0580, 0.0512, 0.0458]
    assert dist.tolist() == pytest.approx(want, abs=5e-5)
    assert torch.equal(dist, sampler.dist)
    assert sampler.get_log_uniform_distr(3).sum() == pytest.approx(1)
    # the reference's form of the chance of ten draws, and the right one
    chance = sampler.get_unique_sampling_distr(dist, 10)
    torch.testing.assert_close(chance, 1 - (1 + dist) ** -10)
    assert torch.equal(chance, sampler.unique_sampling_dist)
    right = LogUniformSampler(5, 10, 1, keep_lowest=False).get_unique_sampling_distr(dist, 10)
    torch.testing.assert_close(right, 1 - (1 - dist) ** 10)


class Frequencies(LogUniformSampler):
    """Items as often as they were counted."""

    def get_log_uniform_distr(self, max_id, min_id=0):
        counts = torch.zeros(max_id)
        counts[[min_id, max_id - 1]] = torch.tensor([1.0, 3.0])
        return counts / counts.sum()


def test_a_subclass_draws_from_its_own_distribution():
    torch.manual_seed(0)
    sampler = Frequencies(400, 1000, 1, unique_sampling=False)
    ids, _, of_ids = sampler.sample(torch.tensor([1]))
    assert set(ids.tolist()) == {1, 999}
    assert (ids == 999).float().mean() == pytest.approx(0.75, abs=0.1)
    assert torch.equal(of_ids, sampler.dist[ids])
    with pytest.raises(ValueError, match="needs keep_lowest=True"):
        Frequencies(4, 1000, 1, keep_lowest=False)


# -- Lightning -------------------------------------------------------------------------------------


def test_without_lightning_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(lightning, "_PACKAGES", ("no_such_lightning", "no_such.pytorch"))
    with pytest.raises(ModuleNotFoundError, match=r"needs PyTorch Lightning, .* pip install"):
        cells.gru(cells.schema(30)).to_lightning()


def test_a_broken_lightning_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "broken_lightning.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lightning, "_PACKAGES", ("broken_lightning",))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        cells.gru(cells.schema(30)).to_lightning()


class Module(nn.Module):
    """What a LightningModule gives, as far as to_lightning uses it."""

    def log(self, name, value, batch_size=None):
        self.__dict__.setdefault("logged", []).append((name, float(value), batch_size))


def test_a_step_of_the_lightning_module(monkeypatch, tmp_path):
    (tmp_path / "double_of_lightning.py").write_text(
        "from test_output_layers import Module as LightningModule"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(lightning, "_PACKAGES", ("double_of_lightning",))
    model = cells.gru(cells.schema(30))
    module = model.to_lightning()
    batch = cells.batch(model.input_schema, 4)
    optimizer = module.configure_optimizers()
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.param_groups[0]["lr"] == 1e-3
    for step in (batch, (batch, None)):
        loss = module.training_step(step, 0)
        assert module.logged[-1] == ("train_loss", float(loss), 4)
    loss.backward()
    assert sum(p.grad is not None for p in model.parameters()) > 4
    torch.testing.assert_close(module(batch), model(batch))


def test_lightning_itself_trains(tmp_path):
    pl = pytest.importorskip("pytorch_lightning", reason="PyTorch Lightning is not installed")
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(cells.gru(cells.schema(30)))
    theirs, ours = models
    batches = [cells.batch(ours.input_schema, 8) for _ in range(4)]
    logged = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(trainer.callback_metrics["train_loss"].item())

    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Losses()],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(theirs.to_lightning(), torch.utils.data.DataLoader(batches, batch_size=None))
    adam = torch.optim.Adam(ours.parameters(), lr=1e-3)
    means = ours.fit(batches, adam, num_epochs=3, verbose=False, compute_metric=False)
    assert [sum(logged[i : i + 4]) / 4 for i in (0, 4, 8)] == pytest.approx(means.tolist())
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a, b)

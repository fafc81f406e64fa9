"""t4r_fast.accelerate on models of the real Transformers4Rec 23.12: run beside that package.

    python tests/accelerate_case.py [NAME ...]

test_accelerate.py runs it; it needs transformers4rec, torch >= 2.11, and t4r_fast on the path.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "parity")]
# E402: some of the modules below are found by this path
import record  # noqa: E402
import record_surface  # noqa: E402
import surface  # noqa: E402
import tasks  # noqa: E402
import transformers4rec.torch as tr  # noqa: E402

import t4r_fast  # noqa: E402

INPUTS = surface.batch(["item", "cat"])


def body(masking="clm", **arguments):
    inputs = surface._sequence(
        ["item", "cat"], masking=masking, d_output=16, max_sequence_length=6, **arguments
    )[1](tr, record_surface.schema)
    config = tr.XLNetConfig.build(16, 2, 1, 6, dropout=0.1)
    return tr.SequentialBlock(inputs, tr.TransformerBlock(config, masking=inputs.masking)), inputs


def model(masking="clm", **task):
    torch.manual_seed(0)
    block, inputs = body(masking)
    return tr.Model(tr.Head(block, tr.NextItemPredictionTask(**task), inputs=inputs))


def step(model, training=True):
    """(loss, gradients) with the random numbers of seed 1."""
    torch.manual_seed(1)
    model.train(training)
    model.zero_grad()
    loss = model(dict(INPUTS), training=True)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def evaluated(model):
    model.eval()
    model.reset_metrics()
    with torch.no_grad():
        out = model(dict(INPUTS), testing=True)
        batch = model.calculate_metrics(out["predictions"], out["labels"])
        told = model(dict(INPUTS))
    metrics = tasks.flat(model.compute_metrics())
    return out, batch, metrics, told


def same_as_before(model, said=()):
    """Loss, gradients, metrics and inference before and after, and once more after restore()."""
    keys = list(model.state_dict())
    before = step(model), evaluated(model)
    cls = [type(m) for m in model.modules()]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = t4r_fast.accelerate(model)
    ours = [w for w in seen if issubclass(w.category, t4r_fast.patch.AccelerateWarning)]
    assert len(ours) == len(report.kept)
    assert set(report.kept) == set(said), report
    assert t4r_fast.accelerate(copy.deepcopy(model)).replaced == report.replaced
    assert list(model.state_dict()) == keys
    for found in (model, copy.deepcopy(model)):
        (loss, gradients), ((out, batch, metrics, told)) = step(found), evaluated(found)
        (loss0, gradients0), ((out0, batch0, metrics0, told0)) = before
        torch.testing.assert_close(loss, loss0, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == gradients0.keys()
        for name, g in gradients0.items():
            torch.testing.assert_close(gradients[name], g, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out["loss"], out0["loss"], rtol=1e-5, atol=1e-6)
        assert torch.equal(out["labels"], out0["labels"])
        if isinstance(out["predictions"], t4r_fast.patch.LazyLogits) and not said:
            assert out["predictions"]._dense is None  # nobody has formed the scores
        torch.testing.assert_close(
            out["predictions"] + 0, out0["predictions"], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(told, told0, rtol=1e-4, atol=1e-5)
        assert batch.keys() == batch0.keys()
        for name, value in batch0.items():
            torch.testing.assert_close(batch[name], value, rtol=1e-5, atol=1e-6)
        assert metrics.keys() == metrics0.keys()
        for name, value in metrics0.items():
            assert abs(metrics[name] - value) < 1e-6, name
    replaced = t4r_fast.restore(model)
    assert replaced == report.replaced
    assert [type(m) for m in model.modules()] == cls
    loss, _ = step(model)
    assert torch.equal(loss, before[0][0])


# -- cases -----------------------------------------------------------------------------------------


def case_maskings():
    for masking in ("clm", "mlm", "plm", "rtd"):
        same_as_before(model(masking, weight_tying=True))


def case_tutorial():
    for kind in record.problem.KINDS:
        found = record.build(kind)
        global INPUTS
        INPUTS, kept = record.problem.batch(0, record.problem.columns(kind)), INPUTS
        same_as_before(found)
        INPUTS = kept


def case_options():
    same_as_before(model(weight_tying=False))
    same_as_before(model(weight_tying=True, softmax_temperature=0.3))
    same_as_before(model(weight_tying=True, softmax_temperature=0))
    smoothed = tr.LabelSmoothCrossEntropyLoss(smoothing=0.2)
    same_as_before(model(weight_tying=True, loss=smoothed))
    same_as_before(model(loss=torch.nn.CrossEntropyLoss(reduction="sum")))
    block = tr.MLPBlock([8, 12], activation=torch.nn.ELU)
    same_as_before(model(weight_tying=False, task_block=block))
    single = [tr.ranking_metric.NDCGAt(top_ks=5, labels_onehot=True)]
    every = [cls(top_ks=[1, 4], labels_onehot=True) for cls in ranking_metrics()]
    same_as_before(model(weight_tying=True, metrics=single))
    same_as_before(model(weight_tying=True, metrics=every))


def ranking_metrics():
    names = ("NDCGAt", "DCGAt", "RecallAt", "PrecisionAt", "AvgPrecisionAt", "MeanReciprocalRankAt")
    return [getattr(tr.ranking_metric, name) for name in names]


def case_batch_norm():
    """Its statistics are over all positions, so rows are chosen behind it."""
    block, inputs = body()
    task = tr.NextItemPredictionTask(task_block=torch.nn.Sequential())
    found = tr.Model(tr.Head(block, task, inputs=inputs))

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(16, track_running_stats=False)

        def forward(self, x):
            return self.norm(x.flatten(0, 1)).view_as(x)

    found.heads[0].prediction_task_dict["next-item"].task_block = Norm()
    same_as_before(found)


def case_what_stays():
    class Own(torch.nn.CrossEntropyLoss):
        pass

    for loss, word in (
        (Own(), "its loss is Own"),
        (torch.nn.CrossEntropyLoss(weight=torch.ones(30)), "class weights"),
        (torch.nn.CrossEntropyLoss(reduction="none"), "reduction"),
    ):
        found = model(weight_tying=True, loss=loss)
        report = quiet(found)
        assert report.replaced == ()
        assert word in report.kept["heads.0.prediction_task_dict.next-item"], report
        assert "as it is" in str(report)
    import torchmetrics

    metric = torchmetrics.classification.MulticlassAccuracy(num_classes=30)
    found = model(weight_tying=True)
    found.heads[0].prediction_task_dict["next-item"].metrics.append(metric)
    report = quiet(found)
    assert list(report.kept) == ["heads.0.prediction_task_dict.next-item.metrics[3]"]
    assert report.replaced == ("heads.0.prediction_task_dict.next-item",)


def quiet(found):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return t4r_fast.accelerate(found)


def case_top_k():
    found = model(weight_tying=True).eval()
    for k in (1, 7, 30):
        found.top_k = k
        expected = found(dict(INPUTS))
        t4r_fast.accelerate(found)
        scores, ids = found(dict(INPUTS))
        torch.testing.assert_close(scores, expected[0], rtol=1e-4, atol=1e-5)
        assert (ids == expected[1]).float().mean() > 0.95
        t4r_fast.restore(found)


def case_training():
    """Twenty optimizer steps, a checkpoint of theirs, and Model.fit and evaluate."""
    data = [(dict(INPUTS), None)]
    losses, states = [], []
    for fast in (False, True):
        found = model("mlm", weight_tying=True)
        start = copy.deepcopy(found.state_dict())
        if fast:
            t4r_fast.accelerate(found)
        found.load_state_dict(start)
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(found.parameters(), lr=1e-3)
        losses.append(found.fit(data, optimizer=optimizer, num_epochs=20, verbose=False))
        found.eval()
        states.append((found.state_dict(), found.evaluate(data, verbose=False)))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=0)
    for name, value in states[0][0].items():
        torch.testing.assert_close(states[1][0][name], value, rtol=1e-3, atol=1e-4)


class Loader:
    """What their Trainer asks of a loader."""

    _batch_size = 4
    dataset = range(8)
    batch_sampler = None

    def __iter__(self):
        return iter([(dict(INPUTS), None)] * 2)

    def __len__(self):
        return 2


def case_trainer():
    """Their Trainer evaluates and predicts the same, and forms no scores while it does."""
    from tempfile import TemporaryDirectory

    found = model("mlm", weight_tying=True)
    with TemporaryDirectory() as folder:
        args = tr.T4RecTrainingArguments(
            output_dir=folder, report_to=[], per_device_eval_batch_size=4, predict_top_k=5
        )
        loader = Loader()
        trainer = tr.Trainer(
            model=found, args=args, eval_dataloader=loader, test_dataloader=loader,
            compute_metrics=True,
        )  # fmt: skip
        gather = getattr(trainer, "_pad_across_processes", None)
        trainer._pad_across_processes = gather or (lambda tensor: tensor)
        before, told = trainer.evaluate(), trainer.predict(loader).predictions
        t4r_fast.accelerate(found)

        def formed(self):
            raise AssertionError("the N x V scores were formed")

        dense, t4r_fast.patch.LazyLogits.dense = t4r_fast.patch.LazyLogits.dense, formed
        try:
            after, again = trainer.evaluate(), trainer.predict(loader).predictions
        finally:
            t4r_fast.patch.LazyLogits.dense = dense
    for key, value in before.items():
        if "/" in key:
            assert abs(after[key] - value) < 1e-5 * max(1, abs(value)), key
    assert (told[0] == again[0]).mean() > 0.95


def case_sampled():
    """Other random numbers, the same distribution: the mean loss over many draws."""
    found = model(weight_tying=True, sampled_softmax=True, max_n_samples=4).eval()
    means = []
    for fast in (False, True):
        if fast:
            t4r_fast.accelerate(found)
        torch.manual_seed(0)
        with torch.no_grad():
            losses = [found(dict(INPUTS), training=True)["loss"] for _ in range(4000)]
        losses = torch.stack(losses).double()
        means.append((losses.mean(), losses.std() / len(losses) ** 0.5))
    (a, da), (b, db) = means
    assert abs(a - b) < 4 * (da**2 + db**2) ** 0.5, means
    found.train()
    found(dict(INPUTS), training=True)["loss"].backward()
    out = found(dict(INPUTS), testing=True)
    t4r_fast.restore(found)
    expected = found(dict(INPUTS), testing=True)
    assert out["predictions"].shape == expected["predictions"].shape


def case_other_models():
    said = ""
    try:
        t4r_fast.accelerate(torch.nn.Linear(2, 2))
    except ValueError as e:
        said = str(e)
    if "no NextItemPredictionTask of transformers4rec" not in said:
        raise AssertionError("a plain module was taken")


def main() -> None:
    cases = {name[5:]: f for name, f in globals().items() if name.startswith("case_")}
    for name in sys.argv[1:] or cases:
        cases[name]()
        print(f"{name} ok", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

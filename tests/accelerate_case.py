"""t4r_fast.accelerate on models of the real Transformers4Rec 23.12: run beside that package.

    python tests/accelerate_case.py [NAME ...]

test_accelerate.py runs it; it needs transformers4rec, torch >= 2.11, and t4r_fast on the path.
"""

from __future__ import annotations

import copy
import functools
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
import transformers  # noqa: E402
import transformers4rec.torch as tr  # noqa: E402
from transformers4rec.config.transformer import transformer_registry  # noqa: E402
from transformers4rec.torch.block.transformer import TransformerPrepare  # noqa: E402

import t4r_fast  # noqa: E402

INPUTS = surface.batch(["item", "cat"])


BODY, TASK = "heads.0.body", "heads.0.prediction_task_dict.next-item"


def body(masking="clm", kind="xlnet", dropout=0.0, behind=(), **arguments):
    inputs = surface._sequence(
        ["item", "cat"], masking=masking, d_output=16, max_sequence_length=6, **arguments
    )[1](tr, record_surface.schema)
    transformer = tr.TransformerBlock(config_of(kind, dropout), masking=inputs.masking)
    return tr.SequentialBlock(inputs, transformer, *behind), inputs


def config_of(kind, dropout):
    """Two layers of width 16; their small ones, with room for one more item at inference."""
    dropouts = {
        "xlnet": ("dropout",),
        "gtp2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    }
    config = transformer_registry.parse(kind).build(16, 2, 2, 8)
    for name in dropouts.get(kind, ()):
        setattr(config, name, dropout)
    return config


def model(masking="clm", body_of=body, **task):
    torch.manual_seed(0)
    block, inputs = body_of(masking)
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


def same_as_before(model, said=(), attend_padding=True, expected=None):
    """Loss, gradients, metrics and inference before and after, and once more after restore().

    expected  a model that does in its own way what is expected; None: this one
    """
    keys = list(model.state_dict())
    own = step(model)[0]
    before = step(expected or model), evaluated(expected or model)
    cls = [type(m) for m in model.modules()]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        report = t4r_fast.accelerate(model, attend_padding=attend_padding)
    ours = [w for w in seen if issubclass(w.category, t4r_fast.patch.AccelerateWarning)]
    assert len(ours) == len(report.kept)
    assert set(report.kept) == set(said), report
    again = t4r_fast.accelerate(copy.deepcopy(model), attend_padding=attend_padding)
    assert again.replaced == report.replaced
    assert list(model.state_dict()) == keys
    for found in (model, copy.deepcopy(model)):
        (loss, gradients), ((out, batch, metrics, told)) = step(found), evaluated(found)
        (loss0, gradients0), ((out0, batch0, metrics0, told0)) = before
        torch.testing.assert_close(loss, loss0, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == gradients0.keys()
        for name, g in gradients0.items():
            tolerance = 1e-5 * max(float(g.abs().max()), 0.1)
            torch.testing.assert_close(gradients[name], g, rtol=1e-5, atol=tolerance)
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
    assert torch.equal(loss, own)
    return report


# -- cases -----------------------------------------------------------------------------------------


def case_maskings():
    for masking in ("clm", "mlm", "rtd"):
        report = same_as_before(model(masking, weight_tying=True))
        assert report.replaced == (BODY, TASK)
    report = same_as_before(model("plm", weight_tying=True), said=[BODY])
    assert "PermutationLanguageModeling" in report.kept[BODY]
    assert report.replaced == (TASK,)


BODIES = [("xlnet", "mlm"), ("xlnet", "clm"), ("gtp2", "clm"), ("bert", "mlm")]


def bodies():
    """Models around every Transformer that has a form for packed sessions."""
    for kind, masking in BODIES:
        for last in (True, False):
            make = functools.partial(body, kind=kind, eval_on_last_item_seq_only=last)
            yield model(masking, make, weight_tying=True)
    behind = [tr.MLPBlock([12]), tr.Block(torch.nn.LayerNorm(12), [None, 6, 12])]
    yield model("mlm", functools.partial(body, behind=behind), task_block=tr.MLPBlock([8]))


def case_bodies():
    for found in bodies():
        assert same_as_before(found).replaced == (BODY, TASK)


def attending_items(model):
    """A copy whose Transformer is given an attention mask."""
    found = copy.deepcopy(model)
    inputs, block = found.heads[0].body[0], found.heads[0].body[1]
    own = block.transformer.forward

    def forward(inputs_embeds, head_mask=None):
        item_ids = inputs.categorical_module.item_seq
        width = inputs_embeds.shape[1]
        lengths = (item_ids != 0).sum(1) + width - item_ids.shape[1]
        mask = (torch.arange(width) < lengths[:, None]).float()
        given = {} if head_mask is None else {"head_mask": head_mask}
        return own(inputs_embeds=inputs_embeds, attention_mask=mask, **given)

    block.transformer.forward = forward
    return found


def case_without_padding():
    for found in bodies():
        report = same_as_before(found, attend_padding=False, expected=attending_items(found))
        assert report.replaced == (BODY, TASK)


def case_gradients_in_float64():
    """Of a weighted sum of what the body makes where something is predicted."""
    for found in bodies():
        found.double()
        for attend_padding, own in ((True, copy.deepcopy(found)), (False, attending_items(found))):
            fast = copy.deepcopy(found)
            quiet(fast, attend_padding=attend_padding)
            made, expected = (body_gradients(m) for m in (fast, own))
            assert made.keys() == expected.keys()
            for name, g in expected.items():
                tolerance = 1e-12 * max(float(g.abs().max()), 1e-3)
                torch.testing.assert_close(made[name], g, rtol=1e-10, atol=tolerance)


def body_gradients(model):
    torch.manual_seed(1)
    block = model.heads[0].body
    x = block(dict(INPUTS), training=True)[block[0].masking.masked_targets != 0]
    (x * torch.randn(x.shape)).sum().backward()
    return {n: p.grad for n, p in block.named_parameters() if p.grad is not None}


def case_predictions_do_not_depend_on_the_batch():
    for kind, masking in BODIES:
        found = model(masking, functools.partial(body, kind=kind), weight_tying=True).eval()
        short = {name: column[1:2, :2] for name, column in INPUTS.items()}
        quiet(found, attend_padding=False)
        torch.testing.assert_close(found(short)[0], found(dict(INPUTS))[1], rtol=1e-5, atol=1e-6)
        if kind == "gtp2":
            continue  # it never sees what is behind an item
        t4r_fast.restore(found)
        assert (found(short)[0] - found(dict(INPUTS))[1]).abs().max() > 1e-6


def case_an_empty_session():
    """At inference: what they give for it, and what the others get is the same."""
    batch = {name: column.clone() for name, column in INPUTS.items()}
    for column in batch.values():
        column[1] = 0
    for found in bodies():
        found.eval()
        expected = found(dict(batch))
        quiet(found)
        torch.testing.assert_close(found(dict(batch)), expected, rtol=1e-4, atol=1e-5)
        quiet(found, attend_padding=False)
        assert found(dict(batch)).isfinite().all()


def case_autocast():
    for found in bodies():
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(1)
            own = found(dict(INPUTS), training=True)["loss"]
            for attend_padding in (True, False):
                quiet(found, attend_padding=attend_padding)
                torch.manual_seed(1)
                loss = found(dict(INPUTS), training=True)["loss"]
                assert abs(loss - own) < 0.05 * own
        loss.backward()
        assert all(p.grad.isfinite().all() for p in found.parameters() if p.grad is not None)


def case_changed_later():
    """A hook that is put on it later sees what it would have seen."""
    for attend_padding in (True, False):
        found = model("mlm", weight_tying=True).eval()
        quiet(found, attend_padding=attend_padding)
        expected, seen = found(dict(INPUTS)), []
        transformer = found.heads[0].body[1].transformer
        transformer.register_forward_hook(lambda *a, seen=seen: seen.append(a[2][0]))
        torch.testing.assert_close(found(dict(INPUTS)), expected, rtol=1e-4, atol=1e-5)
        assert seen[0].shape == (4, 7, 16)


def case_dropout_draws_from_torchs_generator():
    found = model("mlm", functools.partial(body, dropout=0.3), weight_tying=True)
    quiet(found)
    first, again = (step(found) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(g, again[1][n]) for n, g in first[1].items())
    found.heads[0].body[1].transformer.eval()
    torch.manual_seed(1)
    assert found(dict(INPUTS), training=True)["loss"] != first[0]


def case_traced():
    """torch.jit.trace, which their export to Triton takes, follows any batch."""
    for attend_padding in (True, False):
        found = model("mlm", weight_tying=True).eval()
        quiet(found, attend_padding=attend_padding)
        inputs = tuple(INPUTS.values())

        class Columns(torch.nn.Module):
            def __init__(self, model):
                super().__init__()
                self.model = model

            def forward(self, item, cat):
                return self.model({"item": item, "cat": cat})

        with torch.no_grad():
            traced = torch.jit.trace(Columns(found), inputs, check_trace=False)
            for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
                columns = [column[order] for column in inputs]
                expected = found(dict(zip(INPUTS, columns)))
                torch.testing.assert_close(traced(*columns), expected, rtol=1e-4, atol=1e-5)


class Prepare(TransformerPrepare):
    def forward(self, inputs_embeds):
        return {"inputs_embeds": inputs_embeds}


class OwnXLNet(transformers.XLNetModel):
    pass


def case_bodies_that_stay():
    def hooked(found):
        found.heads[0].body[1].transformer.layer[0].register_forward_hook(lambda *_: None)

    def task_hooked(found):
        task = found.heads[0].prediction_task_dict["next-item"]
        task.register_forward_pre_hook(lambda *_: None)

    def prepared(found):
        block = found.heads[0].body[1]
        block.prepare_module = Prepare(block.transformer, block.masking)

    def own_output(found):
        found.heads[0].body[1].output_fn = lambda outputs: outputs[0] * 2

    def own_class(found):
        found.heads[0].body[1].transformer.__class__ = OwnXLNet

    def adapted(found):
        class Adapted(torch.nn.Linear):
            pass

        found.heads[0].body[1].transformer.layer[0].ff.layer_1.__class__ = Adapted

    def clamped(found):
        found.heads[0].body[1].transformer.config.clamp_len = 2

    def mixing(found):
        task = found.heads[0].prediction_task_dict["next-item"]
        task.task_block = torch.nn.Sequential(task.task_block, torch.nn.Softmax(dim=1))

    for change, why in (
        (hooked, "hooks on its parts"),
        (task_hooked, "hooks on its parts"),
        (prepared, "prepare_module Prepare"),
        (own_output, "output_fn"),
        (own_class, "OwnXLNet has no form for packed sessions"),
        (adapted, "a Adapted that is not transformers' own"),
        (clamped, "clamp_len"),
        (mixing, "Softmax may mix rows"),
    ):
        found = model("mlm", weight_tying=True)
        change(found)
        report = same_as_before(found, said=[BODY])
        assert why in report.kept[BODY], report
        report = quiet(found, attend_padding=False)
        assert report.kept[BODY].endswith("; it attends to padding")


def case_body_that_another_task_reads():
    block, inputs = body("mlm")
    other = tr.BinaryClassificationTask("click")
    found = tr.Model(tr.Head(block, [tr.NextItemPredictionTask(weight_tying=True), other]))
    del inputs
    report = quiet(found)
    assert report.replaced == (TASK,)
    assert "BinaryClassificationTask" in report.kept[BODY]


def case_tutorial():
    for kind in record.problem.KINDS:
        found = record.build(kind)
        global INPUTS
        INPUTS, kept = record.problem.batch(0, record.problem.columns(kind)), INPUTS
        for module in found.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
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
    report = same_as_before(found, said=[BODY])
    assert "Norm may mix rows" in report.kept[BODY]


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
        assert word in report.kept[TASK], report
        assert "NextItemPredictionTask, which has no fused ops" in report.kept[BODY]
        assert "as it is" in str(report)
    import torchmetrics

    metric = torchmetrics.classification.MulticlassAccuracy(num_classes=30)
    found = model(weight_tying=True)
    found.heads[0].prediction_task_dict["next-item"].metrics.append(metric)
    report = quiet(found)
    assert list(report.kept) == [TASK + ".metrics[3]"]
    assert report.replaced == (BODY, TASK)


def quiet(found, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return t4r_fast.accelerate(found, **options)


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

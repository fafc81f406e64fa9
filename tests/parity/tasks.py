"""Tasks of the parity test, written once for both sides.

`tr` is transformers4rec.torch or t4r_fast.torch. Needs numpy and torch alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import problem
import surface
import torch

COLUMNS = ["item", "cat"]


def targets() -> dict[str, torch.Tensor]:
    """What each session is to be predicted: bought or not, a price."""
    rng = np.random.default_rng(11)
    return {
        "bought": torch.tensor([1, 0, 1, 1]),
        "price": torch.from_numpy(rng.normal(size=surface.SESSIONS).astype(np.float32)),
    }


def _body(tr, schema, masking: str | None = None):
    inputs = surface._sequence(
        COLUMNS, masking=masking, d_output=surface.WIDTH, max_sequence_length=surface.LENGTH
    )[1](tr, schema)
    config = tr.GPT2Config.build(surface.WIDTH, 2, 2, surface.LENGTH)
    block = tr.TransformerBlock(config, masking=inputs.masking)
    return tr.SequentialBlock(inputs, tr.MLPBlock([surface.WIDTH]), block), inputs


def _one(make: Callable, masking: str | None = None, **head):
    def build(tr, schema):
        body, inputs = _body(tr, schema, masking)
        options = {n: value(tr) if callable(value) else value for n, value in head.items()}
        return tr.Model(tr.Head(body, make(tr), inputs=inputs, **options))

    return build


def _from_schema(tr, schema):
    """Two targets found by their tags, with a block of its own in front of each and weights."""
    body, inputs = _body(tr, schema)
    head = tr.Head.from_schema(
        schema(["item", "bought", "price"]),
        body,
        task_blocks={
            "bought/binary_classification_task": tr.MLPBlock([5]),
            "price/regression_task": tr.MLPBlock([6, 3]),
        },
        task_weight_dict={"price": 0.5},
        loss_reduction="sum",
        inputs=inputs,
    )
    return tr.Model(head)


def _two_heads(tr, schema):
    heads = [
        tr.Head(body, task, inputs=inputs)
        for task, (body, inputs) in (
            (tr.BinaryClassificationTask("bought"), _body(tr, schema)),
            (tr.RegressionTask("price"), _body(tr, schema)),
        )
    ]
    return tr.Model(*heads, head_weights=[1.0, 3.0])


MODELS: dict[str, Callable] = {
    "binary": _one(lambda tr: tr.BinaryClassificationTask("bought")),
    "binary_mean": _one(lambda tr: tr.BinaryClassificationTask("bought", summary_type="mean")),
    "regression": _one(lambda tr: tr.RegressionTask("price", task_block=tr.MLPBlock([6, 5]))),
    "regression_last": _one(lambda tr: tr.RegressionTask("price", "cost", summary_type="last")),
    "from_schema": _from_schema,
    "two_heads": _two_heads,
    "shared_blocks": _one(
        lambda tr: [tr.BinaryClassificationTask("bought"), tr.RegressionTask("price")],
        task_blocks=lambda tr: tr.MLPBlock([6]),
        task_weights=[2.0, 0.25],
    ),
    "next_item_too": _one(
        lambda tr: [tr.NextItemPredictionTask(weight_tying=True), tr.RegressionTask("price")], "clm"
    ),
    "smoothed": _one(
        lambda tr: tr.NextItemPredictionTask(
            loss=tr.LabelSmoothCrossEntropyLoss(smoothing=0.1), softmax_temperature=0.5
        ),
        "clm",
    ),
}


SAMPLED = {"few": 3}


def sampled(tr, schema, negatives: int):
    """A model with sampled softmax whose losses differ much from draw to draw."""
    make = _one(
        lambda tr: tr.NextItemPredictionTask(
            weight_tying=True,
            sampled_softmax=True,
            max_n_samples=negatives,
            softmax_temperature=0.05,
        ),
        "clm",
    )
    return make(tr, schema)


def measure_sampled(module: torch.nn.Module, draws: int) -> dict:
    """The mean training loss over many draws, and the standard error of that mean."""
    surface.set_weights(module)
    module.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        losses = [module(surface.batch(COLUMNS), training=True)["loss"] for _ in range(draws)]
    losses = torch.stack(losses).double()
    state = {n: v for n, v in module.state_dict().items() if "sampler" in n}
    return {
        "keys": sorted(n for n in module.state_dict() if "next-item" in n),
        "tables": {n: surface.some(table) for n, table in state.items()},
        "mean": float(losses.mean()),
        "error": float(losses.std()) / draws**0.5,
    }


def model(tr, schema, name: str):
    return MODELS[name](tr, schema)


def _by_task(value) -> dict:
    return value if isinstance(value, dict) else {"": value}


def flat(metrics: dict) -> dict[str, float]:
    found = {}
    for key, value in metrics.items():
        found.update(flat(value) if isinstance(value, dict) else {key: float(value)})
    return found


def measure(module: torch.nn.Module) -> dict:
    """Everything that is compared, without dropout."""
    surface.set_weights(module)
    module.eval()
    inputs, wanted = surface.batch(COLUMNS), targets()
    module.reset_metrics()
    with torch.no_grad():
        out = module(inputs, targets=wanted, testing=True)
        module.calculate_metrics(out["predictions"], out["labels"])
        told = module(inputs)
    found = {
        "parameters": sorted(name for name, _ in module.named_parameters()),
        "eval_loss": float(out["loss"]),
        "predictions": {n: surface.some(p + 0.0) for n, p in _by_task(out["predictions"]).items()},
        "inference": {n: surface.some(p) for n, p in _by_task(told).items()},
        "metrics": flat(module.compute_metrics()),
        "nested": sorted(module.compute_metrics(mode="eval")),
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=problem.LEARNING_RATE)
    found["training_losses"] = []
    for step in range(problem.STEPS):
        optimizer.zero_grad()
        loss = module(inputs, targets=wanted, training=True)["loss"]
        loss.backward()
        found["training_losses"].append(float(loss.detach()))
        if step == 0:
            found["gradients"] = surface.gradients(module)
        optimizer.step()
    return found

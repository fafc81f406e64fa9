"""Input blocks, maskings and bodies of the parity test, written once for both sides.

`tr` is transformers4rec.torch or t4r_fast.torch. Needs numpy and torch alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import problem
import torch

ROWS = {"item": 30, "cat": 12, "user": 7}
NUMBERS = ("x", "y")
LENGTH, SESSIONS, WIDTH, VECTOR = 6, 4, 8, 5
LISTS = ("item", "cat", "x", "y")


def batch(columns) -> dict[str, torch.Tensor]:
    """Four sessions of 6, 2, 5 and 3 items; `user` is one id per session."""
    rng = np.random.default_rng(7)
    keep = np.arange(LENGTH) < np.array([6, 2, 5, 3])[:, None]
    out = {}
    for name in ("item", "cat"):
        out[name] = np.where(keep, rng.integers(1, ROWS[name], keep.shape), 0)
    for name in NUMBERS:
        out[name] = np.where(keep, rng.normal(size=keep.shape), 0).astype(np.float32)
    out["user"] = rng.integers(1, ROWS["user"], SESSIONS)
    vectors = rng.normal(size=(*keep.shape, VECTOR))
    out["vec"] = np.where(keep[..., None], vectors, 0).astype(np.float32)
    return {name: torch.from_numpy(out[name]) for name in columns}


def _sequence(columns, **arguments):
    def build(tr, schema):
        make = tr.TabularSequenceFeatures.from_schema
        return make(schema(columns), **{"embedding_dim_default": WIDTH, **arguments})

    return columns, build


def _session(columns, **arguments):
    def build(tr, schema):
        make = tr.TabularFeatures.from_schema
        return make(schema(columns), **{"embedding_dim_default": WIDTH, **arguments})

    return columns, build


def _fusion(kind: str):
    def build(tr, schema):
        from importlib import import_module

        fusion = import_module(f"{tr.__name__}.experimental").PostContextFusion
        inputs = _sequence(["item"], masking="clm")[1](tr, schema)
        context = _sequence(["cat", "x"], d_output=4)[1](tr, schema)
        return fusion(tr.SequentialBlock(inputs, tr.MLPBlock([WIDTH])), context, kind)

    return ["item", "cat", "x"], build


def _transformer(name: str):
    """A body by itself, for one that the reference cannot put into a model."""

    def build(tr, schema):
        inputs = _sequence(["item"], d_output=WIDTH, max_sequence_length=LENGTH)[1](tr, schema)
        return tr.SequentialBlock(inputs, tr.TransformerBlock.from_registry(name, WIDTH, 2, 2, 6))

    return ["item"], build


ITEM_CAT = ["item", "cat"]
BLOCKS: dict[str, tuple[list[str], Callable]] = {
    "concat": _sequence([*LISTS, "user"], aggregation="concat"),
    "sum": _sequence([*ITEM_CAT, "user"], aggregation="element-wise-sum"),
    "item_multi": _sequence([*ITEM_CAT, "user"], aggregation="element-wise-sum-item-multi"),
    "stack": _sequence(ITEM_CAT, aggregation="stack"),
    "projection": _sequence([*LISTS], continuous_projection=3, d_output=7),
    "inferred": _sequence([*LISTS], aggregation="concat", infer_embedding_sizes=True),
    "post": _sequence([*LISTS], aggregation="concat", post="layer-norm"),
    "soft": _sequence(
        [*LISTS],
        aggregation="concat",
        continuous_soft_embeddings=True,
        soft_embedding_cardinalities={"x": 4},
        soft_embedding_dims={"y": 6},
    ),
    "soft_plain": _sequence(
        [*LISTS], aggregation="concat", continuous_soft_embeddings=True, layer_norm=False
    ),
    "pretrained": _sequence(
        ["item", "vec"], d_output=7, pretrained_output_dims=4, normalizer="layer-norm"
    ),
    "pretrained_as_is": _sequence(["item", "x", "vec"], aggregation="concat"),
    "session": _session([*ITEM_CAT, "user"], aggregation="concat"),
    "session_sum": _session([*ITEM_CAT, "user"], aggregation="element-wise-sum", combiner="sum"),
    "session_vectors": _session(["cat", "vec"], aggregation="concat", sequence_combiner="mean"),
    "fusion_mul": _fusion("elementwise-mul"),
    "fusion_sum": _fusion("elementwise-sum"),
    "fusion_concat": _fusion("concat"),
    "reformer": _transformer("reformer"),
}

# body, masking, further arguments of the input block
MODELS: dict[str, tuple[str, str, dict]] = {
    "gpt2_clm": ("gtp2", "clm", {}),
    "gpt2_clm_last": ("gtp2", "clm", {"train_on_last_item_seq_only": True}),
    "gpt2_clm_all": ("gtp2", "clm", {"eval_on_last_item_seq_only": False}),
    "bert_mlm": ("bert", "mlm", {}),
    "bert_mlm_all": ("bert", "mlm", {"eval_on_last_item_seq_only": False}),
    "roberta_mlm": ("roberta", "mlm", {}),
    "albert_mlm": ("albert", "mlm", {}),
    "electra_rtd": ("electra", "rtd", {}),
    "longformer_mlm": ("longformer", "mlm", {}),
    "longformer_clm": ("longformer", "clm", {}),
    "xlnet_clm": ("xlnet", "clm", {}),
    "xlnet_clm_last": ("xlnet", "clm", {"train_on_last_item_seq_only": True}),
    "xlnet_rtd": ("xlnet", "rtd", {}),
    "xlnet_plm": ("xlnet", "plm", {}),
    "xlnet_plm_permute_all": ("xlnet", "plm", {"permute_all": True}),
}


def model(tr, schema, name: str):
    body, masking, arguments = MODELS[name]
    inputs = _sequence(
        ITEM_CAT, masking=masking, d_output=WIDTH, max_sequence_length=LENGTH, **arguments
    )[1](tr, schema)
    # a narrow feed-forward layer where the reference would take 3072
    wide = body in ("bert", "roberta", "longformer")
    config = getattr(tr, "transformer_registry", None) or _registry()
    config = config.parse(body).build(
        WIDTH, 2, 2, LENGTH, **({"intermediate_size": 16} if wide else {})
    )
    body = tr.SequentialBlock(inputs, tr.TransformerBlock(config, masking=inputs.masking))
    task = tr.NextItemPredictionTask(weight_tying=True)
    return tr.Model(tr.Head(body, task, inputs=inputs))


def _registry():
    from transformers4rec.config.transformer import transformer_registry

    return transformer_registry


def some(tensor: torch.Tensor) -> list[float]:
    """The norm, and up to 12 elements from all over the tensor."""
    flat = tensor.detach().double().flatten()
    at = torch.linspace(0, len(flat) - 1, min(12, len(flat))).long()
    return [float(flat.norm()), *flat[at].tolist()]


def gradients(module: torch.nn.Module) -> dict[str, list[float]]:
    named = module.named_parameters()
    return {n: some(p.grad) for n, p in named if p.grad is not None}


def set_weights(module: torch.nn.Module) -> None:
    """problem.set_weights; gains of every kind of layer norm stand around 1."""
    problem.set_weights(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            gain = name.endswith("weight") and parameter.dim() == 1
            if gain and "layer_norm.weight" not in name:
                parameter += 1.0


def measure_block(module: torch.nn.Module, columns: list[str]) -> dict:
    set_weights(module)
    module.eval()
    inputs = batch(columns)
    out = module(inputs)
    found = {"shape": list(out.shape), "output": some(out), "keys": sorted(module.state_dict())}
    if any("reformer" in type(m).__name__.lower() for m in module.modules()):
        return found  # its backward pass runs in training mode alone
    weight = torch.from_numpy(np.random.default_rng(3).normal(size=tuple(out.shape))).float()
    (out * weight).sum().backward()
    return {**found, "gradients": gradients(module)}


def measure_model(module: torch.nn.Module, mask_training: Callable[[int], None]) -> dict:
    """mask_training(step) is called before each training pass; they are done without dropout."""
    set_weights(module)
    module.eval()
    inputs = batch(ITEM_CAT)
    with torch.no_grad():
        out = module(inputs, testing=True)
        scores = module(inputs)
    found = {
        "eval_loss": float(out["loss"]),
        "eval_labels": out["labels"][out["labels"] != 0].tolist(),
        "eval_predictions": some(out["predictions"] + 0.0),
        "inference": some(scores),
        "parameters": sorted(name for name, _ in module.named_parameters()),
    }
    optimizer = torch.optim.AdamW(module.parameters(), lr=problem.LEARNING_RATE)
    found["training_losses"] = []
    for step in range(problem.STEPS):
        mask_training(step)
        optimizer.zero_grad()
        loss = module(inputs, training=True)["loss"]
        loss.backward()
        found["training_losses"].append(float(loss.detach()))
        if step == 0:
            found["gradients"] = gradients(module)
        optimizer.step()
    with torch.no_grad():
        found["inference_after"] = some(module(inputs))
    return found

"""The inputs that both sides of the parity test make for themselves: weights, batches, sizes.

Needs numpy and torch alone, so that it runs beside the real Transformers4Rec.
"""

from __future__ import annotations

import numpy as np
import torch

SIZES = {"product_id-list_seq": 500, "category_id-list_seq": 31, "brand-list_seq": 41}
NUMBERS = (
    "product_recency_days_log_norm-list_seq",
    "et_dayofweek_sin-list_seq",
    "et_dayofweek_cos-list_seq",
    "price_log_norm-list_seq",
    "relative_price_to_avg_categ_id-list_seq",
)
KINDS = ("gru", "xlnet", "xlnet_side")
LENGTH, SESSIONS, STEPS = 20, 16, 20
LEARNING_RATE = 1e-3


def set_weights(model: torch.nn.Module) -> None:
    """Fill every parameter from its name and shape alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rng = np.random.default_rng([ord(c) for c in name])
            values = rng.normal(0.0, 0.06, tuple(parameter.shape)).astype(np.float32)
            if "layer_norm.weight" in name:
                values += 1.0
            parameter.copy_(torch.from_numpy(values))


def batch(step: int, names: list[str]) -> dict[str, torch.Tensor]:
    """Sessions of 2 to 20 items; the first is full."""
    rng = np.random.default_rng(step)
    length = rng.integers(2, LENGTH + 1, SESSIONS)
    length[0] = LENGTH
    keep = np.arange(LENGTH) < length[:, None]
    out = {}
    for name, rows in SIZES.items():
        ids = rng.integers(3, rows, (SESSIONS, LENGTH))
        out[name] = torch.from_numpy(np.where(keep, ids, 0))
    for name in NUMBERS:
        values = rng.normal(size=(SESSIONS, LENGTH)).astype(np.float32)
        out[name] = torch.from_numpy(np.where(keep, values, np.float32(0)))
    return {name: out[name] for name in names}


def columns(kind: str) -> list[str]:
    return [*SIZES, *NUMBERS] if kind == "xlnet_side" else [next(iter(SIZES))]


def numbers(tensor: torch.Tensor) -> list:
    return tensor.detach().double().tolist()


def measure(model, kind: str, draw_mask) -> dict:
    """Everything that is compared. draw_mask(step) prepares the masking for a training step."""
    names = columns(kind)
    model.eval()  # no dropout: its random numbers are not comparable
    with torch.no_grad():
        out = model(batch(0, names), testing=True)
        scores = model(batch(0, names))
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "keys": sorted(model.state_dict()),
        "eval_loss": float(out["loss"]),
        "eval_labels": out["labels"].tolist(),
        "eval_predictions": numbers(out["predictions"][:4, :12]),
        "inference": numbers(scores[:4, :12]),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(STEPS):
        draw_mask(step)
        optimizer.zero_grad()
        loss = model(batch(step, names), training=True)["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        if step == 0:
            found["gradient_norms"] = {
                n: float(p.grad.double().norm())
                for n, p in model.named_parameters()
                if p.grad is not None
            }
        optimizer.step()
    found["training_losses"] = losses
    with torch.no_grad():
        found["inference_after"] = numbers(model(batch(0, names))[:4, :12])
    return found

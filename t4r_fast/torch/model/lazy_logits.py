"""The predictions of a model; they live beside the ops, which need nothing of this package."""

from t4r_fast.lazy_logits import LazyLogits

__all__ = ["LazyLogits"]

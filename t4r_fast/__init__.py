"""t4r_fast: session-based recommendation at kernel speed.

The ops stand here under their names; `t4r_fast.torch` is the drop-in layer, `t4r_fast.etl` makes
sessions of raw events.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from t4r_fast.compat import get_compat, set_compat
from t4r_fast.moved import MOVED, install
from t4r_fast.version import __version__

if TYPE_CHECKING:
    from t4r_fast import backend
    from t4r_fast.compat.accelerate import accelerate, restore
    from t4r_fast.ops.activation_dropout import activation_dropout
    from t4r_fast.ops.item_topk import item_topk
    from t4r_fast.ops.log_uniform_sample import log_uniform_log_prob, log_uniform_sample
    from t4r_fast.ops.mask_causal import mask_causal
    from t4r_fast.ops.mask_mlm import mask_mlm
    from t4r_fast.ops.mask_permutation import mask_permutation
    from t4r_fast.ops.ranking_metrics import ranking_metrics
    from t4r_fast.ops.residual_norm import residual_norm
    from t4r_fast.ops.sampled_softmax_loss import (
        PopularityTable,
        popularity_table,
        sampled_softmax_loss,
    )
    from t4r_fast.ops.sequence_embedding import sequence_embedding
    from t4r_fast.ops.session_attention import Relative, session_attention
    from t4r_fast.ops.target_rank import target_rank
    from t4r_fast.ops.tied_softmax_loss import tied_softmax_loss
    from t4r_fast.ops.tied_table_step import tied_table_step

__all__ = [
    "PopularityTable",
    "Relative",
    "__version__",
    "accelerate",
    "activation_dropout",
    "backend",
    "get_compat",
    "item_topk",
    "log_uniform_log_prob",
    "log_uniform_sample",
    "mask_causal",
    "mask_mlm",
    "mask_permutation",
    "popularity_table",
    "ranking_metrics",
    "residual_norm",
    "restore",
    "sampled_softmax_loss",
    "sequence_embedding",
    "session_attention",
    "set_compat",
    "target_rank",
    "tied_softmax_loss",
    "tied_table_step",
]


# An op is imported when it is first asked for: importing torch takes seconds, and
# `t4r-fast --help` and the ETL do without it.
_MODULES = {
    "PopularityTable": "sampled_softmax_loss",
    "Relative": "session_attention",
    "log_uniform_log_prob": "log_uniform_sample",
    "popularity_table": "sampled_softmax_loss",
}


install()


def __getattr__(name: str) -> object:
    if f"t4r_fast.{name}" in MOVED:
        return importlib.import_module(f"t4r_fast.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "backend":
        return importlib.import_module("t4r_fast.backend")
    accelerates = name in ("accelerate", "restore")
    home = "compat.accelerate" if accelerates else f"ops.{_MODULES.get(name, name)}"
    module = importlib.import_module(f"t4r_fast.{home}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""What a pass may take apart: modules that are known by their class, with nothing overridden.

Nothing of transformers is imported: its modules are known by the names of their classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from t4r_fast.model.bodies import self_attention, xlnet
from t4r_fast.model.sessions import Layout

# What gives each row from this row alone.
ROW_BY_ROW = (nn.Linear, nn.LayerNorm, nn.Identity, nn.Dropout)
_SOFTMAXES = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.MultiheadAttention)
# Where the parts of a transformers module come from; parametrized layers, adapters and the like
# come from elsewhere.
_PARTS = ("transformers.", "torch.nn.modules.")


class PackedBody(NamedTuple):
    """A module of transformers as a function.

    run         (vectors (U, D), layout, rows or None, seed or None) -> (R, D)
    looks_back  whether an item sees those before it alone
    """

    run: Callable[[Tensor, Layout, Tensor | None, Tensor | None], Tensor]
    looks_back: bool


# class -> (its function, why a configuration has none)
_BODIES: dict[str, tuple[Callable[..., Tensor], Callable[[Any], str | None]]] = {
    "XLNetModel": (xlnet.xlnet, xlnet.why_not),
    "GPT2Model": (self_attention.gpt2, self_attention.why_not_gpt2),
    "BertModel": (self_attention.bert, self_attention.why_not_bert),
}


def is_row_by_row(module: nn.Module) -> bool:
    """Whether a module without parts of its own gives each row from this row alone."""
    return type(module) in ROW_BY_ROW or _is_elementwise(module)


def _is_elementwise(module: nn.Module) -> bool:
    among = type(module).__module__ == "torch.nn.modules.activation"
    return among and not isinstance(module, _SOFTMAXES)


def is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def packed_body(module: nn.Module) -> PackedBody | str:
    """The function over packed sessions that computes what a module of transformers does; for other
    modules a sentence that says why there is none."""
    kind = type(module)
    config: Any = getattr(module, "config", None)
    if kind.__name__ not in _BODIES or not kind.__module__.startswith("transformers."):
        return f"{kind.__name__} has no form for packed sessions"
    function, why_not = _BODIES[kind.__name__]
    why = why_not(config)
    if why is not None:
        return f"{kind.__name__} with {why} has no form for packed sessions"
    if config.output_attentions or config.output_hidden_states:
        return f"{kind.__name__} hands out attentions or hidden states"
    strange = _strange(module.modules())
    if strange is not None:
        return f"{kind.__name__} holds {strange}"
    looks_back = kind.__name__ == "GPT2Model" or getattr(module, "attn_type", "") == "uni"
    return PackedBody(partial(function, module), looks_back)


def _strange(modules: Iterable[nn.Module]) -> str | None:
    for module in modules:
        name, own = type(module).__name__, vars(module)
        if not type(module).__module__.startswith(_PARTS):
            return f"a {name} that is not transformers' own"
        if "forward" in own:
            return f"a {name} with a forward of its own"
        if own.get("pruned_heads"):
            return f"a {name} without some of its heads"
        if own.get("gradient_checkpointing"):
            return f"a {name} with gradient checkpointing"
    return None

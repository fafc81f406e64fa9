"""GRU over time on packed sessions, by the parameters of torch.nn.GRU(batch_first=True).

torch.nn.GRU takes packed sessions of its own form, step by step: all first items, all second items
of the sessions that have one, and so on, longest session first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from t4r_fast.model import sessions
from t4r_fast.model.sessions import ROW_BLOCK, Layout


def why_not(module: nn.GRU) -> str | None:
    """Why a GRU cannot be run here; None where it can."""
    if not module.batch_first:
        return "it recurs over the sessions of the batch"
    if module.bidirectional:
        return "it is bidirectional"
    return None


def gru(module: nn.GRU, x: Tensor, layout: Layout, rows: Tensor | None) -> Tensor:
    """The outputs of the last layer at `rows`, or of all items; (U, D) -> (R, H).

    Each step takes a whole number of blocks of sessions: those that have ended go on over items of
    others, and nobody reads what comes out. So the bits of a session do not depend on the others.
    Where shapes may not depend on values the module gets padded sessions.
    """
    wanted = layout.places if rows is None else torch.where(rows < 0, -1, layout.places[rows])
    session, place = wanted.clamp(min=0) >> 32, wanted.clamp(min=0) & 0xFFFFFFFF
    if sessions.fixed_capacity(x):
        found, _ = module(sessions.pad(x, layout.offsets, layout.longest))
        return found.flatten(0, 1).index_select(0, session * layout.longest + place)
    lengths = layout.offsets.diff()
    if int(layout.offsets[-1]) == 0:
        return x.new_zeros(x.shape[0] if rows is None else rows.shape[0], module.hidden_size)
    order = lengths.argsort(descending=True, stable=True)
    sizes = (lengths[:, None] > torch.arange(int(lengths.max()))).sum(0)  # of each step
    sizes = -(-sizes // ROW_BLOCK) * ROW_BLOCK
    first = nn.functional.pad(layout.offsets[:-1][order], (0, -len(order) % ROW_BLOCK))
    begin = nn.functional.pad(sizes.cumsum(0), (1, 0))
    step = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    slot = torch.arange(len(step)) - begin[step]
    at = (first[slot] + step).clamp(max=x.shape[0] - 1)
    found, _ = module(PackedSequence(x.index_select(0, at), sizes))
    # where each item went: its place is the step, its session's rank the slot
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    return found.data.index_select(0, begin[place] + rank[session])

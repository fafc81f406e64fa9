"""The pass of a session model: a function of its weights and a batch.

A SessionModel is a value that names the weights; the modules that hold them are not written to, so
any number of threads may use one model at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from t4r_fast.model.inputs import Inputs, row_by_row, vectors
from t4r_fast.model.mask import Mask, Masking
from t4r_fast.model.sessions import Layout, Sessions, layout_of
from t4r_fast.ops._seed import check_seed

# (vectors (U, D), layout, rows or None, seed or None) -> (R, D)
Body = Callable[[Tensor, Layout, Tensor | None, Tensor | None], Tensor]


class SessionModel(NamedTuple):
    """What stands before the scores.

    inputs       columns to vectors
    masking      what is hidden and what is predicted
    mask_vector  (D,)
    between      modules before the body, each of which gives a row from this row alone
    body         the body over packed sessions, see t4r_fast.model.bodies
    after        modules behind it, row by row
    """

    inputs: Inputs
    masking: Masking
    mask_vector: Tensor
    between: tuple[nn.Module, ...]
    body: Body
    after: tuple[nn.Module, ...]


class Hidden(NamedTuple):
    """What is scored against the items.

    vectors   (R, D)  at the rows of the mask, in order; whole blocks, anything behind the last row
    mask      what was hidden and is predicted
    sessions  the batch that the mask is for
    """

    vectors: Tensor
    mask: Mask
    sessions: Sessions


def hidden(
    model: SessionModel, sessions: Sessions, training: bool, testing: bool, dropout: bool
) -> Hidden:
    """The vectors at which a prediction is made.

    training, testing  which rows these are; neither: inference, at the end of each session
    dropout            whether to drop; drawn by a seed from torch's default generator
    """
    sessions, mask = model.masking.draw(sessions, model.inputs.item, training, testing)
    layout = layout_of(sessions)
    seed = check_seed("dropout", None, layout.offsets.device) if dropout else None
    x = vectors(model.inputs, sessions, mask, model.mask_vector, layout, seed)
    return Hidden(behind_inputs(model, x, layout, mask.rows, seed), mask, sessions)


def behind_inputs(
    model: SessionModel, x: Tensor, layout: Layout, rows: Tensor, seed: Tensor | None
) -> Tensor:
    """(R, D'), what is scored, of the masked vectors x (U, D) at rows (R,)."""
    x = row_by_row(model.between, x, layout.places, seed, site=2 << 20)
    x = model.body(x, layout, rows, seed)
    places = torch.where(rows < 0, -1, layout.places[rows])
    # float: under autocast a linear map gives half precision, the item table is float32
    return row_by_row(model.after, x.float(), places, seed, site=3 << 20).float()

"""sequence_embedding in plain PyTorch: gather each column, put them together, substitute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sequence_embedding(
    columns: list[Tensor],
    tables: list[Tensor | None],
    mask: Tensor | None,
    mask_vector: Tensor | None,
    offsets: Tensor | None,
    sum: bool,
    zero_padding: bool,
    padding_idx: int,
    sparse: tuple[bool, ...],
) -> Tensor:
    """(B, L, W); differentiable by PyTorch's own rules. With offsets B is 1."""
    parts = []
    for column, table, is_sparse in zip(columns, tables, sparse):
        if table is not None:
            pad = padding_idx if padding_idx < len(table) else None
            if offsets is not None:
                column = ids_inside(column, table, offsets, padding_idx)
            parts.append(F.embedding(column, table, pad, sparse=is_sparse))
        else:
            parts.append(column if column.dim() == 3 else column[..., None])
    if not sum:
        out = torch.cat(parts, dim=2)
    else:
        out = parts[0]
        for part in parts[1:]:
            out = out + part
    if zero_padding:
        first = next(c for c, table in zip(columns, tables) if table is not None)
        out = torch.where((first == padding_idx)[..., None], out.new_zeros(()), out)
    if mask is not None:
        out = torch.where(mask[..., None], mask_vector, out)
    if offsets is not None:
        inside = is_inside(out.shape[1], offsets)
        out = torch.where(inside[:, None], out, out.new_zeros(()))
    return out


def is_inside(size: int, offsets: Tensor) -> Tensor:
    """(U,) bool: which of U items are those of packed sessions."""
    return torch.arange(size, device=offsets.device) < offsets[-1]


def ids_inside(ids: Tensor, table: Tensor, offsets: Tensor, padding_idx: int) -> Tensor:
    """ids (..., U), with an id of the table, that of padding if it is one, behind the sessions."""
    behind = padding_idx if 0 <= padding_idx < len(table) else 0
    return torch.where(is_inside(ids.shape[-1], offsets), ids, behind)

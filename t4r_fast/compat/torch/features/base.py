"""What the blocks that read columns of a batch are."""

from __future__ import annotations

from t4r_fast.compat.torch.tabular.base import TabularBlock


class InputBlock(TabularBlock):
    """A TabularBlock that reads columns of a batch: embedding tables, numbers, given vectors."""

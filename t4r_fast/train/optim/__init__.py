"""Optimizers for models with a large item table, whose gradient they do not form.

for_model gives one optimizer for a model: the item table by TiedTableOptimizer, everything else by
torch.optim.AdamW(fused=True). docs/optimizers.md
"""

from t4r_fast.train.optim.model import ModelOptimizer, for_model
from t4r_fast.train.optim.tied_table import TiedTableOptimizer

__all__ = ["ModelOptimizer", "TiedTableOptimizer", "for_model"]

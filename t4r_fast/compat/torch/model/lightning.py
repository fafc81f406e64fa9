"""Model.to_lightning: the model as a LightningModule, where Lightning is installed."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from t4r_fast.compat.torch.model.fitting import inputs_and_targets

if TYPE_CHECKING:
    from t4r_fast.compat.torch.model.base import Model

# The two distributions have classes of their own, and a Trainer takes those of its own alone. The
# reference imports pytorch_lightning.
_PACKAGES = ("pytorch_lightning", "lightning.pytorch")


def as_lightning(model: Model) -> Any:
    """See Model.to_lightning."""
    pl = _package()

    class LightningModel(pl.LightningModule):
        """Trains the model in `parent`, whose parameters are its own."""

        def __init__(self) -> None:
            super().__init__()
            self.parent = model

        def forward(
            self, inputs: Any, targets: Any = None, training: bool = False, testing: bool = False
        ) -> Any:
            return self.parent(inputs, targets=targets, training=training, testing=testing)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            inputs, targets = inputs_and_targets(batch)
            loss = self(inputs, targets=targets, training=True)["loss"]
            size = next(iter(inputs.values())).shape[0]
            self.log("train_loss", loss, batch_size=size)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.parent.optimizer(self.parent.parameters(), lr=1e-3)

    return LightningModel()


def _package() -> ModuleType:
    for name in _PACKAGES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as e:
            if e.name is None or not name.startswith(e.name):
                raise  # it is there, and lacks a package of its own
    raise ModuleNotFoundError(
        "Model.to_lightning needs PyTorch Lightning, which is not installed: pip install"
        " pytorch-lightning (or lightning); Model.fit and the Trainer need neither",
        name=_PACKAGES[0],
    )

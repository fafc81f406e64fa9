"""The drop-in layer: the names of transformers4rec.torch on fused ops.

import t4r_fast.torch as tr
"""

from t4r_fast.config.transformer import XLNetConfig
from t4r_fast.schema import Schema, Tags
from t4r_fast.torch import ranking_metric
from t4r_fast.torch.block.base import Block, BlockBase, BuildableBlock, SequentialBlock
from t4r_fast.torch.block.mlp import MLPBlock
from t4r_fast.torch.block.transformer import TransformerBlock
from t4r_fast.torch.features.continuous import ContinuousFeatures
from t4r_fast.torch.features.embedding import (
    FeatureConfig,
    SequenceEmbeddingFeatures,
    TableConfig,
)
from t4r_fast.torch.features.sequence import TabularSequenceFeatures
from t4r_fast.torch.masking import (
    CausalLanguageModeling,
    MaskedLanguageModeling,
    MaskSequence,
    masking_registry,
)
from t4r_fast.torch.model.base import Model
from t4r_fast.torch.model.head import Head
from t4r_fast.torch.model.lazy_logits import LazyLogits
from t4r_fast.torch.model.prediction_task import NextItemPredictionTask

__all__ = [
    "Block",
    "BlockBase",
    "BuildableBlock",
    "CausalLanguageModeling",
    "ContinuousFeatures",
    "FeatureConfig",
    "Head",
    "LazyLogits",
    "MLPBlock",
    "MaskSequence",
    "MaskedLanguageModeling",
    "Model",
    "NextItemPredictionTask",
    "Schema",
    "SequenceEmbeddingFeatures",
    "SequentialBlock",
    "TableConfig",
    "TabularSequenceFeatures",
    "Tags",
    "TransformerBlock",
    "XLNetConfig",
    "masking_registry",
    "ranking_metric",
]

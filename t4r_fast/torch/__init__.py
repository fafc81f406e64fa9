"""The drop-in layer: the names of transformers4rec.torch on fused ops.

import t4r_fast.torch as tr
"""

from t4r_fast.config.trainer import T4RecTrainingArguments
from t4r_fast.config.transformer import XLNetConfig
from t4r_fast.schema import Schema, Tags
from t4r_fast.torch import ranking_metric
from t4r_fast.torch.block.base import Block, BlockBase, BuildableBlock, SequentialBlock
from t4r_fast.torch.block.mlp import MLPBlock
from t4r_fast.torch.block.transformer import TransformerBlock
from t4r_fast.torch.checkpoint import load_weights
from t4r_fast.torch.data import (
    DATA_LOADER_ENGINES,
    MerlinDataLoader,
    NVTabularDataLoader,
    ParquetDataLoader,
    PyarrowDataLoader,
    T4RecDataLoader,
)
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
from t4r_fast.torch.trainer import Trainer

__all__ = [
    "DATA_LOADER_ENGINES",
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
    "MerlinDataLoader",
    "Model",
    "NVTabularDataLoader",
    "NextItemPredictionTask",
    "ParquetDataLoader",
    "PyarrowDataLoader",
    "Schema",
    "SequenceEmbeddingFeatures",
    "SequentialBlock",
    "T4RecDataLoader",
    "T4RecTrainingArguments",
    "TableConfig",
    "TabularSequenceFeatures",
    "Tags",
    "Trainer",
    "TransformerBlock",
    "XLNetConfig",
    "load_weights",
    "masking_registry",
    "ranking_metric",
]

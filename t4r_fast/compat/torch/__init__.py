"""The drop-in layer: the names of transformers4rec.torch on fused ops.

import t4r_fast.torch as tr
"""

from t4r_fast.compat.config.schema import requires_schema
from t4r_fast.compat.config.trainer import T4RecTrainingArguments
from t4r_fast.compat.config.transformer import (
    AlbertConfig,
    BertConfig,
    ElectraConfig,
    GPT2Config,
    LongformerConfig,
    ReformerConfig,
    RobertaConfig,
    T4RecConfig,
    TransfoXLConfig,
    XLNetConfig,
    transformer_registry,
)
from t4r_fast.compat.torch import ranking_metric, saved_names  # noqa: F401  # the list fills itself
from t4r_fast.compat.torch.block.base import (
    Block,
    BlockBase,
    BuildableBlock,
    SequentialBlock,
    build_blocks,
    right_shift_block,
)
from t4r_fast.compat.torch.block.mlp import MLPBlock
from t4r_fast.compat.torch.block.transformer import TransformerBlock
from t4r_fast.compat.torch.data import (
    DLDataLoader,
    MerlinDataLoader,
    NVTabularDataLoader,
    ParquetDataLoader,
    PyarrowDataLoader,
    T4RecDataLoader,
    dataloader_registry,
)
from t4r_fast.compat.torch.features.continuous import ContinuousFeatures
from t4r_fast.compat.torch.features.embedding import (
    EmbeddingFeatures,
    FeatureConfig,
    PretrainedEmbeddingsInitializer,
    SequenceEmbeddingFeatures,
    TableConfig,
)
from t4r_fast.compat.torch.features.pretrained import PretrainedEmbeddingFeatures
from t4r_fast.compat.torch.features.sequence import TabularSequenceFeatures
from t4r_fast.compat.torch.features.soft import SoftEmbedding, SoftEmbeddingFeatures
from t4r_fast.compat.torch.features.tabular import TabularFeatures
from t4r_fast.compat.torch.losses import LabelSmoothCrossEntropyLoss
from t4r_fast.compat.torch.masking import (
    CausalLanguageModeling,
    MaskedLanguageModeling,
    MaskSequence,
    PermutationLanguageModeling,
    ReplacementLanguageModeling,
    masking_registry,
)
from t4r_fast.compat.torch.model.base import Model
from t4r_fast.compat.torch.model.head import Head
from t4r_fast.compat.torch.model.prediction_task import NextItemPredictionTask
from t4r_fast.compat.torch.model.replaced_item_task import ReplacedItemPredictionTask
from t4r_fast.compat.torch.model.session_task import BinaryClassificationTask, RegressionTask
from t4r_fast.compat.torch.model.task import PredictionTask
from t4r_fast.compat.torch.tabular.aggregation import (
    ConcatFeatures,
    ElementwiseSum,
    ElementwiseSumItemMulti,
    StackFeatures,
)
from t4r_fast.compat.torch.tabular.base import (
    AsTabular,
    FilterFeatures,
    MergeTabular,
    SequentialTabularTransformations,
    TabularAggregation,
    TabularBlock,
    TabularModule,
    TabularTransformation,
)
from t4r_fast.compat.torch.tabular.transformations import (
    StochasticSwapNoise,
    TabularDropout,
    TabularLayerNorm,
)
from t4r_fast.model.architecture import saveable
from t4r_fast.model.next_item import LazyLogits
from t4r_fast.model.store import load_model
from t4r_fast.schema import Schema, Tags
from t4r_fast.train.checkpoint import load_weights
from t4r_fast.train.trainer import Trainer

__all__ = [
    "AlbertConfig",
    "AsTabular",
    "BertConfig",
    "BinaryClassificationTask",
    "Block",
    "BlockBase",
    "BuildableBlock",
    "CausalLanguageModeling",
    "ConcatFeatures",
    "ContinuousFeatures",
    "DLDataLoader",
    "ElectraConfig",
    "ElementwiseSum",
    "ElementwiseSumItemMulti",
    "EmbeddingFeatures",
    "FeatureConfig",
    "FilterFeatures",
    "GPT2Config",
    "Head",
    "LabelSmoothCrossEntropyLoss",
    "LazyLogits",
    "LongformerConfig",
    "MLPBlock",
    "MaskSequence",
    "MaskedLanguageModeling",
    "MergeTabular",
    "MerlinDataLoader",
    "Model",
    "NVTabularDataLoader",
    "NextItemPredictionTask",
    "ParquetDataLoader",
    "PermutationLanguageModeling",
    "PredictionTask",
    "PretrainedEmbeddingFeatures",
    "PretrainedEmbeddingsInitializer",
    "PyarrowDataLoader",
    "ReformerConfig",
    "RegressionTask",
    "ReplacedItemPredictionTask",
    "ReplacementLanguageModeling",
    "RobertaConfig",
    "Schema",
    "SequenceEmbeddingFeatures",
    "SequentialBlock",
    "SequentialTabularTransformations",
    "SoftEmbedding",
    "SoftEmbeddingFeatures",
    "StackFeatures",
    "StochasticSwapNoise",
    "T4RecConfig",
    "T4RecDataLoader",
    "T4RecTrainingArguments",
    "TableConfig",
    "TabularAggregation",
    "TabularBlock",
    "TabularDropout",
    "TabularFeatures",
    "TabularLayerNorm",
    "TabularModule",
    "TabularSequenceFeatures",
    "TabularTransformation",
    "Tags",
    "Trainer",
    "TransfoXLConfig",
    "TransformerBlock",
    "XLNetConfig",
    "build_blocks",
    "dataloader_registry",
    "load_model",
    "load_weights",
    "masking_registry",
    "ranking_metric",
    "requires_schema",
    "right_shift_block",
    "saveable",
    "transformer_registry",
]

"""The closed list: what a saved model may be built of, beside torch.nn and Transformer configs."""

from __future__ import annotations

from t4r_fast.compat.torch import masking, ranking_metric, session_metric
from t4r_fast.compat.torch.block.base import Block, SequentialBlock
from t4r_fast.compat.torch.block.mlp import DenseBlock, MLPBlock
from t4r_fast.compat.torch.block.transformer import GPT2Prepare, TransformerBlock
from t4r_fast.compat.torch.experimental import PostContextFusion
from t4r_fast.compat.torch.features.continuous import ContinuousFeatures
from t4r_fast.compat.torch.features.embedding import (
    EmbeddingFeatures,
    FeatureConfig,
    SequenceEmbeddingFeatures,
    TableConfig,
)
from t4r_fast.compat.torch.features.pretrained import PretrainedEmbeddingFeatures
from t4r_fast.compat.torch.features.sequence import TabularSequenceFeatures
from t4r_fast.compat.torch.features.soft import SoftEmbedding, SoftEmbeddingFeatures
from t4r_fast.compat.torch.features.tabular import TabularFeatures
from t4r_fast.compat.torch.model.base import Model
from t4r_fast.compat.torch.model.head import Head
from t4r_fast.compat.torch.model.prediction_task import NextItemPredictionTask
from t4r_fast.compat.torch.model.replaced_item_task import ReplacedItemPredictionTask
from t4r_fast.compat.torch.model.session_task import (
    BinaryClassificationPrepareBlock,
    BinaryClassificationTask,
    RegressionPrepareBlock,
    RegressionTask,
)
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
    TabularBlock,
)
from t4r_fast.compat.torch.tabular.transformations import (
    StochasticSwapNoise,
    TabularDropout,
    TabularLayerNorm,
)
from t4r_fast.model.architecture import saveable

for _cls in (
    *(Model, Head, PredictionTask, NextItemPredictionTask, ReplacedItemPredictionTask),
    *(BinaryClassificationTask, BinaryClassificationPrepareBlock),
    *(RegressionTask, RegressionPrepareBlock),
    *(Block, SequentialBlock, MLPBlock, DenseBlock),
    *(TransformerBlock, GPT2Prepare, PostContextFusion),
    *(TabularFeatures, TabularSequenceFeatures, ContinuousFeatures, PretrainedEmbeddingFeatures),
    *(EmbeddingFeatures, SequenceEmbeddingFeatures, SoftEmbeddingFeatures, SoftEmbedding),
    *(TableConfig, FeatureConfig),
    *(AsTabular, FilterFeatures, MergeTabular, SequentialTabularTransformations, TabularBlock),
    *(ConcatFeatures, StackFeatures, ElementwiseSum, ElementwiseSumItemMulti),
    *(StochasticSwapNoise, TabularDropout, TabularLayerNorm),
    *(masking.CausalLanguageModeling, masking.MaskedLanguageModeling),
    *(masking.PermutationLanguageModeling, masking.ReplacementLanguageModeling),
    *(ranking_metric.NDCGAt, ranking_metric.DCGAt, ranking_metric.RecallAt),
    *(ranking_metric.PrecisionAt, ranking_metric.AvgPrecisionAt),
    ranking_metric.MeanReciprocalRankAt,
    *(session_metric.BinaryPrecision, session_metric.BinaryRecall),
    *(session_metric.BinaryAccuracy, session_metric.MeanSquaredError),
):
    saveable(_cls)

"""The input block: from id and number columns to one masked sequence of vectors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from t4r_fast.ops.sequence_embedding import sequence_embedding
from t4r_fast.schema import Schema, Tags
from t4r_fast.torch.block.base import BlockBase, BuildableBlock
from t4r_fast.torch.block.mlp import MLPBlock
from t4r_fast.torch.features.continuous import ContinuousFeatures
from t4r_fast.torch.features.embedding import Initializer, SequenceEmbeddingFeatures
from t4r_fast.torch.masking import MaskSequence, build_masking

# The reference's prose names "sequential-concat"; its code knows "concat".
AGGREGATIONS = {"concat": "concat", "sequential-concat": "concat", "element-wise-sum": "sum"}
CONTINUOUS_PROJECTION = "continuous_projection"


class TabularSequenceFeatures(BlockBase):
    """Looks up the ids, joins the features, projects them, masks them. Build it by from_schema.

    forward: dict of (B, L) columns -> (B, L, D), or (B, L + 1, D) for inference under "mlm". Number
    columns and ids of the user, (B,), are repeated over L.

    Features are joined in the order of their names (the order of a checkpoint's projection).
    Lookup, join and, without a projection, the [MASK] vector are one op: sequence_embedding. Tables
    whose torch.nn.Embedding has sparse=True get sparse gradients from it.
    The block keeps the batch's item ids (`item_seq`) and its masking's state for the head.
    Replaces transformers4rec.torch.TabularSequenceFeatures.
    """

    def __init__(
        self,
        continuous_module: nn.Module | None = None,
        categorical_module: SequenceEmbeddingFeatures | None = None,
        projection_module: nn.Module | None = None,
        masking: MaskSequence | None = None,
        aggregation: str = "concat",
        schema: Schema | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        super().__init__()
        if continuous_module is None and categorical_module is None:
            raise ValueError("TabularSequenceFeatures: the schema selects no feature")
        if masking is not None and (
            categorical_module is None or categorical_module.item_id is None
        ):
            raise ValueError("TabularSequenceFeatures: masking needs a column tagged item_id")
        modules = {"continuous_module": continuous_module, "categorical_module": categorical_module}
        self.to_merge = nn.ModuleDict({k: m for k, m in modules.items() if m is not None})
        self.projection_module = projection_module
        self._masking = masking
        self.aggregation = _checked_aggregation(aggregation)
        self.schema = schema
        self.max_sequence_length = max_sequence_length

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        continuous_tags: tuple[str, ...] | str | None = (Tags.CONTINUOUS,),
        categorical_tags: tuple[str, ...] | str | None = (Tags.CATEGORICAL,),
        aggregation: str | None = None,
        max_sequence_length: int | None = None,
        continuous_projection: int | list[int] | None = None,
        projection: BuildableBlock | nn.Module | None = None,
        d_output: int | None = None,
        masking: str | MaskSequence | None = None,
        embedding_dims: Mapping[str, int] | None = None,
        embedding_dim_default: int = 64,
        infer_embedding_sizes: bool = False,
        infer_embedding_sizes_multiplier: float = 2.0,
        embeddings_initializers: Mapping[str, Initializer] | None = None,
        item_id: str | None = None,
        **masking_arguments: object,
    ) -> TabularSequenceFeatures:
        """The input block for the columns of a schema.

        continuous_tags, categorical_tags  which columns are numbers and ids; None for none of them
        aggregation            "concat" (default; also "sequential-concat") or "element-wise-sum"
        max_sequence_length    L of the data; used to state the output size
        continuous_projection  width(s) of an MLP over all numbers together; the result is one
                               feature
        projection, d_output   what follows the join: a block, or the width of MLPBlock([d_output])
                               (Linear + ReLU); give one of them
        masking                "clm"/"causal", "mlm"/"masked", a MaskSequence or None
        embedding_dims ...     see SequenceEmbeddingFeatures.from_schema
        masking_arguments      mlm_probability, eval_on_last_item_seq_only, ...

        Raises ValueError for arguments that contradict each other or the schema, TypeError for
        unknown ones.
        """
        if projection is not None and d_output is not None:
            raise ValueError(
                "TabularSequenceFeatures: give projection or d_output, not both; d_output=n is"
                " short for projection=MLPBlock([n])"
            )
        if masking_arguments and not isinstance(masking, str):
            raise TypeError(
                "TabularSequenceFeatures.from_schema: unknown arguments"
                f" {sorted(masking_arguments)}"
            )
        categorical = continuous = None
        if categorical_tags:
            categorical = SequenceEmbeddingFeatures.from_schema(
                schema,
                tags=_as_tags(categorical_tags),
                embedding_dims=embedding_dims,
                embedding_dim_default=embedding_dim_default,
                infer_embedding_sizes=infer_embedding_sizes,
                infer_embedding_sizes_multiplier=infer_embedding_sizes_multiplier,
                embeddings_initializers=embeddings_initializers,
                item_id=item_id,
            )
        if continuous_tags:
            continuous = ContinuousFeatures.from_schema(schema, _as_tags(continuous_tags))
        block = cls(
            continuous,
            categorical,
            aggregation=aggregation or "concat",
            schema=schema,
            max_sequence_length=max_sequence_length,
        )
        if continuous_projection is not None:
            block.project_continuous_features(continuous_projection)
        if d_output is not None:
            projection = MLPBlock([d_output])
        if projection is not None:
            built = (
                projection.build(block.output_size())
                if (isinstance(projection, BuildableBlock))
                else projection
            )
            block.projection_module = built
        width = block.output_size()[-1]
        if isinstance(masking, str):
            masking = build_masking(masking, hidden_size=width, **masking_arguments)
        if masking is not None:
            block.set_masking(masking)
        return block

    # -- parts -----------------------------------------------------------------------------------

    def _part(self, name: str) -> nn.Module | None:
        # nn.ModuleDict has no get, and torch.compile cannot trace dict(ModuleDict)
        return self.to_merge[name] if name in self.to_merge else None  # noqa: SIM401

    @property
    def categorical_module(self) -> SequenceEmbeddingFeatures | None:
        return self._part("categorical_module")

    @property
    def continuous_module(self) -> nn.Module | None:
        return self._part("continuous_module")

    @property
    def masking(self) -> MaskSequence | None:
        return self._masking

    def set_masking(self, masking: MaskSequence) -> None:
        if self.categorical_module is None or self.categorical_module.item_id is None:
            raise ValueError("TabularSequenceFeatures: masking needs a column tagged item_id")
        width = self.output_size()[-1]
        if masking.hidden_size != width:
            raise ValueError(
                "TabularSequenceFeatures: masking.hidden_size must be the block's width,"
                f" {width}; got {masking.hidden_size}"
            )
        self._masking = masking

    @property
    def item_id(self) -> str | None:
        return None if self.categorical_module is None else self.categorical_module.item_id

    @property
    def item_embedding_table(self) -> nn.Embedding:
        return self.categorical_module.item_embedding_table

    def project_continuous_features(self, dimensions: int | list[int]) -> TabularSequenceFeatures:
        """Put an MLP over all number features; they become the one feature
        `continuous_projection`."""
        numbers = self.continuous_module
        if not isinstance(numbers, ContinuousFeatures):
            raise ValueError(
                "TabularSequenceFeatures: continuous_projection needs number columns in the schema"
            )
        mlp = MLPBlock(dimensions).build((-1, -1, len(numbers.features)))
        self.to_merge["continuous_module"] = nn.Sequential(numbers, mlp)
        return self

    def _widths(self) -> dict[str, int]:
        """Width of every joined feature, by name."""
        widths: dict[str, int] = {}
        if self.categorical_module is not None:
            tables = self.categorical_module.embedding_tables
            widths.update({name: table.embedding_dim for name, table in tables.items()})
        numbers = self.continuous_module
        if isinstance(numbers, ContinuousFeatures):
            widths.update(dict.fromkeys(numbers.features, 1))
        elif numbers is not None:
            widths[CONTINUOUS_PROJECTION] = numbers[1].output_size()[-1]
        return widths

    def output_size(self) -> tuple[int, ...]:
        length = self.max_sequence_length or -1
        if self.projection_module is not None:
            if isinstance(self.projection_module, BlockBase):
                return (-1, length, self.projection_module.output_size()[-1])
            raise ValueError(
                "TabularSequenceFeatures: projection does not know its output size; wrap it in"
                " Block(module, output_size)"
            )
        widths = self._widths()
        if self.aggregation == "concat":
            return (-1, length, sum(widths.values()))
        if len(set(widths.values())) > 1:
            raise ValueError(
                "TabularSequenceFeatures: element-wise-sum needs features of one width; got"
                f" {widths}. Give continuous_projection, or embedding_dims"
            )
        return (-1, length, next(iter(widths.values())))

    # -- the pass --------------------------------------------------------------------------------

    def _columns(
        self, inputs: dict[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[nn.Embedding | None]]:
        """The columns in the order of their names, with the table of each id column."""
        named: dict[str, tuple[torch.Tensor, nn.Embedding | None]] = {}
        categorical, numbers = self.categorical_module, self.continuous_module
        if categorical is not None:
            for name, table in categorical.embedding_tables.items():
                named[name] = (_column(inputs, name), table)
        if isinstance(numbers, ContinuousFeatures):
            for name in numbers.features:
                named[name] = (_column(inputs, name).to(torch.float32), None)
        elif numbers is not None:
            named[CONTINUOUS_PROJECTION] = (numbers(inputs), None)
        length = max(c.shape[1] for c, _ in named.values() if c.dim() > 1)
        ordered = [named[name] for name in sorted(named)]
        columns = [c if c.dim() > 1 else c.unsqueeze(1).expand(-1, length) for c, _ in ordered]
        return columns, [table for _, table in ordered]

    def forward(
        self, inputs: dict[str, torch.Tensor], training: bool = False, testing: bool = False
    ) -> torch.Tensor:
        columns, tables = self._columns(inputs)
        joined = partial(
            sequence_embedding,
            columns,
            [None if table is None else table.weight for table in tables],
            aggregation=self.aggregation,
            sparse=[table is not None and table.sparse for table in tables],
        )
        if self._masking is None:
            x = joined()
            return x if self.projection_module is None else self.projection_module(x)
        masking, item_ids = self._masking, _column(inputs, self.item_id)
        self.categorical_module.item_seq = item_ids
        masking.compute_masked_targets(item_ids, training=training, testing=testing)
        # Where the join itself is masked and nothing is appended, the op writes [MASK] in its pass.
        if self.projection_module is None and training:
            return joined(mask=masking.replaced, mask_vector=masking.masked_item_embedding)
        x = joined()
        if self.projection_module is not None:
            x = self.projection_module(x)
        return masking.apply_mask_to_inputs(x, training=training, testing=testing)


def _checked_aggregation(aggregation: str) -> str:
    if aggregation not in AGGREGATIONS:
        raise ValueError(
            f"TabularSequenceFeatures: aggregation must be one of {', '.join(AGGREGATIONS)}; got"
            f" {aggregation!r}"
        )
    return AGGREGATIONS[aggregation]


def _as_tags(tags: tuple[str, ...] | str) -> tuple[str, ...]:
    return (tags,) if isinstance(tags, str) else tuple(tags)


def _column(inputs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    try:
        return inputs[name]
    except KeyError:
        raise KeyError(
            f"TabularSequenceFeatures: the batch lacks the column {name!r}; it holds"
            f" {sorted(inputs)}"
        ) from None

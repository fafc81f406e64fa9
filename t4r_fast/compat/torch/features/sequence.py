"""The input block: from id and number columns to one masked sequence of vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from t4r_fast.compat import warn_once
from t4r_fast.compat.torch.block.base import BlockBase, BuildableBlock
from t4r_fast.compat.torch.block.mlp import MLPBlock
from t4r_fast.compat.torch.features.continuous import column
from t4r_fast.compat.torch.features.embedding import SequenceEmbeddingFeatures, keeps_targets
from t4r_fast.compat.torch.features.tabular import TabularFeatures
from t4r_fast.compat.torch.masking import (
    Drawn,
    MaskSequence,
    ReplacementLanguageModeling,
    build_masking,
    masking_options,
)
from t4r_fast.compat.torch.tabular.aggregation import (
    ConcatFeatures,
    ElementwiseSum,
    ElementwiseSumItemMulti,
)
from t4r_fast.compat.torch.tabular.base import (
    Sizes,
    TabularAggregation,
    TabularAggregationType,
    TabularData,
    TabularTransformationsType,
)
from t4r_fast.ops.sequence_embedding import sequence_embedding
from t4r_fast.schema import Schema, Tags

__all__ = ["SequenceEmbeddingFeatures", "TabularSequenceFeatures"]

# A column, and the table in which its ids are looked up; None: it is the feature itself.
Part = tuple[torch.Tensor, nn.Embedding | None]
# The aggregations that the op sequence_embedding does, by their exact class.
AGGREGATIONS = {ConcatFeatures: "concat", ElementwiseSum: "sum"}


class Encoded(NamedTuple):
    """A padded batch behind the input block.

    vectors   (B, L, D), or a dict of features where nothing joins them
    item_ids  (B, L) int64, those that targets are made of; None without a column of items
    drawn     what the masking decided; None without a masking
    columns   the columns that the vectors were made of
    """

    vectors: torch.Tensor | TabularData
    item_ids: torch.Tensor | None
    drawn: Drawn | None
    columns: TabularData


class TabularSequenceFeatures(TabularFeatures):
    """Looks up the ids, joins the features, projects them, masks them. Build it by from_schema.

    continuous_module, categorical_module, pretrained_embedding_module  the parts, at least one
    projection_module          what follows the join
    masking                    what follows the projection; needs a column tagged item_id
    pre, post, aggregation, schema  see TabularBlock
    post_before_aggregation    apply `post` where there is a masking or projection too. None: drop
                               it then, as the reference does, with a warning

    forward: dict of (B, L) columns -> (B, L, D), or (B, L + 1, D) for inference under "mlm"; a dict
    of features without aggregation, projection and masking. Columns of the user, (B,), are repeated
    over L.

    Features are joined in the order of their names (the order of a checkpoint's projection).
    Lookup, join and, without a projection, the [MASK] vector are one op: sequence_embedding. Tables
    whose torch.nn.Embedding has sparse=True get sparse gradients from it.
    A call notes the batch's item ids (`item_seq`) and what the masking drew, for a head that is
    called by itself; the pass of a Model hands them on as a value, Encoded.
    Replaces transformers4rec.torch.TabularSequenceFeatures.
    """

    EMBEDDING_MODULE_CLASS = SequenceEmbeddingFeatures

    def __init__(
        self,
        continuous_module: nn.Module | None = None,
        categorical_module: nn.Module | None = None,
        pretrained_embedding_module: nn.Module | None = None,
        projection_module: nn.Module | None = None,
        masking: MaskSequence | None = None,
        pre: TabularTransformationsType | None = None,
        post: TabularTransformationsType | None = None,
        aggregation: TabularAggregationType | None = None,
        schema: Schema | None = None,
        post_before_aggregation: bool | None = None,
    ) -> None:
        super().__init__(
            continuous_module,
            categorical_module,
            pretrained_embedding_module,
            pre,
            post,
            aggregation,
            schema,
        )
        self.projection_module = projection_module
        self.post_before_aggregation = post_before_aggregation
        self._masking: MaskSequence | None = None
        self.noted_columns: TabularData = {}
        self.set_masking(masking)

    @classmethod
    def from_schema(
        cls,
        schema: Schema,
        continuous_tags: object = (Tags.CONTINUOUS,),
        categorical_tags: object = (Tags.CATEGORICAL,),
        pretrained_embeddings_tags: object = (Tags.EMBEDDING,),
        aggregation: TabularAggregationType | None = None,
        automatic_build: bool = True,
        max_sequence_length: int | None = None,
        continuous_projection: int | list[int] | None = None,
        continuous_soft_embeddings: bool = False,
        projection: BuildableBlock | nn.Module | None = None,
        d_output: int | None = None,
        masking: str | MaskSequence | None = None,
        table_padding_idx: int = 0,
        **kwargs: object,
    ) -> TabularSequenceFeatures:
        """The input block for the columns of a schema.

        aggregation          "concat" (also "sequential-concat"), "element-wise-sum",
                             "element-wise-sum-item-multi", "stack", or a module. None: "concat"
                             with projection, d_output or masking, else a dict of features
        projection, d_output what follows the join: a block, or the width of MLPBlock([d_output])
                             (Linear + ReLU); give one of them
        masking              "clm"/"causal", "mlm"/"masked", "plm"/"permutation",
                             "rtd"/"replacement", a MaskSequence or None
        table_padding_idx    the id of padding in the embedding tables. As in the reference
                             padding_idx, one of kwargs, is the masking's alone. The Trainer's
                             loaders pad with both: items with the masking's, others with this
        kwargs               options of the parts (see TabularFeatures.from_schema) and of the
                             masking: mlm_probability, eval_on_last_item_seq_only, ...

        The other arguments are those of TabularFeatures.from_schema.
        Raises ValueError for arguments that contradict each other or the schema, TypeError for
        unknown ones.
        """
        if projection is not None and d_output is not None:
            raise ValueError(
                "TabularSequenceFeatures: give projection or d_output, not both; d_output=n is"
                " short for projection=MLPBlock([n])"
            )
        of_masking = masking_options(masking)
        mask_arguments = {name: kwargs.pop(name) for name in list(kwargs) if name in of_masking}
        joined = projection is not None or d_output is not None or masking is not None
        if table_padding_idx:
            kwargs["padding_idx"] = table_padding_idx
        block = super().from_schema(
            schema,
            continuous_tags=continuous_tags,
            categorical_tags=categorical_tags,
            pretrained_embeddings_tags=pretrained_embeddings_tags,
            aggregation="concat" if aggregation is None and joined else aggregation,
            automatic_build=automatic_build,
            max_sequence_length=max_sequence_length,
            continuous_projection=continuous_projection,
            continuous_soft_embeddings=continuous_soft_embeddings,
            **kwargs,
        )
        if d_output is not None:
            projection = MLPBlock([d_output])
        if isinstance(projection, BuildableBlock):
            projection = projection.build(block.output_size())
        block.projection_module = projection
        if isinstance(masking, str):
            block._check_item_id()
            width = block.output_size()[-1]
            masking = build_masking(masking, hidden_size=width, **mask_arguments)
        block.set_masking(masking)
        return block

    # -- parts -----------------------------------------------------------------------------------

    @property
    def masking(self) -> MaskSequence | None:
        return self._masking

    def set_masking(self, value: MaskSequence | None) -> None:
        if value is not None:
            self._check_item_id()
            size = self.output_size()
            if size is not None and value.hidden_size != size[-1]:
                raise ValueError(
                    "TabularSequenceFeatures: masking.hidden_size must be the block's width,"
                    f" {size[-1]}; got {value.hidden_size}"
                )
        self._masking = value

    def _check_item_id(self) -> None:
        if self.item_id is None:
            raise ValueError("TabularSequenceFeatures: masking needs a column tagged item_id")

    @property
    def item_id(self) -> str | None:
        return getattr(self.categorical_module, "item_id", None)

    @property
    def item_embedding_table(self) -> nn.Module | None:
        return getattr(self.categorical_module, "item_embedding_table", None)

    def project_continuous_features(self, dimensions: int | list[int]) -> TabularSequenceFeatures:
        """See TabularFeatures; the reference names the argument so here."""
        return super().project_continuous_features(dimensions)

    def output_size(self, input_size: Sizes | None = None):
        size = super().output_size(input_size)
        if self.projection_module is None or size is None:
            return size
        if isinstance(self.projection_module, BlockBase):
            return (*size[:-1], self.projection_module.output_size()[-1])
        raise ValueError(
            "TabularSequenceFeatures: projection does not know its output size; wrap it in"
            " Block(module, output_size)"
        )

    # -- the pass --------------------------------------------------------------------------------

    def __call__(self, inputs: TabularData, *args: object, pre: Any = None, **kwargs: object):
        # What is given for this call alone works on the features, so forward must not join them.
        if any(kwargs.get(name) is not None for name in ("post", "merge_with", "aggregation")):
            kwargs["as_features"] = True
        kwargs["item_ids"] = self._true_item_ids(inputs, pre)
        return super().__call__(inputs, *args, pre=pre, **kwargs)

    def _true_item_ids(self, inputs: TabularData, pre: Any = None) -> torch.Tensor | None:
        """The items to predict, where they are read before `pre` changes them; else None."""
        pre = self.pre if pre is None else pre
        if pre is None or self.item_id is None or not keeps_targets(pre):
            return None
        return column(inputs, self.item_id)

    def forward(
        self,
        inputs: TabularData,
        training: bool = False,
        testing: bool = False,
        as_features: bool = False,
        item_ids: torch.Tensor | None = None,
        **_: object,
    ) -> TabularData | torch.Tensor:
        encoded = self._encoded(inputs, training, testing, as_features, item_ids)
        self.note(encoded)
        return encoded.vectors

    def encoded(self, inputs: TabularData, training: bool, testing: bool) -> Encoded:
        """What a call gives, as a value: nothing is noted."""
        item_ids = self._true_item_ids(inputs)
        found = self._encoded(self.pre_forward(inputs), training, testing, item_ids=item_ids)
        if isinstance(found.vectors, dict):
            found = found._replace(vectors=self.post_forward(found.vectors))
        return found

    def note(self, encoded: Encoded) -> None:
        """Keep the item ids and the mask for code that reads them from the modules."""
        if encoded.item_ids is not None:
            self.categorical_module.item_seq = encoded.item_ids
        if encoded.drawn is not None:
            self._masking.note(encoded.drawn)
        if isinstance(self._masking, ReplacementLanguageModeling):
            self.noted_columns = encoded.columns

    def _encoded(
        self,
        inputs: TabularData,
        training: bool,
        testing: bool,
        as_features: bool = False,
        item_ids: torch.Tensor | None = None,
    ) -> Encoded:
        parts, found = self._parts(inputs)
        item_ids = found if item_ids is None else item_ids
        aggregation, masking, drawn = self.aggregation, self._masking, None
        if masking is None and self.projection_module is None:
            if aggregation is None or self.post is not None or as_features:
                x = _features(parts, self.padding_idx)
            else:
                x = self._join(parts, aggregation)
            return Encoded(x, item_ids, None, inputs)
        if as_features:
            raise ValueError(
                "TabularSequenceFeatures: post, merge_with and aggregation of a single call need a"
                " block without masking and projection"
            )
        aggregation = ConcatFeatures() if aggregation is None else aggregation
        if self.post is not None:
            parts = self._after_post(parts)
        if masking is None:
            return Encoded(
                self.projection_module(self._join(parts, aggregation)), item_ids, None, inputs
            )
        if self.projection_module is None and training and masking.replaces_inputs_only:
            # Nothing stands between join and mask: the op writes [MASK] in its pass.
            drawn = masking.drawn(item_ids, training, testing)
            return Encoded(self._join(parts, aggregation, drawn), item_ids, drawn, inputs)
        x = self._join(parts, aggregation)
        if self.projection_module is not None:
            x = self.projection_module(x)
        if type(masking).forward is not MaskSequence.forward or _is_hooked(masking):
            x = masking(x, item_ids=item_ids, training=training, testing=testing)
            return Encoded(x, item_ids, masking.noted, inputs)
        drawn = masking.drawn(item_ids, training, testing)
        schema = drawn.mask_schema
        x = masking.apply_mask_to_inputs(x, schema, training=training, testing=testing)
        return Encoded(x, item_ids, drawn, inputs)

    def unmasked(self, columns: TabularData, item_ids: torch.Tensor) -> torch.Tensor:
        """What becomes of a batch's columns with other item ids (B, L), before the masking."""
        parts, _ = self._parts({**columns, self.item_id: item_ids})
        if self.post is not None:
            parts = self._after_post(parts)
        x = self._join(parts, self.aggregation or ConcatFeatures())
        return x if self.projection_module is None else self.projection_module(x)

    @property
    def padding_idx(self) -> int:
        """The id of padding in the tables."""
        return getattr(self.categorical_module, "padding_idx", 0)

    def _parts(self, inputs: TabularData) -> tuple[dict[str, Part], torch.Tensor | None]:
        """All features by name, ids with their table where the module looks up and does no more;
        and the item ids."""
        parts: dict[str, Part] = {}
        item_ids = None
        for module in self.merge_values:
            item = getattr(module, "item_id", None)
            if only_looks_up(module):
                columns = module.pre_forward(inputs)
                for name, table in module.embedding_tables.items():
                    parts[name] = (column(columns, name).long(), table)
                if item is not None:
                    keep = module.pre is not None and keeps_targets(module.pre)
                    item_ids = module.item_ids(inputs if keep else columns)
                continue
            parts.update({name: (value, None) for name, value in module(inputs).items()})
            if item is not None:
                # transformed ones are known to the module alone
                keep = module.pre is None or keeps_targets(module.pre)
                item_ids = module.item_ids(inputs) if keep else module.item_seq
        return parts, item_ids

    def _after_post(self, parts: dict[str, Part]) -> dict[str, Part]:
        if not self.post_before_aggregation:
            warn_once(
                "post_before_aggregation",
                "TabularSequenceFeatures drops post because it has a masking or a projection, as"
                " the reference does; give post_before_aggregation=True",
            )
            return parts
        features = self.post(_features(parts, self.padding_idx))
        return {name: (value, None) for name, value in features.items()}

    def _join(
        self,
        parts: dict[str, Part],
        aggregation: TabularAggregation,
        drawn: Drawn | None = None,
    ) -> torch.Tensor:
        """(B, L, W); with a mask the [MASK] vector stands at the drawn positions."""
        kind, padding_idx = AGGREGATIONS.get(type(aggregation)), self.padding_idx
        aggregation.set_schema(self.schema)
        if kind is not None:
            mask = None if drawn is None else drawn.replaced
            vector = None if drawn is None else self._masking.masked_item_embedding
            return _joined(parts, kind, padding_idx, mask, vector)
        if type(aggregation) is ElementwiseSumItemMulti and len(parts) > 1:
            item = self.schema.item_id_column_name
            rest = {name: part for name, part in parts.items() if name != item}
            _check_one_width(parts)
            x = _joined(rest, "sum", padding_idx)
            x = x * _joined({item: parts[item]}, "sum", padding_idx)
        else:
            x = aggregation(_features(parts, padding_idx))
        return (
            x if drawn is None else self._masking.apply_mask_to_inputs(x, drawn.mask_schema, True)
        )


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def only_looks_up(module: nn.Module) -> bool:
    """Whether the op may look up for this module: nothing of it, and nothing behind, is changed."""
    return (
        isinstance(module, SequenceEmbeddingFeatures)
        and module.post is None
        and module.aggregation is None
        and type(module).forward is SequenceEmbeddingFeatures.forward
        and type(module).embed is SequenceEmbeddingFeatures.embed
        and not _is_hooked(module)
        and all(type(table) is nn.Embedding for table in module.embedding_tables.values())
    )


def _joined(
    parts: dict[str, Part],
    kind: str,
    padding_idx: int,
    mask: torch.Tensor | None = None,
    vector: torch.Tensor | None = None,
) -> torch.Tensor:
    named = [parts[name] for name in sorted(parts)]
    # ids are (B, L) or (B,), features (B, L, W) or (B, W): one axis more
    lengths = [c.shape[1] for c, table in named if c.dim() > (1 if table is not None else 2)]
    if not lengths:
        features = _features(parts, padding_idx)
        return (ConcatFeatures() if kind == "concat" else ElementwiseSum())(features)
    # under autocast features of a module come in half precision, the tables stay float32
    weights = [table.weight.dtype for _, table in named if table is not None]
    dtype = weights[0] if weights else torch.float32
    columns = []
    for c, table in named:
        if table is None:
            c = c.to(dtype)
        sequence = c.dim() > (1 if table is not None else 2)
        columns.append(c if sequence else c.unsqueeze(1).expand(-1, lengths[0], *c.shape[1:]))
    return sequence_embedding(
        columns,
        [None if table is None else table.weight for _, table in named],
        aggregation=kind,
        mask=mask,
        mask_vector=vector,
        padding_idx=padding_idx,
        sparse=[table is not None and table.sparse for _, table in named],
    )


def _features(parts: dict[str, Part], padding_idx: int) -> TabularData:
    """The features themselves: ids looked up."""
    features = {}
    for name, (values, table) in parts.items():
        if table is not None:
            ids = values if values.dim() == 2 else values.unsqueeze(1)
            found = sequence_embedding(
                [ids], [table.weight], padding_idx=padding_idx, sparse=table.sparse
            )
            values = found if values.dim() == 2 else found.squeeze(1)
        features[name] = values
    return features


def _check_one_width(parts: dict[str, Part]) -> None:
    widths = {
        name: values.shape[-1] if table is None else table.embedding_dim
        for name, (values, table) in parts.items()
    }
    if len(set(widths.values())) > 1:
        raise ValueError(f"ElementwiseSumItemMulti: features must have one width; got {widths}")

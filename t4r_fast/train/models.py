"""The tutorial's models: two GRUs and two XLNets, built as its cells build them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from t4r_fast.errors import InputError
from t4r_fast.schema import Schema

if TYPE_CHECKING:
    from t4r_fast.compat.torch import Model

SIDE_FEATURES = (
    "category_id",
    "brand",
    "product_recency_days_log_norm",
    "et_dayofweek_sin",
    "et_dayofweek_cos",
    "price_log_norm",
    "relative_price_to_avg_categ_id",
)
SUFFIXES = ("-list_seq", "-list")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One model of the tutorial.

    title          name in the report
    results_title  its line in results.txt; the three of the tutorial are as its cells write them
    about          one sentence for the report's legend
    body           "gru" or "xlnet"
    d_model        width of the body
    n_layer        layers of the body
    learning_rate  the tutorial's
    side           whether it needs category, brand, price, recency and day of week
    """

    title: str
    results_title: str
    about: str
    body: str
    d_model: int
    n_layer: int
    learning_rate: float
    side: bool = False


KINDS = {
    "gru_as_printed": Kind(
        "GRU, as printed",
        "GRU accuracy results:",
        "Item ids through a GRU as the tutorial prints it: torch.nn.GRU without batch_first, so"
        " its memory runs over the sessions of a batch and not over time; it sees one item of a"
        " session, and its numbers depend on the evaluation batch size.",
        body="gru",
        d_model=128,
        n_layer=1,
        learning_rate=0.00071,
    ),
    "gru": Kind(
        "GRU over time",
        "GRU over time accuracy results:",
        "The same GRU with batch_first=True: its memory runs over the items of a session.",
        body="gru",
        d_model=128,
        n_layer=1,
        learning_rate=0.00071,
    ),
    "xlnet_mlm": Kind(
        "XLNet-MLM",
        "XLNet-MLM accuracy results:",
        "Item ids through a two-layer XLNet, trained to fill in masked items.",
        body="xlnet",
        d_model=192,
        n_layer=2,
        learning_rate=0.000666,
    ),
    "xlnet_mlm_side": Kind(
        "XLNet-MLM with side information",
        "XLNet-MLM with side information accuracy results:",
        "The same XLNet that also reads category, brand, price, recency and day of week.",
        body="xlnet",
        d_model=192,
        n_layer=2,
        learning_rate=0.000666,
        side=True,
    ),
}


def kind_of(name: str) -> Kind:
    """The Kind called `name`; InputError with the known names otherwise."""
    if name not in KINDS:
        raise InputError(f"there is no model {name!r}; the models are {', '.join(KINDS)}")
    return KINDS[name]


def feature_columns(name: str, schema: Schema) -> list[str]:
    """The columns that model `name` reads: the item column, and the side features if it has them.

    Raises InputError when the schema lacks one of the side features.
    """
    item = schema.item_id_column_name
    if not kind_of(name).side:
        return [item]
    missing = missing_side_features(schema)
    if missing:
        raise InputError(
            f"model {name} also reads side features, and the data has no {', '.join(missing)};"
            " map the columns in the ETL (--map category=..,brand=..,price=..) or leave it out"
        )
    suffix = _suffix(item)
    return [item, *(feature + suffix for feature in SIDE_FEATURES)]


def missing_side_features(schema: Schema) -> list[str]:
    """The side features of the tutorial that the schema does not have."""
    suffix = _suffix(schema.item_id_column_name)
    return [feature for feature in SIDE_FEATURES if feature + suffix not in schema]


def _suffix(item_column: str) -> str:
    for suffix in SUFFIXES:
        if item_column.endswith(suffix):
            return suffix
    return ""


def build(
    name: str,
    schema: Schema,
    *,
    d_model: int | None = None,
    n_head: int = 4,
    n_layer: int | None = None,
    item_dim: int = 64,
    embedding_std: float = 0.05,
    dropout: float = 0.3,
    max_sequence_length: int = 20,
    negatives: int = 0,
    sampler: str = "log_uniform",
    attend_padding: bool = False,
) -> Model:
    """A model of the tutorial with fresh weights from torch's global generator.

    name                 "gru_as_printed", "gru", "xlnet_mlm", "xlnet_mlm_side"
    schema               of the whole data; the model takes its own columns
    d_model              width of the body; None: 128 for a GRU, 192 for an XLNet
    n_head               attention heads of XLNet; d_model must be a multiple
    n_layer              layers of the body; None: 1 for a GRU, 2 for an XLNet
    item_dim             width of the embedding tables, and so of the tied softmax
    embedding_std        deviation of fresh embeddings; the reference's .05 learns slowly on little
                         data, since the scores of a tied softmax start near zero and must grow
    dropout              of XLNet, 0 <= dropout < 1; a GRU has none, as in the tutorial
    max_sequence_length  L
    negatives            drawn items per batch that training scores beside the targets; 0: all items
    sampler              how they are drawn, see NextItemPredictionTask
    attend_padding       of XLNet: whether items see the padding behind them, as in the tutorial.
                         False: sessions are not padded at all

    Raises InputError on an unknown name, missing columns, or heads that do not divide d_model.
    """
    import t4r_fast.compat.torch as tr
    from t4r_fast.compat.torch.ranking_metric import NDCGAt, RecallAt

    kind = kind_of(name)
    width = d_model or kind.d_model
    layers = n_layer or kind.n_layer
    columns = schema.select_by_name(feature_columns(name, schema))
    tables = _tables(columns, item_dim, embedding_std)
    if kind.body == "gru":
        inputs, body = _gru_body(name, columns, width, layers, max_sequence_length, tables)
    else:
        if width % n_head:
            raise InputError(
                f"d_model must be a multiple of the {n_head} attention heads; got {width}"
            )
        inputs = tr.TabularSequenceFeatures.from_schema(
            columns,
            max_sequence_length=max_sequence_length,
            aggregation="concat",
            d_output=width,
            masking="mlm",
            **tables,
        )
        config = tr.XLNetConfig.build(
            d_model=width,
            n_head=n_head,
            n_layer=layers,
            total_seq_length=max_sequence_length,
            dropout=dropout,
        )
        body = tr.SequentialBlock(
            inputs,
            tr.MLPBlock([width]),
            tr.TransformerBlock(config, masking=inputs.masking, attend_padding=attend_padding),
        )
    metrics = [metric(top_ks=[10, 20], labels_onehot=True) for metric in (NDCGAt, RecallAt)]
    sampling = (
        {"sampled_softmax": True, "max_n_samples": negatives, "sampler": sampler}
        if negatives
        else {}
    )
    task = tr.NextItemPredictionTask(weight_tying=True, metrics=metrics, **sampling)
    return tr.Model(tr.Head(body, task, inputs=inputs), max_sequence_length=max_sequence_length)


def _tables(columns: Schema, width: int, std: float) -> dict:
    """Arguments for the embedding tables: their width and how they start."""
    import functools

    import torch

    start = functools.partial(torch.nn.init.normal_, mean=0.0, std=std)
    names = [c.name for c in columns if c.is_categorical]
    return {"embedding_dim_default": width, "embeddings_initializers": dict.fromkeys(names, start)}


def _gru_body(name: str, columns: Schema, width: int, layers: int, length: int, tables: dict):
    import torch

    import t4r_fast.compat.torch as tr

    over_time = name == "gru"
    # at compat 0.1 evaluation hides the history, which a GRU over time is there to read
    masking = {"hide_history": False} if over_time else {}
    inputs = tr.TabularSequenceFeatures.from_schema(
        columns,
        max_sequence_length=length,
        masking="causal",
        **tables,
        **masking,
    )
    gru = torch.nn.GRU(width, width, num_layers=layers, batch_first=over_time)
    return inputs, tr.SequentialBlock(
        inputs, tr.MLPBlock([width]), tr.Block(gru, [None, length, width])
    )

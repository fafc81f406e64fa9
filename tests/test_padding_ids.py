"""Padding with another id than 0: the loaders and ragged inputs follow the model."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import triton_double as double
from training_case import BATCH, ITEM, ITEMS, LENGTH, PRICE, ROWS, SCHEMA, write_sessions

import t4r_fast.torch as tr
from t4r_fast.dropin.nvtabular import Dataset
from t4r_fast.dropin.nvtabular.loader.torch import DLDataLoader, TorchAsyncItr
from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema
from t4r_fast.serving import export
from t4r_fast.torch.padding import model_padding, pad_inputs

PAD = 7
SIDE = "brand-list_seq"
ONLY_ITEMS = SCHEMA.select_by_name(ITEM)


def swapped(ids):
    """Ids with 0 and 7 changed for each other."""
    return np.where(ids == 0, PAD, np.where(ids == PAD, 0, ids))


def make_model(pad, masking="mlm"):
    """A model without dropout; with PAD the same one on swapped ids."""
    torch.manual_seed(0)
    options = {} if not pad else {"padding_idx": pad, "table_padding_idx": pad}
    inputs = tr.TabularSequenceFeatures.from_schema(
        ONLY_ITEMS,
        max_sequence_length=LENGTH,
        aggregation="concat",
        d_output=16,
        masking=masking,
        embedding_dim_default=8,
        **options,
    )
    config = tr.XLNetConfig.build(16, 2, 1, LENGTH, dropout=0.0)
    body = tr.SequentialBlock(inputs, tr.TransformerBlock(config, masking=inputs.masking))
    task = tr.NextItemPredictionTask(weight_tying=True)
    model = tr.Model(tr.Head(body, task, inputs=inputs))
    if pad:
        table = inputs.item_embedding_table.weight
        with torch.no_grad():
            table[[0, pad]] = table[[pad, 0]]
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same sessions with padding 0 and, ids swapped, with padding 7."""
    folder = tmp_path_factory.mktemp("padded")
    plain = write_sessions(folder / "0.parquet")
    table = pq.read_table(plain)
    items = [swapped(np.array(s)).tolist() for s in table[ITEM].to_pylist()]
    other = folder / "7.parquet"
    pq.write_table(table.set_column(0, ITEM, pa.array(items)), other, row_group_size=25)
    assert sum(0 in s for s in items) > 3
    return {0: plain, PAD: str(other)}


def make_trainer(out, model, data=None, **options):
    arguments = tr.T4RecTrainingArguments(
        output_dir=str(out), per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH,
        max_sequence_length=LENGTH, learning_rate=1e-2, max_steps=12, save_strategy="no",
        use_cpu=True, disable_tqdm=True, report_to=[],
    )  # fmt: skip
    return tr.Trainer(
        model, arguments, schema=ONLY_ITEMS, train_dataset_or_path=data,
        eval_dataset_or_path=data, compute_metrics=True, **options,
    )  # fmt: skip


def numbers(found):
    return {k: v for k, v in found.items() if "/" in k}


# -- wrong and right -------------------------------------------------------------------------------


def test_the_trainer_pads_as_its_model_does(files, tmp_path):
    """Renaming ids changes nothing, the id of padding among them."""
    found = {}
    for pad, data in files.items():
        trainer = make_trainer(tmp_path, make_model(pad), data)
        before = numbers(trainer.evaluate())
        trainer.train()
        found[pad] = before, numbers(trainer.evaluate())
    for theirs, ours in zip(found[0], found[PAD], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert found[0][1]["eval_/loss"] < found[0][0]["eval_/loss"]


def test_padding_of_0_is_learned_as_an_item_by_such_a_model(files):
    model = make_model(PAD, "clm").eval()
    batch, _ = next(
        iter(tr.ParquetDataLoader(files[PAD], ONLY_ITEMS, BATCH, LENGTH, padding_idx=PAD))
    )
    items = batch[ITEM]
    right = model(batch, testing=True)
    assert (right["labels"] == items.gather(1, (items != PAD).sum(1, keepdim=True) - 1)[:, 0]).all()
    # what the reference's loaders would give: 0, which is an item here, behind every session
    wrong = model({ITEM: torch.where(items == PAD, 0, items)}, testing=True)
    short = (items == PAD).any(dim=1)
    assert short.sum() > 3
    assert (wrong["labels"][short] == 0).all()
    assert wrong["loss"] != right["loss"]


def test_a_loader_that_pads_otherwise_is_refused(files, tmp_path):
    model = make_model(PAD)
    loaders = [
        tr.ParquetDataLoader(files[PAD], ONLY_ITEMS, BATCH, LENGTH),
        tr.MerlinDataLoader.from_schema(ONLY_ITEMS, files[PAD], BATCH, LENGTH),
        DLDataLoader(
            TorchAsyncItr(
                Dataset(files[PAD]), [ITEM], [], [], BATCH, sparse_names=[ITEM],
                sparse_max={ITEM: LENGTH}, sparse_as_dense=True,
            ),
            collate_fn=lambda batch: batch,
            batch_size=None,
        ),
    ]  # fmt: skip
    says = rf"pads with other ids .*{{'{ITEM}': 0}}, the model's {{'{ITEM}': 7}}"
    for loader in loaders:
        for call in (model.fit, model.evaluate):
            with pytest.raises(InputError, match=f"Model.{call.__name__}: .*{says}"):
                call(loader, verbose=False)
        trainer = make_trainer(tmp_path, model, train_dataloader=loader)
        with pytest.raises(InputError, match=f"Trainer: .*{says}"):
            trainer.train()
        with pytest.raises(InputError, match=f"Trainer: .*{says}"):
            trainer.evaluate(loader)
    own = tr.ParquetDataLoader(files[PAD], ONLY_ITEMS, BATCH, LENGTH, padding_idx=PAD)
    assert numbers(make_trainer(tmp_path, model).evaluate(own)) == numbers(
        make_trainer(tmp_path, model, files[PAD]).evaluate()
    )
    with pytest.raises(InputError, match=rf"{{'{ITEM}': 7}}, the model's {{'{ITEM}': 0}}"):
        make_model(0).fit(own, verbose=False)


@pytest.mark.parametrize("call", ["forward", "recommend"])
def test_ragged_inputs_are_padded_as_the_model_says(files, call):
    model = make_model(PAD).eval()
    batch, _ = next(iter(tr.ParquetDataLoader(files[PAD], ONLY_ITEMS, BATCH, padding_idx=PAD)))
    items = batch[ITEM]
    lengths = (items != PAD).sum(1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    ragged = {f"{ITEM}__values": items[items != PAD], f"{ITEM}__offsets": offsets}
    with torch.no_grad():
        if call == "recommend":
            for ours, theirs in zip(model.recommend(ragged, 5), model.recommend(batch, 5)):
                assert torch.equal(ours, theirs)
        else:
            assert torch.equal(
                model(ragged, testing=True)["loss"], model(batch, testing=True)["loss"]
            )
    assert torch.equal(pad_inputs(ragged, padding_idx={ITEM: PAD})[ITEM], items)
    assert torch.equal(pad_inputs(ragged)[ITEM], items.masked_fill(items == PAD, 0))


# -- the loader ------------------------------------------------------------------------------------

WITH_SIDE = SCHEMA + Schema([ColumnSchema.create_categorical(SIDE, 5, tags=["list"])])


@pytest.fixture
def sides():
    return pa.table(
        {
            ITEM: pa.array([[3, 0, 9], [4]]),
            PRICE: pa.array([[0.5, 1.5, 2.5], [3.5]], pa.list_(pa.float32())),
            SIDE: pa.array([[1, 2, 5], [3]]),
        }
    )


@pytest.mark.parametrize("memory_limit", [1 << 30, 1], ids=["in-memory", "streamed"])
def test_columns_are_padded_by_name(sides, memory_limit, tmp_path):
    pq.write_table(sides, tmp_path / "a.parquet", row_group_size=1)
    options = {"memory_limit": memory_limit, "padding_idx": {ITEM: PAD}}
    loader = tr.ParquetDataLoader(tmp_path, WITH_SIDE, 2, 4, **options)
    ((x, _),) = loader
    assert x[ITEM].tolist() == [[3, 0, 9, PAD], [4, PAD, PAD, PAD]]
    assert x[SIDE].tolist() == [[1, 2, 5, 0], [3, 0, 0, 0]]
    assert x[PRICE].tolist() == [[0.5, 1.5, 2.5, 0], [3.5, 0, 0, 0]]
    assert loader.padding_ids == {ITEM: PAD, SIDE: 0}
    ((x, _),) = tr.ParquetDataLoader(tmp_path, WITH_SIDE, 2, 4, padding_idx=5)
    assert x[SIDE].tolist() == [[1, 2, 5, 5], [3, 5, 5, 5]]
    assert x[ITEM].tolist() == [[3, 0, 9, 5], [4, 5, 5, 5]]
    ((x, _),) = tr.PyarrowDataLoader(tmp_path, 2, 4, [ITEM], padding_idx={ITEM: PAD})
    assert x[ITEM].tolist() == [[3, 0, 9, PAD], [4, PAD, PAD, PAD]]


def test_stored_padding_ends_a_session():
    stored = pa.table({ITEM: pa.array([[3, 0, PAD, PAD], [4, 5, 6, 8]], pa.list_(pa.int64(), 4))})
    ((x, _),) = tr.ParquetDataLoader(stored, ONLY_ITEMS, 2, 3, padding_idx=PAD)
    assert x[ITEM].tolist() == [[3, 0, PAD], [5, 6, 8]]
    left = pa.table({ITEM: pa.array([[PAD, 3, 4]])})
    with pytest.raises(InputError, match=r"has padding \(id 7\) before an item"):
        list(tr.ParquetDataLoader(left, ONLY_ITEMS, 2, 3, padding_idx=PAD))


@pytest.mark.parametrize(
    ("padding_idx", "says"),
    [
        (-1, "must be ids >= 0; got -1"),
        ({ITEM: 1.5}, "must be ids >= 0; got 1.5"),
        ({PRICE: 1}, f"names '{PRICE}', which is no column of whole numbers"),
        ({"itme": 1}, "names 'itme', which is no column of whole numbers"),
        (PAD, rf"column '{SIDE}': padding_idx 7 is outside 0\.\.5"),
        (ITEMS, rf"column '{ITEM}': padding_idx 40 is outside 0\.\.39"),
    ],
)
def test_padding_that_no_column_can_have(sides, padding_idx, says):
    with pytest.raises(InputError, match=says):
        list(tr.ParquetDataLoader(sides, WITH_SIDE, 2, 4, padding_idx=padding_idx))


def test_which_ids_pad_a_model():
    def of(**options):
        block = tr.TabularSequenceFeatures.from_schema(
            WITH_SIDE + Schema([ColumnSchema.create_categorical("user", 9)]),
            max_sequence_length=LENGTH,
            aggregation="concat",
            **options,
        )
        body = tr.SequentialBlock(block, tr.MLPBlock([4]))
        return model_padding(tr.Model(tr.Head(body, tr.RegressionTask("y"))))

    masked = {"masking": "clm", "d_output": 8}
    assert of() == of(**masked) == {ITEM: 0, SIDE: 0}
    assert of(padding_idx=PAD, **masked) == {ITEM: PAD, SIDE: 0}
    assert of(table_padding_idx=2) == {ITEM: 2, SIDE: 2}
    assert of(table_padding_idx=2, padding_idx=PAD, **masked) == {ITEM: PAD, SIDE: 2}
    assert model_padding(torch.nn.Linear(2, 2)) == {}


# -- serving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_a_served_model_pads_as_it_was_trained(files, form, tmp_path, monkeypatch):
    """The answers to requests are those of the model itself, on sessions with the item 0."""
    model = make_model(PAD).eval()
    batch, _ = next(
        iter(tr.ParquetDataLoader(files[PAD], ONLY_ITEMS, ROWS, LENGTH, padding_idx=PAD))
    )
    items = batch[ITEM].numpy()
    assert (items == 0).any()
    folder = export(model, None, tmp_path, sessions=form, top_k=5, length=LENGTH)
    served = double.load(folder, monkeypatch)
    inputs = {ITEM: items}
    if form == "ragged":
        offsets = np.concatenate([[0], (items != PAD).sum(1).cumsum()])
        inputs = {f"{ITEM}__values": items[items != PAD], f"{ITEM}__offsets": offsets}
    (answer,) = served.execute([double.Request(inputs, ["item_ids", "item_id_scores"])])
    assert answer.error is None
    scores, ids = model.recommend(batch, 5, recommend_from=PAD + 1)
    assert np.array_equal(answer.outputs["item_id_scores"], scores.numpy())
    assert answer.outputs["item_ids"].tolist() == ids.tolist()

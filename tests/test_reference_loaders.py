"""The loaders by their names in the reference: its recorded batches, engines of users' own, the
data set of single sessions, and shuffling through a buffer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.data_loader import skip_first_batches
from torch.utils.data import DataLoader, IterableDataset
from training_case import BATCH, ITEM, LENGTH, PRICE, ROWS, SCHEMA, make_trainer, write_sessions

import t4r_fast
import t4r_fast.torch as tr
from t4r_fast.compat import CompatWarning, forget_warnings
from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema, ValueCount
from t4r_fast.torch.data import (
    DLDataLoader,
    MerlinDataLoader,
    ParquetDataLoader,
    ParquetDataset,
    PyarrowDataLoader,
    ShuffleDataset,
    T4RecDataLoader,
    dataloader_registry,
)

RECORDED = json.loads((Path(__file__).parent / "parity" / "loaders.json").read_text())
COLUMNS = RECORDED["columns"]
KINDS = {
    "item": pa.list_(pa.int64()),
    "price": pa.list_(pa.float32()),
    "age": pa.float32(),
    "like": pa.float32(),
}
NAMED = ["item", "price", "user", "like", "click"]
COUNT = ValueCount(1, 6)
OF_RECORDED = Schema(
    [
        ColumnSchema.create_categorical("item", 50, value_count=COUNT, tags=["item_id", "list"]),
        ColumnSchema.create_continuous("price", value_count=COUNT, tags=["list"]),
        ColumnSchema.create_categorical("user", 9),
        ColumnSchema.create_continuous("age"),
        ColumnSchema("click", tags=["binary_classification", "target"]),
    ]
)


@pytest.fixture(autouse=True)
def _level():
    yield
    t4r_fast.set_compat("23.12")
    forget_warnings()


@pytest.fixture(scope="module")
def table():
    return pa.table({n: pa.array(v, KINDS.get(n, pa.int64())) for n, v in COLUMNS.items()})


@pytest.fixture(scope="module")
def file(table, tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "data.parquet"
    pq.write_table(table, path, row_group_size=3)
    return str(path)


def merlin(file, **options):
    named = {"cats": ["item", "user"], "conts": ["price", "age"], "lists": ["item", "price"]}
    options = {"labels": ["click", "like"], "drop_last": True, **named, **options}
    return MerlinDataLoader(file, 3, 4, **options)


MADE = {
    "merlin_from_schema": lambda file: MerlinDataLoader.from_schema(
        OF_RECORDED, file, 3, 4, shuffle=False, truncate="first"
    ),
    "merlin": lambda file: merlin(file, truncate="first"),
    "merlin_collated": lambda file: MerlinDataLoader(
        file,
        3,
        4,
        cats=["item"],
        labels=["click"],
        lists=["item"],
        collate_fn=lambda batches: (batches[0][0]["item"].sum(1), batches[0][1]),
        truncate="first",
    ),
    "pyarrow_from_schema": lambda file: PyarrowDataLoader.from_schema(
        OF_RECORDED, file, 3, 4, num_workers=1, truncate="first"
    ),
    "pyarrow": lambda file: PyarrowDataLoader(
        file, 3, 4, NAMED, ["click", "like"], drop_last=True, truncate="first"
    ),
    "dataset": lambda file: ParquetDataset(file, NAMED, ["like"], 4, truncate="first"),
}


def plain(value):
    if isinstance(value, dict):
        return {name: plain(v) for name, v in sorted(value.items())}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return value if value is None else np.asarray(value).tolist()


@pytest.mark.parametrize("name", MADE)
def test_batches_are_those_of_the_reference(file, name):
    made = MADE[name](file)
    found = [made[i] for i in range(len(made))] if name == "dataset" else list(made)
    assert plain(found) == RECORDED[name]


# -- Merlin's --------------------------------------------------------------------------------------


def test_merlins_loader_keeps_the_newest_items_and_knows_its_size(file):
    loader = merlin(file)
    inputs, targets = next(iter(loader))
    assert inputs["item"].tolist() == [s[-4:] for s in COLUMNS["item"][:3]]
    assert sorted(targets) == ["click", "like"]
    assert (len(loader), len(loader.dataset), loader._batch_size) == (2, 8, 3)
    assert loader.output_schema.column_names == list(COLUMNS)
    assert loader.output_schema["item"].tags == ["list", "categorical"]
    assert loader.output_schema["click"].tags == ["target"]
    assert isinstance(loader, (ParquetDataLoader, T4RecDataLoader))


def test_merlins_loader_shuffles_from_schema(file):
    def order(**options):
        made = MerlinDataLoader.from_schema(OF_RECORDED, file, 8, 4, **options)
        return next(iter(made))[0]["age"].tolist()

    stored = [float(np.float32(a)) for a in COLUMNS["age"]]
    assert sorted(order()) == sorted(stored)
    assert order() == order(seed=0) == order(seed_fn=lambda: 0) != stored
    assert order(seed=1) == order(seed_fn=lambda: 1) != order()
    assert order(shuffle=False) == stored


def test_columns_without_a_tag_are_not_read(file):
    more = OF_RECORDED + Schema([ColumnSchema("not_there"), ColumnSchema("like", "FLOAT")])
    for cls in (MerlinDataLoader, PyarrowDataLoader):
        inputs, _ = next(iter(cls.from_schema(more, file, 3, 4)))
        assert sorted(inputs) == ["age", "item", "price", "user"]
    with pytest.raises(InputError, match="no column 'not_there'"):
        ParquetDataLoader.from_schema(more, file, 3, 4)


def test_a_collate_function_also_sees_the_batches_after_a_resumption(file):
    loader = MADE["merlin_collated"](file)
    whole = [s.tolist() for s, _ in loader]
    assert [s.tolist() for s, _ in skip_first_batches(loader, 1)] == whole[1:]
    loader = MADE["pyarrow_from_schema"](file)
    assert [sorted(t) for _, t in skip_first_batches(loader, 1)] == [["click"]] * 2


def test_a_merlin_dataset_is_computed(table):
    class OfMerlin:
        schema = OF_RECORDED

        def to_ddf(self):
            return self

        def compute(self):
            return pl.from_arrow(table)

    inputs, targets = next(iter(MerlinDataLoader(OfMerlin(), 8, 6)))
    assert inputs["user"].tolist() == COLUMNS["user"]
    assert targets.tolist() == COLUMNS["click"]
    (inputs, _), *_ = ParquetDataLoader(OfMerlin(), OF_RECORDED, 8, 6)
    assert inputs["user"].tolist() == COLUMNS["user"]


def test_ids_are_checked_where_a_schema_says_their_range(file):
    small = Schema([ColumnSchema.create_categorical("item", 9, tags=["item_id", "list"])])
    with pytest.raises(InputError, match=r"id 40 is outside 0\.\.9"):
        list(MerlinDataLoader(file, 8, schema=small))
    assert len(list(MerlinDataLoader(file, 8, cats=["item"], lists=["item"]))) == 1


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"transforms": [len]}, InputError, "transforms are steps of Merlin"),
        ({"engine": "csv"}, InputError, "engine must be 'parquet' or None; got 'csv'"),
        ({"cats": ["itme"]}, InputError, r"no column \['itme'\]"),
        ({"shufle": True}, TypeError, "shufle"),
    ],
)
def test_what_merlins_loader_refuses(file, options, error, says):
    with pytest.raises(error, match=says):
        merlin(file, **options)


def test_without_names_all_columns_are_read(file, table):
    ((inputs, targets),) = MerlinDataLoader(file, 8)
    assert (sorted(inputs), targets) == (sorted(COLUMNS), None)
    with pytest.raises(InputError, match="column 'name' holds strings"):
        MerlinDataLoader(table.append_column("name", pa.array(["x"] * 8)), 8)


def test_options_without_effect_warn(file):
    for options in ({"buffer_size": 0.5}, {"device": 0}, {"row_groups_per_part": False}):
        with pytest.warns(CompatWarning, match=f"{next(iter(options))} has no effect"):
            merlin(file, **options)
    with pytest.warns(CompatWarning, match="num_workers has no effect"):
        PyarrowDataLoader(file, 3, 4, num_workers=3)


def test_a_loader_keeps_its_data_and_a_subclass_may_choose_them(file, table):
    with pytest.raises(ValueError, match="dataset attribute should not be set"):
        merlin(file).set_dataset(0.1, "parquet", {})
    with pytest.raises(ValueError, match="dataset attribute should not be set"):
        MADE["pyarrow"](file).set_dataset(NAMED, [])

    class Chosen(MerlinDataLoader):
        def set_dataset(self, buffer_size, engine, reader_kwargs, schema=None):
            self.dataset, self.schema = table.slice(0, 2), schema

    inputs, _ = next(iter(Chosen("nowhere", 8, 4, schema=OF_RECORDED)))
    assert inputs["user"].tolist() == COLUMNS["user"][:2]


# -- pyarrow's -------------------------------------------------------------------------------------


def test_the_pyarrow_loader_gives_dicts(file, table):
    inputs, targets = next(iter(PyarrowDataLoader(file, 8, 4)))
    assert sorted(inputs) == sorted(COLUMNS)
    assert targets == {}
    single = ParquetDataset(file, NAMED, [], 4)
    inputs, _ = next(iter(PyarrowDataLoader(single, 8, 4, ["item", "user"], shuffle=True)))
    assert sorted(inputs) == ["item", "user"]
    assert sorted(inputs["user"].tolist()) == sorted(COLUMNS["user"]) != inputs["user"].tolist()
    with pytest.raises(InputError, match="there is no column 'itme'"):
        PyarrowDataLoader(file, 8, 4, ["itme"])
    with pytest.raises(InputError, match="'like'"):
        PyarrowDataLoader(file, 8, 4, ["item"], ["like"])
    t4r_fast.set_compat("0.1")
    (batch,) = PyarrowDataLoader(file, 8, 6, ["item", "like"], ["like"])
    assert sorted(batch) == ["item", "like"]


def test_single_sessions_are_padded_and_cut(file):
    single = ParquetDataset(file, NAMED, ["like"], 4)
    assert len(single) == 8
    inputs, targets = single[0]
    assert inputs["item"].tolist() == COLUMNS["item"][0][-4:]
    assert inputs["item"].dtype == np.int64
    assert inputs["price"].dtype == np.float32
    assert inputs["user"] == COLUMNS["user"][0]
    assert list(targets) == ["like"]
    assert plain(single[-1]) == plain(single[7])
    assert single.pad_seq_column_if_needed(np.array([1.5])).tolist() == [1.5, 0, 0, 0]
    assert single.pad_seq_column_if_needed(3) == 3
    with pytest.raises(IndexError, match="there are 8 sessions; got index 8"):
        _ = single[8]
    t4r_fast.set_compat("0.1")
    assert ParquetDataset(file, ["item"], [], 4)[0][0]["item"].tolist() == COLUMNS["item"][0][:4]


def test_what_single_sessions_refuse(file):
    with pytest.raises(InputError, match=r"target_names \['like'\] must be in cols_to_read"):
        ParquetDataset(file, ["item"], ["like"], 4)
    with pytest.raises(InputError, match="no column 'itme'"):
        ParquetDataset(file, ["itme"], [], 4)
    with pytest.raises(InputError, match="truncate must be one of"):
        ParquetDataset(file, ["item"], [], 4, truncate="middle")
    names = pa.table({"names": [["a"], ["b", "c"]]})
    with pytest.raises(InputError, match=r"'names' holds list<.*>, no lists of numbers"):
        ParquetDataset(names, ["names"], [], 4)


# -- shuffling -------------------------------------------------------------------------------------


class Counted(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter(range(self.n))


@pytest.mark.parametrize("samples", [range(50), Counted(50)], ids=["by index", "iterable"])
def test_a_buffer_shuffles(samples):
    before = torch.get_rng_state()
    shuffled = ShuffleDataset(samples, 10)
    first, second = list(shuffled), list(shuffled)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert list(ShuffleDataset(samples, 10)) == first
    assert list(ShuffleDataset(samples, 10, seed=1)) != first
    shuffled.set_epoch(1)
    assert list(shuffled) == second
    assert list(ShuffleDataset(samples, 1)) == list(range(50))
    # a sample cannot come before those that the buffer was filled with have made room
    assert all(sample <= place + 10 for place, sample in enumerate(first))
    assert len(shuffled) == 50
    assert torch.equal(before, torch.get_rng_state())


def test_a_large_buffer_gives_any_order():
    passes = 3000
    shuffled = ShuffleDataset(range(3), 3)
    orders = [tuple(shuffled) for _ in range(passes)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 6
    # five deviations of a count that is binomial, 3000 draws of 1/6
    assert max(abs(c - passes / 6) for c in counts) < 5 * (passes * 5 / 36) ** 0.5


@pytest.mark.parametrize("samples", [range(50), Counted(50)], ids=["by index", "iterable"])
def test_workers_divide_the_samples(samples):
    loader = DataLoader(ShuffleDataset(samples, 10), batch_size=None, num_workers=2)
    assert sorted(loader) == list(range(50))


def test_a_buffer_holds_something():
    with pytest.raises(InputError, match="buffer_size must be >= 1; got 0"):
        ShuffleDataset(range(3), 0)


# -- engines of users' own -------------------------------------------------------------------------


def test_a_loader_of_whole_batches(file, tmp_path):
    inside = ParquetDataLoader(file, OF_RECORDED, 3, 4)
    loader = DLDataLoader(inside.dataset, batch_size=3, collate_fn=lambda samples: samples[0])
    assert loader._batch_size == 3
    assert loader.batch_size == 1
    assert len(loader) == len(inside.dataset)
    assert loader.device.type in ("cpu", "cuda")
    found = [user for inputs, _ in loader for user in inputs["user"].tolist()]
    assert found == COLUMNS["user"]
    with pytest.raises(TypeError, match="batch_size is missing"):
        DLDataLoader(inside.dataset)


@pytest.fixture
def mine():
    calls = []

    class Mine(T4RecDataLoader):
        _batch_size = BATCH

        def __init__(self, batches):
            self.batches = batches

        @classmethod
        def from_schema(
            cls, schema, paths_or_dataset, batch_size, max_sequence_length, drop_last, shuffle,
            shuffle_buffer_size, global_rank, global_size, device,
        ):  # fmt: skip
            calls.append((batch_size, max_sequence_length, shuffle, global_rank, global_size))
            batches = ParquetDataLoader(paths_or_dataset, schema, batch_size, max_sequence_length)
            return cls(list(batches))

        def __iter__(self):
            return iter(self.batches)

        def __len__(self):
            return len(self.batches)

    name = "mine"
    dataloader_registry.register(name)(Mine)
    yield name, Mine, calls
    dataloader_registry._classes.pop(name)


def test_the_trainer_makes_a_registered_loader(tmp_path, mine):
    name, cls, calls = mine
    assert T4RecDataLoader.parse(name) is cls is dataloader_registry.parse(name)
    assert T4RecDataLoader.parse(cls) is cls
    data = write_sessions(tmp_path / "train.parquet")
    trainer = make_trainer(tmp_path, data, data_loader_engine=name, max_steps=2, save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 2
    found = trainer.evaluate()
    assert calls == [(BATCH, LENGTH, True, None, None), (BATCH, LENGTH, False, None, None)]
    trainer.args.data_loader_engine = "parquet"
    assert trainer.evaluate()["eval_/loss"] == found["eval_/loss"]
    assert trainer.num_examples(cls([None] * 3)) == 3 * BATCH


def test_names_are_taken_once_and_the_base_says_what_to_override(mine):
    with pytest.raises(KeyError, match="registered already"):
        dataloader_registry.register("merlin")(object)
    with pytest.raises(ValueError, match=r"data_loader_engine must be one of .*merlin.*mine"):
        T4RecDataLoader.parse("mien")
    with pytest.raises(NotImplementedError, match=r"T4RecDataLoader .* override from_schema"):
        T4RecDataLoader.from_schema(SCHEMA, "x", 2, 3)
    with pytest.raises(NotImplementedError, match="override set_dataset"):
        T4RecDataLoader().set_dataset("x")


def test_the_references_engines_are_registered():
    merlin = ("merlin", "merlin_dataloader", "nvtabular", "nvtabular_dataloader")
    assert {dataloader_registry[n] for n in merlin} == {MerlinDataLoader}
    assert {dataloader_registry[n] for n in ("pyarrow", "pyarrow_builder")} == {PyarrowDataLoader}
    assert tr.NVTabularDataLoader is MerlinDataLoader


@pytest.mark.parametrize("engine", ["merlin", "pyarrow"])
def test_the_trainer_trains_on_every_engine_alike(tmp_path, engine):
    data = write_sessions(tmp_path / "train.parquet")
    losses = []
    for name in ("parquet", engine):
        options = {"data_loader_engine": name, "max_steps": 8, "save_strategy": "no"}
        trainer = make_trainer(tmp_path, data, **options)
        losses.append(trainer.train().training_loss)
        assert isinstance(trainer.get_train_dataloader(), dataloader_registry[name])
    assert losses[0] == losses[1]
    assert ROWS > 5 * BATCH
    assert {ITEM, PRICE} == set(next(iter(trainer.get_eval_dataloader()))[0])

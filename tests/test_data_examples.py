"""Testing data, random batches and events for a schema, and the steps from events to sessions."""

from __future__ import annotations

import datetime

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from polars.testing import assert_frame_equal

import t4r_fast.torch as tr
from t4r_fast.data import dataset, preprocessing, synthetic
from t4r_fast.data.random_data import random_data_from_schema
from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema, ValueCount

COUNT = ValueCount(1, 7)
SCHEMA = Schema(
    [
        ColumnSchema.create_categorical("item", 9, value_count=COUNT, min_index=3, tags=["item"]),
        ColumnSchema.create_continuous("x", value_count=COUNT, min_value=-1.5),
        ColumnSchema.create_continuous("vec", value_count=COUNT, is_embedding=True, shape=(5,)),
        ColumnSchema.create_categorical("user", 4),
        ColumnSchema.create_continuous("age"),
    ]
)


# -- schemas as JSON -------------------------------------------------------------------------------


def test_json_goes_round(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA.to_json())
    for given in (file, str(file), SCHEMA.to_json(), SCHEMA.to_json().encode()):
        assert Schema().from_json(given) == SCHEMA


def test_json_of_tensorflow_metadata():
    (column, target) = Schema().from_json(
        """{"feature": [{"name": "a", "type": "INT", "valueCount": {"min": "2", "max": "185"},
        "intDomain": {"name": "a", "max": "51996", "isCategorical": true},
        "annotation": {"tag": ["item_id", "list"]}},
        {"name": "t", "annotation": {"tag": ["regression"]}}]}"""
    )
    assert (column.cardinality, column.value_count.max) == (51997, 185)
    assert column.tags == ["item_id", "list"]
    assert (target.type, target.int_domain) == ("FLOAT", None)


@pytest.mark.parametrize("text", ["{}", '{"feature": [{}]}', "{no", '{"feature": 3}'])
def test_json_that_is_no_schema(text):
    with pytest.raises(InputError, match="text is no schema in JSON"):
        Schema().from_json(text)


def test_a_json_file_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        Schema().from_json(tmp_path / "no.json")


# -- random batches --------------------------------------------------------------------------------


def test_random_batches_fit_the_schema():
    state = torch.get_rng_state()
    found = random_data_from_schema(SCHEMA, 200, max_session_length=6, min_session_length=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: tuple(v.shape) for n, v in found.items()} == {
        "item": (200, 6), "x": (200, 6), "vec": (200, 6, 5), "user": (200,), "age": (200,),
    }  # fmt: skip
    lengths = (found["item"] > 0).sum(1)
    assert lengths.unique().tolist() == [2, 3, 4, 5, 6]
    assert torch.equal((found["vec"] != 0).any(-1).sum(1), lengths)
    assert found["item"][found["item"] > 0].unique().tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert found["user"].unique().tolist() == [1, 2, 3, 4]
    assert found["x"].dtype == torch.float32
    again = random_data_from_schema(SCHEMA, 200, max_session_length=6, min_session_length=2)
    assert all(torch.equal(found[n], again[n]) for n in found)
    other = random_data_from_schema(SCHEMA, 200, 6, 2, seed=1)
    assert not torch.equal(found["item"], other["item"])


def test_ragged_batches_hold_the_same_lists():
    padded = random_data_from_schema(SCHEMA, 9, 6, 1)
    ragged = random_data_from_schema(SCHEMA, 9, 6, 1, ragged=True)
    lengths = (padded["item"] > 0).sum(1)
    assert torch.equal(ragged["item__offsets"].diff(), lengths)
    assert ragged["vec__values"].shape == (int(lengths.sum()), 5)
    assert "user" in ragged


def test_without_a_longest_session_the_columns_decide():
    assert random_data_from_schema(SCHEMA, 3)["item"].shape == (3, 7)
    bare = Schema([ColumnSchema.create_categorical("a", 3, tags=["list"])])
    with pytest.raises(ValueError, match="'a' is a list without value_count"):
        random_data_from_schema(bare, 3)
    with pytest.raises(ValueError, match="num_rows must be >= 1"):
        random_data_from_schema(SCHEMA, 0)
    with pytest.raises(ValueError, match="between 0 and"):
        random_data_from_schema(SCHEMA, 2, max_session_length=3)


# -- testing data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tabular_sequence", "music_streaming", "tabular"])
def test_testing_data_have_a_schema_a_file_and_batches(name):
    data = getattr(tr.data, f"{name}_testing_data")
    table = pq.read_table(data.path)
    assert table.num_rows == 1000
    assert table.column_names == data.schema.column_names
    batch = data.torch_synthetic_data(num_rows=10, max_session_length=8)
    assert set(batch) == set(data.schema.column_names)
    for column in data.schema:
        values = table[column.name]
        values = values.combine_chunks().flatten() if column.value_count else values
        values = values.to_numpy()
        if column.int_domain is not None:
            assert 1 <= values.min() <= values.max() <= column.int_domain.max
    assert data.path == data.path
    assert dataset.Dataset(data.schema_path).schema == data.schema


def test_a_model_trains_on_testing_data(tmp_path):
    data = tr.data.music_streaming_testing_data
    columns = data.schema.select_by_name(["item_id", "item_category", "item_recency", "country"])
    inputs = tr.TabularSequenceFeatures.from_schema(columns, d_output=16, max_sequence_length=20)
    head = tr.Head.from_schema(data.schema, tr.SequentialBlock(inputs, tr.MLPBlock([16])))
    assert set(head.prediction_task_dict) == {
        "click/binary_classification_task",
        "like/binary_classification_task",
        "play_percentage/regression_task",
    }
    loader = tr.ParquetDataLoader.from_schema(data.schema, data.path, 100)
    losses = tr.Model(head).fit(loader, num_epochs=3, verbose=False)
    assert losses[-1] < losses[0]


def test_a_folder_of_data_and_schema(tmp_path):
    (tmp_path / "schema.json").write_text(SCHEMA.to_json())
    found = dataset.ParquetDataset(tmp_path)
    assert found.schema == SCHEMA
    assert found.path == str(tmp_path / "data.parquet")
    SCHEMA.to_proto_text(tmp_path / "s.pbtxt")
    assert dataset.Dataset(str(tmp_path / "s.pbtxt")).schema.column_names == SCHEMA.column_names


# -- random events ---------------------------------------------------------------------------------


def test_events_have_one_value_for_each_session_and_each_item():
    schema = synthetic.synthetic_ecommerce_data_schema
    events = synthetic.generate_item_interactions(5000, schema)
    assert set(events.columns) == set(schema.column_names)
    assert len(events) == 5000
    for column, of in (("day", "session_id"), ("purchase", "session_id"), ("category", "item_id")):
        assert events.group_by(of).agg(pl.col(column).n_unique())[column].max() == 1
    assert set(events["purchase"]) == {0, 1}
    assert events["item_id"].min() >= 1
    assert 1 < events["category"].n_unique() <= 100
    again = synthetic.generate_item_interactions(5000, schema)
    assert_frame_equal(events, again)
    with pytest.raises(InputError, match="tagged session_id"):
        synthetic.generate_item_interactions(10, SCHEMA)


def test_sessions_are_lists_of_their_events():
    schema = synthetic.synthetic_ecommerce_data_schema
    events = synthetic.generate_item_interactions(20_000, schema)
    sessions = synthetic.generate_session_interactions(20_000, schema, 4, 3)
    length = sessions["item_id-list_trim"].list.len()
    assert (length.min(), length.max()) == (3, 4)
    assert "price-first" in sessions.columns
    counts = events.group_by("session_id").len()["len"]
    assert len(sessions) == (counts >= 3).sum()


# -- steps from events to sessions -----------------------------------------------------------------

EVENTS = pl.DataFrame(
    {
        "session_id": [1, 1, 1, 2, 2, 1],
        "item_id": [5, 5, 6, 6, 6, 5],
        "timestamp": [1, 2, 3, 4, 5, 9],
    }
)


def test_repeated_items_go():
    found = preprocessing.remove_consecutive_interactions(EVENTS.reverse())
    assert found["item_id"].to_list() == [5, 6, 5, 6]
    assert found["timestamp"].to_list() == [1, 3, 9, 4]


def test_first_seen():
    found = preprocessing.add_item_first_seen_col_to_df(EVENTS)
    assert found["item_ts_first"].to_list() == [1, 1, 3, 3, 3, 1]


def test_pandas_comes_back_as_pandas():
    pytest.importorskip("pandas")
    found = preprocessing.add_item_first_seen_col_to_df(EVENTS.to_pandas())
    assert type(found).__module__.startswith("pandas")
    assert found["item_ts_first"].tolist() == [1, 1, 3, 3, 3, 1]


def test_session_aggregator_needs_its_tags():
    with pytest.raises(InputError, match="one column tagged session_id"):
        preprocessing.session_aggregator(SCHEMA, EVENTS)
    with pytest.raises(TypeError, match="got list"):
        preprocessing.remove_consecutive_interactions([1])


def test_splits_are_the_references(tmp_path):
    table = pl.DataFrame(
        {"day_idx": [1] * 50 + [2] * 30, "ts/first": range(80, 0, -1), "x": range(80)}
    )
    (tmp_path / "out" / "old").mkdir(parents=True)
    preprocessing.save_time_based_splits(table, tmp_path / "out")
    draw = np.random.RandomState(1).rand(50)
    by_time = table.filter(pl.col("day_idx") == 1).sort("ts/first").drop("day_idx")
    expected = {
        "train": draw <= 0.8,
        "valid": (draw > 0.8) & (draw <= 0.9),
        "test": draw > 0.9,
    }
    for name, rows in expected.items():
        found = pl.read_parquet(tmp_path / "out" / "1" / f"{name}.parquet")
        assert_frame_equal(found, by_time.filter(pl.Series(rows)))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1", "2"]
    with pytest.raises(InputError, match="together <= 1"):
        preprocessing.save_time_based_splits(table, tmp_path, test_size=0.7, val_size=0.4)
    with pytest.raises(InputError, match="no column"):
        preprocessing.save_time_based_splits(table, tmp_path, partition_col="day")


def test_splits_by_date(tmp_path):
    days = [datetime.date(2020, 1, 1), datetime.date(2020, 1, 2)]
    table = pl.DataFrame({"day": days, "ts/first": [1, 2]})
    preprocessing.save_time_based_splits(table, tmp_path / "out", "day", test_size=0, val_size=0)
    assert len(pl.read_parquet(tmp_path / "out" / "2020-01-02" / "train.parquet")) == 1

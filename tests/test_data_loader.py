"""The parquet loader against plain Python padding, its order, its errors and its thread."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import t4r_fast
from t4r_fast.compat import CompatWarning, forget_warnings
from t4r_fast.errors import InputError
from t4r_fast.schema import ColumnSchema, Schema
from t4r_fast.torch.data import ParquetDataLoader, T4RecDataLoader
from t4r_fast.torch.data.loader import prefetched

ITEM, PRICE, AGE = "product_id-list_seq", "price_log_norm-list_seq", "age"
SCHEMA = Schema(
    [
        ColumnSchema.create_categorical(ITEM, 50, tags=["item_id", "list"]),
        ColumnSchema.create_continuous(PRICE, tags=["list"]),
    ]
)


@pytest.fixture(autouse=True)
def _level():
    yield
    t4r_fast.set_compat("23.12")
    forget_warnings()


def sessions(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [list(map(int, rng.integers(3, 51, n))) for n in lengths]


def write(path, items, group=None, **more):
    prices = [[i / 10 for i in s] for s in items]
    columns = {
        ITEM: pa.array(items, pa.list_(pa.int64())),
        PRICE: pa.array(prices, pa.list_(pa.float32())),
        **more,
    }
    pq.write_table(pa.table(columns), path, row_group_size=group or max(1, len(items)))
    return str(path)


def padded(rows, width):
    return [(r + [0] * width)[:width] for r in rows]


def seen(loader):
    """The sessions of one pass, without pads."""
    return [[i for i in row if i] for x, _ in loader for row in x[ITEM].tolist()]


@pytest.fixture
def hundred(tmp_path):
    items = sessions(np.random.default_rng(1).integers(1, 9, 100))
    return items, write(tmp_path / "train.parquet", items, group=7)


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("memory_limit", [1 << 30, 1], ids=["in-memory", "streamed"])
def test_batches_are_the_rows_padded_on_the_right(hundred, memory_limit, prefetch):
    items, path = hundred
    loader = ParquetDataLoader(path, SCHEMA, 32, 8, memory_limit=memory_limit, prefetch=prefetch)
    batches = list(loader)
    assert [targets for _, targets in batches] == [None] * 4
    assert [len(x[ITEM]) for x, _ in batches] == [32, 32, 32, 4]
    ids = torch.cat([x[ITEM] for x, _ in batches])
    prices = torch.cat([x[PRICE] for x, _ in batches])
    assert ids.dtype == torch.int64
    assert prices.dtype == torch.float32
    assert ids.tolist() == padded(items, 8)
    assert torch.equal(prices, (ids / 10).float())
    assert len(loader) == 4
    assert len(loader.dataset) == 100
    assert loader._batch_size == 32


def test_width_is_the_longest_of_the_batch_without_max_sequence_length(tmp_path):
    path = write(tmp_path / "a.parquet", sessions([2, 3, 5, 1]))
    widths = [x[ITEM].shape for x, _ in ParquetDataLoader(path, SCHEMA, 2)]
    assert widths == [(2, 3), (2, 5)]


@pytest.mark.parametrize("memory_limit", [1 << 30, 1], ids=["in-memory", "streamed"])
def test_drop_last_leaves_the_rest_out(hundred, memory_limit):
    _, path = hundred
    for shuffle in (False, True):
        loader = ParquetDataLoader(
            path, SCHEMA, 32, 8, drop_last=True, shuffle=shuffle, memory_limit=memory_limit
        )
        assert [len(x[ITEM]) for x, _ in loader] == [32, 32, 32]
        assert len(loader) == 3


def test_many_files_folders_and_patterns_name_the_same_data(tmp_path):
    a, b = sessions([2, 3], 1), sessions([4], 2)
    pa_, pb = write(tmp_path / "a.parquet", a), write(tmp_path / "b.parquet", b)
    write(tmp_path / "_part.parquet", sessions([1]))
    for source in ([pa_, pb], tmp_path, str(tmp_path / "[ab].parquet")):
        assert seen(ParquetDataLoader(source, SCHEMA, 2, 5)) == a + b


def test_tables_in_memory_are_read(tmp_path):
    items = sessions([2, 3])
    table = pq.read_table(write(tmp_path / "a.parquet", items))
    assert seen(ParquetDataLoader(table, SCHEMA, 2, 5)) == items


@pytest.mark.parametrize("kind", ["fixed", "large", "sliced", "list-suffix"])
def test_other_ways_to_store_lists(tmp_path, kind):
    items = sessions([2, 4, 1])
    table = pq.read_table(write(tmp_path / "a.parquet", items))
    if kind == "fixed":
        rows = pa.array(padded(items, 6), pa.list_(pa.int64(), 6))
        table = table.set_column(0, ITEM, rows)
    elif kind == "large":
        table = table.set_column(0, ITEM, table[ITEM].cast(pa.large_list(pa.int32())))
    elif kind == "sliced":
        table = pa.concat_tables([table.slice(2), table.slice(0, 2)]).slice(1)
        items = items[:2]
    else:
        table = table.rename_columns(["product_id-list", "price_log_norm-list"])
    assert seen(ParquetDataLoader(table, SCHEMA, 3, 6)) == items


def test_padded_and_ragged_columns_of_one_file_agree(tmp_path):
    items = sessions([2, 4])
    table = pa.table(
        {
            ITEM: pa.array(padded(items, 6), pa.list_(pa.int64(), 6)),
            PRICE: pa.array([[0.5, 0.0], [1.0, 2.0, 3.0, 4.0]], pa.list_(pa.float64())),
        }
    )
    ((x, _),) = ParquetDataLoader(table, SCHEMA, 2, 3, truncate="last")
    assert x[ITEM].tolist() == [[*items[0], 0], items[1][1:]]
    assert x[PRICE].tolist() == [[0.5, 0.0, 0.0], [2.0, 3.0, 4.0]]


def test_scalar_columns_and_targets(tmp_path):
    path = write(
        tmp_path / "a.parquet",
        sessions([2, 3]),
        age=pa.array([7, 9]),
        bought=pa.array([True, False]),
    )
    schema = SCHEMA + Schema(
        [ColumnSchema(AGE), ColumnSchema("bought", tags=["binary_classification", "target"])]
    )
    ((x, y),) = ParquetDataLoader(path, schema, 2, 4)
    assert x[AGE].tolist() == [7, 9]
    assert "bought" not in x
    assert y.tolist() == [1, 0]
    ((x, y),) = ParquetDataLoader(path, schema, 2, 4, targets=["bought", AGE])
    assert sorted(y) == [AGE, "bought"]


def test_compat_0_1_gives_dicts(tmp_path):
    t4r_fast.set_compat("0.1")
    path = write(tmp_path / "a.parquet", sessions([2, 3]))
    (x,) = ParquetDataLoader(path, SCHEMA, 2, 4)
    assert sorted(x) == [PRICE, ITEM]


# -- long sessions ---------------------------------------------------------------------------------


def test_long_sessions_keep_their_last_items(tmp_path):
    items = sessions([6, 2])
    path = write(tmp_path / "a.parquet", items)
    assert seen(ParquetDataLoader(path, SCHEMA, 2, 4)) == [items[0][-4:], items[1]]
    assert seen(ParquetDataLoader(path, SCHEMA, 2, 4, truncate="first")) == [
        items[0][:4],
        items[1],
    ]


def test_compat_0_1_keeps_the_first_items_and_says_so_once(tmp_path):
    t4r_fast.set_compat("0.1")
    items = sessions([6, 2])
    path = write(tmp_path / "a.parquet", items)
    with pytest.warns(CompatWarning, match="truncate='last'"):
        (x,) = ParquetDataLoader(path, SCHEMA, 2, 4, prefetch=0)
    assert x[ITEM][0].tolist() == items[0][:4]


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [1 << 30, 1], ids=["in-memory", "streamed"])
def test_shuffling_is_a_permutation_fixed_by_seed_and_epoch(hundred, memory_limit):
    items, path = hundred

    def order(seed, epoch=None, passes=1):
        loader = ParquetDataLoader(
            path, SCHEMA, 16, 8, shuffle=True, seed=seed, memory_limit=memory_limit,
            shuffle_buffer_size=30,
        )  # fmt: skip
        if epoch is not None:
            loader.set_epoch(epoch)
        return [seen(loader) for _ in range(passes)][-1]

    assert order(5) == order(5)
    assert sorted(order(5)) == sorted(items)
    assert order(5) != items
    assert order(5) != order(6)
    assert order(5, passes=3) == order(5, epoch=2) != order(5)


def test_streamed_shuffling_mixes_row_groups_beyond_the_pool(hundred):
    """With a pool of 30 of 100 rows, batches hold rows of groups that are not neighbours."""
    items, path = hundred
    group = {tuple(s): i // 7 for i, s in enumerate(items)}
    loader = ParquetDataLoader(
        path, SCHEMA, 10, 8, shuffle=True, memory_limit=1, shuffle_buffer_size=30
    )
    first = [group[tuple(s)] for s in seen(loader)[:10]]
    assert len(set(first)) >= 3


def test_shuffling_leaves_pytorchs_random_state_alone(hundred):
    _, path = hundred
    before = torch.get_rng_state()
    list(ParquetDataLoader(path, SCHEMA, 16, 8, shuffle=True))
    assert torch.equal(before, torch.get_rng_state())


# -- bad input -------------------------------------------------------------------------------------


def bad_rows(column, value, kind):
    good = sessions([2, 2, 2])
    lists = {ITEM: good, PRICE: [[0.0, 0.0]] * 3}
    lists[column] = [*lists[column][:2], value]
    kinds = {ITEM: pa.list_(pa.int64()), PRICE: pa.list_(pa.float32()), **kind}
    return pa.table({n: pa.array(v, kinds[n]) for n, v in lists.items()})


@pytest.mark.parametrize(
    ("column", "value", "kind", "says"),
    [
        (ITEM, [3, 51], {}, "row 2: id 51 is outside 0..50"),
        (ITEM, [3, -1], {}, "row 2: id -1 is outside 0..50"),
        (ITEM, [0, 3], {}, "row 2: .*padding.*right"),
        (ITEM, [0, 0], {}, "row 2: the session has no items"),
        (ITEM, [], {}, "row 2: the session has no items"),
        (ITEM, None, {}, "row 2: the list is null"),
        (ITEM, [3, None], {}, "row 2: a value is null"),
        (ITEM, [3, 4, 5], {}, "row 2: column 'price_log_norm-list_seq' has 2 values"),
        (PRICE, [0.0, float("nan")], {}, "row 2: nan is no finite number"),
        (PRICE, [0.0], {}, "row 2: .* has 1 values"),
        (ITEM, [3, 4], {ITEM: pa.list_(pa.float64())}, "integers.*double"),
        (ITEM, [3, 4], {ITEM: pa.list_(pa.list_(pa.int64()))}, "integers.*list"),
    ],
)
def test_bad_contents_are_named(tmp_path, column, value, kind, says):
    if ITEM in kind and "list<" in str(kind[ITEM].value_type):
        table = pa.table({ITEM: pa.array([[[3], [4]]]), PRICE: pa.array([[0.0, 0.0]])})
    else:
        table = bad_rows(column, value, kind)
    path = str(tmp_path / "bad.parquet")
    pq.write_table(table, path)
    with pytest.raises(InputError, match=rf"bad\.parquet.*{says}"):
        list(ParquetDataLoader(path, SCHEMA, 2, 4))


def test_row_numbers_count_from_the_start_of_the_file(tmp_path):
    path = write(tmp_path / "a.parquet", [*sessions([2] * 9), [51, 3]], group=4)
    with pytest.raises(InputError, match="row 9: id 51"):
        list(ParquetDataLoader(path, SCHEMA, 2, 4))


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"no parquet file at .*nowhere\.parquet"):
        ParquetDataLoader(tmp_path / "nowhere.parquet", SCHEMA, 2)
    with pytest.raises(InputError, match="list of parquet files is empty"):
        ParquetDataLoader([], SCHEMA, 2)
    with pytest.raises(InputError, match="no parquet file at"):
        ParquetDataLoader(tmp_path, SCHEMA, 2)
    path = write(tmp_path / "a.parquet", sessions([2, 3]))
    whole = Path(path).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.parquet is not a readable parquet file"):
        ParquetDataLoader(tmp_path / "cut.parquet", SCHEMA, 2)


def test_missing_columns_are_named_with_those_that_exist(tmp_path):
    path = write(tmp_path / "a.parquet", sessions([2, 3]))
    schema = SCHEMA + Schema([ColumnSchema.create_categorical("brand-list_seq", 5)])
    with pytest.raises(InputError, match=r"no column 'brand-list_seq'; it has price.*product"):
        ParquetDataLoader(path, schema, 2)


def test_empty_data_and_too_few_rows_are_refused(tmp_path):
    empty = write(tmp_path / "empty.parquet", [])
    with pytest.raises(InputError, match=r"empty\.parquet holds no sessions"):
        ParquetDataLoader(empty, SCHEMA, 2)
    path = write(tmp_path / "a.parquet", sessions([2, 3]))
    with pytest.raises(InputError, match="2 sessions make no full batch of 4"):
        ParquetDataLoader(path, SCHEMA, 4, drop_last=True)


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"max_sequence_length": 0}, {"truncate": "middle"}, {"prefetch": -1}],
)
def test_bad_options_are_refused(tmp_path, options):
    path = write(tmp_path / "a.parquet", sessions([2]))
    with pytest.raises(InputError, match=next(iter(options))):
        ParquetDataLoader(path, SCHEMA, **{"batch_size": 2, **options})


def test_strings_are_refused_before_anything_is_read(tmp_path):
    path = write(tmp_path / "a.parquet", sessions([2]))
    with pytest.raises(InputError, match="'brand' holds strings"):
        ParquetDataLoader(path, SCHEMA + Schema([ColumnSchema("brand", "BYTES")]), 2)


# -- the thread ------------------------------------------------------------------------------------


def ahead_threads():
    return [t for t in threading.enumerate() if t.name == "t4r_fast prefetch"]


def test_leaving_the_loop_stops_the_thread(hundred):
    _, path = hundred
    for _ in ParquetDataLoader(path, SCHEMA, 2, 8, prefetch=2):
        assert ahead_threads()
        break
    assert not ahead_threads()


def test_errors_come_after_the_items_before_them():
    def broken():
        yield from (1, 2)
        raise InputError("third")

    ahead = prefetched(broken, 1)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(InputError, match="third"):
        next(ahead)
    assert not ahead_threads()


def test_no_more_than_depth_items_are_made_ahead():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    ahead = prefetched(items, 3)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(made) <= 1 + 3 + 1  # taken, waiting, and the one that found no room
    ahead.close()


# -- engines ---------------------------------------------------------------------------------------


def test_every_engine_name_finds_the_loader(tmp_path):
    path = write(tmp_path / "a.parquet", sessions([2, 3]))
    for name in ("parquet", "merlin", "merlin_dataloader", "nvtabular", "pyarrow"):
        loader = T4RecDataLoader.parse(name).from_schema(SCHEMA, path, 2, max_sequence_length=4)
        assert isinstance(loader, ParquetDataLoader)
    with pytest.raises(ValueError, match=r"data_loader_engine must be one of .*parquet.*petastorm"):
        T4RecDataLoader.parse("petastorm")


def test_options_of_the_references_loaders_warn_and_unknown_ones_raise(tmp_path):
    path = write(tmp_path / "a.parquet", sessions([2, 3]))
    with pytest.warns(CompatWarning, match="num_workers has no effect"):
        ParquetDataLoader.from_schema(SCHEMA, path, 2, num_workers=4)
    with pytest.raises(TypeError, match="shufle"):
        ParquetDataLoader.from_schema(SCHEMA, path, 2, shufle=True)

"""Two processes under torchrun: they train like one, evaluate exactly like one, and end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from distributed_case import BATCH, causal_model, judged, masked_model, trained
from training_case import ITEM, ITEMS, LENGTH, PRICE, SCHEMA, write_sessions

from t4r_fast.errors import InputError
from t4r_fast.torch.data import ParquetDataLoader

CASE = Path(__file__).with_name("distributed_case.py")
SECONDS = 300  # for what takes 30: a process that waits for ever fails the test


def write_bare(path):
    """Of each four sessions the last two have one item: no target for the second process."""
    items = [[3, 4, 5], [6, 7, 8, 9], [10], [11]] * 3
    prices = [[0.5] * len(s) for s in items]
    pq.write_table(pa.table({ITEM: items, PRICE: pa.array(prices, pa.list_(pa.float32()))}), path)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    write_sessions(folder / "data.parquet")
    write_sessions(folder / "odd.parquet", rows=97)
    write_bare(folder / "bare.parquet")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [*command, str(CASE), str(folder)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def two(folder):
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def _same(a, b):
    assert a.keys() == b.keys() != set()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("name", "batch"), [("data", BATCH), ("bare", 2)])
def test_two_processes_train_like_one(folder, two, tmp_path, name, batch):
    """The last step's parts are uneven, and so are the targets: the mean is over all targets."""
    data = str(folder / f"{name}.parquet")
    order = {} if name == "data" else {"train_sampling_strategy": "sequential"}
    weights, losses, steps = trained(tmp_path, data, causal_model(), 2 * batch, **order)
    own = two[0]["trained" if name == "data" else "bare"]
    assert own[2] == steps > 4
    np.testing.assert_allclose(own[1], losses, rtol=1e-4)
    for key, value in weights.items():
        np.testing.assert_allclose(own[0][key], value, rtol=0, atol=2e-3 * float(value.abs().max()))
    _same(own[0], two[1]["trained" if name == "data" else "bare"][0])


def test_uneven_data_end_in_the_same_step(two):
    assert two[0]["odd_steps"] == two[1]["odd_steps"] == 2 * (97 // (2 * BATCH))
    _same(two[0]["odd_weights"], two[1]["odd_weights"])
    assert two[0]["given_steps"] == two[1]["given_steps"] == 97 // BATCH // 2
    assert [part["dealt_batches"] for part in two] == [7, 6]
    assert two[0]["dealt_steps"] == two[1]["dealt_steps"] == 6


def test_processes_draw_different_masks(two):
    assert two[0]["draw"] != two[1]["draw"]


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(two):
    for rank in (0, 1):
        # the running means of the last step are the process's own, until an evaluation
        own, whole = (
            {k: v for k, v in two[rank][name].items() if not (rank and ".running_" in k)}
            for name in ("resumed", "odd_weights")
        )
        _same(own, whole)
        assert len(own) > 5


def test_evaluation_is_that_of_one_process(folder, two, tmp_path):
    """13 batches: seven and six. Every process gets the metrics and predictions of all."""
    model = masked_model()
    model.load_state_dict(two[0]["odd_weights"])
    metrics, (ids, scores), _ = judged(tmp_path, str(folder / "odd.parquet"), model)
    assert len(ids) == 97
    for rank in (0, 1):
        own, (own_ids, own_scores), _ = two[rank]["judged"]
        assert own.keys() == metrics.keys()
        for key, value in metrics.items():
            # the loss is a float64 sum in another order
            assert own[key] == (pytest.approx(value, rel=1e-12) if "loss" in key else value), key
        np.testing.assert_array_equal(own_ids, ids)
        np.testing.assert_array_equal(own_scores, scores)


def test_the_table_optimizer_is_refused(two):
    for rank in (0, 1):
        assert "table_optimizer='adamw' works in one process" in two[rank]["refused"]


# -- dividing a step's sessions --------------------------------------------------------------------


def _items(loader):
    return [sorted(batch[ITEM][:, 0].tolist()) for batch, _ in loader]


@pytest.mark.parametrize("memory_limit", [1 << 30, 1])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rows", [3, 24, 25, 26, 31, 61])
def test_parts_of_a_loader_make_the_whole(tmp_path, rows, drop_last, shuffle, memory_limit):
    if drop_last and rows < 12:
        return
    path = tmp_path / "s.parquet"
    ids = list(range(3, 3 + rows))
    prices = pa.array([[0.0, 0.0]] * rows, pa.list_(pa.float32()))
    table = pa.table({ITEM: [[i % (ITEMS - 3) + 3, 3] for i in ids], PRICE: prices})
    pq.write_table(table, path, row_group_size=7)
    options = {"shuffle": shuffle, "drop_last": drop_last, "memory_limit": memory_limit}
    parts = [
        ParquetDataLoader(str(path), SCHEMA, 4, LENGTH, global_size=3, global_rank=r, **options)
        for r in range(3)
    ]
    seen = [_items(p) for p in parts]
    assert {len(s) for s in seen} == {len(parts[0])}
    assert all(batch for s in seen for batch in s)
    whole = rows // 12
    kept = rows if not drop_last else whole * 12
    every = sorted(i for s in seen for batch in s for i in batch)
    if kept == rows:
        assert every == sorted(i % (ITEMS - 3) + 3 for i in ids)
    assert len(every) == kept


def test_more_processes_than_sessions(tmp_path):
    data = write_sessions(tmp_path / "s.parquet", rows=2)
    with pytest.raises(InputError, match="2 sessions cannot be divided among 3"):
        ParquetDataLoader(data, SCHEMA, 4, LENGTH, global_size=3)
    with pytest.raises(InputError, match="global_rank must be >= 0 and < 2"):
        ParquetDataLoader(data, SCHEMA, 4, LENGTH, global_size=2, global_rank=2)

"""The stand-ins for NVTabular's names: what their batches hold, and what they refuse."""

from __future__ import annotations

import importlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import serving_case
import torch
import triton_double
import tutorial_cells

import t4r_fast
import t4r_fast.torch as tr
from t4r_fast.compat import CompatWarning, forget_warnings
from t4r_fast.dropin import install, uninstall
from t4r_fast.dropin.nvtabular import Dataset, Workflow
from t4r_fast.dropin.nvtabular.inference.triton import export_pytorch_ensemble
from t4r_fast.dropin.nvtabular.loader import torch as loader
from t4r_fast.dropin.nvtabular.loader.torch import DLDataLoader, TorchAsyncItr
from t4r_fast.errors import InputError

ITEM, PRICE, AGE, BOUGHT = "product_id-list_seq", "price_log_norm-list_seq", "age", "bought"
SESSIONS = [[3, 4], [5, 6, 7], [8, 9, 10, 11], [12, 3], [4, 5, 6], [7, 8], [9, 10]]


@pytest.fixture(autouse=True)
def _names():
    forget_warnings()
    install(replace=False)
    yield
    uninstall()
    t4r_fast.set_compat("23.12")


@pytest.fixture
def files(tmp_path):
    """Four and three sessions in two files."""
    paths = []
    for n, part in enumerate((slice(0, 4), slice(4, 7))):
        items = SESSIONS[part]
        table = {
            ITEM: pa.array(items, pa.list_(pa.int64())),
            PRICE: pa.array([[i / 8 for i in s] for s in items], pa.list_(pa.float32())),
            AGE: pa.array([s[0] * 10 for s in items], pa.int32()),
            BOUGHT: pa.array([len(s) % 2 for s in items], pa.float64()),
        }
        paths.append(str(tmp_path / f"{n}.parquet"))
        pq.write_table(pa.table(table), paths[-1])
    return paths


def lists(**more):
    return {"sparse_names": [ITEM, PRICE], "sparse_max": {ITEM: 5, PRICE: 5},
            "sparse_as_dense": True, **more}  # fmt: skip


def seen(batches):
    return [[i for i in row if i] for x, _ in batches for row in x[ITEM].tolist()]


def test_batches_hold_the_sessions_padded_on_the_right(files):
    data = Dataset(files, engine="parquet")
    assert data.num_rows == 7
    batches = TorchAsyncItr(
        data, cats=[ITEM, AGE], conts=[PRICE], labels=[BOUGHT], batch_size=3, **lists()
    )
    found = list(batches)
    assert len(batches) == len(found) == 3
    at = 0
    for features, target in found:
        rows = SESSIONS[at : at + len(target)]
        at += len(target)
        assert set(features) == {ITEM, PRICE, AGE}
        ids = torch.tensor([(s + [0] * 5)[:5] for s in rows])
        assert torch.equal(features[ITEM], ids)
        assert torch.equal(features[PRICE], ids / 8)
        assert torch.equal(features[AGE], torch.tensor([s[0] * 10 for s in rows]))
        assert torch.equal(target, torch.tensor([len(s) % 2 for s in rows], dtype=torch.float32))
    assert at == 7


@pytest.mark.parametrize("level", ["0.1", "23.12"])
def test_pairs_at_both_levels_and_all_kinds_of_labels(files, level):
    t4r_fast.set_compat(level)
    one = {"cats": [ITEM], "batch_size": 7, **lists()}
    assert next(iter(TorchAsyncItr(Dataset(files), labels=[], **one)))[1] is None
    features, targets = next(iter(TorchAsyncItr(Dataset(files), labels=[BOUGHT, AGE], **one)))
    assert set(features) == {ITEM}
    assert {n: t.dtype for n, t in targets.items()} == {BOUGHT: torch.float32, AGE: torch.int64}


def test_order_of_a_shuffled_pass(files):
    options = {"cats": [ITEM], "batch_size": 2, "shuffle": True, **lists()}
    batches = TorchAsyncItr(Dataset(files), **options)
    first, second = seen(batches), seen(batches)
    assert sorted(first) == sorted(second) == sorted(SESSIONS)
    assert first != second
    batches.set_epoch(0)
    assert seen(batches) == first
    # one seed for each pass, as many as were asked for
    seeds = iter([7, 8])
    seeded = TorchAsyncItr(Dataset(files), seed_fn=lambda: next(seeds), **options)
    seven, eight = seen(seeded), seen(seeded)
    assert seven != eight
    again = TorchAsyncItr(Dataset(files), seed_fn=lambda: np.int64(7), **options)
    assert seen(again) == seven
    whole = seen(TorchAsyncItr(Dataset(files), drop_last=True, **options))
    assert len(whole) == 6


def test_processes_divide_the_sessions(files):
    def part(rank):
        options = {"batch_size": 2, "global_size": 2, "global_rank": rank, **lists()}
        return DLDataLoader(TorchAsyncItr(Dataset(files), cats=[ITEM], **options))

    assert [part(rank).global_size for rank in (0, 1)] == [2, 2]
    found = [seen(part(rank).dataset) for rank in (0, 1)]
    assert found == [[*SESSIONS[:2], *SESSIONS[4:6]], [*SESSIONS[2:4], *SESSIONS[6:]]]


class Wrapper(DLDataLoader):
    """As the tutorial writes it."""

    def __init__(self, *args, **kwargs) -> None:
        if "batch_size" in kwargs:
            self._batch_size = kwargs.pop("batch_size")
        super().__init__(*args, **kwargs)


def wrapped(files, **options):
    batches = TorchAsyncItr(Dataset(files), cats=[ITEM], batch_size=3, **lists(), **options)
    return Wrapper(batches, collate_fn=lambda inputs: inputs[0][0], batch_size=3)


def test_the_users_wrapper_and_collate_function(files):
    given = wrapped(files)
    assert len(given) == 3
    assert given.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert [len(batch[ITEM]) for batch in given] == [3, 3, 1]
    assert all(set(batch) == {ITEM} for batch in given)
    given.set_epoch(4)
    assert given.dataset._batches._epoch == 4


def test_the_trainer_counts_sessions_and_resumes_shuffled_data(files, tmp_path):
    t4r_fast.set_compat("0.1")
    schema = tutorial_cells.schema(13).select_by_name([ITEM])
    options = {"output_dir": str(tmp_path), "report_to": [], "disable_tqdm": True, "use_cpu": True}

    def trained(resume=None, **more):
        torch.manual_seed(0)
        model = tutorial_cells.gru(schema)
        args = tr.T4RecTrainingArguments(**options, num_train_epochs=2, **more)
        trainer = tr.Trainer(model=model, args=args, schema=schema, compute_metrics=True)
        trainer.train_dataloader = wrapped(files, shuffle=True)
        trainer.eval_dataloader = wrapped(files)
        assert trainer.num_examples(trainer.train_dataloader) == 7
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(save_steps=4)
    found = whole.evaluate(metric_key_prefix="eval")
    assert found["eval_samples_per_second"] > 0
    assert 0 < found["eval/next-item/recall_at_20"] <= 1
    again = trained(resume=str(tmp_path / "checkpoint-4"), save_strategy="no")
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_dataset_may_stand_for_files(files):
    schema = tutorial_cells.schema(13).select_by_name([ITEM])
    found = tr.ParquetDataLoader(Dataset(files), schema, 7, 5)
    assert seen(found) == SESSIONS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name at least one column, in cats or conts"),
        ({"cats": ["colour"]}, r"has no column 'colour'; it has age, bought, price_log"),
        ({"cats": [ITEM], "sparse_as_dense": False}, "sparse_as_dense must be True: .* got False"),
        ({"cats": [ITEM], "conts": [PRICE], "sparse_max": {ITEM: 5}}, f"{PRICE} is missing"),
        ({"cats": [ITEM], "conts": [PRICE], "sparse_names": [ITEM]}, f"{PRICE} is missing"),
        (
            {"cats": [ITEM], "conts": [PRICE], "sparse_max": {ITEM: 5, PRICE: 4}},
            "must be one width for all list columns; got {.*5, .*4}",
        ),
        ({"cats": [ITEM], "global_size": 2, "global_rank": 2}, "global_rank must be >= 0 and < 2"),
        ({"cats": [ITEM], "batch_size": 0}, "batch_size must be an integer >= 1; got 0"),
    ],
)
def test_what_the_iterator_refuses(files, options, message):
    with pytest.raises(InputError, match=message):
        TorchAsyncItr(Dataset(files), **lists(**options))


def test_other_refusals(files):
    with pytest.raises(InputError, match="engine must be 'parquet'; got 'csv'"):
        Dataset(files, engine="csv")
    with pytest.raises(TypeError, match="storage_options is not supported by t4r_fast"):
        Dataset(files, storage_options={})
    with pytest.raises(TypeError, match="give parquet files; got a Table"):
        Dataset(pa.table({"a": [1]}))
    with pytest.raises(InputError, match="list of parquet files is empty"):
        Dataset([], engine="parquet")
    with pytest.raises(TypeError, match=r"dataset must be an nvtabular\.Dataset; got list"):
        TorchAsyncItr(files, cats=[ITEM])
    batches = TorchAsyncItr(Dataset(files), cats=[ITEM], **lists())
    with pytest.raises(InputError, match="num_workers must be 0; got 2"):
        list(DLDataLoader(batches, num_workers=2))


@pytest.mark.filterwarnings("error::t4r_fast.compat.CompatWarning")
def test_warnings_of_options_without_effect(files, monkeypatch):
    with pytest.raises(CompatWarning, match="part_size has no effect"):
        Dataset(files, part_size="100MB")
    with pytest.raises(CompatWarning, match="parts_per_chunk has no effect"):
        TorchAsyncItr(Dataset(files), cats=[ITEM], parts_per_chunk=2, **lists())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CompatWarning, match=r"there is no GPU: .* not on device 0"):
        TorchAsyncItr(Dataset(files), cats=[ITEM], device=0, **lists())
    assert TorchAsyncItr(Dataset(files), cats=[ITEM], device="cpu", **lists()).device.type == "cpu"


def test_batches_go_to_the_device(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loader._device(1) == torch.device("cuda", 1)
    batches = TorchAsyncItr(
        Dataset(files), cats=[ITEM], labels=[BOUGHT], device="meta", batch_size=7, **lists()
    )
    features, target = next(iter(batches))
    assert features[ITEM].device.type == target.device.type == "meta"


def test_names():
    nvt = importlib.import_module("nvtabular")
    assert nvt.Workflow is Workflow is t4r_fast.etl.Workflow
    assert importlib.import_module("nvtabular.loader.torch").TorchAsyncItr is TorchAsyncItr
    with pytest.raises(AttributeError, match="not 'ops'; install NVTabular"):
        nvt.ops  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"'nvtabular\.ops'; install NVTabular for it"):
        importlib.import_module("nvtabular.ops")


def test_export(tmp_path, monkeypatch):
    events, workflow = serving_case.shop(str(tmp_path))
    model = serving_case.make_model(workflow)
    given = {"sparse_max": {ITEM: 5}, "name": "t4r_pytorch", "model_path": str(tmp_path / "models")}
    for _ in range(2):  # an earlier one is replaced
        assert export_pytorch_ensemble(model, workflow, label_columns=[], **given) is None
    served = triton_double.load(tmp_path / "models" / "t4r_pytorch", monkeypatch)
    new = serving_case.latest(events, 3)
    kinds = {"user_session": "STRING", "product_id": "INT64", "event_time": "STRING"}
    sent = {name: triton_double.column(new[name], kind) for name, kind in kinds.items()}
    (answer,) = served.execute([triton_double.Request(sent, ["output"])])
    with torch.no_grad():
        expected = model({ITEM: newest(serving_case.lists(new, workflow)[ITEM], 5)})
    assert torch.equal(torch.from_numpy(answer.outputs["output"]), expected)
    with pytest.raises(InputError, match="sparse_max must give one length"):
        export_pytorch_ensemble(model, workflow, **{**given, "sparse_max": {ITEM: 5, "b": 6}})
    with pytest.raises(InputError, match="sparse_max has no length for"):
        export_pytorch_ensemble(model, workflow, **{**given, "sparse_max": {"b": 6}})
    with pytest.warns(CompatWarning, match="cats has no effect"):
        export_pytorch_ensemble(model, workflow, cats=[ITEM], **given)


def newest(items, length):
    """(B, length): the last items of each row, pads behind them."""
    rows = [row[row != 0][-length:] for row in items]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

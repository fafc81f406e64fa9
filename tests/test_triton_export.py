"""Model repositories for Triton, driven without the server; test_triton.py starts the real one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import triton_double as double
import tutorial_cells
from serving_case import ITEM, LENGTH, latest, lists, make_model, shop

import t4r_fast
from t4r_fast.compat import CompatWarning, forget_warnings
from t4r_fast.errors import InputError
from t4r_fast.etl import Workflow
from t4r_fast.serving import Recommender, export

EVENTS_OUT = ("session", "items", "scores")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return shop(str(tmp_path_factory.mktemp("shop")))


def tensors(folder, field):
    """name -> (type, dims) of config.pbtxt."""
    text = (folder / "config.pbtxt").read_text()
    pattern = rf'^{field} \[ {{ name: "(.*?)" data_type: TYPE_(\w+) dims: \[ (.*?) \]'
    found = re.findall(pattern, text, re.MULTILINE)
    return {n: (kind, tuple(map(int, dims.split(", ")))) for n, kind, dims in found}


def request(folder, events, outputs=EVENTS_OUT, **parameters):
    kinds = tensors(folder, "input")
    inputs = {name: double.column(events[name], kind) for name, (kind, _) in kinds.items()}
    return double.Request(inputs, outputs, **parameters)


@pytest.mark.parametrize("side", [False, True], ids=["items", "side"])
def test_raw_events_get_the_recommenders_answers(case, side, tmp_path, monkeypatch):
    events, workflow = case
    model, new = make_model(workflow, side=side), latest(events, 12)
    folder = export(model, workflow, tmp_path, "shop", top_k=7)
    assert folder == tmp_path / "shop"
    kinds = {"event_time": "STRING", "user_session": "STRING", "product_id": "INT64"}
    if side:
        kinds |= {"category_id": "INT64", "brand": "STRING", "price": "FP64"}
        for name in ("category_id", "brand"):
            whole = workflow.vocabularies[name.removesuffix("_id")]["value"].dtype.is_integer()
            kinds[name] = "INT64" if whole else "STRING"
    assert tensors(folder, "input") == {n: (kind, (1,)) for n, kind in kinds.items()}
    outs = {"session": ("STRING", (1,)), "items": ("INT64", (-1,)), "scores": ("FP32", (-1,))}
    assert tensors(folder, "output") == outs
    served = double.load(folder, monkeypatch)
    (answer,) = served.execute([request(folder, new)])
    assert answer.error is None
    expected = Recommender(model, workflow).recommend(new, 7)
    assert [s.decode() for s in answer.outputs["session"][:, 0]] == expected.sessions
    assert answer.outputs["items"].tolist() == expected.items
    assert np.array_equal(answer.outputs["scores"], expected.scores)


def test_nothing_is_pickled_and_the_files_say_what_they_are(case, tmp_path):
    _, workflow = case
    folder = export(make_model(workflow), workflow, tmp_path, "shop", version=3)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {
        "config.pbtxt", "3/model.py", "3/serving.json", "3/model/t4rec_model_class.json",
        "3/model/t4rec_model_class.safetensors", "3/workflow/workflow.json",
        "3/workflow/item.parquet", *(f"warmup/input_{i}" for i in range(3)),
    }  # fmt: skip
    text = (folder / "config.pbtxt").read_text()
    assert text.startswith('name: "shop"\nbackend: "python"\nmax_batch_size: 65536\n')
    assert "dynamic_batching { max_queue_delay_microseconds: 1000 }" in text
    assert list(tmp_path.iterdir()) == [folder]


def test_joined_requests_are_answered_each_and_a_bad_one_stands_alone(case, tmp_path, monkeypatch):
    events, workflow = case
    folder = export(make_model(workflow), workflow, tmp_path, top_k=7)
    served, new = double.load(folder, monkeypatch), latest(events, 9)
    sessions = new["user_session"].unique(maintain_order=True).to_list()
    parts = [new.filter(new["user_session"].is_in(sessions[i : i + 3])) for i in (0, 3, 6)]
    bad_time = request(folder, parts[0])
    bad_time.inputs["event_time"][1] = b"noon"
    asked = [
        request(folder, parts[0]),
        bad_time,
        request(folder, parts[1], top_k=3),
        request(folder, parts[2], exclude_seen=True),
        request(folder, parts[2], top_k="many"),
        request(folder, parts[2], exclude_seen=1),
        request(folder, parts[2], top_k=129),
    ]
    calls = []
    monkeypatch.setattr(
        served._recommender,
        "answer",
        lambda *a, f=served._recommender.answer: calls.append(a) or f(*a),
    )
    found = served.execute(asked)
    assert [len(c[0][ITEM]) for c in calls] == [6, 3]  # one call for each value of exclude_seen
    plain = Recommender(make_model(workflow), workflow)
    for answer, part, k, options in (
        (found[0], parts[0], 7, {}),
        (found[2], parts[1], 3, {}),
        (found[3], parts[2], 7, {"exclude_seen": True}),
    ):
        expected = plain.recommend(part, k, **options)
        assert answer.outputs["items"].tolist() == expected.items
        assert np.allclose(answer.outputs["scores"], expected.scores, atol=1e-5)
    for answer, message in zip(
        (found[1], *found[4:]),
        (
            "column 'event_time', row 2 .*: the time 'noon' is no time",
            "top_k must be a whole number from 1 to 128; got 'many'",
            "exclude_seen must be true or false; got 1",
            "top_k must be a whole number from 1 to 128; got 129",
        ),
    ):
        assert re.search(message, answer.error)


@pytest.mark.parametrize("form", ["ragged", "padded"])
@pytest.mark.parametrize("mapped", [True, False], ids=["products", "ids"])
def test_encoded_sessions(case, form, mapped, tmp_path, monkeypatch):
    events, workflow = case
    model, batch = make_model(workflow), lists(latest(events, 12), workflow)
    folder = export(model, workflow if mapped else None, tmp_path, sessions=form, top_k=7)
    items = batch[ITEM]
    if form == "ragged":
        offsets = np.concatenate([[0], (items != 0).sum(1).cumsum(0).numpy()]).astype(np.int32)
        inputs = {f"{ITEM}__values": items[items != 0].numpy(), f"{ITEM}__offsets": offsets}
        kinds = {f"{ITEM}__values": ("INT64", (-1,)), f"{ITEM}__offsets": ("INT32", (-1,))}
    else:
        wide = torch.nn.functional.pad(items, (0, 4))
        inputs, kinds = {ITEM: wide.numpy()}, {ITEM: ("INT64", (-1,))}
    assert tensors(folder, "input") == kinds
    names = ("items", "scores") if mapped else ("item_ids", "item_id_scores")
    dims = (-1, -1) if form == "ragged" else (-1,)
    assert tensors(folder, "output") == {names[0]: ("INT64", dims), names[1]: ("FP32", dims)}
    served = double.load(folder, monkeypatch)
    (answer,) = served.execute([double.Request(inputs, names)])
    scores, ids = model.recommend(batch, 7, recommend_from=3 if mapped else 1)
    assert np.array_equal(answer.outputs[names[1]], scores.numpy())
    expected = [workflow.items(row) for row in ids.tolist()] if mapped else ids.tolist()
    assert answer.outputs[names[0]].tolist() == expected


@pytest.mark.parametrize(
    ("values", "offsets", "message"),
    [
        ([5, 6, 7], [0, 2], "must begin with 0 and end with the number of values, 3"),
        ([5, 6, 7], [3], "must begin with 0 and end"),
        ([5, 6, 7], [0, 4, 3], "must not fall"),
        ([5, 6, 7], [0, 0, 3], "session 0 .counted from 0. has no items"),
        ([5, 999, 7], [0, 3], "column 'product_id-list_seq', session 0: id 999 is no row"),
    ],
)
def test_bad_ragged_sessions(case, values, offsets, message, tmp_path, monkeypatch):
    _, workflow = case
    folder = export(make_model(workflow), workflow, tmp_path, sessions="ragged")
    inputs = {
        f"{ITEM}__values": np.array(values),
        f"{ITEM}__offsets": np.array(offsets, dtype=np.int32),
    }
    (answer,) = double.load(folder, monkeypatch).execute([double.Request(inputs, ["items"])])
    assert re.search(message, answer.error)


def test_padded_sessions_of_any_width_keep_their_newest_items(case, tmp_path, monkeypatch):
    _, workflow = case
    model = make_model(workflow)
    folder = export(model, workflow, tmp_path, sessions="padded", top_k=4)
    served = double.load(folder, monkeypatch)
    long = torch.arange(3, 3 + LENGTH + 5)
    wide = torch.zeros(2, LENGTH + 9, dtype=torch.int64)
    wide[0, : len(long)], wide[1, :1] = long, 9
    short = wide[1:, :2]
    found = served.execute(
        [double.Request({ITEM: x.numpy()}, ["items"]) for x in (wide, short, wide.flip(1))]
    )
    cut = torch.zeros(2, LENGTH, dtype=torch.int64)
    cut[0], cut[1, 0] = long[-LENGTH:], 9
    expected = [workflow.items(row) for row in model.recommend({ITEM: cut}, 4, recommend_from=3)[1]]
    assert found[0].outputs["items"].tolist() == expected
    assert found[1].outputs["items"].tolist() == expected[1:]
    assert "pads (0) must stand behind the items" in found[2].error


def test_scores_of_all_items_on_request(case, tmp_path, monkeypatch):
    events, workflow = case
    model, new = make_model(workflow), latest(events, 4)
    folder = export(model, workflow, tmp_path, all_scores=True)
    served = double.load(folder, monkeypatch)
    both = [request(folder, new, outputs) for outputs in (["output", "session"], ["items"])]
    found = served.execute(both)
    with torch.no_grad():
        expected = model(lists(new, workflow))
    assert np.allclose(found[0].outputs["output"], expected.numpy(), atol=1e-5)
    assert [set(f.outputs) for f in found] == [{"output", "session"}, {"items"}]


def test_text_products_and_answers_that_are_short(case, tmp_path, monkeypatch):
    events, _ = case
    named = events.with_columns(product_id="p" + events["product_id"].cast(str))
    workflow = Workflow.fit(named)
    folder = export(make_model(workflow), workflow, tmp_path, top_k=128, exclude_seen=True)
    assert tensors(folder, "input")["product_id"] == ("STRING", (1,))
    assert tensors(folder, "output")["items"] == ("STRING", (-1,))
    (answer,) = double.load(folder, monkeypatch).execute([request(folder, latest(named, 2))])
    items, scores = answer.outputs["items"], answer.outputs["scores"]
    assert items.shape == scores.shape == (2, 128)
    assert ((items == b"") == (scores == -np.inf)).all()
    assert items[0, 0].startswith(b"p")
    assert items[0, -1] == b""


def test_the_warm_up_is_a_request_that_works(case, tmp_path, monkeypatch):
    _, workflow = case
    model = make_model(workflow, side=True)
    for form in ("events", "ragged", "padded"):
        folder = export(model, workflow, tmp_path / form, sessions=form)
        kinds = {"INT64": "<i8", "INT32": "<i4", "FP32": "<f4", "FP64": "<f8"}
        inputs = {}
        for i, (name, (kind, _)) in enumerate(tensors(folder, "input").items()):
            raw = (folder / "warmup" / f"input_{i}").read_bytes()
            if kind == "STRING":
                assert int.from_bytes(raw[:4], "little") == len(raw) - 4
                inputs[name] = np.array([raw[4:]], dtype=np.object_)
            else:
                inputs[name] = np.frombuffer(raw, kinds[kind])
            if form != "ragged":
                inputs[name] = inputs[name][None]
        (answer,) = double.load(folder, monkeypatch).execute(
            [double.Request(inputs, tensors(folder, "output"))]
        )
        assert answer.error is None
        assert len(answer.outputs["items"]) == 1


def test_types_of_the_events(case, tmp_path, monkeypatch):
    events, workflow = case
    model, new = make_model(workflow), latest(events, 5)
    types = {"event_time": "INT64", "user_session": "INT64", "product_id": "STRING"}
    folder = export(model, workflow, tmp_path, types=types)
    sessions = new["user_session"].unique(maintain_order=True).to_list()
    numbers = new.with_columns(
        user_session=new["user_session"].replace_strict(sessions, list(range(5))),
        event_time=new["event_time"].str.to_datetime("%Y-%m-%d %H:%M:%S UTC").dt.epoch("s"),
    )
    (answer,) = double.load(folder, monkeypatch).execute([request(folder, numbers)])
    assert answer.outputs["session"][:, 0].tolist() == [b"0", b"1", b"2", b"3", b"4"]
    assert answer.outputs["items"].tolist() == Recommender(model, workflow).recommend(new).items
    with pytest.raises(InputError, match=r"'event_time' .time. must be one of STRING, INT64, FP64"):
        export(model, workflow, tmp_path, "b", types={"event_time": "FP32"})
    with pytest.raises(InputError, match=r"\['brand'\] are no columns; the model reads"):
        export(model, workflow, tmp_path, "b", types={"brand": "STRING"})
    with pytest.raises(InputError, match="types are of the events"):
        export(model, workflow, tmp_path, "b", types=types, sessions="ragged")
    assert not (tmp_path / "b").exists()


def test_sessions_of_the_printed_gru_are_not_joined_with_other_requests(
    case, tmp_path, monkeypatch
):
    _, workflow = case
    schema = workflow.schema()
    forget_warnings()
    with t4r_fast.compat.compat_level("0.1"):
        model = tutorial_cells.gru(schema).eval()
        with pytest.warns(CompatWarning, match="the server answers each request by itself"):
            folder = export(model, workflow, tmp_path, sessions="padded", top_k=4)
    assert json.loads((folder / "1" / "serving.json").read_text())["join"] is False
    served = double.load(folder, monkeypatch)
    batches = [np.array([[5, 6, 0], [7, 8, 9]]), np.array([[4, 0, 0]])]
    asked = [double.Request({ITEM: batch}, ["scores"]) for batch in batches]
    together, alone = served.execute(asked), [served.execute([one])[0] for one in asked]
    for a, b in zip(together, alone):
        assert np.array_equal(a.outputs["scores"], b.outputs["scores"])


def test_what_export_refuses(case, tmp_path):
    _, workflow = case
    model = make_model(workflow)
    for match, options in (
        ("sessions must be one of events, ragged, padded; got 'lists'", {"sessions": "lists"}),
        ("name must be letters", {"name": "../x"}),
        ("version must be a whole number from 1; got 0", {"version": 0}),
        ("instances must be a whole number from 1", {"instances": 0}),
        ("top_k must be a whole number from 1 to 128; got 200", {"top_k": 200}),
        ("max_batch_size must be at least 1", {"max_batch_size": 0}),
        ("ragged sessions cannot be joined", {"sessions": "ragged", "max_batch_size": 8}),
        ("length must be at least 1", {"length": 0}),
    ):
        with pytest.raises(InputError, match=match):
            export(model, workflow, tmp_path, **options)
    with pytest.raises(InputError, match="raw events need a workflow"):
        export(model, None, tmp_path)
    with pytest.raises(InputError, match="they are of different ETL runs"):
        export(model, Workflow.fit(case[0].head(40)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    export(model, workflow, tmp_path)
    with pytest.raises(InputError, match="is there already; give overwrite=True"):
        export(model, workflow, tmp_path)
    assert export(model, workflow, tmp_path, overwrite=True) == Path(tmp_path / "t4r_fast")

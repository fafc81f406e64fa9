"""The real Triton Inference Server on exported models, by HTTP and by gRPC.

`make test-serving` builds the environment that has the server and runs these tests in it.
"""

from __future__ import annotations

import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import triton_server
from serving_case import ITEM, LENGTH, latest, lists, make_model, shop
from triton_double import column

from t4r_fast.serving import Recommender, export

REASON = triton_server.missing()
if REASON is not None and os.environ.get("T4R_FAST_REQUIRE_TRITON") == "1":
    raise RuntimeError(f"T4R_FAST_REQUIRE_TRITON=1, and there is no server: {REASON}")
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

KINDS = {"user_session": "STRING", "product_id": "INT64", "event_time": "STRING"}
OUT = {"events": ("session", "items", "scores"), "ids": ("item_ids", "item_id_scores")}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The server with a model of raw events and two of encoded sessions, and what they hold."""
    events, workflow = shop(str(tmp_path_factory.mktemp("shop")))
    model = make_model(workflow)
    repository = tmp_path_factory.mktemp("repository")
    export(model, workflow, repository, "shop", top_k=7, all_scores=True)
    export(model, None, repository, "ragged", sessions="ragged", top_k=7)
    export(model, None, repository, "padded", sessions="padded", top_k=7)
    with triton_server.running(repository, tmp_path_factory.mktemp("server")) as server:
        yield SimpleNamespace(
            server=server,
            events=events,
            workflow=workflow,
            model=model,
            recommender=Recommender(model, workflow),
        )


class Client:
    """One of tritonclient's two, with plain arrays in and out."""

    def __init__(self, server, protocol):
        import tritonclient.grpc
        import tritonclient.http

        self.of = {"http": tritonclient.http, "grpc": tritonclient.grpc}[protocol]
        self.client = self.of.InferenceServerClient(getattr(server, protocol))

    def ask(self, model, inputs, outputs, **parameters):
        """inputs: name -> (Triton type, array)."""
        sent = []
        for name, (kind, array) in inputs.items():
            tensor = self.of.InferInput(name, list(array.shape), kind)
            tensor.set_data_from_numpy(array)
            sent.append(tensor)
        wanted = [self.of.InferRequestedOutput(name) for name in outputs]
        reply = self.client.infer(model, sent, outputs=wanted, parameters=parameters or None)
        return {name: reply.as_numpy(name) for name in outputs}

    def refused(self, *args, **parameters):
        """The message of the error."""
        from tritonclient.utils import InferenceServerException

        with pytest.raises(InferenceServerException) as caught:
            self.ask(*args, **parameters)
        return caught.value.message()


@pytest.fixture(params=["http", "grpc"])
def client(request, served):
    return Client(served.server, request.param)


def raw(events):
    names = {"STRING": "BYTES", "INT64": "INT64"}
    return {n: (names[kind], column(events[n], kind)) for n, kind in KINDS.items()}


def test_raw_events_get_what_the_model_recommends(served, client):
    for sessions in (1, 12):
        new = latest(served.events, sessions)
        found = client.ask("shop", raw(new), OUT["events"])
        scores, ids = served.model.recommend(lists(new, served.workflow), 7, recommend_from=3)
        expected = served.recommender.recommend(new, 7)
        assert [s.decode() for s in found["session"][:, 0]] == expected.sessions
        assert found["items"].tolist() == [served.workflow.items(row) for row in ids.tolist()]
        assert found["items"].tolist() == expected.items
        assert np.array_equal(found["scores"], scores.numpy())


def test_parameters_of_a_request(served, client):
    new = latest(served.events, 5)
    found = client.ask("shop", raw(new), OUT["events"], top_k=3, exclude_seen=True)
    expected = served.recommender.recommend(new, 3, exclude_seen=True)
    assert found["items"].tolist() == expected.items
    assert np.array_equal(found["scores"], expected.scores)
    assert "from 1 to 128; got 129" in client.refused("shop", raw(new), OUT["events"], top_k=129)


def test_scores_of_all_items(served, client):
    new = latest(served.events, 5)
    found = client.ask("shop", raw(new), ["output"])["output"]
    assert found.shape == (5, served.workflow.num_items)
    expected = served.recommender.recommend(new, 7)
    assert np.allclose(np.take_along_axis(found, expected.ids, 1), expected.scores, atol=1e-5)


def test_encoded_sessions(served, client):
    items = lists(latest(served.events, 9), served.workflow)[ITEM]
    scores, ids = served.model.recommend({ITEM: items}, 7, recommend_from=1)
    offsets = np.concatenate([[0], (items != 0).sum(1).cumsum(0).numpy()]).astype(np.int32)
    ragged = {
        f"{ITEM}__values": ("INT64", items[items != 0].numpy()),
        f"{ITEM}__offsets": ("INT32", offsets),
    }
    for model, inputs in (("ragged", ragged), ("padded", {ITEM: ("INT64", items.numpy())})):
        found = client.ask(model, inputs, OUT["ids"])
        assert np.array_equal(found["item_ids"], ids.numpy())
        assert np.array_equal(found["item_id_scores"], scores.numpy())


def test_unusual_requests_get_the_documented_answer(served, client):
    new = latest(served.events, 1)
    unknown = new.with_columns(product_id=pl.lit(77))
    long = pl.concat([new.head(1)] * 1000).with_columns(
        event_time=pl.Series([str(1_600_000_000 + n) for n in range(1000)]),
        product_id=pl.Series((served.events["product_id"].to_list() * 3)[:1000]),
    )
    for events in (unknown, long):
        found = client.ask("shop", raw(events), OUT["events"])
        assert found["items"].tolist() == served.recommender.recommend(events, 7).items
    assert len(lists(long, served.workflow)[ITEM][0]) == LENGTH


def test_bad_requests_get_an_error_and_the_server_stays_up(served, client):
    new = latest(served.events, 2)
    good = raw(new)
    two = {k: v for k, v in good.items() if k != "product_id"}
    times = good["event_time"][1].copy()
    times[1] = b"noon"
    sessions = good["user_session"][1].copy()
    sessions[0] = b""
    ids = {ITEM: ("INT64", np.array([[5, 10**9]]))}
    empty = {ITEM: ("INT64", np.array([[0, 0]]))}
    for model, inputs, message in (
        ("shop", {**good, "event_time": ("BYTES", times)}, "the time 'noon' is no time"),
        ("shop", {**good, "user_session": ("BYTES", sessions)}, "the session is missing"),
        ("shop", two, "expected 3 inputs but got 2"),
        ("shop", {**good, "product_id": ("FP32", np.zeros((len(new), 1), np.float32))}, "type"),
        ("shop", {**good, "product_id": ("INT64", np.zeros((len(new), 2), np.int64))}, "shape"),
        ("shop", {**good, "product_id": ("INT64", np.zeros((1, 1), np.int64))}, "batch size"),
        ("padded", ids, f"column '{ITEM}', session 0: id 1000000000 is no row of the table"),
        ("padded", empty, "session 0 (counted from 0) has no items"),
    ):
        assert message in client.refused(model, inputs, OUT["events" if model == "shop" else "ids"])
    none = {n: (kind, array[:0]) for n, (kind, array) in good.items()}
    assert client.refused("shop", none, OUT["events"])
    assert served.server.ready()
    assert all(served.server.ready(name) for name in ("shop", "ragged", "padded"))
    found = client.ask("shop", good, OUT["events"])
    assert found["items"].tolist() == served.recommender.recommend(new, 7).items


@pytest.mark.slow
def test_sixteen_clients_for_half_a_minute(served):
    parts = [latest(served.events, n) for n in range(1, 9)]
    expected = [served.recommender.recommend(part, 7) for part in parts]
    end, errors, answered = time.monotonic() + 30, [], [0] * 16

    def ask(number):
        try:
            client = Client(served.server, ("http", "grpc")[number % 2])
            while time.monotonic() < end:
                at = (number + answered[number]) % 8
                found = client.ask("shop", raw(parts[at]), OUT["events"])
                # joined requests may round otherwise than one alone
                assert np.allclose(found["scores"], expected[at].scores, atol=1e-4)
                assert found["items"].tolist() == expected[at].items
                answered[number] += 1
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(10)
    before = served.server.resident_mib()
    for thread in threads:
        thread.join()
    assert errors == []
    assert min(answered) >= 10
    # of the last 20 seconds; a request's own data are under a tenth of a MiB
    assert served.server.resident_mib() < before + 40, answered
    assert served.server.ready()

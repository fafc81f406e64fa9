"""`t4r-fast serve`: the HTTP server, and its page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving_case import latest, make_model, shop

from t4r_fast.errors import InputError
from t4r_fast.serving import Recommender, web

uvicorn = pytest.importorskip("uvicorn", reason="not installed: pip install 't4r_fast[serve]'")
pytest.importorskip("fastapi", reason="not installed: pip install 't4r_fast[serve]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return shop(str(tmp_path_factory.mktemp("shop")))


class Served:
    """A running app; `recommender` is what it answers with."""

    def __init__(self, recommender):
        self.recommender, self.app = recommender, web.create_app(recommender)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(self.app, host="127.0.0.1", port=port, log_level="error")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            text = reply.read().decode()
            return json.loads(text) if "json" in reply.headers["Content-Type"] else text

    def recommend(self, events, **options):
        """(status, answer)."""
        body = json.dumps({"events": events, **options}).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"{self.url}/recommend", body, headers)
        try:
            with urllib.request.urlopen(asked, timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)


@pytest.fixture(scope="module")
def served(case):
    _, workflow = case
    with Served(Recommender(make_model(workflow), workflow)) as running:
        yield running


def answers(found):
    return [
        {"session": s, "items": [{"item": i, "score": x} for i, x in zip(items, scores)]}
        for s, items, scores in zip(found.sessions, found.items, found.scores.tolist())
    ]


def test_it_answers_as_the_recommender_does(case, served):
    new = latest(case[0], 6)
    for options in ({}, {"top_k": 3, "exclude_seen": True}):
        status, found = served.recommend(new.to_dicts(), **options)
        assert status == 200
        asked = {"top_k": 20, **options}
        expected = served.recommender.recommend(new, asked.pop("top_k"), **asked)
        assert found == {"sessions": answers(expected)}
    assert len(found["sessions"][0]["items"]) == 3


def test_side_features_may_be_missing(case):
    events, workflow = case
    with Served(Recommender(make_model(workflow, side=True), workflow)) as side:
        new = latest(events, 3)
        expected = answers(side.recommender.recommend(new))
        assert side.recommend(new.to_dicts()) == (200, {"sessions": expected})
        bare = new.select("user_session", "product_id", "event_time")
        status, found = side.recommend(bare.to_dicts(), top_k=4)
        assert status == 200
        assert [len(s["items"]) for s in found["sessions"]] == [4, 4, 4]


def test_bad_requests_say_what_is_wrong(case, served):
    events, _ = case
    good = latest(events, 1).to_dicts()
    for event, message in (
        ({"event_time": "noon"}, "the time 'noon' is no time"),
        ({"user_session": None}, "the session is missing"),
        ({"product_id": 2**70}, "whole numbers must fit 64 bits"),
    ):
        status, found = served.recommend([{**good[0], **event}])
        assert (status, message in found["detail"]) == (422, True), found
    del good[0]["product_id"]
    assert served.recommend(good) == (422, {"detail": "event 1 has no 'product_id', its item"})
    for body in ({"events": []}, {"events": good, "top_k": 0}, {"events": good, "k": 3}):
        assert served.recommend(**body)[0] == 422
    unknown = [{**latest(events, 1).to_dicts()[0], "product_id": "nothing"}]
    status, found = served.recommend(unknown, top_k=2)
    assert (status, len(found["sessions"][0]["items"])) == (200, 2)


def test_health_items_and_the_description(case, served):
    _, workflow = case
    health = served.get("/health")
    assert health["status"] == "ok"
    assert health["items"] == workflow.num_items - 3
    assert health["columns"] == served.recommender.columns
    values = workflow.vocabularies["item"]["value"].to_list()
    assert served.get("/items?limit=5") == values[:5]
    part = str(values[7])[2:]
    assert served.get(f"/items?contains={part}") == [v for v in values if part in str(v)]
    paths = served.get("/openapi.json")["paths"]
    assert set(paths) == {"/recommend", "/items", "/health", "/metrics"}
    assert "openapi.json" in served.get("/docs")


def test_metrics_count_requests(case):
    events, workflow = case
    with Served(Recommender(make_model(workflow), workflow)) as fresh:
        fresh.recommend(latest(events, 4).to_dicts())
        fresh.recommend([{"product_id": 1}])
        text = fresh.get("/metrics")
    for line in (
        't4r_fast_requests_total{code="200"} 1',
        't4r_fast_requests_total{code="422"} 1',
        "t4r_fast_sessions_total 4",
        "t4r_fast_request_seconds_count 2",
        't4r_fast_request_seconds_bucket{le="+Inf"} 2',
    ):
        assert line in text.splitlines()
    buckets = [int(n) for n in re.findall(r'bucket{le="[^"]*"} (\d+)', text)]
    assert buckets == sorted(buckets)


def test_many_clients_at_once(case, served):
    events, _ = case
    asked = [
        (latest(events, n), {"top_k": k, "exclude_seen": unseen})
        for n, k, unseen in zip(range(1, 9), (1, 5, 20, 60) * 2, (False,) * 3 + (True,) * 5)
    ]
    expected = []
    for part, options in asked:
        found = served.recommender.recommend(
            part, options["top_k"], exclude_seen=options["exclude_seen"]
        )
        expected.append((200, {"sessions": answers(found)}))

    def ask(n):
        if n % 9 == 8:
            assert served.get("/health")["status"] == "ok"
        part, options = asked[n % 8]
        return served.recommend(part.to_dicts(), **options)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(160)))
    assert found == [expected[n % 8] for n in range(160)]


def test_two_requests_are_in_the_model_at_the_same_time(case, monkeypatch):
    events, workflow = case
    recommender = Recommender(make_model(workflow), workflow)
    both, alone = threading.Barrier(2), recommender.model.recommend

    def recommend(*args, **options):
        both.wait(timeout=60)  # behind a lock the second one would never come
        return alone(*args, **options)

    new = latest(events, 2)
    expected = answers(recommender.recommend(new, 5))
    with Served(recommender) as running:
        monkeypatch.setattr(recommender.model, "recommend", recommend)
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda _: running.recommend(new.to_dicts(), top_k=5), range(2)))
    assert found == [(200, {"sessions": expected})] * 2


# Clicks as a person does, in a frame of the page, and writes down what it shows.
DRIVER = """
<!DOCTYPE html><iframe id="f" src="/" width="1000" height="800"></iframe><pre id="log"></pre>
<script>
const wait = async what => { while (!what()) await new Promise(r => setTimeout(r, 20)); };
const log = [];
document.getElementById("f").onload = async () => {
  const page = document.getElementById("f").contentDocument;
  const products = () => [...page.querySelectorAll("#products button")];
  const shown = () => [...page.querySelectorAll("#found li button")].map(b => b.textContent);
  const changed = async act => {
    const before = JSON.stringify(shown()); act();
    await wait(() => JSON.stringify(shown()) !== before); log.push(shown());
  };
  await wait(() => products().length > 3);
  await changed(() => products()[0].click());
  await changed(() => products()[3].click());
  await changed(() => page.querySelector("#found li button").click());
  log.push([...page.querySelectorAll("#session button")].map(b => b.textContent));
  await changed(() => page.querySelector("#exclude").click());
  page.querySelector("#clear").click();
  await wait(() => !shown().length);
  document.getElementById("log").textContent = JSON.stringify(log);
  document.title = "done";
};
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_the_page_in_a_browser(case, tmp_path):
    from fastapi.responses import HTMLResponse

    _, workflow = case
    with Served(Recommender(make_model(workflow), workflow)) as running:
        running.app.get("/drive", response_class=HTMLResponse)(lambda: DRIVER)
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={tmp_path}", "--virtual-time-budget=60000", "--dump-dom"),
            f"{running.url}/drive",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        page = re.search(r'<pre id="log">(.*?)</pre>', done.stdout)
        assert page, done.stderr[-2000:]
        first, second, third, session, excluded = json.loads(page[1])
        values = workflow.vocabularies["item"]["value"].to_list()
        clicked = [values[0], values[3], int(second[0])]
        assert session == [str(v) for v in clicked]
        for shown, items, options in (
            (first, clicked[:1], {}),
            (second, clicked[:2], {}),
            (third, clicked, {}),
            (excluded, clicked, {"exclude_seen": True}),
        ):
            events = [
                {"user_session": "page", "product_id": item, "event_time": 1_700_000_000 + n}
                for n, item in enumerate(items)
            ]
            _, found = running.recommend(events, top_k=12, **options)
            assert shown == [str(i["item"]) for i in found["sessions"][0]["items"]]


def test_without_fastapi_the_error_says_what_to_install(case, monkeypatch):
    _, workflow = case
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(InputError, match=r"fastapi is missing; pip install 't4r_fast\[serve\]'"):
        web.create_app(Recommender(make_model(workflow), workflow))


def test_the_command_serves(case, tmp_path):
    _, workflow = case
    make_model(workflow).save(tmp_path / "models" / "m")
    workflow.save(tmp_path / "data" / "workflow")
    script = "import sys; from t4r_fast.cli import main; main()"
    command = [sys.executable, "-c", script, "serve", tmp_path / "models" / "m", "--port", "0"]
    with subprocess.Popen(
        [*map(str, command)], cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines = iter(process.stderr.readline, "")
            url = next(m[0] for m in (re.search(r"http://[\d.:]+", line) for line in lines) if m)
            with urllib.request.urlopen(f"{url}/health", timeout=60) as reply:
                assert json.load(reply)["status"] == "ok"
        finally:
            process.terminate()
            process.communicate()

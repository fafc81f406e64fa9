"""The HTTP server of `t4r-fast serve`: recommendations, health, metrics and a page to try them.

Needs the extra `serve` (FastAPI and uvicorn), which is imported when the app is made.
"""

# FastAPI reads annotations at run time, those of classes inside a function too: they must not be
# postponed here.
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from t4r_fast.errors import InputError
from t4r_fast.ops.item_topk import MAX_K
from t4r_fast.serve.recommender import Recommender
from t4r_fast.version import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_EVENTS = 100_000
PAGE = Path(__file__).with_name("page.html")
# Upper ends of the latency histogram, seconds.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)

Value = str | int | float | None


class Metrics:
    """Counters in the text format of Prometheus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = {"200": 0, "422": 0}
        self._sessions = 0
        self._seconds = 0.0
        self._within = [0] * len(_BUCKETS)

    def count(self, code: str, sessions: int, seconds: float) -> None:
        """One request to /recommend, answered in so many seconds."""
        with self._lock:
            self._requests[code] += 1
            self._sessions += sessions
            self._seconds += seconds
            for i, end in enumerate(_BUCKETS):
                self._within[i] += seconds <= end

    def text(self) -> str:
        with self._lock:
            total = sum(self._requests.values())
            lines = [
                "# HELP t4r_fast_requests_total Requests to /recommend by status.",
                "# TYPE t4r_fast_requests_total counter",
                *(f't4r_fast_requests_total{{code="{c}"}} {n}' for c, n in self._requests.items()),
                "# HELP t4r_fast_sessions_total Sessions answered.",
                "# TYPE t4r_fast_sessions_total counter",
                f"t4r_fast_sessions_total {self._sessions}",
                "# HELP t4r_fast_request_seconds Time to answer a request to /recommend.",
                "# TYPE t4r_fast_request_seconds histogram",
                *(
                    f't4r_fast_request_seconds_bucket{{le="{end}"}} {n}'
                    for end, n in zip(_BUCKETS, self._within)
                ),
                f't4r_fast_request_seconds_bucket{{le="+Inf"}} {total}',
                f"t4r_fast_request_seconds_sum {self._seconds:.6f}",
                f"t4r_fast_request_seconds_count {total}",
            ]
        return "\n".join(lines) + "\n"


def create_app(recommender: Recommender) -> "FastAPI":
    """POST /recommend, GET /items, /health, /metrics, /docs, /openapi.json, and the page at /.

    Raises InputError where FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, HTTPException
        from fastapi.responses import HTMLResponse, PlainTextResponse
        from pydantic import BaseModel, ConfigDict, Field
    except ImportError as e:
        raise InputError(f"serve: {e.name} is missing; pip install 't4r_fast[serve]'") from e

    columns = recommender.columns
    names = ", ".join(f"`{column}` ({role})" for role, column in columns.items())

    class Request(BaseModel):
        """Events of one session or several, and what to recommend."""

        model_config = ConfigDict(extra="forbid")
        events: list[dict[str, Value]] = Field(
            min_length=1,
            max_length=MAX_EVENTS,
            description=f"Events with the columns {names}; other columns are not read. Session,"
            " item and time are needed.",
        )
        top_k: int = Field(20, ge=1, le=MAX_K, description="Items per session.")
        exclude_seen: bool = Field(False, description="Leave out the session's own items.")

    class Item(BaseModel):
        item: str | int
        score: float

    class Session(BaseModel):
        session: str | int
        items: list[Item] = Field(description="Best first.")

    class Answer(BaseModel):
        sessions: list[Session] = Field(description="In the order in which they first came.")

    app = FastAPI(title="t4r_fast", version=__version__, description=__doc__.partition("\n")[0])
    metrics = Metrics()

    @app.post("/recommend")
    def recommend(request: Request) -> Answer:
        """The next items of each session in the events."""
        start = time.perf_counter()
        try:
            found = recommender.recommend(
                _frame(request.events, columns), request.top_k, exclude_seen=request.exclude_seen
            )
        except InputError as e:
            metrics.count("422", 0, time.perf_counter() - start)
            raise HTTPException(422, str(e)) from e
        sessions = [
            Session(session=key, items=[Item(item=i, score=s) for i, s in zip(items, scores)])
            for key, items, scores in zip(found.sessions, found.items, found.scores.tolist())
        ]
        metrics.count("200", len(sessions), time.perf_counter() - start)
        return Answer(sessions=sessions)

    @app.get("/items")
    def items(contains: str = "", limit: int = 60) -> list[str | int]:
        """Items that the model knows, the most frequent first."""
        values = recommender.fitted.vocabularies["item"]["value"]
        if contains:
            values = values.filter(values.cast(pl.String).str.contains(contains, literal=True))
        return values.head(max(0, min(limit, 1000))).to_list()

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Whether the server answers, and what it serves."""
        known = recommender.fitted.vocabularies["item"].height
        return {"status": "ok", "items": known, "columns": columns, "version": __version__}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics_text() -> str:
        """Counters for Prometheus."""
        return metrics.text()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    return app


def _frame(events: list[dict[str, Value]], columns: dict[str, str]) -> pl.DataFrame:
    """The columns that the model reads; what no event has is missing, which the ETL knows."""
    out = []
    for role, column in columns.items():
        values = [event.get(column) for event in events]
        if role in ("session", "item", "time"):
            absent = next((n for n, event in enumerate(events) if column not in event), None)
            if absent is not None:
                raise InputError(f"event {absent + 1} has no {column!r}, its {role}")
        kinds = {type(value) for value in values if value is not None}
        if role == "price":
            if str in kinds:
                raise InputError(f"column {column!r}: a price must be a number")
            out.append(pl.Series(column, values, dtype=pl.Float64))
        elif kinds <= {int}:
            out.append(_whole_numbers(column, values))
        else:
            texts = [None if value is None else str(value) for value in values]
            out.append(pl.Series(column, texts, dtype=pl.String))
    return pl.DataFrame(out)


def _whole_numbers(column: str, values: list[Any]) -> pl.Series:
    try:
        return pl.Series(column, values, dtype=pl.Int64)
    except (OverflowError, TypeError, pl.exceptions.PolarsError) as e:
        raise InputError(f"column {column!r}: whole numbers must fit 64 bits") from e

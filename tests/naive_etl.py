"""The ETL over again in plain Python, event by event, for tests to compare with."""

from __future__ import annotations

import math
from collections import Counter
from datetime import datetime, timezone

DAY = 86_400


def naive_sessions(events, *, window=DAY, min_length=2, max_length=20, keep="last"):
    """(sessions, vocabularies) of dicts session, item, time (s), category, brand, price.

    sessions: session value -> dict window, start, and one list per feature.
    """
    clean = _without_repeats(events)
    vocabularies = {r: _vocabulary(e[r] for e in clean) for r in ("item", "category", "brand")}
    first_seen = {}
    for e in clean:
        first_seen[e["item"]] = min(e["time"], first_seen.get(e["item"], math.inf))
    recency = _standardiser([_recency(e, first_seen) for e in clean])
    price = _standardiser([math.log1p(e["price"]) for e in clean if e["price"] is not None])
    category_mean = _category_means(clean)

    by_session = {}
    for e in clean:
        by_session.setdefault(e["session"], []).append(e)
    kept = {s: es for s, es in by_session.items() if len(es) >= min_length}
    sessions = {}
    first_window = min((es[0]["time"] // window for es in kept.values()), default=0)
    for session, es in kept.items():
        cut = es[-max_length:] if keep == "last" else es[:max_length]
        days = [datetime.fromtimestamp(e["time"], timezone.utc).isoweekday() for e in cut]
        angles = [2 * math.pi * (d + 1e-6) / 7 for d in days]
        sessions[session] = {
            "window": int(es[0]["time"] // window - first_window + 1),
            "start": es[0]["time"],
            "row": es[0]["row"],
            "product_id": [_id(vocabularies["item"], e["item"]) for e in cut],
            "category_id": [_id(vocabularies["category"], e["category"]) for e in cut],
            "brand": [_id(vocabularies["brand"], e["brand"]) for e in cut],
            "product_recency_days_log_norm": [recency(_recency(e, first_seen)) for e in cut],
            "et_dayofweek_sin": [math.sin(a) for a in angles],
            "et_dayofweek_cos": [math.cos(a) for a in angles],
            "price_log_norm": [
                0.0 if e["price"] is None else price(math.log1p(e["price"])) for e in cut
            ],
            "relative_price_to_avg_categ_id": [
                0.0
                if e["price"] is None
                else (e["price"] - category_mean[e["category"]])
                / (category_mean[e["category"]] + 1e-5)
                for e in cut
            ],
        }
    return sessions, vocabularies


def _without_repeats(events):
    numbered = [{**e, "row": i} for i, e in enumerate(events) if e["session"] is not None]
    numbered.sort(key=lambda e: (e["session"], e["time"], e["row"]))
    clean = []
    last = (None, None)
    for e in numbered:
        if (e["session"], e["item"]) != last:
            clean.append(e)
        last = (e["session"], e["item"])
    return clean


def _vocabulary(values):
    counts = Counter(v for v in values if v is not None)
    ordered = sorted(counts, key=lambda v: (-counts[v], v))
    return {v: i for i, v in enumerate(ordered, 3)}


def _id(vocabulary, value):
    return 1 if value is None else vocabulary.get(value, 2)


def _recency(e, first_seen):
    if e["item"] is None:
        return 0.0
    return math.log1p((e["time"] - first_seen[e["item"]]) / DAY)


def _standardiser(sample):
    mean = math.fsum(sample) / len(sample) if sample else 0.0
    squares = math.fsum((s - mean) ** 2 for s in sample)
    deviation = math.sqrt(squares / (len(sample) - 1)) if len(sample) > 1 else 0.0
    return lambda value: (value - mean) / (deviation or 1.0)


def _category_means(clean):
    prices = {}
    for e in clean:
        prices.setdefault(e["category"], [])
        if e["price"] is not None:
            prices[e["category"]].append(e["price"])
    everything = [p for ps in prices.values() for p in ps]
    overall = math.fsum(everything) / len(everything) if everything else 0.0
    return {c: math.fsum(ps) / len(ps) if ps else overall for c, ps in prices.items()}

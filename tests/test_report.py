"""The report page and results.txt, from results made by hand."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from t4r_fast.tutorial import charts
from t4r_fast.tutorial.baselines import BASELINES
from t4r_fast.tutorial.models import KINDS
from t4r_fast.tutorial.report import render
from t4r_fast.tutorial.results import results_text


def record(train, evaluate, level, **more):
    metrics = {
        "ndcg_at_10": 0.8 * level,
        "ndcg_at_20": level,
        "recall_at_10": 1.9 * level,
        "recall_at_20": 2.3 * level,
    }
    base = {"train_window": train, "eval_window": evaluate, "eval_sessions": 1204}
    return {**base, "eval_seconds": 0.8, "metrics": metrics, **more}


def trained(level, windows):
    records = []
    for w in range(1, windows + 1):
        curve = [[50 * i, 9.5 - level * 20 - w / 4 - i / 9] for i in range(1, 9)]
        records.append(
            record(
                w,
                w + 1,
                level * (1 + w / 10),
                steps=400,
                epochs=3,
                train_sessions=9700 + w,
                train_seconds=21.5,
                eval_loss=8.2 - level * 20,
                train_loss=8.0,
                loss_curve=curve,
            )
        )
    return {"parameters": 8_718_079, "windows": records}


def made_up(windows=3, names=tuple(KINDS)):
    return {
        "command": "t4r-fast tutorial events.csv --out <folder>",
        "compat": "23.12",
        "finished": "2026-11-24 12:00 UTC",
        "seconds": 312.4,
        "versions": {"t4r_fast": "0.1.0", "torch": "2.13.0"},
        "machine": {"processor": "Some CPU & Co", "cores": 2},
        "options": {"epochs": 3, "batch_size": 256},
        "tie_rule": "Equal scores: half count as better.",
        "data": {
            "name": "events.csv",
            "window": "1d",
            "sessions": 316_160,
            "interactions": 1_733_211,
            "items": 118_332,
            "mean_length": 5.482,
            "windows": [
                {"window": w, "train": 80_000 + 997 * w, "valid": 10_000, "test": 10_000}
                for w in range(1, windows + 2)
            ],
            "length_histogram": {n: int(90_000 * 0.8**n) for n in range(2, 21)},
        },
        "models": {n: trained(0.07 + 0.011 * i, windows) for i, n in enumerate(names)},
        "baselines": {
            name: {"windows": [record(w, w + 1, 0.02 * (1 + i)) for w in range(1, windows + 1)]}
            for i, name in enumerate(BASELINES)
        },
        "left_out": {} if len(names) == 4 else {"xlnet_mlm_side": "the data has no <brand>"},
    }


class Page(HTMLParser):
    """Checks that tags close in order, and gathers text, tags and addresses."""

    VOID = ("meta",)

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.words, self.links = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.mark.parametrize("windows", [1, 3, 40])
def test_the_page_is_well_formed_and_complete(windows):
    results = made_up(windows)
    page = Page(render(results))
    text = " ".join(page.words)
    for name, title in [*((n, k.title) for n, k in KINDS.items()), *BASELINES.items()]:
        part = "models" if name in KINDS else "baselines"
        assert title in text
        for value in results[part][name]["windows"][-1]["metrics"].values():
            assert f"{value:.4f}" in text
    assert "118,332" in text
    assert "Some CPU & Co" in text
    assert page.tags.count("svg") == 2 + 4 + 2


def test_the_page_needs_nothing_from_outside():
    page = render(made_up())
    parsed = Page(page)
    assert parsed.links == []
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page


def test_the_best_of_each_column_is_bold_and_gain_is_over_popularity():
    results = made_up()
    page = render(results)
    best = results["models"]["xlnet_mlm_side"]["windows"][-1]["metrics"]["ndcg_at_20"]
    other = results["models"]["gru"]["windows"][-1]["metrics"]["ndcg_at_20"]
    assert f"<td><strong>{best:.4f}</strong></td>" in page
    assert f"<td>{other:.4f}</td>" in page
    popular = results["baselines"]["popularity"]["windows"][-1]["metrics"]["ndcg_at_20"]
    assert f"<td>{best / popular:.2f}x</td>" in page


def test_a_model_left_out_is_named_with_its_reason():
    page = render(made_up(names=("gru_as_printed", "gru", "xlnet_mlm")))
    assert "XLNet-MLM with side information</strong> was left out" in page
    assert "the data has no &lt;brand&gt;" in page
    Page(page)


def test_results_text_has_the_format_of_the_tutorial():
    text = results_text(made_up()["models"])
    number = r"\d+\.\d+(e-\d+)?"
    block = (
        rf"next-item/ndcg_at_10:{number}\nnext-item/ndcg_at_20:{number}\n"
        rf"next-item/recall_at_10:{number}\nnext-item/recall_at_20:{number}\n"
    )
    titles = (
        "GRU accuracy results:",
        "GRU over time accuracy results:",
        "XLNet-MLM accuracy results:",
        "XLNet-MLM with side information accuracy results:",
    )
    assert re.fullmatch("\n".join(f"{t}\n{block}" for t in titles), text)


def test_ticks_are_round_and_cover_the_range():
    assert charts.nice_ticks(0.0, 0.1051) == [0, 0.025, 0.05, 0.075, 0.1, 0.125]
    assert charts.nice_ticks(6.2, 9.9) == [6, 7, 8, 9, 10]
    for low, high in [(0.0, 1e-7), (0.0, 0.0), (5.0, 5.0), (-2.0, 3.0), (0, 123456)]:
        ticks = charts.nice_ticks(low, high)
        assert ticks[0] <= low
        assert ticks[-1] >= high
        assert 2 <= len(ticks) <= 9

"""report.html: one page without scripts or outside files, from results.json alone."""

from __future__ import annotations

from html import escape

from t4r_fast.train.baselines import BASELINES
from t4r_fast.train.charts import Series, bar_chart, line_chart, number
from t4r_fast.train.models import KINDS
from t4r_fast.train.report_style import CSS
from t4r_fast.train.results import METRIC_TITLES, METRICS, final_metrics, gain_over_popularity

BASELINES_ABOUT = {
    "popularity": "The items with the most interactions in the training windows so far, the same"
    " list for everybody.",
    "markov": "Items that most often directly followed the session's last known item in the"
    " training windows so far, then the most popular ones.",
}


def render(results: dict) -> str:
    """The page. results: what results.json holds."""
    parts = [
        _header(results),
        _section("Last window", _headline_table(results) + _left_out(results)),
        _section("Window by window", _metric_charts(results)),
        _section("Training", _loss_charts(results) + _speed_table(results)),
        _section("Data", _data(results)),
        _section("What is compared", _legend(results)),
        _section("How it was run", _how(results)),
    ]
    title = escape(_title(results))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{CSS}</style></head><body><main>"
        + "".join(parts)
        + "</main></body></html>\n"
    )


def _title(results: dict) -> str:
    return f"Next-item recommendation on {results['data']['name']}"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _row_title(name: str) -> str:
    return KINDS[name].title if name in KINDS else BASELINES[name]


def _windows_of(results: dict, name: str) -> list[dict]:
    part = "models" if name in results["models"] else "baselines"
    return results[part][name]["windows"]


def _rows(results: dict) -> list[str]:
    return [*results["models"], *results["baselines"]]


def _header(results: dict) -> str:
    data = results["data"]
    best = max(
        results["models"], key=lambda n: final_metrics(_windows_of(results, n))["ndcg_at_20"]
    )
    last = _windows_of(results, best)[-1]
    gain = gain_over_popularity(results, best)
    beside = f", {gain:.1f} times the most popular items" if gain else ""
    return (
        f"<header><h1>{escape(_title(results))}</h1><p class='lead'>"
        f"{data['sessions']:,} sessions over {data['items']:,} items in {len(data['windows'])}"
        f" windows of {_duration(data['window'])}. Best on the last window:"
        f" <strong>{escape(_row_title(best))}</strong>, NDCG@20"
        f" <strong>{last['metrics']['ndcg_at_20']:.4f}</strong>{beside}.</p></header>"
    )


def _duration(window: str) -> str:
    return "one day" if window == "day" else escape(window)


def _table(head: list[str], rows: list[str]) -> str:
    cells = "".join(f"<th scope='col'>{escape(h)}</th>" for h in head)
    return (
        f"<div class='scroll'><table><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _name_cell(name: str) -> str:
    return (
        f"<th scope='row'><span class='swatch tone-{name}'></span>{escape(_row_title(name))}</th>"
    )


def _headline_table(results: dict) -> str:
    names = _rows(results)
    finals = {name: final_metrics(_windows_of(results, name)) for name in names}
    best = {metric: max(finals[n][metric] for n in names) for metric in METRICS}
    rows = []
    for name in names:
        cells = [_name_cell(name)]
        for metric in METRICS:
            value = finals[name][metric]
            strong = value == best[metric] and value > 0
            text = f"{value:.4f}"
            cells.append(f"<td>{f'<strong>{text}</strong>' if strong else text}</td>")
        gain = gain_over_popularity(results, name)
        loss = _windows_of(results, name)[-1].get("eval_loss")
        cells.append(f"<td>{'-' if gain is None else f'{gain:.2f}x'}</td>")
        cells.append(f"<td>{'-' if loss is None else f'{loss:.3f}'}</td>")
        kind = " class='baseline'" if name in results["baselines"] else ""
        rows.append(f"<tr{kind}>{''.join(cells)}</tr>")
    last = _windows_of(results, names[0])[-1]
    head = ["Model", *(METRIC_TITLES[m] for m in METRICS), "vs popularity", "Loss"]
    return _table(head, rows) + (
        f"<p class='note'>Validation sessions of window {last['eval_window']}"
        f" ({last['eval_sessions']:,}), after training up to window {last['train_window']}. The"
        " task: from the items before the last one, rank the last one among all items. Best of"
        " each column in bold; &quot;vs popularity&quot; is the ratio of NDCG@20. Loss is the mean"
        " cross-entropy in nats.</p>"
    )


def _left_out(results: dict) -> str:
    return "".join(
        f"<p class='note'><strong>{escape(KINDS[name].title)}</strong> was left out:"
        f" {escape(reason)}</p>"
        for name, reason in results.get("left_out", {}).items()
    )


def _swatches(names: list[str]) -> str:
    items = "".join(
        f"<li><span class='swatch tone-{n}'></span>{escape(_row_title(n))}</li>" for n in names
    )
    return f"<ul class='legend'>{items}</ul>"


def _metric_charts(results: dict) -> str:
    names = _rows(results)
    charts = []
    for metric in ("ndcg_at_20", "recall_at_20"):
        series = [
            Series(
                _row_title(name),
                name,
                [(r["train_window"], r["metrics"][metric]) for r in _windows_of(results, name)],
                dashed=name in results["baselines"],
            )
            for name in reversed(names)
        ]
        top = max(y for s in series for _, y in s.points)
        windows = [r["train_window"] for r in _windows_of(results, names[0])]
        every = -(-len(windows) // 12)
        charts.append(
            _figure(
                METRIC_TITLES[metric],
                line_chart(
                    series,
                    label=f"{METRIC_TITLES[metric]} of each model after each window",
                    x_title="after training up to window",
                    x_ticks=[(w, str(w)) for w in windows[::every]],
                    x_range=(min(windows) - 0.3, max(windows) + 0.3),
                    y_range=(0.0, top),
                ),
            )
        )
    return (
        "<p>Each model is trained on one window, evaluated on the next that has validation"
        " sessions, and goes on from there.</p>"
        + _swatches(names)
        + f"<div class='charts'>{''.join(charts)}</div>"
        + _windows_table(results)
    )


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def _windows_table(results: dict) -> str:
    names = _rows(results)
    first = _windows_of(results, names[0])
    head = ["NDCG@20 on window", *(str(r["eval_window"]) for r in first)]
    rows = []
    for name in names:
        values = "".join(
            f"<td>{r['metrics']['ndcg_at_20']:.4f}</td>" for r in _windows_of(results, name)
        )
        rows.append(f"<tr>{_name_cell(name)}{values}</tr>")
    return (
        "<details><summary>NDCG@20 of every window as a table</summary>"
        + _table(head, rows)
        + "</details>"
    )


def _loss_charts(results: dict) -> str:
    curves = {name: _loss_curve(model["windows"]) for name, model in results["models"].items()}
    values = [y for lines, _, _, _ in curves.values() for line in lines for _, y in line]
    values += [y for _, judged, _, _ in curves.values() for _, y in judged]
    if not values:
        return ""
    charts = []
    for name, (lines, judged, ends, middles) in curves.items():
        title = KINDS[name].title
        charts.append(
            _figure(
                title,
                line_chart(
                    [
                        *(Series(f"{title}, training", name, line, marks=False) for line in lines),
                        Series(f"{title}, next window", name, judged, line=False),
                    ],
                    label=f"Training loss of {title} over all windows",
                    x_title=f"window trained on ({number(ends[-1])} steps in all)",
                    x_ticks=middles[:: -(-len(middles) // 12)],
                    x_range=(0, ends[-1]),
                    y_range=(min(values), max(values)),
                    dividers=ends[:-1],
                ),
            )
        )
    return (
        "<p>Loss in nats per predicted item. Line: training, mean over the steps since the last"
        " point. Dots: validation on the next window, last item of each session. Causal (GRU) and"
        " masked (XLNet) training predict other positions, so compare lines within a model.</p>"
        f"<div class='charts'>{''.join(charts)}</div>"
    )


def _loss_curve(windows: list[dict]):
    """(a line per window, evaluation points, window ends, tick per window), x in steps so far."""
    lines, judged, ends, middles = [], [], [], []
    before = 0
    for record in windows:
        lines.append([(before + step, loss) for step, loss in record["loss_curve"]])
        end = before + record["steps"]
        if record.get("eval_loss") is not None:
            judged.append((end, record["eval_loss"]))
        middles.append(((before + end) / 2, str(record["train_window"])))
        ends.append(end)
        before = end
    return lines, judged, ends, middles


def _speed_table(results: dict) -> str:
    rows = []
    for name, model in results["models"].items():
        windows = model["windows"]
        train = sum(r["train_seconds"] for r in windows)
        judge = sum(r["eval_seconds"] for r in windows)
        trained = sum(r["train_sessions"] * r["epochs"] for r in windows)
        judged = sum(r["eval_sessions"] for r in windows)
        cells = [
            f"{model['parameters']:,}",
            f"{sum(r['steps'] for r in windows):,}",
            f"{train:.1f}",
            f"{trained / train:,.0f}" if train else "-",
            f"{judge:.1f}",
            f"{judged / judge:,.0f}" if judge else "-",
        ]
        rows.append(f"<tr>{_name_cell(name)}{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    head = [
        "Model",
        "Parameters",
        "Steps",
        "Training s",
        "Sessions/s",
        "Evaluation s",
        "Sessions/s",
    ]
    return _table(head, rows)


def _data(results: dict) -> str:
    data = results["data"]
    facts = [
        ("Sessions", f"{data['sessions']:,}"),
        ("Interactions", f"{data['interactions']:,}"),
        ("Items", f"{data['items']:,}"),
        ("Mean length", f"{data['mean_length']:.2f}"),
    ]
    tiles = "".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts)
    lengths = [
        (str(n), c) for n, c in sorted((int(n), c) for n, c in data["length_histogram"].items())
    ]
    windows = [(str(w["window"]), w["train"] + w["valid"] + w["test"]) for w in data["windows"]]
    charts = _figure(
        "Sessions by length",
        bar_chart(lengths, label="Number of sessions by length", x_title="items in the session"),
    ) + _figure(
        "Sessions by window",
        bar_chart(windows, label="Number of sessions per window", x_title="window"),
    )
    return f"<dl class='tiles'>{tiles}</dl><div class='charts'>{charts}</div>"


def _legend(results: dict) -> str:
    about = [(name, KINDS[name].about) for name in results["models"]]
    about += [(name, BASELINES_ABOUT[name]) for name in results["baselines"]]
    items = "".join(
        f"<div><dt><span class='swatch tone-{name}'></span>{escape(_row_title(name))}</dt>"
        f"<dd>{escape(text)}</dd></div>"
        for name, text in about
    )
    return f"<dl class='about'>{items}</dl><p class='note'>{escape(results['tie_rule'])}</p>"


def _padding(options: dict) -> str:
    """Which of the two ways ran; results from before there was a choice attend to padding."""
    if options.get("as_printed", True):
        return "As printed: XLNet attends to the padding behind a session, and the GRU reads it."
    return "None: XLNet sees the items of a session alone."


def _how(results: dict) -> str:
    options = results["options"]
    machine = ", ".join(
        f"{v} {k}" if isinstance(v, int) else str(v) for k, v in results["machine"].items()
    )
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    settings = ", ".join(f"{k} {v}" for k, v in options.items() if v is not None)
    rows = [
        ("Command", f"<code>{escape(results['command'])}</code>"),
        ("Settings", escape(settings)),
        ("Padding", escape(_padding(options))),
        ("Compat level", escape(results["compat"])),
        ("Machine", escape(machine)),
        ("Versions", escape(versions)),
        ("Finished", escape(results["finished"])),
        ("Wall time", f"{results['seconds']:.0f} s"),
    ]
    body = "".join(f"<tr><th scope='row'>{k}</th><td>{v}</td></tr>" for k, v in rows)
    return f"<div class='scroll'><table class='how'><tbody>{body}</tbody></table></div>"

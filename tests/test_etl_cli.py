"""The commands `etl` and `generate`: what they print, write and return."""

from __future__ import annotations

import json
import sys

import pytest

from t4r_fast.cli import main


def call(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of a command line."""
    monkeypatch.setattr(sys, "argv", ["t4r-fast", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0, *capsys.readouterr()


def test_generate_then_etl(monkeypatch, capsys, tmp_path):
    events, out = tmp_path / "events.csv", tmp_path / "data"
    size = ["--items", 40, "--sessions", 150, "--days", 2, "--seed", 3]
    status, text, _ = call(monkeypatch, capsys, "generate", events, *size)
    assert status == 0
    assert "300 sessions, 40 items, 2 days" in text
    assert f"t4r-fast etl {events}" in text

    options = ["--out", out, "--window", "6h", "--keep", "first", "--max-length", 5]
    options += ["--suffix", "-list", "--map", "brand=", "--event-types", "view", "--text", "item"]
    status, text, notes = call(monkeypatch, capsys, "etl", events, *options)
    assert status == 0
    assert "Features left out, as the events have no such column: brand" in text
    assert f"t4r-fast train {out}" in text
    # one line for every step that is done
    steps = ["read events", "drop repeats, count items", "fit recency", "make sessions"]
    assert [notes.count(f"done {step} ") for step in [*steps, "write windows"]] == [1] * 5
    summary = json.loads((out / "summary.json").read_text())
    assert f"{summary['sessions']:,}" in text
    assert summary["events_of_other_types"] > 0
    rules = json.loads((out / "workflow" / "workflow.json").read_text())["rules"]
    assert rules == {"min_length": 2, "max_length": 5, "keep": "first", "suffix": "-list"}


def test_bad_input_is_one_line_and_status_1(monkeypatch, capsys, tmp_path):
    (tmp_path / "e.csv").write_text("a;b\n1;2\n")
    status, text, notes = call(monkeypatch, capsys, "etl", tmp_path / "e.csv", "-o", tmp_path / "o")
    assert (status, text) == (1, "")
    assert notes.startswith(f"error: {tmp_path / 'e.csv'}: there is no column 'user_session'")
    assert "Traceback" not in notes
    assert not (tmp_path / "o").exists()


def test_separator_by_name(monkeypatch, capsys, tmp_path):
    # more semicolons than tabs in the header
    rows = ["the;item;id;\ts\tt", "1\tx\t1569888000", "2\tx\t1569888001"]
    (tmp_path / "e.txt").write_text("\n".join(rows) + "\n")
    arguments = ["etl", tmp_path / "e.txt", "-o", tmp_path / "o"]
    arguments += ["--map", "item=the;item;id;,session=s,time=t"]
    status, _, notes = call(monkeypatch, capsys, *arguments)
    assert (status, "no column 's'" in notes) == (1, True)
    status, _, _ = call(monkeypatch, capsys, *arguments, "--separator", "tab")
    assert status == 0
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["sessions"] == 1


@pytest.mark.parametrize("command", ["etl", "generate"])
def test_help_has_an_example(monkeypatch, capsys, command):
    status, text, _ = call(monkeypatch, capsys, command, "--help")
    assert status == 0
    assert f"Example: t4r-fast {command} " in text

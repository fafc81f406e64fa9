"""The command line: help with an example, errors as one line, and the commands on small data."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import polars as pl
import pytest
import triton_double
from session_files import walks, write_windows

import t4r_fast.torch as tr
from t4r_fast import cli, compat
from t4r_fast.tutorial import models

COMMANDS = (
    "demo",
    "etl",
    "generate",
    "train",
    "evaluate",
    "recommend",
    "export",
    "serve",
    "tutorial",
    "bench",
    "doctor",
)
SMALL = [
    "--epochs",
    "1",
    "--batch-size",
    "32",
    "--d-model",
    "16",
    "--layers",
    "1",
    "--heads",
    "2",
    "--item-dim",
    "16",
    "--learning-rate",
    "0.01",
]


def ran(*arguments, code=0):
    """Run the command line in this process, which has torch loaded; returns (stdout, stderr)."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        patch.setattr(sys, "argv", ["t4r-fast", *map(str, arguments)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        patch.setattr(compat, "_level", None)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert (stopped.value.code or 0) == code, stderr.getvalue()
    return stdout.getvalue(), stderr.getvalue()


def shown(*arguments):
    return ran(*arguments)[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    text = shown(command, "--help")
    assert re.search(rf"Example: *t4r-fast {command}\b", text)


def test_the_list_of_commands_is_complete():
    text = shown("--help")
    assert all(re.search(rf"^.\s{command}\s", text, re.MULTILINE) for command in COMMANDS)


def test_help_answers_without_loading_torch():
    script = (
        "import sys\nfrom t4r_fast.cli import app\nfrom typer.testing import CliRunner\n"
        "r = CliRunner().invoke(app, ['tutorial', '--help'])\n"
        "assert r.exit_code == 0, r.output\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Events of three days in a ring of items, with names of columns of its own."""
    rows = []
    for day in (1, 2, 3):
        for s, session in enumerate(walks(day, 150, 43)):
            for i, item in enumerate(session):
                rows.append((f"{day}-{s}", f"item{item}", f"2024-05-0{day} 10:00:{i:02d}", s))
    path = tmp_path_factory.mktemp("events") / "clicks.csv"
    frame = pl.DataFrame(rows, schema=["SessionId", "ItemId", "Time", "place"], orient="row")
    frame.sort("Time", "place", maintain_order=True).drop("place").write_csv(path)
    return path


@pytest.fixture(scope="module")
def tutorial_out(events, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    mapped = "session=SessionId,item=ItemId,time=Time"
    return out, *ran("tutorial", events, "--map", mapped, "--out", out, *SMALL)


def test_tutorial_writes_its_files_and_prints_the_table(tutorial_out):
    out, stdout, _ = tutorial_out
    results = json.loads((out / "results.json").read_text())
    assert list(results["models"]) == ["gru_as_printed", "gru", "xlnet_mlm"]
    for name, entry in results["models"].items():
        value = entry["windows"][-1]["metrics"]["ndcg_at_20"]
        assert re.search(rf"{re.escape(models.KINDS[name].title)} .*{value:.4f}", stdout)
    assert "Most popular items" in stdout
    assert str(out / "report.html") in stdout
    assert (out / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert max(map(len, stdout.splitlines()[:-2])) <= 80
    text = (out / "results.txt").read_text()
    number = r"\d+\.\d+(e-\d+)?"
    block = "".join(
        rf"next-item/{m}:{number}\n"
        for m in ("ndcg_at_10", "ndcg_at_20", "recall_at_10", "recall_at_20")
    )
    titles = (models.KINDS[n].results_title for n in results["models"])
    assert re.fullmatch("\n".join(f"{t}\n{block}" for t in titles), text)


def test_tutorial_without_side_features_says_what_it_leaves_out(tutorial_out):
    out, _, stderr = tutorial_out
    note = " ".join(stderr.split())
    assert "XLNet-MLM with side information is left out: it also reads category_id, brand" in note
    left_out = json.loads((out / "results.json").read_text())["left_out"]
    assert list(left_out) == ["xlnet_mlm_side"]


def test_a_second_run_is_refused_resumed_or_overwritten(tutorial_out, events):
    out = tutorial_out[0]
    arguments = ["tutorial", events, "--map", "session=SessionId,item=ItemId,time=Time"]
    arguments += ["--out", out, *SMALL]
    _, stderr = ran(*arguments, code=1)
    assert "--resume goes on with it, --overwrite replaces it" in stderr
    before = json.loads((out / "results.json").read_text())["models"]
    ran(*arguments, "--resume")
    assert json.loads((out / "results.json").read_text())["models"] == before
    _, stderr = ran(*arguments, "--resume", "--seed", 5, code=1)
    assert "seed was 0 and is 5 now" in stderr


def test_evaluate_repeats_the_numbers_of_the_run(tutorial_out):
    out = tutorial_out[0]
    results = json.loads((out / "results.json").read_text())
    last = results["models"]["xlnet_mlm"]["windows"][-1]
    text = shown("evaluate", out / "models" / "xlnet_mlm", out / "data", "--window", 3)
    assert f"{last['metrics']['recall_at_20']:.4f}" in text
    assert f"{last['eval_loss']:.4f}" in text


def test_recommend_gives_items_of_the_events(tutorial_out):
    out = tutorial_out[0]
    model = out / "models" / "gru"
    text = shown("recommend", model, "--items", "item7,item8", "-k", 5)
    found = re.findall(r"item\d+", text)
    assert len(found) == len(set(found)) == 5
    seen = shown("recommend", model, "--items", "item7,item8", "-k", 35, "--exclude-seen")
    found = re.findall(r"item\d+", seen)
    assert len(set(found)) == 35
    assert not {"item7", "item8"} & set(found)
    _, stderr = ran("recommend", model, "--items", "item7,itemX", "-k", 3)
    assert "never seen in training: itemX" in stderr
    _, stderr = ran("recommend", model, "--items", "itemX", code=1)
    assert "knows none of the items itemX" in stderr


def test_export_writes_a_repository_that_recommends_the_same(tutorial_out, tmp_path, monkeypatch):
    model = tutorial_out[0] / "models" / "xlnet_mlm"
    stdout, stderr = ran("export", model, "--out", tmp_path / "models", "--name", "clicks", "-k", 5)
    assert f"wrote {tmp_path / 'models' / 'clicks'}" in stdout
    assert f"tritonserver --model-repository={tmp_path / 'models'}" in stderr
    served = triton_double.load(tmp_path / "models" / "clicks", monkeypatch)
    values = [["a", "a"], ["item7", "item8"], ["2024-05-04 10:00:00", "2024-05-04 10:00:01"]]
    sent = {
        name: triton_double.column(column, "STRING")
        for name, column in zip(("SessionId", "ItemId", "Time"), values)
    }
    (answer,) = served.execute([triton_double.Request(sent, ["items"])])
    text = shown("recommend", model, "--items", "item7,item8", "-k", 5)
    assert [i.decode() for i in answer.outputs["items"][0]] == re.findall(r"item\d+", text)
    _, stderr = ran("export", model, "--out", tmp_path / "models", "--name", "clicks", code=1)
    assert "is there already" in stderr
    _, stderr = ran("export", tmp_path, "--out", tmp_path / "b", code=1)
    assert "holds no saved model" in stderr


def test_recommend_answers_every_session_of_a_file(tutorial_out, tmp_path):
    out = tutorial_out[0]
    path = tmp_path / "new.csv"
    path.write_text(
        "SessionId,ItemId,Time\n"
        "a,item5,2024-05-09 10:00:00\na,item6,2024-05-09 10:00:05\nb,item9,2024-05-09 11:00:00\n"
    )
    text = shown("recommend", out / "models" / "gru", "--sessions", path, "-k", 2)
    assert re.search(r"^ *a +1 +item", text, re.MULTILINE)
    assert re.search(r"^ *b +1 +item", text, re.MULTILINE)
    assert len(re.findall(r"item\d+", text)) == 4
    printed = re.findall(r"item\d+", text)
    for suffix, read in ((".csv", pl.read_csv), (".parquet", pl.read_parquet)):
        to = tmp_path / f"found{suffix}"
        shown("recommend", out / "models" / "gru", "--sessions", path, "-k", 2, "--out", to)
        found = read(to)
        assert found["item"].to_list() == printed
        assert found.select("session", "rank").rows() == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
        assert (found["score"].diff().gather([1, 3]) <= 0).all()
    _, stderr = ran(
        *("recommend", out / "models" / "gru", "--sessions", path, "--out", "found.txt"), code=1
    )
    assert "must end in .csv or .parquet; got found.txt" in stderr
    valid = out / "data" / "sessions_by_day" / "3" / "valid.parquet"
    text = shown("recommend", out / "models" / "gru", "--sessions", valid, "-k", 1)
    assert len(re.findall(r"item\d+", text)) == pl.read_parquet(valid).height


def test_all_commands_take_a_folder_of_model_save(tutorial_out, tmp_path):
    out = tutorial_out[0]
    tr.load_model(out / "models" / "gru").save(tmp_path / "gru")
    asked = ("--items", "item7,item8", "-k", 128, "--exclude-seen")
    workflow = ("--workflow", out / "data" / "workflow")
    expected = shown("recommend", out / "models" / "gru", *asked)
    assert shown("recommend", tmp_path / "gru", *asked, *workflow) == expected
    _, stderr = ran("recommend", tmp_path / "gru", *asked, code=1)
    assert "no workflow there; name the ETL's with --workflow" in stderr
    _, stderr = ran("recommend", out / "models" / "gru", "--items", "item7", "-k", 129, code=1)
    assert "top_k must be a whole number from 1 to 128; got 129" in stderr
    numbers = [
        re.findall(r"\d\.\d{4}", shown("evaluate", folder / "gru", out / "data", "--window", 3))
        for folder in (out / "models", tmp_path)
    ]
    assert len(numbers[0]) == 5
    assert numbers[0] == numbers[1]
    ran("export", tmp_path / "gru", "--out", tmp_path / "models", "-k", 128, *workflow)


def test_train_on_some_windows(tmp_path):
    windows = {w: {"train": walks(w, 40, 23), "valid": walks(w, 9, 23)} for w in (1, 2, 3, 4)}
    folder = write_windows(tmp_path / "data", windows, 23)
    out = tmp_path / "run"
    shown("train", folder, "--model", "gru", "--windows", "2-3", "--out", out, *SMALL)
    results = json.loads((out / "results.json").read_text())
    records = results["models"]["gru"]["windows"]
    assert [(r["train_window"], r["eval_window"]) for r in records] == [(2, 3), (3, 4)]
    assert (out / "models" / "gru" / "t4rec_model_class.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tutorial", "nowhere.csv", "--out", "OUT"], "nowhere.csv"),
        (["tutorial", "nowhere.csv", "--out", "OUT", "--models", "lstm"], "no model 'lstm'"),
        (["tutorial", "nowhere.csv", "--out", "OUT", "--compat", "0.2"], "0.1, 23.12"),
        (["tutorial", "nowhere.csv", "--out", "OUT", "--epochs", "0"], "epochs must be at least 1"),
        (["tutorial", "nowhere.csv", "--out", "OUT", "--dropout", "1"], "dropout must be"),
        (["train", "nowhere", "--out", "OUT"], "nowhere: no such folder"),
        (["train", "DATA", "--out", "OUT", "--windows", "a-b"], "--windows: give a window"),
        (["train", "DATA", "--out", "OUT", "--windows", "7"], "none of windows 7 to 7"),
        (["train", "DATA", "--out", "OUT", "--model", "xlnet_mlm_side"], "no category_id, brand"),
        (["train", "DATA", "--out", "OUT", "--d-model", "30"], "multiple of the 4 attention"),
        (["train", "DATA", "--out", "DATA"], "is not empty and holds no run.json of ours"),
        (["evaluate", "DATA", "DATA", "--window", "1"], "holds no saved model"),
        (["recommend", "DATA", "--items", "1", "--sessions", "x.csv"], "give either --items"),
        (["recommend", "DATA"], "give either --items"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_1(arguments, message, tmp_path, monkeypatch):
    write_windows(tmp_path / "DATA", {w: {"train": [[3, 4]], "valid": [[3, 4]]} for w in (1, 2)}, 9)
    monkeypatch.chdir(tmp_path)
    _, stderr = ran(*arguments, code=1)
    lines = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in stderr
    assert not Path("OUT/results.json").exists()


def test_debug_shows_the_traceback():
    _, stderr = ran("--debug", "train", "nowhere", "--out", "x", code=1)
    assert "Traceback" in stderr
    assert "error: nowhere: no such folder" in stderr


def test_an_unknown_option_is_a_usage_error():
    _, stderr = ran("train", "--such-option", code=2)
    assert "--such-option" in stderr


def test_an_interrupt_is_status_130():
    script = (
        "import t4r_fast.cli as cli\n"
        "def stop(): raise KeyboardInterrupt\n"
        "cli.app.command('stop')(stop)\n"
        "import sys; sys.argv = ['t4r-fast', 'stop']\ncli.main()"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 130

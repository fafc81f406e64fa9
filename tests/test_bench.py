"""The benchmark runner: what it refuses, how it times, what it writes."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from harness import ROOT
from typer.testing import CliRunner

from t4r_fast.cli import app
from t4r_fast.cli.bench import find_checkout, load_benchmarks
from t4r_fast.errors import InputError

load_benchmarks(ROOT)
from benchmarks import against_t4rec, bench, machine, table  # noqa: E402
from benchmarks.case import Benchmark, Case, Missing, Provider, Work, exact  # noqa: E402
from benchmarks.check import Wrong, check  # noqa: E402
from benchmarks.peak_memory import measure_in_new_process  # noqa: E402
from benchmarks.timing import Budget, percentiles, time_in_turn  # noqa: E402

RATES = {"fma": 100.0, "exp": 4.0, "read": 10.0, "copy": 20.0, "gather": 5.0}

# -- what the ops declare --------------------------------------------------------------------------


@pytest.mark.parametrize("op", bench.available())
def test_benchmark_is_complete(op):
    found = bench.load(op)
    assert found.op == op
    assert [provider.ours for provider in found.providers].index(True) == 0
    assert not found.providers[1].slow
    labels = [case.label for case in found.cases]
    assert len(set(labels)) == len(labels)
    assert any(case.set == "quick" for case in found.cases)
    for case in found.cases:
        assert found.providers[1].takes(case) or case.set != "quick"
        assert found.work(case, 4).floor_ms(RATES) > 0


def test_floor_is_the_slower_of_arithmetic_and_memory():
    assert Work(flop=1e9, exp=4e8).floor_ms(RATES) == pytest.approx(10 + 100)
    assert Work(flop=1e9, read=1e9, written=1e9).floor_ms(RATES) == pytest.approx(100 + 50)
    assert Work(gather=5e6).floor_ms(RATES) == pytest.approx(1)


def test_exact_numbers_have_exact_products():
    a, b = exact(8, 256, dtype=torch.float32), exact(50, 256, dtype=torch.float32, seed=1)
    assert torch.equal((a @ b.T).double(), a.double() @ b.double().T)
    assert torch.equal(a.bfloat16().float(), a)


def test_unknown_op_is_named():
    with pytest.raises(
        InputError, match="no benchmark of 'nothing'; there are activation_dropout, item_topk, "
    ):
        bench.load("nothing")


# -- the check -------------------------------------------------------------------------------------


def _outputs(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_check_allows_twice_the_baselines_error():
    true = {"loss": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    plain = _outputs(loss=[1.0, 2.0 + 1e-3])
    check(_outputs(loss=[1.0, 2.0 + 1.9e-3]), true, plain, torch.float32)
    with pytest.raises(Wrong, match="loss is off by"):
        check(_outputs(loss=[1.0, 2.0 + 2.1e-3]), true, plain, torch.float32)


def test_check_sees_integers_shapes_nan_and_sparse_rows():
    with pytest.raises(Wrong, match=r"ids\[0, 1\] is 4, expected 5"):
        check(_outputs(ids=[[1, 4]]), _outputs(ids=[[1, 5]]), {}, torch.float32)
    with pytest.raises(Wrong, match="shape"):
        check(_outputs(loss=[1.0]), _outputs(loss=[1.0, 1.0]), {}, torch.float32)
    with pytest.raises(Wrong, match="off by inf"):
        check(_outputs(loss=[math.nan]), _outputs(loss=[1.0]), {}, torch.float32)
    check(_outputs(loss=[-math.inf]), _outputs(loss=[-math.inf]), {}, torch.float32)
    sparse = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=True)
    check({"d": sparse}, {"d": sparse.to_dense()}, {}, torch.float32)
    with pytest.raises(Wrong, match="d is off by 1"):
        check({"d": sparse}, {"d": torch.zeros(3, 2)}, {}, torch.float32)


def test_baselines_may_round_but_not_differ():
    true = {"loss": torch.tensor(1.0, dtype=torch.float64)}
    check(_outputs(loss=1.0005), true, None, torch.float32)
    with pytest.raises(Wrong):
        check(_outputs(loss=1.01), true, None, torch.float32)


# -- timing ----------------------------------------------------------------------------------------


def test_percentiles():
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert percentiles([float(i) for i in range(11)]) == pytest.approx((2.0, 5.0, 8.0))


def test_calls_take_turns_and_slow_ones_are_called_less():
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.12)

    def fast():
        order.append("fast")
        time.sleep(0.004)

    budget = Budget(seconds=0.25, least=2, most=8, patience=9.0)
    found = time_in_turn({"slow": slow, "fast": fast}, budget, threads=1)
    assert found["slow"].samples == 2
    assert found["fast"].samples > 4
    assert found["slow"].wall_ms[0] >= 120
    assert found["slow"].cpu_ms[2] < 60  # asleep
    first, last = [i for i, name in enumerate(order) if name == "slow"][-2:]
    assert "fast" in order[first:last]


def test_a_call_beyond_patience_runs_once():
    calls = []
    budget = Budget(seconds=1.0, least=3, most=3, patience=0.02)
    found = time_in_turn({"x": lambda: calls.append(time.sleep(0.03))}, budget, threads=1)
    assert (len(calls), found["x"].samples) == (1, 1)
    assert found["x"].wall_ms[0] >= 30


def test_short_calls_are_repeated_inside_a_sample():
    calls = []
    time_in_turn({"x": lambda: calls.append(0)}, Budget(0.01, 3, 3, 1.0), threads=1)
    assert len(calls) > 300


# -- the machine -----------------------------------------------------------------------------------


def test_machine_floors_of_every_instruction_set():
    host = pytest.importorskip("t4r_fast._C", reason="t4r_fast._C is not built")
    features = host.cpu_features()
    offered = ["portable"] + [isa for isa in ("avx2", "avx512f") if features.get(isa)]
    found = [host.machine_floors(1, 0.01, isa.removesuffix("f")) for isa in offered]
    for floors in found:
        assert set(floors["cpu"]) == set(floors["wall"]) == {"fma", "exp", "read", "copy", "gather"}
        assert all(0 < rate < 1e5 for rate in floors["cpu"].values())
    assert found[-1]["cpu"]["exp"] > 0.8 * found[0]["cpu"]["exp"]
    with pytest.raises(ValueError, match="isa must be"):
        host.machine_floors(1, 0.01, "sse2")
    with pytest.raises(ValueError, match="threads must be >= 1"):
        host.machine_floors(0, 0.01)


def test_machine_name_is_a_file_name():
    assert machine.machine_name().replace("-", "").isalnum()


def test_peak_memory_counts_what_a_call_holds():
    found = bench.load("tied_softmax_loss")
    case = found.case("fwd+bwd N=48 V=118335 D=64")
    memory = measure_in_new_process(found.op, case, found.provider("eager"), torch.float32)
    if "clear" in memory.get("reason", "") or "does not tell" in memory.get("reason", ""):
        pytest.skip(memory["reason"])
    gradients = (118335 + 48) * 64 * 4 / 2**20
    scores = 48 * 118335 * 4 / 2**20
    assert memory["outputs"] == pytest.approx(gradients, abs=0.2)
    assert gradients + scores - 3 < memory["extra"] < gradients + 5 * scores
    assert memory["process"] > memory["extra"] + 50


# -- a run -----------------------------------------------------------------------------------------


def _double(x):
    return {"y": 2 * x["x"]}


def _missing(case):
    raise Missing("not installed")


def _broken(x):
    raise OSError("no such thing\nand more")


def _small(op, ours):
    """A benchmark of y = 2 x with the name of a real op."""
    return Benchmark(
        op,
        [Case("double", {"N": 4}, "quick"), Case("double", {"N": 8}, "full")],
        lambda case, dtype: {"x": torch.arange(1.0, 1.0 + case["N"]).to(dtype)},
        [
            Provider("t4r_fast", lambda case: ours, ours=True),
            Provider("plain", lambda case: _double),
            Provider("absent", _missing),
            Provider("broken", lambda case: _broken),
            Provider("other", lambda case: lambda x: {"y": 3 * x["x"]}),
            Provider("compiler", lambda case: _double, slow=True),
        ],
        lambda case, size: Work(read=case["N"] * size),
    )


@pytest.fixture
def quick_floors(monkeypatch):
    monkeypatch.setattr(
        machine, "measure_floors", lambda threads: {"threads": threads, "cpu": RATES, "wall": RATES}
    )


def test_run_records_numbers_and_troubles(monkeypatch, quick_floors):
    monkeypatch.setattr(bench, "load", lambda op: _small(op, _double))
    records = bench.run(["item_topk"], bench.Options("quick"), bench.Watch())
    state = {record["provider"]: (record["status"], record.get("reason")) for record in records}
    assert state == {
        "t4r_fast": ("ok", None),
        "plain": ("ok", None),
        "absent": ("missing", "not installed"),
        "broken": ("missing", "failed: OSError: no such thing"),
        "other": ("wrong", "y is off by 4, allowed 0.008"),
    }
    ours = records[0]
    assert ours["case"] == "double N=4"
    assert ours["cpu_ms"]["p20"] <= ours["cpu_ms"]["p50"] <= ours["cpu_ms"]["p80"]
    assert ours["floor_ms"] == pytest.approx(1.6e-6)
    assert ours["backend"] in ("cpu", "plain")
    assert {"commit", "versions", "machine", "run", "floors", "dtype"} <= set(ours)


def test_no_number_from_a_wrong_kernel(monkeypatch, quick_floors):
    truths = iter([_double])  # the truth is right, the kernel is not
    wrong = lambda x: next(truths, lambda x: {"y": 2.01 * x["x"]})(x)  # noqa: E731
    monkeypatch.setattr(bench, "load", lambda op: _small(op, wrong))
    ours = bench.run(["item_topk"], bench.Options("quick"), bench.Watch())[0]
    assert ours["status"] == "wrong"
    assert "cpu_ms" not in ours


# -- the command -----------------------------------------------------------------------------------


def test_command_appends_records(tmp_path):
    pytest.importorskip("t4r_fast._C", reason="t4r_fast._C is not built")
    out = tmp_path / "results.jsonl"
    result = CliRunner().invoke(app, ["bench", "mask_mlm", "--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "train B=256 L=20, 1 thread" in result.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["provider"] for r in records] == ["t4r_fast", "Transformers4Rec's steps"]
    assert all(r["status"] == "ok" and r["floors"]["cpu"]["fma"] > 0 for r in records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no benchmark of 'nothing'"),
        (["--threads", "0"], "--threads must be numbers from 1 to"),
        (["--threads", "two"], "--threads must be numbers from 1 to"),
        (["--dtype", "int8"], "--dtype must be one of float32"),
        (["--quick", "--full"], "--quick or --full"),
    ],
)
def test_command_refuses(arguments, message):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_outside_a_checkout(tmp_path, monkeypatch):
    import t4r_fast

    outside = Path(tmp_path.anchor)  # tmp_path may be in a checkout's build folder
    monkeypatch.setattr(t4r_fast, "__file__", str(outside / "site-packages/t4r_fast/__init__.py"))
    monkeypatch.chdir(outside)
    with pytest.raises(InputError, match="run this inside a checkout"):
        find_checkout()
    monkeypatch.chdir(ROOT / "tests")
    assert find_checkout() == ROOT


# -- tables ----------------------------------------------------------------------------------------

MACHINE = {"cpu": "Tested CPU", "family": "25", "model": "17", "cores": 2, "flags": ["avx2"]}


def _record(provider, p50, run="2026-11-24T10:00:00+00:00", **changes):
    times = {"p20": 0.9 * p50, "p50": p50, "p80": 1.1 * p50}
    return {
        "op": "item_topk", "case": "topk N=1", "kind": "topk", "sizes": {"N": 1}, "shown": True,
        "provider": provider, "ours": provider == "t4r_fast", "threads": 1, "status": "ok",
        "run": run, "dtype": "float32", "cpu_ms": times, "wall_ms": times, "gflop_per_s": 3.0,
        "gbyte_per_s": 2.0, "floor_share": 0.5, "machine": MACHINE, "commit": "abc",
        "uncommitted_changes": False, "versions": {"torch": "2.13.0"}, **changes,
    }  # fmt: skip


def test_table_shows_losses_and_takes_the_last_run_alone(tmp_path):
    old = [_record("t4r_fast", 1.0, "2026-11-20T00:00:00+00:00"), _record("eager", 9.0)]
    old[1]["run"] = old[0]["run"]
    new = [_record("eager", 8.0), _record("t4r_fast", 10.0), _record("compile", 25.0)]
    text = table.ops_table(old + new)
    assert "| `item_topk` | topk N=1 | 10 | **0.80x (slower)** eager | **2.50x** compile |" in text
    assert "Tested CPU (family 25, model 17), 2 cores, avx2; torch 2.13.0; commit abc" in text
    assert "9.0" not in text


def test_tables_go_between_their_markers(tmp_path):
    results = tmp_path / "results"
    bench.append([_record("t4r_fast", 10.0), _record("eager", 20.0)], results / "box.jsonl")
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- bench:ops -->\nold\n<!-- /bench:ops -->\nbelow\n")
    assert table.write_tables(tmp_path, results) == [readme]
    text = readme.read_text()
    assert text.startswith("above\n<!-- bench:ops -->\n| op |")
    assert text.endswith("<!-- /bench:ops -->\nbelow\n")
    assert "**2.00x** eager" in text
    assert "old" not in text
    table.write_tables(tmp_path, results)
    assert readme.read_text() == text


def test_tables_want_results_and_markers(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    with pytest.raises(InputError, match="there are no results"):
        table.write_tables(tmp_path, results)
    bench.append([_record("t4r_fast", 10.0)], results / "box.jsonl")
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(InputError, match="put <!-- bench:ops -->"):
        table.write_tables(tmp_path, results)
    (tmp_path / "README.md").write_text("<!-- bench:ops -->\n")
    with pytest.raises(InputError, match="has no <!-- /bench:ops --> behind it"):
        table.write_tables(tmp_path, results)
    (results / "box.jsonl").write_text("{}\nnonsense\n")
    with pytest.raises(InputError, match="line 2 is no JSON"):
        table.write_tables(tmp_path, results)


# -- beside Transformers4Rec -----------------------------------------------------------------------


def _process(cpu, params=100, loss=9.2, mode="train"):
    times = (
        {"cpu_s_median": cpu, "wall_s_median": cpu, "loss": loss}
        if mode == "train"
        else {"cpu_s_per_step": cpu, "wall_s_per_step": cpu, "metrics": {"eval_/loss": loss}}
    )
    return {"params": params, "peak_rss_gib": 1.5, "loadavg": 0.1, **times}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_tutorial_records(mode):
    found = {
        "t4r_fast": [_process(1.0, mode=mode), _process(3.0, mode=mode)],
        against_t4rec.THEIRS: [_process(4.0, mode=mode), _process(4.0, mode=mode)],
    }
    shared = {k: v for k, v in _record("x", 1.0).items() if k in ("run", "dtype", "machine",
              "commit", "uncommitted_changes", "versions")}  # fmt: skip
    records = [
        {**shared, **record} for record in against_t4rec.records_of(found, "gru", 99, mode, 1)
    ]
    assert records[0]["cpu_ms"] == {"p20": 1000.0, "p50": 2000.0, "p80": 3000.0}
    text = table.tutorial_table(records)
    assert table.ops_table(records) == "No results yet: `make bench`."
    assert table.full_table(records) == "No results yet: `make bench`."
    assert f"| gru, {mode} | 99 | 256 | 1 (CPU) | 2 | 4 | **2.00x** | 1.50 / 1.50 |" in text


def test_tutorial_commands(monkeypatch, tmp_path):
    """Both sides get the same case; the sampled ones their negatives."""
    commands = []

    def timed(command, threads, environment):
        commands.append(command)
        return _process(1.0)

    monkeypatch.setattr(against_t4rec, "make_data", lambda python, items: tmp_path)
    monkeypatch.setattr(against_t4rec, "last_json", timed)
    options = against_t4rec.parse(["--steps", "3", "--threads", "1"])
    for model, (theirs, ours) in {
        "gru": ([], []),
        "gru_sampled": ([], ["--negatives", "4096"]),
        "gru_sampled_both": (["4096"], ["--negatives", "4096", "--sampler", "t4rec"]),
    }.items():
        commands.clear()
        found = against_t4rec.run_pair(Path("python"), model, 99, "train", 1, options)
        assert set(found) == {"t4r_fast", against_t4rec.THEIRS}
        mine, other = sorted(commands, key=lambda c: "--data" not in c)
        shared = ["--model", "gru", "--mode", "train", "--threads", "1", "--steps", "3"]
        shared += ["--warm", "2"]
        assert mine[mine.index("--data") + 2 :] == [*ours, *shared]
        script = other.index(str(against_t4rec.PEERS / "bench_t4rec.py"))
        assert other[script - len(theirs) : script] == theirs
        assert (Path(other[3]).name == "t4rec_sampled.py") == bool(theirs)
        assert other[script + 1 :] == ["--items", "99", *shared]
    assert against_t4rec.MODELS["gru_sampled"].modes == ("train",)


def test_tutorial_sides_must_compute_the_same():
    ours, theirs = _process(1.0), _process(1.0)
    assert against_t4rec.difference(ours, theirs) == ""
    assert "100 parameters, theirs 7" in against_t4rec.difference(ours, _process(1.0, params=7))
    assert "loss 9.2000, theirs 8.0000" in against_t4rec.difference(ours, _process(1.0, loss=8.0))

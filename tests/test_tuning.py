"""Block sizes of the Triton kernels: tables, and autotuning with an injected timer."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from t4r_fast.kernels import _tuning
from t4r_fast.kernels._tuning import Config, Entry, Key, config

SMALL, LARGE, WIDE_ROWS = (
    config(4, 2, BLOCK_N=32, BLOCK_V=32),
    config(8, 3, BLOCK_N=128, BLOCK_V=128),
    config(4, 2, BLOCK_N=64, BLOCK_V=32),
)
TABLE = {
    "some_kernel": (
        Entry(SMALL, most_rows=128),
        Entry(LARGE, archs=(90, 100), itemsizes=(2,), most_width=128),
        Entry(WIDE_ROWS),
    )
}
KEY = Key(arch=90, itemsize=2, width=64, rows=1024, items=4**9, device="some GPU")


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """Autotuning on, with an empty cache in a folder that does not exist yet."""
    path = tmp_path / "new" / "cache.json"
    monkeypatch.setenv("T4R_FAST_AUTOTUNE", "1")
    monkeypatch.setenv("T4R_FAST_AUTOTUNE_CACHE", str(path))
    monkeypatch.setattr(_tuning, "_tuned", {})
    return path


class Clock:
    """Times in the order of the candidates, and which configurations ran."""

    def __init__(self, *times):
        self.times, self.ran = list(times), []

    def __call__(self, run):
        run()
        return self.times.pop(0)

    def choose(self, key=KEY):
        return _tuning.chosen("some_kernel", TABLE, key, self.ran.append, self)


def test_the_first_entry_that_fits():
    assert _tuning.fixed("some_kernel", TABLE, KEY) == LARGE
    assert _tuning.fixed("some_kernel", TABLE, KEY._replace(rows=128)) == SMALL
    for change in ({"arch": 80}, {"itemsize": 4}, {"width": 256}):
        assert _tuning.fixed("some_kernel", TABLE, KEY._replace(**change)) == WIDE_ROWS
    with pytest.raises(LookupError, match="some_kernel: CONFIGS must have an entry for Key"):
        _tuning.fixed("some_kernel", {"some_kernel": TABLE["some_kernel"][:1]}, KEY)


def test_plain_entries_are_not_for_calls_with_options():
    table = {"some_kernel": (Entry(LARGE, plain=True), Entry(SMALL))}
    assert _tuning.fixed("some_kernel", table, KEY) == LARGE
    assert _tuning.fixed("some_kernel", table, KEY._replace(options=True)) == SMALL
    assert _tuning.candidates("some_kernel", table, KEY._replace(options=True)) == [SMALL]


def test_exact_sizes_do_not_count():
    t = torch.zeros(1, dtype=torch.bfloat16)
    keys = {_tuning.key(t, rows=n, items=v, width=60) for n in (129, 700) for v in (70e3, 1e5)
            for v in [int(v)]}  # fmt: skip
    assert len(keys) == 1
    assert keys.pop()[1:5] == (2, 64, 1024, 4**9)
    assert _tuning.key(t, rows=0, items=1, width=257).width == _tuning.WIDE
    assert _tuning.key(t, rows=2**40, items=1, width=1)[2:4] == (16, _tuning.N_BINS[-1])


def test_off_by_default(monkeypatch):
    monkeypatch.delenv("T4R_FAST_AUTOTUNE", raising=False)
    clock = Clock()
    assert clock.choose() == LARGE
    assert clock.ran == []


def test_the_fastest_is_kept_and_not_timed_again(tuning):
    clock = Clock(3.0, 2.0, 1.0)
    assert clock.choose() == WIDE_ROWS
    assert clock.ran == [SMALL, LARGE, WIDE_ROWS]
    assert clock.choose() == WIDE_ROWS
    assert len(clock.ran) == 3
    (name,) = json.loads(tuning.read_text())
    for part in ("some_kernel", "some GPU", "sm_90", "D 64", "N 1024", torch.__version__):
        assert part in name


def test_a_second_process_reads_the_file(tuning, monkeypatch):
    Clock(3.0, 1.0, 2.0).choose()
    monkeypatch.setattr(_tuning, "_tuned", {})
    again = Clock()
    assert again.choose() == LARGE
    assert again.ran == []
    other = Clock(2.0, 1.0)  # float32: two candidates; the file keeps both keys
    assert other.choose(KEY._replace(itemsize=4)) == WIDE_ROWS
    assert len(json.loads(tuning.read_text())) == 2


def test_a_stored_configuration_that_left_the_table_is_tuned_again(tuning, monkeypatch):
    Clock(3.0, 1.0, 2.0).choose()
    stored = {
        name: {**value, "BLOCK_N": 7} for name, value in json.loads(tuning.read_text()).items()
    }
    tuning.write_text(json.dumps(stored))
    monkeypatch.setattr(_tuning, "_tuned", {})
    assert Clock(1.0, 2.0, 2.0).choose() == SMALL


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_warns_and_is_replaced(tuning, content):
    tuning.parent.mkdir()
    tuning.write_text(content)
    with pytest.warns(RuntimeWarning, match=r"cache\.json is not readable"):
        assert Clock(1.0, 2.0, 2.0).choose() == SMALL
    assert len(json.loads(tuning.read_text())) == 1


def test_arguments_of_a_launch():
    blocks = {"BLOCK_N": 32, "BLOCK_V": 32}
    assert SMALL.arguments() == {**blocks, "num_warps": 4, "num_stages": 2}
    assert (SMALL["BLOCK_V"], SMALL.num_stages) == (32, 2)
    assert isinstance(SMALL, Config)


class Kernel:
    """What a launch needs of a kernel (x, D, HAS_BIAS, BLOCK_N, BLOCK_V), and how it was called."""

    def __init__(self):
        self.arg_names = ["x", "D", "HAS_BIAS", "BLOCK_N", "BLOCK_V"]
        self.params = [
            SimpleNamespace(name=name, is_constexpr=name not in "xD", annotation_type=None)
            for name in self.arg_names
        ]
        self.fn = SimpleNamespace(__name__="some_kernel")
        self.launched = []

    def __getitem__(self, grid):
        return lambda **arguments: self.launched.append(arguments)


def test_a_launch_names_the_cap_of_its_compilation_and_of_no_other(monkeypatch):
    kernel, x = Kernel(), torch.zeros(3, dtype=torch.bfloat16)
    types = {"x": "*bf16", "D": "i32"}
    made = _tuning.variant(kernel, types, {"HAS_BIAS": True}, SMALL, "bf16")
    caps = {("some_kernel", 80): {_tuning.compilation(made): 168}}
    monkeypatch.setattr(_tuning, "CAPS", caps)
    monkeypatch.setattr(_tuning, "_launch_caps", {})
    assert _tuning.cap(made, 80) == 168
    assert _tuning.cap(made, 90) is None
    assert _tuning.cap(made._replace(label="other"), 80) == 168

    def cap_of(arch=80, config=SMALL, x=x, bias=True):
        monkeypatch.setattr(_tuning, "capability", lambda tensor: arch)
        _tuning.launch(kernel, (1,), config, x=x, D=64, HAS_BIAS=bias)
        return kernel.launched[-1]["maxnreg"]

    assert [cap_of(), cap_of()] == [168, 168]
    assert kernel.launched[-1]["num_warps"] == 4
    others = [
        cap_of(arch=90),
        cap_of(config=LARGE),
        cap_of(config=SMALL._replace(num_stages=3)),
        cap_of(x=x.float()),
        cap_of(bias=False),
    ]
    assert others == [None] * 5


def test_tf32_only_where_asked_for(monkeypatch):
    assert _tuning.precision(torch.float32) == "tf32x3"
    assert _tuning.precision(torch.bfloat16) == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert _tuning.precision(torch.float32) == "tf32"

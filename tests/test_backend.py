"""The choice of backend: what is picked, forced, missing, and how it is said."""

import json
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from cuda_on_cpu import build
from harness import REQUIRED, ROOT

import t4r_fast
from t4r_fast import backend
from t4r_fast.cli import doctor

IDS = torch.tensor([[3, 4, 5, 0]])
CPU_BUILT = backend.OFF["cpu"] is None
needs_cpu = pytest.mark.skipif(
    not CPU_BUILT and "cpu" not in REQUIRED, reason=str(backend.OFF["cpu"])
)


def run_python(code, path=ROOT, **environment):
    """A fresh interpreter: what happens at import cannot be tried twice in this one."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        cwd=path,
    )


@needs_cpu
def test_native_kernel_is_picked_per_op():
    assert backend.pick("mask_mlm", IDS) == "cpu"
    assert backend.pick("ranking_metrics", IDS) == "plain"
    with backend.use("plain"):
        assert backend.pick("mask_mlm", IDS) == "plain"
    assert backend.pick("mask_mlm", IDS) == "cpu"


@needs_cpu
def test_forced_backend_without_a_kernel_is_an_error():
    rank = torch.tensor([0, 1])
    message = "ranking_metrics: backend 'cpu' is forced, but .* no kernel .* use backend 'plain'"
    with backend.use("cpu"), pytest.raises(RuntimeError, match=message):
        t4r_fast.ranking_metrics(rank, [5])
    code = "import torch, t4r_fast; t4r_fast.mask_mlm(torch.tensor([[3, 4]]))"
    done = run_python(code, T4R_FAST_BACKEND="cuda", T4R_FAST_CUDA_ON_CPU="")
    last = done.stderr.splitlines()[-1]
    assert re.search("mask_mlm: backend 'cuda' is forced, but .* does not run on .*'cpu'", last)


def test_use_restores_after_an_error_and_refuses_unknown_names():
    with pytest.raises(ZeroDivisionError), backend.use("plain"):
        raise ZeroDivisionError
    assert backend.forced() is None
    with pytest.raises(ValueError, match="cpu, cuda, triton; got 'fast'"), backend.use("fast"):
        pass


def test_the_old_name_of_plain_is_accepted_with_a_note():
    noted = pytest.warns(UserWarning, match="'reference' is called 'plain' now")
    with noted, backend.use("reference"):
        assert backend.forced() == "plain"


def test_meta_tensors_take_plain_pytorch():
    ids = IDS.to("meta")
    assert backend.pick("mask_mlm", ids) == "plain"


def test_table_lists_every_op():
    table = backend.table()
    ops = {p.stem for p in (ROOT / "t4r_fast/ops").glob("*.py") if not p.stem.startswith("_")}
    assert set(table) == ops
    assert table["ranking_metrics"] == {"cpu": "plain", "cuda": "plain"}
    with backend.use("triton"):
        assert backend.table()["ranking_metrics"]["cpu"].startswith("error: ranking_metrics: back")


def test_triton_kernels_register_and_run(monkeypatch):
    """A row's launcher becomes the op of its namespace; forced it runs, unforced on a GPU only."""
    kernels = types.ModuleType("t4r_fast.kernels")
    kernels.__path__ = []
    kernels.__spec__ = types.SimpleNamespace(name="t4r_fast.kernels")
    probe = types.ModuleType("t4r_fast.kernels.probe")
    probe.__spec__ = types.SimpleNamespace(name="t4r_fast.kernels.probe")
    probe.probe_fwd = lambda x: x * 3
    monkeypatch.setitem(sys.modules, "t4r_fast.kernels", kernels)
    monkeypatch.setitem(sys.modules, "t4r_fast.kernels.probe", probe)
    monkeypatch.setitem(backend.OFF, "triton", None)
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    backend.declare("probe", "probe_fwd(Tensor x) -> Tensor", torch.empty_like)
    x = torch.ones(2, device=device)
    assert backend.pick("probe", x) == ("triton" if device == "cuda" else "plain")
    with backend.use("triton"):
        assert backend.pick("probe", x) == "triton"
        assert backend.ops("triton", probe).probe_fwd(x).tolist() == [3, 3]


def test_environment_forces():
    done = run_python(
        "import torch, t4r_fast; print(t4r_fast.backend.pick('mask_mlm', torch.zeros(1)))",
        T4R_FAST_BACKEND="plain",
    )
    assert done.stdout == "plain\n"
    done = run_python(
        "import torch, t4r_fast; t4r_fast.mask_mlm(torch.tensor([[3, 4]]))", T4R_FAST_BACKEND="fast"
    )
    assert done.returncode == 1
    assert "T4R_FAST_BACKEND) must be one of" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory):
    """A copy of the package without its libraries."""
    folder = tmp_path_factory.mktemp("unbuilt")
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "t4r_fast", folder / "t4r_fast", ignore=ignore)
    return folder


def test_unbuilt_package_warns_once_and_runs(unbuilt):
    code = (
        "import torch, t4r_fast; x = torch.tensor([[3, 4]]);"
        "t4r_fast.mask_mlm(x); t4r_fast.mask_causal(x); print(t4r_fast.__file__)"
    )
    done = run_python(code, unbuilt)
    assert done.returncode == 0, done.stderr
    assert str(unbuilt) in done.stdout
    assert done.stderr.count("RuntimeWarning: t4r_fast runs its ops in plain PyTorch") == 1
    assert "libt4r_fast_cpu.so is not built" in done.stderr
    silent = run_python(code, unbuilt, T4R_FAST_BACKEND="plain")
    assert (silent.returncode, silent.stderr) == (0, "")


def test_unbuilt_package_refuses_its_kernels(unbuilt):
    code = "import torch, t4r_fast; t4r_fast.mask_mlm(torch.tensor([[3, 4]]))"
    done = run_python(code, unbuilt, T4R_FAST_BACKEND="cpu")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: mask_mlm: backend 'cpu' is forced, but libt4r_fast_cpu")
    assert "pip install" in last


@needs_cpu
def test_another_library_can_be_chosen(unbuilt, tmp_path):
    code = "import torch, t4r_fast; print(t4r_fast.backend.pick('mask_mlm', torch.zeros(1)))"
    built = str(ROOT / "t4r_fast/libt4r_fast_cpu.so")
    assert run_python(code, unbuilt, T4R_FAST_CPU_LIBRARY=built).stdout == "cpu\n"
    done = run_python(code, T4R_FAST_CPU_LIBRARY=str(tmp_path / "none.so"))
    assert done.stdout == "plain\n"
    assert f"T4R_FAST_CPU_LIBRARY names {tmp_path}/none.so, which does not exist" in done.stderr


OFF = """
import json, sys
for name in sys.argv[1:]:
    sys.modules[name] = None
import torch, t4r_fast
from t4r_fast.cli import doctor
assert t4r_fast.mask_mlm(torch.tensor([[3, 4]]))
print(json.dumps(doctor.collect()))
"""


def doctor_without(*modules, path=ROOT, **environment):
    """What doctor collects where modules cannot be imported."""
    environment = {"T4R_FAST_CUDA_ON_CPU": "", "TRITON_INTERPRET": "", **environment}
    code = OFF.replace("sys.argv[1:]", repr(list(modules)))
    done = run_python(code, path, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_doctor_says_what_is_off_without_triton():
    facts = doctor_without("triton", TRITON_INTERPRET="1", T4R_FAST_CUDA_ON_CPU="nowhere.so")
    assert facts["off"]["triton"] == "the package triton is not installed"
    assert facts["off"]["cuda"].startswith("T4R_FAST_CUDA_ON_CPU names nowhere.so, which does not")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_says_what_is_off_without_a_gpu():
    facts = doctor_without()
    assert facts["off"]["triton"].startswith("no GPU (set TRITON_INTERPRET=1 before the import")
    built = facts["built"]["libt4r_fast_cuda.so"]
    state = "built" if built["ok"] else "not built either"
    assert facts["off"]["cuda"] == f"no GPU that torch can use (libt4r_fast_cuda.so is {state})"
    wanted = str(ROOT / "t4r_fast") if built["ok"] else "not built: no nvcc, or T4R_FAST_CUDA=0"
    assert built["detail"].startswith(wanted)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_package_with_the_cuda_library_imports_without_a_gpu(unbuilt):
    """Whatever it holds: it is not loaded."""
    library = unbuilt / "t4r_fast" / "libt4r_fast_cuda.so"
    library.write_bytes(b"for GPUs")
    try:
        facts = doctor_without(path=unbuilt, T4R_FAST_BACKEND="plain")
    finally:
        library.unlink()
    assert facts["off"]["cuda"] == "no GPU that torch can use (libt4r_fast_cuda.so is built)"
    assert facts["built"]["libt4r_fast_cuda.so"] == {"ok": True, "detail": str(library)}


def test_cuda_kernels_on_the_cpu_run_only_where_forced():
    if build.why_not("plain") is not None:
        assert "cuda-on-cpu" not in REQUIRED, build.why_not("plain")
        pytest.skip(build.why_not("plain"))
    facts = doctor_without(T4R_FAST_CUDA_ON_CPU=str(build.library("plain")))
    assert "cuda" not in facts["off"]
    assert "cuda" not in {row["cpu"] for row in facts["ops"].values()}


def test_broken_library_is_named(unbuilt):
    (unbuilt / "t4r_fast" / "libt4r_fast_cpu.so").write_bytes(b"not a library")
    try:
        done = run_python("import t4r_fast; t4r_fast.backend.table()", unbuilt)
    finally:
        (unbuilt / "t4r_fast" / "libt4r_fast_cpu.so").unlink()
    assert done.returncode == 0
    assert "libt4r_fast_cpu.so cannot be loaded" in done.stderr


def test_doctor_in_json():
    facts = json.loads(json.dumps(doctor.collect()))
    # without the part behind a "+", which the CUDA builds of PyPI have in torch.__version__ alone
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["versions"]["t4r_fast"] == t4r_fast.__version__
    assert facts["ops"] == backend.table()
    assert facts["built"]["libt4r_fast_cpu.so"]["ok"] == CPU_BUILT
    assert facts["cpu"]["cores"] >= 1
    assert facts["forced"] is None
    if CPU_BUILT:
        assert "cpu" in facts["missing"]["ranking_metrics"]
        assert "mask_mlm" not in facts["missing"] or "cpu" not in facts["missing"]["mask_mlm"]
    for name, reason in facts["off"].items():
        assert reason, name


def test_doctor_in_words():
    done = subprocess.run(
        [sys.executable, "-c", "from t4r_fast.cli import main; main()", "doctor"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "T4R_FAST_BACKEND": "cpu", "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for part in ("libt4r_fast_cpu.so", "CPU features", "tied_softmax_loss", "Forced by", "error"):
        assert part in done.stdout

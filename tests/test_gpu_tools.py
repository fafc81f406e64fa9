"""What says how fast GPU kernels will be, where there is no GPU: budget, model, script."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from harness import ROOT

from t4r_fast.cli.bench import load_benchmarks

load_benchmarks(ROOT)
# The checkout's benchmarks, which load_benchmarks finds.
from benchmarks import gpu, gpu_budget, gpu_step, kernel_sources, roofline, sass  # noqa: E402

ROW = {
    "op": "some_op",
    "backend": "triton",
    "kernel": "_some_kernel",
    "variant": "bf16 D64",
    "arch": "sm_90a",
    "warps": 8,
    "registers": 128,
    "stack": 0,
    "spills": 0,
    "shared": 65536,
    "blocks_per_sm": 2,
    "occupancy": 0.25,
    "tensor_core": "HGMMA.64x128x16.F32.BF16",
    "loop": {"exp": 66, "fp32": 266, "tensor": 12},
    "blocks": {"BLOCK_N": 128, "BLOCK_V": 128},
}

# -- budget ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        (90, 128, 0, 8, 2),  # 65536 / (128 * 256) = 2
        (90, 129, 0, 8, 1),  # rounded up to 136 per thread
        (90, 32, 0, 8, 8),  # 64 warps
        (86, 32, 0, 8, 6),  # 48 warps
        (80, 32, 80 * 1024, 4, 2),  # 164 KiB
        (120, 64, 99 * 1024, 4, 1),
        (86, 16, 0, 1, 16),
    ],
)
def test_blocks_per_sm(arch, registers, shared, warps, blocks):
    assert gpu_budget.blocks_per_sm(arch, registers, shared, warps) == blocks


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "caps"),
    [
        (80, 128, 8, [255]),  # 2 blocks; 1 block could have 256
        (90, 40, 4, [48, 56, 64, 72, 80, 96, 128, 168, 255]),
        (80, 255, 8, []),
        (86, 255, 4, []),
        (80, 168, 2, [200, 255]),  # 6 blocks; 5 have 204 each, rounded down to a multiple of 8
    ],
)
def test_caps_are_tried_by_what_they_cost_in_blocks(arch, registers, warps, caps):
    found = list(gpu_budget.larger_caps(arch, registers, warps))
    blocks = [gpu_budget.blocks_per_sm(arch, cap, 0, warps) for cap in found]
    assert blocks == sorted(set(blocks), reverse=True)
    assert found == caps


def test_the_kept_table_has_no_fault():
    assert gpu_budget.faults([ROW], [ROW]) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spills": 4}, "4 spills"),
        ({"stack": 16}, "16 bytes of stack"),
        ({"tensor_core": ""}, "no tensor cores"),
        ({"registers": 137}, "registers 137, 128 before"),
        ({"shared": 70000}, "shared 70000"),
        ({"occupancy": 0.125}, "occupancy 0.125"),
        ({"blocks_per_sm": 0}, "does not fit"),
        ({"variant": "bf16 D128"}, "is new"),
    ],
)
def test_a_worse_kernel_is_a_fault(change, words):
    found = gpu_budget.faults([{**ROW, **change}], [ROW])
    assert any(words in fault for fault in found)


def test_a_kernel_that_is_gone_is_a_fault():
    (fault,) = gpu_budget.faults([], [ROW])
    assert "is gone" in fault


def test_table_shows_ranges_and_tensor_cores():
    other = {**ROW, "variant": "bf16 D128", "registers": 168, "occupancy": 0.125}
    text = gpu_budget.markdown([ROW, other])
    assert "| `some_kernel` (triton) | 2 | 128-168 r, 64 K, 12-25 %, HGMMA |" in text


def test_kept_table_has_all_architectures_and_no_spills():
    """That it has every kernel is what make gpu-budget compares."""
    kept = json.loads(gpu_budget.KEPT.read_text())["rows"]
    archs = {a.name for a in gpu_budget.ARCHITECTURES.values()}
    ops = {(r["backend"], r["op"]) for r in kept}
    assert ("triton", "target_rank") in ops
    assert ("cuda", "mask_mlm") in ops
    for op in ops:
        assert {r["arch"] for r in kept if (r["backend"], r["op"]) == op} == archs
    assert [r for r in kept if r["spills"] or r["stack"]] == []


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   MUFU.EX2 R5, R4 ;
        /*0030*/              @!P0 FADD.FTZ R5, R5, R6 ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/                   STL [R1], R5 ;
        /*0060*/                   EXIT ;
"""


def test_main_loop_of_a_kernel():
    code = [(int(at, 16), op, rest) for at, op, rest in sass.INSTRUCTION.findall(SASS)]
    kernel = sass.Kernel("k", 32, 0, 0, 0, code)
    assert next(op for _, op, _ in kernel.main_loop()) == "HMMA.16816.F32.BF16"
    assert kernel.mix() == {"tensor": 1, "exp": 1, "fp32": 1, "other": 1}
    assert kernel.tensor_core() == "HMMA.16816.F32.BF16"
    assert sum(bool(sass.LOCAL_MEMORY.match(op)) for _, op, _ in code) == 1


def test_kept_table_was_compiled_from_these_sources(monkeypatch):
    """For all architectures: kernels that were not compiled again after a change are faults."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks/gpu_budget.py"), "--stale"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(gpu_budget.triton_ops() + gpu_budget.cuda_ops()) * len(gpu_budget.ARCHITECTURES)
    assert f"{count} looked at, 0 stale" in done.stdout


def test_a_changed_source_is_stale():
    found = gpu_budget.stale(
        {"cuda op sm_80": "new", "cuda op sm_90a": "old"}, {"cuda op sm_90a": "old"}
    )
    assert len(found) == 1
    assert found[0].startswith("cuda op sm_80: ")


def test_a_configuration_that_no_case_has_is_named(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(gpu_budget, "distinct", lambda op, arch, every: [])
    found = gpu_budget.uncompiled("tied_table_step", 90)
    start = "_tied_table_step_items_kernel sm_90a: 2 bytes, D 64: Config("
    assert sum(words.startswith(start) for words in found) == 1
    assert all(words.endswith("is of no variant; add a case that has it") for words in found)


def test_a_cap_of_nothing_is_named(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from t4r_fast.kernels import _tuning

    monkeypatch.setattr(gpu_budget, "distinct", lambda op, arch, every: [])
    monkeypatch.setattr(_tuning, "CAPS", {("_some_kernel", 90): {"0123456789": 128}})
    (words,) = gpu_budget.unknown_caps()
    assert words == "_some_kernel sm_90a: no compilation is 0123456789 now: a cap of no use"


PYTHON = '''@jit
def kernel(x, BLOCK: constexpr):
    """Doubles."""
    return x + x  # twice
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Doubles.", "Adds x to itself,\n    in place.", True),
        ("  # twice", "", True),
        ("    return", "\n    # here\n    return", True),
        ("@jit", "@jit(fast=True)", True),
        ("x + x", "x * 2", False),
        ("    return", "    if x:\n        return", False),
        ("BLOCK: constexpr", "BLOCK", False),
    ],
)
def test_digest_of_python_is_of_its_code(old, new, same):
    changed = PYTHON.replace(old, new)
    assert changed != PYTHON
    tokens = kernel_sources.without_docstrings
    assert (tokens(changed) == tokens(PYTHON)) is same


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("op.cu", "// one", "// two\n", True),
        ("op.cu", "/* a */", "", True),
        ("op.cu", "int x", "long x", False),
        ("op.cu", '"// no comment"', '"// another"', False),
        ("part.cuh", "int y", "long y", False),
        ("part.cuh", "int y;", "int y; // new", True),
    ],
)
def test_digest_of_cuda_is_of_its_code_and_headers(tmp_path, file, old, new, same):
    texts = {
        "op.cu": '#include "part.cuh"\n#include "elsewhere.h"\n// one\nint x; /* a */\n'
        'auto s = "// no comment";\n',
        "part.cuh": '#include "op.cu"\nint y;\n',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    before = kernel_sources.of_cuda(tmp_path / "op.cu")
    assert old in texts[file]
    (tmp_path / file).write_text(texts[file].replace(old, new))
    assert (kernel_sources.of_cuda(tmp_path / "op.cu") == before) is same


@pytest.mark.slow
@pytest.mark.parametrize("op", gpu_budget.triton_ops())
def test_an_op_compiles_as_kept_without_a_gpu(op, monkeypatch):
    """For one architecture, as the compiler installed has it; make gpu-budget does it for all."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tool = str(ROOT / "benchmarks/gpu_budget.py")
    command = [sys.executable, "-W", "ignore", tool, op, "--arch", "90", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout


# -- model of speed --------------------------------------------------------------------------------


def test_counted_work_of_the_full_softmax():
    case = roofline.tied_softmax_loss(1024, 100_000, 64)
    assert case.work.flops == 8 * 1024 * 100_000 * 64
    assert case.work.exps == 2 * 1024 * 100_000


def test_floor_is_below_what_is_expected():
    for p in roofline.predictions(list(roofline.GPUS)):
        assert 0 < p["floor_ms"] <= p["expected_ms"], p
        assert p["kind"] == "prediction"


def test_exponentials_bound_narrow_items_on_the_fastest_tensor_cores():
    """Tensor cores of B200 are 2.3 times H100's, its exponential units are the same."""
    assert (
        roofline.bound(roofline.GPUS["B200"], roofline.tied_softmax_loss(2048, 10**6, 64).work)
        == "exp"
    )
    wide = roofline.tied_softmax_loss(2048, 10**6, 256).work
    assert roofline.bound(roofline.GPUS["H100"], wide) == "tensor"


def test_mix_per_logit_counts_threads_and_tile():
    mix = roofline.sass_mix([ROW], "_some_kernel", "sm_90a")
    assert mix["exp"] == pytest.approx(66 * 256 / 128**2)
    with pytest.raises(LookupError, match="_other"):
        roofline.sass_mix([ROW], "_other", "sm_90a")


@pytest.mark.parametrize("kernel", roofline.COUNTED)
@pytest.mark.parametrize("arch", [a.name for a in gpu_budget.ARCHITECTURES.values()])
def test_compiled_loops_do_what_the_model_counts(kernel, arch):
    rows = json.loads(gpu_budget.KEPT.read_text())["rows"]
    exps, floats = roofline.COUNTED[kernel]
    mix = roofline.sass_mix(rows, kernel, arch)
    # sm_100's forward pass without a gradient has two exponentials per logit, and more around them
    extra = 1 if (kernel, arch) == ("_tied_softmax_loss_fwd_kernel", "sm_100") else 0
    assert exps <= mix["exp"] <= (exps + extra) * 1.25
    assert 0.6 * floats <= mix["fp32"] <= (1.4 + extra / 2) * floats


# -- script ----------------------------------------------------------------------------------------


def test_report_puts_prediction_beside_measurement():
    sizes = {"N": 1024, "V": 118_335, "D": 64}
    shared = {"op": "tied_softmax_loss", "sizes": sizes, "status": "ok"}
    records = [
        {**shared, "provider": "t4r_fast", "ours": True, "ms": {"p50": 0.5}},
        {**shared, "provider": "eager", "ours": False, "ms": {"p50": 2.0}},
        {**shared, "provider": "Liger", "ours": False, "status": "missing", "reason": "not here"},
    ]
    prediction = {"op": "tied_softmax_loss", "sizes": sizes, "floor_ms": 0.1, "expected_ms": 0.25}
    step = {"step": "build", "status": "ok", "seconds": 12.3, "note": "sm_90a"}
    text = gpu.report([step], records, [prediction])
    assert "| build | ok | 12 | sm_90a |" in text
    line = next(line for line in text.splitlines() if line.startswith("| tied_softmax_loss"))
    assert "| 0.100 to 0.250 | 0.500 | 2.00x | eager: 4.0x; Liger: not here |" in line


def test_names_of_gpus():
    assert gpu.gpu_key("NVIDIA H100 80GB HBM3") == "H100"
    assert gpu.gpu_key("NVIDIA GeForce RTX 4090") == "RTX 4090"
    assert gpu.gpu_key("Radeon") is None
    assert gpu.file_stem("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_failing_step_fails_the_run(tmp_path, monkeypatch, capsys):
    def broken(where):
        raise RuntimeError("no luck")

    monkeypatch.setattr(gpu, "test", broken)
    assert gpu.main(["--device", "cpu", "--only", "build,test", "--out", str(tmp_path)]) == 1
    records = [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    assert [(r["step"], r["status"]) for r in records] == [("build", "skipped"), ("test", "failed")]
    assert "no luck" in (tmp_path / "rehearsal.md").read_text()


def test_a_command_that_hangs_or_fails_says_so():
    with pytest.raises(RuntimeError, match="longer than 1 s"):
        gpu.command([sys.executable, "-c", "import time; time.sleep(30)"], 1)
    with pytest.raises(RuntimeError, match=r"exit status 3\nlast words"):
        gpu.command([sys.executable, "-c", "print('last words'); exit(3)"], 30)


def test_rehearsal_measures_and_reports(tmp_path):
    assert (
        gpu.main(["--device", "cpu", "--only", "bench", "--minutes", "0.1", "--out", str(tmp_path)])
        == 0
    )
    records = [json.loads(line) for line in (tmp_path / "rehearsal.jsonl").read_text().splitlines()]
    ours = [r for r in records if r.get("ours")]
    assert {r["op"] for r in ours} == {op for op, _ in gpu.REHEARSED}
    assert all(r["checked"] and r["ms"]["p50"] > 0 for r in ours)


def test_steps_of_all_models_on_generated_sessions():
    for name in gpu_step.MODELS:
        losses = gpu_step.eager_losses(name, "cpu", items=300, steps=2, sessions=8)
        assert 4 < losses[1] < 8  # ln 300 is 5.7

"""The engine that runs CUDA kernels on the CPU: it must see what is wrong with a kernel."""

import ctypes
import json
import re
import subprocess
import sys

import pytest
import torch
from cuda_on_cpu import build, mutate
from harness import REQUIRED, ROOT

N = 1000
OPS = [path.stem for path in build.ops()]


def need(kind, name):
    reason = build.why_not(kind, name)
    if reason is not None:
        if "cuda-on-cpu" in REQUIRED:
            pytest.fail(f"T4R_FAST_REQUIRE names lane 'cuda-on-cpu', but {reason}")
        pytest.skip(reason)


@pytest.fixture
def probe(monkeypatch):
    """probe(name, seed=0, size of the output) -> message, output; the input is 0, 1, 2, ..."""
    need("plain", "probes")
    run = ctypes.CDLL(str(build.library("plain", "probes"))).run_probe
    run.restype = ctypes.c_char_p

    def call(name, seed=0, size=128, fill=-1.0):
        monkeypatch.setenv("T4R_FAST_SHUFFLE", str(seed))
        x, out = torch.arange(float(N)), torch.full((size,), fill)
        message = run(
            name.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), N
        )
        return message.decode(), out

    return call


def reversed_input(rounds=4):
    return torch.arange(127.0, -1, -1) * rounds + sum(range(rounds))


@pytest.mark.parametrize("seed", range(8))
def test_right_kernels_give_the_same_in_every_order(probe, seed):
    message, out = probe("sum", seed, size=5)
    assert not message
    x = torch.arange(float(N))
    assert out.sum() == x.sum()
    assert out[2] == x[256:384].sum() + x[896:1000].sum()
    assert torch.equal(probe("reverse", seed)[1], reversed_input())
    assert torch.equal(probe("dynamic", seed)[1], reversed_input(1))
    assert torch.equal(probe("reverse warp", seed, 32)[1], torch.arange(31.0, -1, -1))
    message, out = probe("collectives", seed, 32)
    assert not message
    assert out.tolist() == [9.0] * 32
    message, out = probe("atomics", seed, 2, fill=0.0)
    assert out.view(torch.int32).tolist() == [7 * 128, 6]


@pytest.mark.parametrize("name", ["sum", "reverse", "reverse warp"])
def test_a_missing_barrier_gives_other_results(probe, name):
    """Of 20 orders: read before it is written (nan or old values), or written before it is read."""
    right = probe(name)[1]
    wrong = 0
    for seed in range(20):
        message, out = probe(f"{name} without barrier", seed)
        assert not message
        wrong += not torch.equal(out, right)
    assert wrong >= 18


def test_threads_interleave_at_atomics_and_fences(probe):
    counts = [probe("lost update", seed, 1, 0.0)[1].view(torch.int32).item() for seed in range(5)]
    assert max(counts) < 128


def test_orders_differ_by_seed_and_launch_and_repeat(probe):
    def order(seed):
        return tuple(probe("order", seed, 385, 0.0)[1][1:].int().tolist())

    first, again, second = order(1), order(1), order(2)
    assert sorted(first) == list(range(384))
    assert len({first, again, second}) == 3  # a second launch has its own order
    assert order(1) == first  # another seed before: counted from the start
    blocks = {tuple(dict.fromkeys(i // 128 for i in order(seed))) for seed in range(20)}
    assert len(blocks) == 6
    warps = {tuple(dict.fromkeys(i // 32 for i in order(seed) if i < 128)) for seed in range(20)}
    assert len(warps) > 10


@pytest.mark.parametrize("seed", range(3))
def test_look_back_sums_blocks_that_know_only_their_own_count(probe, seed):
    message, out = probe("look back", seed)
    assert not message
    blocks = torch.arange(128.0)
    assert torch.equal(out, blocks * (blocks + 1) / 2)


def test_shared_memory_starts_as_nan_and_huge(probe):
    message, out = probe("unwritten shared", size=2)
    assert not message
    assert out[0].isnan()
    assert out[1] > 2e9


WRONG = {
    "divergent places": r"divergent __syncthreads: thread \(\d+, 0, 0\) waits for its block at "
    r".*probes.cu:\d+, thread",
    "divergent return": r"divergent barrier: thread .* waits for its block at .*, thread "
    r"\(70, 0, 0\) has returned",
    "divergent warp": "divergent barrier: thread .* waits for its",
    "shuffle from nobody": "but lane 8, whose value it wants, takes no part",
    "not in mask": r"lane \d+ is not in its own mask at .*probes.cu",
    "throwing": "^five is too many$",
    "large shared": "65536 bytes of shared memory, aligned to 4; at most 49152",
    "large block": "a block of 1025 threads",
    "no grid": r"a grid of \(0, 1, 1\) blocks",
    "no shared bytes": "launched without shared bytes",
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_exceptions_and_the_next_launch_is_fine(probe, name):
    for seed in range(5):
        message = probe(name, seed, 2000)[0]
        assert re.search(WRONG[name], message), message
        assert torch.equal(probe("reverse", seed)[1], reversed_input())


def sanitized(command, library):
    environment = build.sanitized_environment(library)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


OUT_OF_BOUNDS = {
    "read after": "heap-buffer-overflow.*READ of size 4",
    "read before": "heap-buffer-overflow.*READ of size 4",
    "write after": "heap-buffer-overflow.*WRITE of size 4",
    "shared after": r"index 128 out of bounds for type 'float \[128\]'",
    "dynamic after": "heap-buffer-overflow.*WRITE of size 4",
    "misaligned": "misaligned address .* requires 16 byte alignment",
}
# Right probes first, then each wrong one in a process of its own: torch is imported once.
RUN_PROBES = """
import ctypes, json, os, sys, tempfile, torch
run = ctypes.CDLL(sys.argv[1]).run_probe
def probe(name):
    x, out = torch.arange(128.0), torch.zeros(128)
    run(name.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()), 128)
right, wrong = json.loads(sys.argv[2])
for name in right:
    probe(name)
found = {}
for name in wrong:
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 2)
            probe(name)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        file.seek(0)
        found[name] = status, file.read().decode()
print(json.dumps(found))
"""


def test_one_element_out_of_bounds_ends_a_sanitized_process():
    need("asan", "probes")
    right = ["sum", "reverse", "dynamic", "throwing", "divergent return", "collectives"]
    library, names = build.library("asan", "probes"), json.dumps([right, [*OUT_OF_BOUNDS]])
    done = sanitized([sys.executable, "-c", RUN_PROBES, str(library), names], library)
    assert (done.returncode, done.stderr) == (0, "")
    for name, (status, report) in json.loads(done.stdout).items():
        assert status != 0, name
        assert re.search(OUT_OF_BOUNDS[name], report, re.DOTALL), (name, report)
        assert "probes.cu" in report, name


def test_lane_under_sanitizers():
    """The lane's tests again, where a wrong address ends the process."""
    need("asan", "t4r_fast_emulated")
    options = ["-vv", "--capture=sys", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    files = [f"tests/test_{op}.py" for op in OPS]
    done = sanitized(
        [sys.executable, "-m", "pytest", *options, "-k", build.LANE_TESTS, *files],
        build.library("asan"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for file in files:
        assert re.search(rf"{file}::.*cuda-on-cpu.* PASSED", done.stdout), file
    assert "SKIPPED" not in done.stdout


SNIPPET = """
__device__ int at(int i);
int host(int i, int n) { return i < n ? i : n; }
__global__ void __launch_bounds__(32) kernel(const int* x, int n, int* out) {
  const bool inside = at(threadIdx.x) < n;  // a < b is no mutant
  if (threadIdx.x >= static_cast<unsigned>(n) && !inside) return;
  for (int i = 0; i < n; ++i) {
    if (inside && i + 1 <= n) out[i] = x[i] > 0 ? (i < 2 ? 1 : 2) : 0;
    const bool last = i == n - 1 || x[i + 1] == 0;
    __syncwarp();
  }
  if constexpr (sizeof(int) < 8) __syncthreads();
}
"""
MUTANTS = [
    (6, "inside -> false"),
    (6, "threadIdx.x >= static_cast<unsigned>(n) -> false"),
    (7, "i < n -> i <= n"),
    (8, "i + 1 <= n -> true"),
    (8, "i < 2 -> true"),
    (8, "inside -> true"),
    (8, "x[i] > 0 -> true"),
    (9, "i == n - 1 -> false"),
    (10, "without __syncwarp();"),
    (12, "without __syncthreads();"),
]


def test_mutants_of_a_kernel():
    """tests/cuda_on_cpu/mutate.py finds each barrier and boundary mask, and nothing on the host."""
    found = sorted(mutate.mutants(SNIPPET), key=lambda mutant: (mutant.line, mutant.what))
    assert [(mutant.line, mutant.what) for mutant in found] == MUTANTS
    text = mutate.instrument(SNIPPET, found, 1)
    guarded = "if ((!is_mutant(2) && (threadIdx.x >= static_cast<unsigned>(n))) && !(!is_mutant(1)"
    assert guarded in text
    assert "for (int i = 0; (is_mutant(3) ? (i <= n) : (i < n)); ++i)" in text
    assert "(is_mutant(7) || (x[i] > 0)) ? ((is_mutant(5) || (i < 2)) ? 1 : 2) : 0;" in text
    assert "if (!is_mutant(9)) __syncwarp();" in text
    assert text.count("is_mutant(") == len(MUTANTS)

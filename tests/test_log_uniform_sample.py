"""log_uniform_sample: its distribution, its log-probabilities, and the same ids everywhere."""

import math
import shutil
import subprocess

import pytest
import torch
from harness import ROOT, LargestTensor, lanes, run_on

from t4r_fast import backend
from t4r_fast.ops.log_uniform_sample import log_uniform_log_prob, log_uniform_sample
from t4r_fast.plain import log_uniform_sample as plain
from t4r_fast.plain._draws import exact_exp

LANES = lanes("log_uniform_sample")
NATIVE = [lane for lane in LANES if lane in ("cpu", "cuda-on-cpu")]
SEED = torch.tensor([0x0123456789ABCDEF, (5 << 32) + 77])
EXTREME = torch.tensor([-1, -1])  # all bits set
SIZES = [1, 2, 3, 7, 1000, 118_335, 2**31 - 1, 2**31 + 11, 2**40]


def probabilities(size):
    c = torch.arange(size, dtype=torch.float64)
    return torch.log1p(1 / (c + 1)) / math.log(size + 1)


def chi_square(counts, expected):
    """Standard deviations from what chance gives."""
    assert expected.min() >= 5, "the test needs wider bins"
    freedom = len(counts) - 1
    value = ((counts - expected) ** 2 / expected).sum().item()
    return (value - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [2, 50, 1000])
def test_frequencies(lane, size, seed):
    n = 200_000
    with run_on(lane, "log_uniform_sample") as device:
        ids = log_uniform_sample(n, size, seed=torch.tensor([seed, 3], device=device)).ids.cpu()
    assert abs(chi_square(ids.bincount(minlength=size), n * probabilities(size))) < 4


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("size", [2**31 + 11, 2**40])
def test_frequencies_of_large_ranges(lane, size):
    """In bins of equal probability: the distribution function at the ids is uniform."""
    n, bins = 100_000, 64
    with run_on(lane, "log_uniform_sample") as device:
        ids = log_uniform_sample(n, size, seed=SEED.to(device)).ids.cpu()
    edges = {int((size + 1) ** (i / bins)) - 1 for i in range(bins)} | {size}
    edges = torch.tensor(sorted(edges), dtype=torch.float64)
    share = torch.log(edges[1:] + 1) - torch.log(edges[:-1] + 1)
    counts = torch.histogram(ids.double(), edges).hist
    assert counts.sum() == n
    assert abs(chi_square(counts, n * share / math.log(size + 1))) < 4
    assert ids.max() > size // 4


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("seed", [SEED, EXTREME], ids=["seed", "extreme"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 5, 4097])
def test_same_ids_as_plain_pytorch(lane, n, size, seed):
    with backend.use("plain"):
        truth = log_uniform_sample(n, size + 3, low=3, seed=seed)
    with run_on(lane, "log_uniform_sample") as device:
        ours = log_uniform_sample(n, size + 3, low=3, seed=seed.to(device))
    assert torch.equal(ours.ids.cpu(), truth.ids)
    torch.testing.assert_close(ours.log_prob.cpu(), truth.log_prob, rtol=2e-7, atol=0)
    assert ours.tries.item() == n
    assert n == 0 or (truth.ids.min() >= 3 and truth.ids.max() < size + 3)
    torch.testing.assert_close(
        log_uniform_log_prob(truth.ids, size + 3, 3), truth.log_prob, rtol=0, atol=0
    )


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("n", "size"),
    # around the 2,048 draws of a round on a GPU; many rounds
    [(0, 5), (1, 1), (7, 7), (33, 10**5), (100, 130), (300, 300), (1000, 10**6), (2500, 118_335)],
)
def test_unique_ids_are_the_first_different_ones(lane, n, size):
    with run_on(lane, "log_uniform_sample") as device:
        ids, log_prob, tries = log_uniform_sample(n, size, unique=True, seed=SEED.to(device))
        drawn = log_uniform_sample(tries.item(), size, seed=SEED.to(device)).ids.tolist()
    first = list(dict.fromkeys(drawn))
    assert ids.tolist() == first
    assert len(first) == n
    assert n == 0 or drawn[-1] not in drawn[:-1]  # no draw too many
    # 1 - (1 - q) ** tries, the chance that so many draws hold the id
    q = probabilities(size)[ids.cpu()]
    truth = torch.log(1 - (1 - q) ** tries.item()) if n else q
    torch.testing.assert_close(log_prob.cpu().double(), truth, rtol=1e-5, atol=1e-9)
    again = log_uniform_log_prob(ids, size, tries=tries)
    torch.testing.assert_close(again, log_prob, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("seed", [SEED, EXTREME], ids=["seed", "extreme"])
def test_same_unique_ids_as_plain_pytorch(lane, seed):
    for n, size in [(1, 2**40), (31, 40), (32, 1000), (1023, 2**31), (1025, 1100), (5120, 118_335)]:
        with backend.use("plain"):
            truth = log_uniform_sample(n, size + 3, low=3, unique=True, seed=seed)
        with run_on(lane, "log_uniform_sample") as device:
            for _ in range(2):  # every launch on the emulated GPU has an order of its own
                ours = log_uniform_sample(n, size + 3, low=3, unique=True, seed=seed.to(device))
                assert torch.equal(ours.ids.cpu(), truth.ids)
                assert torch.equal(ours.tries.cpu(), truth.tries)
        torch.testing.assert_close(ours.log_prob.cpu(), truth.log_prob, rtol=2e-7, atol=1e-12)


@pytest.mark.parametrize("lane", [lane for lane in NATIVE if lane != "cpu"])
@pytest.mark.parametrize("unique", [False, True])
def test_one_launch_is_all(lane, unique):
    with run_on(lane, "log_uniform_sample"), LargestTensor() as seen:
        log_uniform_sample(100, 10**6, unique=unique, seed=SEED)
    assert seen.calls == {"log_uniform_sample_fwd"}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the path")
def test_device_code_of_the_draws_fuses_nothing(tmp_path):
    source = tmp_path / "draw.cu"
    source.write_text(
        f'#include "{ROOT}/csrc/draws.h"\n'
        "__global__ void draw(double u, long size, double log_size, long* out) {\n"
        "  *out = t4r_fast::log_uniform(u, size, log_size);\n}\n"
    )
    command = ["nvcc", "-O3", "-arch=compute_80", "-ptx", str(source), "-o", "/dev/stdout"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert made.count("mul.rn.f64") >= 17
    assert made.count("add.rn.f64") >= 16
    for fusible in ("fma", "mul.f64", "add.f64", "sub.f64"):
        assert fusible not in made


def test_unique_plain_over_several_rounds():
    """Near the end of a range plain PyTorch must draw again and again."""
    with backend.use("plain"):
        found = log_uniform_sample(300, 300, unique=True, seed=SEED)
    assert found.tries > 4 * 600
    assert torch.equal(found.ids.sort().values, torch.arange(300))


def test_log_prob_of_any_ids():
    got = log_uniform_log_prob(torch.tensor([[1, 2, 3], [12, 13, -5]]), 13, 3)
    q = probabilities(10).log().float()
    assert torch.equal(got[0], torch.tensor([-math.inf, -math.inf, q[0]]))
    assert torch.equal(got[1], torch.tensor([q[9], -math.inf, -math.inf]))
    every = log_uniform_log_prob(torch.arange(10), 10)
    assert every.double().exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_exact_exp_is_exp():
    t = torch.linspace(0, 63.9, 100_001, dtype=torch.float64)
    assert ((exact_exp(t) - t.exp()).abs() <= 2 * 2.0**-52 * t.exp()).all()
    assert exact_exp(torch.zeros(1, dtype=torch.float64)) == 1


def test_no_tensor_of_the_range():
    with backend.use("plain"), LargestTensor() as seen:
        log_uniform_sample(100, 10**9, seed=SEED)
        log_uniform_sample(100, 10**9, unique=True, seed=SEED)
    assert seen.elements <= 1000


def test_seed_governs():
    torch.manual_seed(3)
    first = log_uniform_sample(20, 10**6).ids
    other = log_uniform_sample(20, 10**6).ids
    torch.manual_seed(3)
    assert torch.equal(log_uniform_sample(20, 10**6).ids, first)
    assert not torch.equal(other, first)
    for shift in ([1, 0], [0, 1], [0, 1 << 32]):
        assert not torch.equal(
            log_uniform_sample(20, 10**6, seed=SEED + torch.tensor(shift)).ids,
            log_uniform_sample(20, 10**6, seed=SEED).ids,
        )


def test_threads_do_not_change_the_ids():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(log_uniform_sample(50_001, 10**6, seed=SEED))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].ids, found[1].ids)
    assert torch.equal(found[0].log_prob, found[1].log_prob)


@pytest.mark.parametrize("lane", NATIVE)
@pytest.mark.parametrize("unique", [False, True])
def test_compiles_and_passes_opcheck(lane, unique):
    def draw(seed):
        return log_uniform_sample(9, 1000, low=1, unique=unique, seed=seed)

    with run_on(lane, "log_uniform_sample"):
        eager = draw(SEED)
        compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(SEED)
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled))
        torch.library.opcheck(
            backend.ops(backend.forced(), plain).log_uniform_sample_fwd,
            (SEED, 9, 999, 1, math.log(1000), unique),
        )


ERRORS = {
    "n": ((-1, 5), {}, "n must be >= 0; got -1"),
    "high": ((2, 3), {"low": 3}, "high must be > low, 3, and at most .*; got 3"),
    "range": ((2, 2**40 + 1), {}, "high must be .* got 1099511627777"),
    "unique": ((6, 7), {"low": 2, "unique": True}, "n must be at most high - low, 5, .* got 6"),
    "seed": ((2, 5), {"seed": SEED[:1]}, r"seed must be int64 \(2,\).* got torch.int64 \(1,\)"),
    "seed dtype": ((2, 5), {"seed": SEED.int()}, r"seed must be int64 .* got torch.int32"),
    "device": ((2, 5), {"seed": SEED, "device": "meta"}, "seed must be on device meta; got cpu"),
}


@pytest.mark.parametrize(("args", "options", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, message):
    with pytest.raises(ValueError, match=rf"^log_uniform_sample: .*{message}"):
        log_uniform_sample(*args, **options)


def test_errors_of_log_prob():
    with pytest.raises(ValueError, match=r"^log_uniform_log_prob: high must be > low, 5"):
        log_uniform_log_prob(SEED, 5, 5)
    with pytest.raises(
        TypeError, match=r"^log_uniform_log_prob: ids must be int64; got torch.float"
    ):
        log_uniform_log_prob(torch.zeros(2), 5)

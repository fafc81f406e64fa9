"""The C++ kernels of the item ops: block boundaries, instruction sets, threads, offsets, memory."""

import itertools
import math
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness import ROOT, check, lanes, run_on
from test_tied_softmax_loss import make_inputs, naive

from t4r_fast import backend
from t4r_fast.ops.item_topk import item_topk
from t4r_fast.ops.target_rank import target_rank
from t4r_fast.ops.tied_softmax_loss import tied_softmax_loss

LOSS = "tied_softmax_loss"
# Panels of 48 rows (24 of float64) in vectors of 2 to 16, blocks of 96 and 192 rows, tiles of 96
# items, chunks of 64 (32) columns; up to 4 rows take another way. A Latin square of the boundaries.
ROWS = (1, 2, 3, 4, 5, 8, 16, 17, 33, 47, 48, 49, 96, 97, 192, 193, 385)
ITEMS = (1, 2, 6, 95, 96, 97, 191, 193, 290)
WIDTHS = (1, 3, 4, 8, 15, 16, 17, 31, 64, 65, 96, 128, 132, 257)
SHAPES = [
    (n, v, d)
    for i, n in enumerate(ROWS)
    for v, d in [(ITEMS[i % 9], WIDTHS[i * 5 % 14]), (ITEMS[(i + 4) % 9], WIDTHS[(i * 3 + 7) % 14])]
]


def gradients(inputs, **options):
    leaves = [inputs["hidden"].clone().requires_grad_(), inputs["items"].clone().requires_grad_()]
    loss = tied_softmax_loss(*leaves, inputs["target"], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_boundaries(shape, dtype):
    """Logits of size 1, so that every item's gradient is large: what is lost at an edge shows."""
    inputs = make_inputs(*shape, bias=shape[1] % 2 == 0)
    inputs["target"][-1] = shape[1] - 1
    temperature, names = shape[2] ** 0.5, ["hidden", "items", "bias"]
    found = []
    for function, compute in ((tied_softmax_loss, dtype), (naive, torch.float64)):
        given = {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}
        given = {k: t.to(compute) if t.is_floating_point() else t for k, t in given.items()}
        leaves = [given[k].requires_grad_() for k in names if k in given]
        with backend.use("cpu"):
            loss, lse = function(
                **given, temperature=temperature, reduction="none", return_lse=True
            )
            weights = torch.linspace(0.5, 2, len(loss), dtype=torch.float64).to(loss.dtype)
            grads = torch.autograd.grad((weights * loss).sum() + lse.sum(), leaves)
        found.append([loss.detach(), lse.detach(), *grads])
    for ours, truth in zip(*found, strict=True):
        error = (ours.double() - truth).abs().max()
        assert error <= 8 * torch.finfo(ours.dtype).eps * max(truth.abs().max(), 1)


def test_more_rows_than_one_workspace_holds():
    """Rows go in chunks then, and 16-bit gradients are still rounded once."""
    inputs = make_inputs(120_000, 30, 64)
    for dtype in (torch.float32, torch.bfloat16):
        options = {"reduction": "sum", "temperature": 8.0}
        check("cpu", tied_softmax_loss, naive, inputs, options, dtype, ("hidden", "items"))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_that_are_needed(needs):
    inputs = make_inputs(50, 100, 20, bias=True)
    found = []
    for name in ("cpu", "plain"):
        leaves = {k: inputs[k].clone() for k in ("hidden", "items", "bias")}
        wanted = [t.requires_grad_() for t, need in zip(leaves.values(), needs) if need]
        with backend.use(name):
            loss = tied_softmax_loss(target=inputs["target"], **leaves)
            found.append(torch.autograd.grad(loss, wanted) if wanted else (loss,))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


def test_loss_near_zero_keeps_its_digits():
    """Where the target wins by far, loss = log(1 + tiny) must not be a difference of large lse."""
    hidden, items = torch.tensor([[30.0]]), torch.tensor([[1.0], [0.5]])
    loss = tied_softmax_loss(hidden, items, torch.tensor([0]))
    assert loss.item() == pytest.approx(3.059023e-07, abs=1e-7)  # log1p(exp(-15))


def test_small_gradients_are_not_dropped():
    """Items with probability 1e-30 still get theirs, to a relative 1e-5."""
    hidden = torch.full((1, 1), 1.0)
    items = -torch.linspace(0, 69, 200)[:, None]
    leaf = items.clone().requires_grad_()
    tied_softmax_loss(hidden, leaf, torch.tensor([0])).backward()
    truth = items.double()[:, 0].softmax(0)
    truth[0] -= 1
    torch.testing.assert_close(leaf.grad[:, 0].double(), truth, rtol=2e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_boundaries_of_rank_and_topk(shape, dtype):
    """Whole numbers: scores are exact, ties abound."""
    n, v, d = shape
    g = torch.Generator().manual_seed(n * 101 + v)
    hidden = torch.randint(-2, 3, (n, d), generator=g)
    items = torch.randint(-2, 3, (v, d), generator=g)
    target = torch.randint(0, v, (n,), generator=g)
    bias = torch.randint(-3, 4, (v,), generator=g) if v % 2 else None
    scores = hidden @ items.T + (0 if bias is None else bias)
    own = scores.gather(1, target[:, None])
    before = torch.arange(v) < target[:, None]
    with backend.use("cpu"):
        given = [t.to(dtype) for t in (hidden, items)]
        bias = None if bias is None else bias.to(dtype)
        above, tied_before, tied_after = target_rank(*given, target, bias=bias)
        best, ids = item_topk(*given, min(v, 20), bias=bias)
    assert torch.equal(above, (scores > own).sum(1))
    assert torch.equal(tied_before, ((scores == own) & before).sum(1))
    assert torch.equal(tied_before + tied_after, (scores == own).sum(1) - 1)
    order = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best.long(), order.values[:, :20])
    assert torch.equal(ids, order.indices[:, :20])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [3, 40, 200])
def test_a_rank_is_the_place_in_topk(n, seed):
    """Also for scores that rounding makes, with equal items among them."""
    g = torch.Generator().manual_seed(seed)
    hidden, items = torch.randn(n, 37, generator=g), torch.randn(60, 37, generator=g).repeat(2, 1)
    ids = item_topk(hidden, items, 120)[1]
    for place in (0, 7, 119):
        rank = target_rank(hidden, items, ids[:, place])
        assert torch.equal(rank.above + rank.tied_before, torch.full((n,), place))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_repeats_bit_for_bit_with_threads(threads):
    before = torch.get_num_threads()
    inputs = make_inputs(100, 3000, 33)
    single = gradients(inputs)
    try:
        torch.set_num_threads(threads)
        first, second = gradients(inputs), gradients(inputs)
        best = item_topk(inputs["hidden"], inputs["items"], 50)
        rank = target_rank(inputs["hidden"], inputs["items"], best[1][:, 49])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, best, item_topk(inputs["hidden"], inputs["items"], 50)))
    assert torch.equal(rank.above + rank.tied_before, torch.full((100,), 49))
    for a, b, c in zip(first, second, single, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


def test_callers_at_the_same_time():
    cases = [make_inputs(60 + i, 700, 24) for i in range(6)]
    alone = [gradients(case) for case in cases]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(gradients, cases * 3))
    for i, found in enumerate(together):
        assert all(torch.equal(a, b) for a, b in zip(found, alone[i % 6], strict=True))


def test_offsets_past_2_to_the_31():
    """Three rows of a table that spans 2**31 elements; only they are touched."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        table = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    items = table.as_strided((3, 8), (2**30, 1))
    items.copy_(torch.arange(24).reshape(3, 8) / 24)
    inputs = make_inputs(7, 3, 8)
    hidden = inputs["hidden"].bfloat16()
    far, near = (tied_softmax_loss(hidden, w, inputs["target"]) for w in (items, items.clone()))
    assert torch.equal(far, near)


@pytest.mark.parametrize("function", ["fwd", "bwd", "rank", "topk"])
def test_opcheck(function):
    inputs = make_inputs(9, 192, 6, bias=True)
    rows = torch.tensor([8, 0, 1, 3] * 4)  # whole vectors and tiles: nothing of stash is left out
    tensors = [inputs[k] for k in ("hidden", "items", "target", "bias")] + [rows]
    options = (2.0, 3.0, 0.1, 0.01, -100)
    with run_on("cpu", LOSS):
        found = torch.ops.t4r_fast.tied_softmax_loss_fwd(*tensors, *options, 96, False)
    loss, *kept = found  # lse, stash, mean
    ops = torch.ops.t4r_fast
    if function == "fwd":
        torch.library.opcheck(ops.tied_softmax_loss_fwd, (*tensors, *options, 96, False))
    if function == "rank":
        for need_lse in (False, True):
            torch.library.opcheck(ops.target_rank_fwd, (*tensors, 2.0, -100, need_lse))
    if function == "topk":
        hidden, items, _, bias, rows = tensors
        exclude = torch.arange(18).reshape(9, 2)
        torch.library.opcheck(ops.item_topk_fwd, (hidden, items, 4, bias, rows, 2.0, exclude, 0))
    if function == "bwd":
        given = (torch.ones_like(loss), torch.ones_like(loss), *tensors, *kept, *options)
        for needs in ((True, True, True), (False, True, False)):
            torch.library.opcheck(ops.tied_softmax_loss_bwd, (*given, *needs))


def test_backward_reads_the_scores_that_were_kept():
    inputs = make_inputs(32, 960, 8)
    tensors = [inputs[k] for k in ("hidden", "items", "target")]
    options = (1.0, 0.0, 0.0, 0.0, -100)
    ops = torch.ops.t4r_fast
    loss, lse, stash, mean = ops.tied_softmax_loss_fwd(*tensors, None, None, *options, 480, False)
    scores = inputs["hidden"] @ inputs["items"].T
    assert stash.shape == (32, 480)
    assert torch.isin(stash.mul(1e3).round(), scores.mul(1e3).round()).float().mean() > 0.99
    dloss = torch.ones_like(loss)
    found = []
    for kept in (stash, stash + math.log(2), stash[:, :0].contiguous()):
        given = (dloss, 0 * dloss, *tensors, None, None, lse, kept, mean, *options)
        found.append(ops.tied_softmax_loss_bwd(*given, True, True, False)[1])
    assert torch.equal(found[0], found[2])
    # five of the ten tiles of items have twice the probability, spread evenly
    changed = [
        bool((a - b).abs().max() > 0) for a, b in zip(found[0].split(96), found[1].split(96))
    ]
    assert changed == [False, True] * 5


def python(code, **environment):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


MEMORY = """
import resource, torch
from t4r_fast.ops.tied_softmax_loss import tied_softmax_loss
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def step(n, v, d):
    hidden, items = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    target = torch.randint(0, v, (n,))
    start = peak()
    tied_softmax_loss(hidden, items, target).backward()
    return peak() - start - 4 * (hidden.numel() + items.numel())
step(8, 8, 8)
print(step(*SHAPE))
"""


@pytest.mark.parametrize("shape", [(4096, 40_000, 16), (1024, 60_000, 256)], ids=str)
def test_memory_beyond_gradients_is_below_64_mib(shape):
    """4096 x 40,000 logits would be 625 MiB. Wide items keep some scores from forward."""
    done = python(MEMORY.replace("SHAPE", str(shape)))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 * 2**20


def has(isa):
    flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
    return isa == "portable" or {"avx2": " avx2 ", "avx512": " avx512dq "}.get(isa, "?") in flags


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The kernels' tests once more in a process that is told what to take."""
    if os.environ.get("T4R_FAST_CPU_ISA"):
        pytest.skip("this process is told already")
    if has(isa) and not has({"portable": "avx2", "avx2": "avx512"}.get(isa, "none")):
        pytest.skip("this process takes it by itself")
    ops = [op for op in (LOSS, "target_rank", "item_topk") if "cpu" in lanes(op)]
    files = [str(ROOT / f"tests/test_{op}.py") for op in ops]
    files.append(str(ROOT / "tests/test_cpu_calls.py"))
    files.append(str(ROOT / "tests/test_session_attention.py"))
    chosen = "block_boundaries or workspace or memory_anywhere or number_of_rows"
    chosen += " or (one-chunk and cpu)"
    chosen += " or ((padded_attention or heads_and_widths or dropped or alone) and cpu)"
    chosen = f"({chosen}) and not (triton or cuda)"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    code = f"import pytest; raise SystemExit(pytest.main({[*files, __file__, *options]!r}))"
    done = python(code, T4R_FAST_CPU_ISA=isa)
    if has(isa):
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert "which this CPU does not have" in done.stdout


def test_unknown_instruction_set_is_refused():
    code = "import torch; from t4r_fast.ops.tied_softmax_loss import tied_softmax_loss as f\n"
    code += "f(torch.ones(1, 2), torch.ones(3, 2), torch.tensor([0]))"
    done = python(code, T4R_FAST_CPU_ISA="sse9")
    assert done.returncode != 0
    assert "T4R_FAST_CPU_ISA must be portable, avx2 or avx512; got sse9" in done.stderr

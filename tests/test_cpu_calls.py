"""What holds for every C++ op: several callers, any number of threads, memory anywhere."""

import ctypes
import math
import mmap
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import test_activation_dropout as activation
import test_residual_norm as norm
import test_sampled_softmax_loss as sampled
import test_sequence_embedding as embedding
import test_session_attention as attention
import test_tied_softmax_loss as tied
import test_tied_table_step as table
import torch
from harness import ROOT, run_on
from test_mask_mlm import SEED, some_sessions

import t4r_fast
from t4r_fast.ops._table import softmax_rows
from t4r_fast.ops.tied_table_step import table_state, tied_table_grad_norm

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}
MASKS = ("mask_causal", "mask_mlm", "mask_permutation")
# (rows, items, width): within one block of everything, and just past one
SHAPES = {"small": (5, 7, 3), "odd": (50, 97, 17), "wide": (3, 200, 65)}


def typed(tensors, place, dtype):
    return {k: place(t.to(dtype) if t.is_floating_point() else t) for k, t in tensors.items()}


def mask(op):
    def run(place, dtype, shape, seed):
        ids = place(some_sessions(60 * shape[0] + seed, shape[2]))
        options = {} if op == "mask_causal" else {"seed": place(SEED + seed)}
        return list(getattr(t4r_fast, op)(ids, **options))

    return run


def log_uniform_sample(place, dtype, shape, seed):
    found = t4r_fast.log_uniform_sample(3000, 4000 + shape[1], seed=place(SEED + seed))
    return [*found, *t4r_fast.log_uniform_sample(40, 50, unique=True, seed=place(SEED + seed))]


def tied_softmax_loss(place, dtype, shape, seed):
    n, v, d = shape
    inputs = typed(tied.make_inputs(n + seed, v, d, bias=True), place, dtype)
    inputs["target"][0] = v - 1
    leaves = [inputs[k].requires_grad_() for k in ("hidden", "items", "bias")]
    loss = t4r_fast.tied_softmax_loss(**inputs, temperature=d**0.5, label_smoothing=0.1)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def sampled_softmax_loss(place, dtype, shape, seed):
    results = []
    for scope in sampled.SCOPES:
        n, v, d = shape
        inputs = typed(sampled.make_inputs(n + seed, v, d, bias=True), place, dtype)
        leaves = [inputs[k].requires_grad_() for k in ("hidden", "items", "bias")]
        loss = t4r_fast.sampled_softmax_loss(
            **inputs, num_negatives=33, scope=scope, seed=place(SEED + seed)
        )
        dhidden, ditems, dbias = torch.autograd.grad(loss, leaves)
        results += [loss.detach(), dhidden, ditems.indices(), ditems.values(), dbias.values()]
    return results


def sequence_embedding(place, dtype, shape, seed):
    inputs = embedding.make_inputs(10 * shape[0] + seed, 5, [shape[2], 4], True, (0,))
    columns = [place(t.to(dtype) if t.is_floating_point() else t) for t in inputs["columns"]]
    tables = [None if t is None else place(t.to(dtype)) for t in inputs["tables"]]
    vector = place(inputs["mask_vector"].to(dtype))
    leaves = [t.requires_grad_() for t in (tables[0], tables[2], columns[1], vector)]
    out = t4r_fast.sequence_embedding(
        columns, tables, mask=place(inputs["mask"]), mask_vector=vector, zero_padding=True
    )
    dout = place(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype))
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def tied_table_step(place, dtype, shape, seed):
    n, v, d = shape
    results = []
    for kind in ("adamw", "rowwise_adagrad"):
        items = place(table.table(v, d, dtype))
        state = {k: place(t) for k, t in table_state(items, kind).items()}
        made = table.case(n, v, d, seed, bias=True)
        given = {k: t for k, t in made.items() if t is not None}
        softmax, lookup = table.pieces(items, {"rows": None, **typed(given, place, dtype)}, {})
        softmax = [type(s)(*(place(x) if torch.is_tensor(x) else x for x in s)) for s in softmax]
        norm = tied_table_grad_norm(items, softmax, lookup)
        t4r_fast.tied_table_step(items, state, softmax, lookup, kind=kind, step=1, lr=0.1)
        results += [items, *state.values(), torch.as_tensor(norm)]
    return results


def row_wise(op, cases, leaves):
    """With rows and columns of a shape; the last number of `shape` is not used."""

    def run(place, dtype, shape, seed):
        rows, width, _ = shape
        inputs = typed(cases.make_inputs(rows + seed, width, none=(1,)), place, dtype)
        found = [inputs[k].requires_grad_() for k in leaves]
        y = getattr(t4r_fast, op)(**inputs, dropout=0.3, site=seed)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, found, place(dy))]

    return run


def ranked(op):
    def run(place, dtype, shape, seed):
        n, v, d = shape
        inputs = typed(tied.make_inputs(n + seed, v, d, bias=True), place, dtype)
        target = inputs.pop("target")
        if op == "item_topk":
            exclude = place(target[:, None])
            return list(t4r_fast.item_topk(**inputs, k=min(v, 20), exclude=exclude))
        rank, *sums = t4r_fast.target_rank(**inputs, target=target, return_lse=True)
        return [*t4r_fast.target_rank(**inputs, target=target), *rank, *sums]

    return run


def session_attention(place, dtype, shape, seed):
    lengths = [(7 * i + seed) % (shape[0] + 1) for i in range(9)] * (1 + shape[1] // 300)
    inputs = attention.make_inputs(lengths, 2, shape[2], reach=max(lengths), seed=seed)
    inputs.update(typed({n: inputs[n] for n in ("q", "k", "v")}, place, dtype))
    relative = [place(t.to(dtype)) for t in inputs.pop("relative")]
    leaves = [*(inputs.pop(n).requires_grad_() for n in ("q", "k", "v"))]
    relative = [t.requires_grad_() for t in relative]
    out = t4r_fast.session_attention(
        *leaves,
        place(inputs["offsets"]),
        relative=t4r_fast.Relative(*relative),
        dropout=0.3,
        seed=place(SEED),
    )
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [*leaves, *relative])]


CASES = {
    "activation_dropout": row_wise("activation_dropout", activation, ("x", "bias")),
    **{op: mask(op) for op in MASKS},
    **{op: ranked(op) for op in ("item_topk", "target_rank")},
    "log_uniform_sample": log_uniform_sample,
    "residual_norm": row_wise("residual_norm", norm, norm.LEAVES),
    "sampled_softmax_loss": sampled_softmax_loss,
    "sequence_embedding": sequence_embedding,
    "session_attention": session_attention,
    "tied_softmax_loss": tied_softmax_loss,
    "tied_table_step": tied_table_step,
}
FLOAT = [op for op in CASES if op not in (*MASKS, "log_uniform_sample")]


def call(op, place=torch.clone, dtype=torch.float32, shape=SHAPES["odd"], seed=0):
    with run_on("cpu", op):
        return CASES[op](place, dtype, shape, seed)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_every_kernel_has_a_case():
    stems = {path.stem for path in (ROOT / "csrc/cpu").glob("*.cpp")}
    assert {stem for stem in stems if hasattr(t4r_fast, stem)} == set(CASES)


@pytest.mark.parametrize("op", CASES)
def test_callers_at_the_same_time(op):
    """Two threads on different data, each result as if it were alone."""
    seeds = [0, 1, 2, 3]
    with run_on("cpu", op):
        run = CASES[op]
        alone = [run(torch.clone, torch.float32, SHAPES["odd"], seed) for seed in seeds]
        with ThreadPoolExecutor(2) as pool:
            jobs = [
                pool.submit(run, torch.clone, torch.float32, SHAPES["odd"], seed)
                for seed in seeds * 4
            ]
        together = [job.result() for job in jobs]
    assert not same(alone[0], alone[1])
    for i, found in enumerate(together):
        assert same(found, alone[i % 4])


@pytest.mark.parametrize("op", CASES)
def test_one_and_two_threads(op):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            found.append(call(op, shape=(200, 1000, 17)))
    finally:
        torch.set_num_threads(before)
    assert same(found[1], found[2])
    if op == "tied_softmax_loss":  # its sums are cut by the number of threads
        for two, one in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    elif op != "tied_table_step":  # that loss's lse goes into it; its own test gives it one lse
        assert same(found[1], found[0])


def misaligned(t):
    """One element past where memory begins, so at an odd multiple of the element's size."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def beside_an_unreadable_page(t, end):
    """Ends (or begins) where a page begins (or ends) that may be neither read nor written."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    room = (size + page - 1) // page * page
    memory = mmap.mmap(-1, room + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = ctypes.c_void_p(address + room if end else address)
    if ctypes.CDLL(None, use_errno=True).mprotect(forbidden, ctypes.c_size_t(page), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    offset = room - size if end else page
    found = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    return found.view(t.shape).copy_(t)


PLACES = {
    "misaligned": misaligned,
    "before an unreadable page": lambda t: beside_an_unreadable_page(t, end=True),
    "after an unreadable page": lambda t: beside_an_unreadable_page(t, end=False),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, dtype) for op in CASES for dtype in (DTYPES if op in FLOAT else ["f32"])],
)
def test_memory_anywhere(op, dtype, place, shape):
    """Bit for bit as in memory of its own. A read or write outside ends the process."""
    found, expected = (call(op, p, DTYPES[dtype], shape) for p in (place, torch.clone))
    assert same(found, expected)


def with_gaps(t):
    """Every second element of memory, so that no two lie side by side."""
    return torch.empty(*t.shape, 2, dtype=t.dtype)[..., 0].copy_(t)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("op", [op for op in CASES if op != "tied_table_step"])
def test_elements_that_do_not_lie_side_by_side(op, dtype):
    """tied_table_step refuses such a table and state: it changes them in place."""
    found, expected = (call(op, place, DTYPES[dtype]) for place in (with_gaps, torch.clone))
    assert same(found, expected)


@pytest.mark.parametrize("op", MASKS)
def test_sessions_past_2_to_the_31(op, tmp_path):
    """Session 1 begins 2**31 + 2 items after session 0, in a file of holes."""
    path, stride = tmp_path / "ids", 2**31 + 2
    with path.open("wb") as file:
        file.truncate(8 * (stride + 8))
    whole = torch.from_file(str(path), shared=True, size=stride + 8, dtype=torch.int64)
    far = whole.as_strided((2, 6), (stride, 1))
    far.copy_(torch.tensor([[5, 6, 7, 0, 0, 0], [8, 9, 3, 4, 5, 6]]))
    options = {} if op == "mask_causal" else {"seed": SEED}
    with run_on("cpu", op):
        found, near = (getattr(t4r_fast, op)(ids, **options) for ids in (far, far.clone()))
    assert same(found, near)


def available_gib():
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"MemAvailable: *(\d+) kB", text)[1]) / 2**20


@pytest.mark.slow
@pytest.mark.skipif(available_gib() < 12, reason="needs 12 GiB of memory")
def test_whole_tables_past_2_to_the_31(monkeypatch):
    """V * D = 2**31 + 2048. Only the last item scores, 8; the table's zeros take no memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    v, d = 2**20 + 1, 2048
    items = torch.from_numpy(np.zeros((v, d), np.int16)).view(torch.bfloat16)
    items[-1] = 2.0**-8
    hidden = torch.ones(1, d, dtype=torch.bfloat16, requires_grad=True)
    last = torch.tensor([v - 1])
    scores, ids = t4r_fast.item_topk(hidden, items, 2)
    assert (scores.tolist(), ids.tolist()) == ([[8, 0]], [[v - 1, 0]])
    for target, wanted in ((v - 1, (0, 0, 0)), (v - 3, (1, v - 3, 1))):
        rank = t4r_fast.target_rank(hidden, items, torch.tensor([target]))
        assert tuple(count.item() for count in rank) == wanted

    total = v - 1 + math.exp(8)
    loss, lse = t4r_fast.tied_softmax_loss(hidden, items.requires_grad_(), last, return_lse=True)
    dhidden, ditems = torch.autograd.grad(loss, [hidden, items])
    assert loss.item() == pytest.approx(math.log(total) - 8, rel=1e-5)
    moves = torch.tensor([1 / total, 1 / total, math.exp(8) / total - 1])
    torch.testing.assert_close(ditems[[0, -2, -1], -1].float(), moves, rtol=1e-2, atol=0)
    assert torch.equal(ditems[:-1:999].amax(), ditems[:-1:999].amin())
    torch.testing.assert_close(dhidden, (moves[2] * 2.0**-8).bfloat16().expand(1, d))
    del ditems

    one = softmax_rows(torch.ones(1), None, hidden.detach(), v, last, None, None, lse.detach())
    norm = tied_table_grad_norm(items, [one])
    assert norm.item() == pytest.approx(
        math.sqrt(d * ((v - 1) / total**2 + moves[2] ** 2)), rel=1e-2
    )
    t4r_fast.tied_table_step(items, {}, [one], kind="sgd", step=1, lr=1.0)
    torch.testing.assert_close(items[[0, -2], -1].float(), -moves[:2], rtol=1e-2, atol=0)
    torch.testing.assert_close(items[-1, -1].float(), 2.0**-8 - moves[2], rtol=1e-2, atol=0)
    assert torch.equal(items[:-1:999].amax(), items[:-1:999].amin())


@pytest.mark.parametrize("scope", sampled.SCOPES)
def test_sampled_gradients_of_a_row_sum_to_zero(scope):
    inputs = sampled.make_inputs(140, 300, 16)
    items = inputs["items"].requires_grad_()
    with run_on("cpu", "sampled_softmax_loss"):
        loss = t4r_fast.sampled_softmax_loss(
            **inputs, num_negatives=50, scope=scope, reduction="sum", seed=SEED
        )
        grad = torch.autograd.grad(loss, items)[0].values()
    assert grad.sum(0).abs().max() < 1e-6 * grad.abs().sum(0).max()


@pytest.mark.parametrize("op", ["tied_softmax_loss", "sampled_softmax_loss"])
def test_nan_in_a_row_reaches_all_that_row_uses(op):
    inputs = tied.make_inputs(60, 97, 17)
    inputs["hidden"][50, 3] = torch.nan
    hidden, items = inputs["hidden"].requires_grad_(), inputs["items"].requires_grad_()
    options = {} if op == "tied_softmax_loss" else {"num_negatives": 20, "seed": sampled.SEED}
    with run_on("cpu", op):
        loss = getattr(t4r_fast, op)(**inputs, **options, reduction="sum")
        dhidden, ditems = torch.autograd.grad(loss, [hidden, items])
    assert loss.isnan()
    assert torch.equal(dhidden.isnan().any(1), torch.arange(60) == 50)
    if op == "tied_softmax_loss":
        assert ditems.isnan().all()
        return
    found = dict(zip(ditems.indices()[0].tolist(), ditems.values().isnan().all(1).tolist()))
    used = {inputs["target"][50].item(), *sampled.drawn(60, 97, 20)[0][0].tolist()}
    assert {i for i, nan in found.items() if nan} == used
    assert sum(found.values()) < len(found)  # other rows' targets are none of its items


def test_nan_in_embedding_stays_in_its_place():
    rows = torch.randn(9, 17)
    rows[4, 2] = torch.nan
    ids = torch.tensor([[3, 4, 5], [4, 1, 0]])
    weight = torch.randn(2, 3, 17)
    weight[0, 2, 1] = torch.nan
    with run_on("cpu", "sequence_embedding"):
        rows.requires_grad_()
        out = t4r_fast.sequence_embedding([ids], [rows])
        (grad,) = torch.autograd.grad(out, rows, weight)
    assert out.isnan().nonzero().tolist() == [[0, 1, 2], [1, 0, 2]]
    assert grad.isnan().nonzero().tolist() == [[5, 1]]

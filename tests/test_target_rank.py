"""target_rank against a count over the full scores, exactly, on scores that have no rounding."""

import math

import pytest
import torch
from harness import LargestTensor, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st

from t4r_fast import backend
from t4r_fast.ops.item_topk import item_topk
from t4r_fast.ops.target_rank import target_rank
from t4r_fast.plain import _scores

LANES = lanes("target_rank")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=[0, 7], ids=["one-chunk", "chunks-of-7"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(_scores, "CHUNK_BYTES", 1)
        monkeypatch.setattr(_scores, "MIN_CHUNK", request.param)


def naive(scores, target):
    """One row after another, in Python."""
    found = []
    for row, t in zip(scores.tolist(), target.tolist()):
        if t == -100:
            found.append((-1, 0, 0))
            continue
        others = [(v, z) for v, z in enumerate(row) if v != t]
        found.append(
            (
                sum(not z <= row[t] for _, z in others),
                sum(z == row[t] and v < t for v, z in others),
                sum(z == row[t] and v > t for v, z in others),
            )
        )
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 3).unbind(1)


def whole(n, v, d, low=-2, high=3):
    """Small whole numbers: products are exact in every dtype, and ties abound."""
    g = torch.Generator().manual_seed(n * 101 + v)
    hidden = torch.randint(low, high, (n, d), generator=g).float()
    items = torch.randint(low, high, (v, d), generator=g).float()
    target = torch.randint(0, v, (n,), generator=g)
    return hidden, items, target


def same(found, expected):
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a.cpu(), b), name


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 3), (37, 29, 5), (65, 129, 4)], ids=str)
@pytest.mark.usefixtures("chunks")
def test_counts(lane, dtype, shape):
    hidden, items, target = whole(*shape)
    expected = naive(hidden @ items.T, target)
    with run_on(lane, "target_rank") as device:
        found = target_rank(hidden.to(device, dtype), items.to(device, dtype), target.to(device))
    same(found, expected)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_bias_rows_and_ignored(lane):
    hidden, items, target = whole(9, 30, 4)
    target[5] = -100
    bias = torch.randint(-3, 4, (30,), generator=torch.Generator().manual_seed(1)).float()
    rows = torch.tensor([8, -1, 3, 3, 5, 0, -9])
    above, before, after = naive(hidden @ items.T + bias, target)
    skipped = rows < 0
    expected = [t[rows.clamp(min=0)] for t in (above, before, after)]
    expected[0][skipped] = -1
    expected[1][skipped] = expected[2][skipped] = 0
    with run_on(lane, "target_rank") as device:
        moved = [t.to(device) for t in (hidden, items, target)]
        found = target_rank(*moved, bias=bias.to(device), rows=rows.to(device))
    same(found, expected)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("size", [6, 15, 16, 17, 500])
@pytest.mark.usefixtures("chunks")
def test_equal_items_tie_in_spite_of_rounding(lane, size):
    """Equal items have equal scores wherever they stand in the table."""
    g = torch.Generator().manual_seed(size)
    hidden, item = torch.randn(33, 64, generator=g), torch.randn(1, 64, generator=g)
    target = torch.arange(33) % size
    with run_on(lane, "target_rank") as device:
        found = target_rank(hidden.to(device), item.repeat(size, 1).to(device), target.to(device))
    same(found, (torch.zeros_like(target), target, size - 1 - target))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_nan_and_infinity(lane):
    """A nan stands above everything; a target with a nan stands last; infinities compare."""
    scores = torch.tensor([[0.0, math.nan, 1.0, -math.inf, math.inf, 2.0, 1.0, math.inf]])
    items = torch.nan_to_num(scores.T, 0.0, 0.0, 0.0)
    bias = torch.where(torch.isfinite(scores[0]), 0.0, scores[0])
    target = torch.arange(8)
    expected = naive(scores.expand(8, 8), target)
    assert expected[0].tolist() == [6, 7, 4, 7, 1, 3, 4, 1]
    with run_on(lane, "target_rank") as device:
        found = target_rank(
            torch.ones(8, 1, device=device),
            items.to(device),
            target.to(device),
            bias=bias.to(device),
        )
    same(found, expected)


@pytest.mark.parametrize("lane", LANES)
def test_views(lane):
    hidden, items, target = whole(16, 40, 8)
    expected = naive(hidden[:, ::2] @ items[:, ::2].T, target)
    with run_on(lane, "target_rank") as device:
        hidden, items = hidden.to(device), items.to(device)
        found = target_rank(
            hidden.T.contiguous().T[:, ::2],
            items[:, ::2],
            torch.stack([target] * 2, 1).to(device)[:, 0],
        )
    same(found, expected)


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 4, 5, 16, 17, 24, 25, 48, 49, 97]),
    v=st.sampled_from([1, 2, 63, 64, 65, 95, 96, 97, 129, 193]),
    d=st.sampled_from([1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65, 129]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    bias=st.booleans(),
    ignored=st.sampled_from([None, "some", "all"]),
    listed=st.booleans(),
    turned=st.booleans(),
    size=st.sampled_from([1.0, 128.0]),  # scores of some 1e4
)
def test_any_shape(lane, n, v, d, dtype, bias, ignored, listed, turned, size):
    hidden, items, target = whole(n, v, d)
    hidden, items = hidden * size, items * size
    scores = hidden @ items.T
    vector = (torch.arange(v) % 5 - 2.0) * size if bias else None
    if bias:
        scores = scores + vector
    if ignored:
        target[:: 3 if ignored == "some" else 1] = -100
    above, before, after = naive(scores, target)
    rows = torch.tensor([-1, n - 1, 0, 0, -7]) if listed and n else None
    if rows is not None:
        skipped = rows < 0
        above = above[rows.clamp(min=0)].where(~skipped, -1)
        before, after = (t[rows.clamp(min=0)].where(~skipped, 0) for t in (before, after))
    with run_on(lane, "target_rank") as device:
        given = [t.to(device, dtype) for t in (hidden, items)]
        if turned:
            given = [t.T.contiguous().T for t in given]
        options = {"rows": rows, "bias": None if vector is None else vector.to(dtype)}
        options = {k: t.to(device) for k, t in options.items() if t is not None}
        found = target_rank(*given, target.to(device), **options)
    same(found, (above, before, after))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("empty", ["no rows", "all ignored", "empty list", "skipped list"])
def test_nothing_to_rank(lane, empty):
    hidden, items, target = whole(0 if empty == "no rows" else 4, 9, 3)
    rows = torch.full((0 if empty == "empty list" else 3,), -1) if "list" in empty else None
    if empty == "all ignored":
        target[:] = 7
    with run_on(lane, "target_rank") as device:
        found = target_rank(
            hidden.to(device),
            items.to(device),
            target.to(device),
            rows=None if rows is None else rows.to(device),
            ignore_index=7,
        )
    size = len(target) if rows is None else len(rows)
    zeros = torch.zeros(size, dtype=torch.int64)
    if empty == "all ignored" or rows is not None or size == 0:
        same(found, (zeros - 1, zeros, zeros))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_rank_is_the_place_in_item_topk(lane):
    """What is measured is what is served, ties included."""
    hidden, items, target = whole(20, 40, 3, low=-1, high=2)
    with run_on(lane, "target_rank") as device:
        rank = target_rank(hidden.to(device), items.to(device), target.to(device))
    with backend.use("plain"):
        _, ids = item_topk(hidden, items, 40)
    place = (ids == target[:, None]).int().argmax(1)
    assert torch.equal((rank.above + rank.tied_before).cpu(), place)
    assert (rank.tied_before + rank.tied_after).sum() > 0


def test_memory_is_one_chunk(monkeypatch):
    monkeypatch.setattr(_scores, "CHUNK_BYTES", 64 * 100 * 8)
    monkeypatch.setattr(_scores, "MIN_CHUNK", 1)
    hidden, items, target = whole(64, 2000, 4)
    with backend.use("plain"), LargestTensor() as seen:
        target_rank(hidden, items, target)
    assert seen.elements <= 64 * 100


def test_no_gradient():
    hidden, items, target = whole(4, 9, 3)
    assert not target_rank(hidden.requires_grad_(), items, target).above.requires_grad


def test_compiles_to_one_graph():
    hidden, items, target = whole(13, 30, 4)
    target[2] = -100

    def step(h):
        return tuple(target_rank(h, items, target, rows=torch.tensor([0, 2, -1, 12])))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    assert all(torch.equal(a, b) for a, b in zip(step(hidden), compiled, strict=True))


H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 4])
ERRORS = {
    "hidden shape": ((H[0], W, T), {}, ValueError, r"hidden must have shape \(N, D\)"),
    "items shape": ((H, W[:, :3], T), {}, ValueError, r"items must .* 4; got \(5, 3\)"),
    "items dtype": ((H, W.double(), T), {}, TypeError, "items must .*float32; got torch.float64"),
    "bias shape": ((H, W, T), {"bias": W[:, 0][:4]}, ValueError, r"bias .*\(5,\); got \(4,\)"),
    "target shape": ((H, W, T[:2]), {}, ValueError, "one entry per row of hidden, 3; got 2"),
    "target dtype": ((H, W, T.int()), {}, TypeError, "target must be int64; got torch.int32"),
    "target range": ((H, W, T + 2), {}, IndexError, "target < 5 .*-100; got 6 at row 2"),
    "rows range": ((H, W, T), {"rows": T}, IndexError, "rows must be < 3 .* got 4 at entry 2"),
    "named target": ((H, W, T + 2), {"rows": T[:1] + 2}, IndexError, "got 6 at entry of rows 0"),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=rf"^target_rank: .*{message}"):
        target_rank(*args, **options)

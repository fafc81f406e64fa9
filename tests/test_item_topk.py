"""item_topk against a full sort by score and id, exactly, on scores that have no rounding."""

import math

import pytest
import torch
from harness import LargestTensor, check, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st

from t4r_fast import backend
from t4r_fast.ops.item_topk import MAX_K, item_topk
from t4r_fast.plain import _scores

LANES = lanes("item_topk")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
WIDE_KEYS = "Triton's keys of float64 scores do not fit 64 bits: test_triton_refuses_float64"


def skip_float64_in_triton(lane, dtype):
    if lane.startswith("triton") and dtype == torch.float64:
        pytest.skip(WIDE_KEYS)


@pytest.fixture(params=[0, 7], ids=["one-chunk", "chunks-of-7"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(_scores, "CHUNK_BYTES", 1)
        monkeypatch.setattr(_scores, "MIN_CHUNK", request.param)


def naive(scores, k, exclude=None, padding_idx=None):
    """One row after another, in Python: scores and ids, by score down and then by id up."""
    all_scores, all_ids = [], []
    for i, row in enumerate(scores.tolist()):
        out = set() if exclude is None else set(exclude[i].tolist())
        out.add(padding_idx)
        rank = {z: math.inf if math.isnan(z) else z for z in row}
        kept = [(v, z) for v, z in enumerate(row) if v not in out and z != -math.inf]
        kept = sorted(kept, key=lambda e: -(math.inf if math.isnan(e[1]) else rank[e[1]]))[:k]
        kept += [(-1, -math.inf)] * (k - len(kept))
        all_scores.append([z for _, z in kept])
        all_ids.append([v for v, _ in kept])
    return torch.tensor(all_scores).reshape(-1, k), torch.tensor(all_ids).reshape(-1, k).long()


def whole(n, v, d, low=-2, high=3):
    g = torch.Generator().manual_seed(n * 101 + v)
    hidden = torch.randint(low, high, (n, d), generator=g).float()
    items = torch.randint(low, high, (v, d), generator=g).float()
    return hidden, items


def same(found, expected):
    torch.testing.assert_close(
        found[0].cpu().float(), expected[0].float(), rtol=0, atol=0, equal_nan=True
    )
    assert found[1].dtype == torch.int64
    assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 8, 128])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 8, 3), (37, 29, 4), (9, 200, 2)], ids=str)
@pytest.mark.usefixtures("chunks")
def test_best_with_ties_by_lowest_id(lane, dtype, k, shape):
    skip_float64_in_triton(lane, dtype)
    hidden, items = whole(*shape)
    expected = naive(hidden @ items.T, k)
    with run_on(lane, "item_topk") as device:
        found = item_topk(hidden.to(device, dtype), items.to(device, dtype), k)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    same(found, expected)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_as_exact_as_topk(lane, dtype):
    skip_float64_in_triton(lane, dtype)
    g = torch.Generator().manual_seed(3)
    inputs = {
        "hidden": torch.randn(17, 48, generator=g),
        "items": torch.randn(129, 48, generator=g),
        "bias": torch.randn(129, generator=g),
    }

    def scores_of_topk(hidden, items, bias, k, temperature):
        return ((hidden @ items.T + bias) / temperature).topk(k).values

    def item_topk_scores(**arguments):
        return item_topk(**arguments)[0]

    item_topk_scores.__name__ = "item_topk"
    check(lane, item_topk_scores, scores_of_topk, inputs, {"k": 20, "temperature": 0.5}, dtype)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_exclude_padding_bias_and_rows(lane):
    hidden, items = whole(9, 30, 4)
    g = torch.Generator().manual_seed(1)
    bias = torch.randint(-3, 4, (30,), generator=g).float()
    exclude = torch.randint(-3, 30, (9, 12), generator=g)
    exclude[3] = 5  # one id many times
    rows = torch.tensor([8, -1, 3, 3, 0, -9])
    scores, ids = naive((hidden @ items.T + bias) / 0.5, 25, exclude, padding_idx=2)
    scores, ids = scores[rows.clamp(min=0)], ids[rows.clamp(min=0)]
    scores[rows < 0], ids[rows < 0] = -math.inf, -1
    assert (ids[rows >= 0] == -1).any()  # fewer than k are left somewhere
    with run_on(lane, "item_topk") as device:
        found = item_topk(
            hidden.to(device),
            items.to(device),
            25,
            bias=bias.to(device),
            rows=rows.to(device),
            temperature=0.5,
            exclude=exclude.to(device),
            padding_idx=2,
        )
    same(found, (scores, ids))


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane == "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 48, 64, 100, 128])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_same_bits_with_any_number_of_rows(lane, dtype, width, has_bias):
    """All scores of 110 items, more than a tile; among them zeros whose sign is negative."""
    g = torch.Generator().manual_seed(width)
    hidden, items = torch.randn(60, width, generator=g), torch.randn(110, width, generator=g)
    bias = torch.randn(110, generator=g)
    hidden[::7] = -hidden[::7].abs()
    items[3], bias[3] = 0, -0.0
    options = {"bias": bias.to(dtype)} if has_bias else {}
    hidden, items = hidden.to(dtype), items.to(dtype)
    with run_on(lane, "item_topk"):
        scores, ids = item_topk(hidden, items, 110, **options)
        bits = torch.int64 if dtype == torch.float64 else torch.int32
        for n in (*range(1, 10), 16, 17, 33):
            for start in (0, 60 - n):
                found = item_topk(hidden[start : start + n], items, 110, **options)
                assert torch.equal(found[0].view(bits), scores[start : start + n].view(bits)), n
                assert torch.equal(found[1], ids[start : start + n]), n
    assert bool((scores[ids == 3].signbit()).any()) == has_bias


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_nothing_left(lane):
    hidden, items = whole(2, 8, 2)
    exclude = torch.arange(8).expand(2, 8)
    with run_on(lane, "item_topk") as device:
        found = item_topk(hidden.to(device), items.to(device), 3, exclude=exclude.to(device))
    same(found, (torch.full((2, 3), -math.inf), torch.full((2, 3), -1)))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_nan_and_infinity(lane):
    scores = torch.tensor([0.0, math.nan, 1.0, -math.inf, math.inf, 2.0, 1.0, math.nan, math.inf])
    bias = torch.where(torch.isfinite(scores), 0.0, scores)
    items = torch.nan_to_num(scores, 0.0, 0.0, 0.0)[:, None]
    for k in (1, 3, 9):
        expected = naive(scores[None], k)
        with run_on(lane, "item_topk") as device:
            hidden = torch.ones(1, 1, device=device)
            found = item_topk(hidden, items.to(device), k, bias=bias.to(device))
        same(found, expected)
    assert expected[1].tolist() == [[1, 4, 7, 8, 5, 2, 6, 0, -1]]


@pytest.mark.parametrize("lane", LANES)
def test_views_and_no_rows(lane):
    hidden, items = whole(16, 40, 8)
    expected = naive(hidden[:, ::2] @ items[:, ::2].T, 5)
    with run_on(lane, "item_topk") as device:
        hidden, items = hidden.to(device), items.to(device)
        same(item_topk(hidden.T.contiguous().T[:, ::2], items[:, ::2], 5), expected)
        scores, ids = item_topk(hidden[:0], items, 5)
    assert scores.shape == ids.shape == (0, 5)


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 4, 5, 16, 17, 24, 25, 48, 49, 97]),
    v=st.sampled_from([1, 2, 63, 64, 65, 95, 96, 97, 129, 193]),
    d=st.sampled_from([1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65, 129]),
    k=st.sampled_from([1, 2, 7, 8, 9, 20, 64, 65, 128]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    bias=st.booleans(),
    seen=st.sampled_from([None, 0, 1, 40]),
    listed=st.booleans(),
    turned=st.booleans(),
    size=st.sampled_from([1.0, 128.0]),  # scores of some 1e4
)
def test_any_shape(lane, n, v, d, k, dtype, bias, seen, listed, turned, size):
    if lane.startswith("triton") and dtype == torch.float64:
        dtype = torch.float16 if size == 1.0 else torch.float32
    hidden, items = whole(n, v, d)
    hidden, items = hidden * size, items * size
    scores = hidden @ items.T
    vector = (torch.arange(v) % 5 - 2.0) * size if bias else None
    if bias:
        scores = scores + vector
    exclude = None
    if seen is not None:
        g = torch.Generator().manual_seed(n + v)
        exclude = torch.randint(-3, v, (n, seen), generator=g)
    best, ids = naive(scores, k, exclude, padding_idx=0)
    rows = torch.tensor([-1, n - 1, 0, 0, -7]) if listed and n else None
    if rows is not None:
        skipped = (rows < 0)[:, None]
        best, ids = best[rows.clamp(min=0)], ids[rows.clamp(min=0)]
        best, ids = best.where(~skipped, -math.inf), ids.where(~skipped, -1)
    with run_on(lane, "item_topk") as device:
        given = [t.to(device, dtype) for t in (hidden, items)]
        if turned:
            given = [t.T.contiguous().T for t in given]
        options = {"rows": rows, "bias": None if vector is None else vector.to(dtype)}
        options = {
            o: t.to(device) for o, t in {**options, "exclude": exclude}.items() if t is not None
        }
        found = item_topk(*given, k, padding_idx=0, **options)
    same(found, (best, ids))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "in turns"])
@pytest.mark.parametrize("k", [3, 64])
def test_any_order_of_scores(lane, order, k):
    """Rising scores pass every threshold, one after the other."""
    v = torch.arange(300.0)
    scores = {"rising": v, "falling": -v, "equal": v * 0, "in turns": v % 7 * 100 + v // 7}[order]
    hidden = torch.tensor([[1.0], [2.0], [-1.0]])
    exclude = torch.arange(300 - 40, 300).expand(3, 40)
    expected = naive(hidden * scores, k, exclude)
    with run_on(lane, "item_topk") as device:
        items = scores[:, None].to(device)
        found = item_topk(hidden.to(device), items, k, exclude=exclude.to(device))
    same(found, expected)


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane.startswith("triton")])
def test_triton_refuses_float64(lane):
    with run_on(lane, "item_topk") as device, pytest.raises(TypeError, match="backend 'triton'"):
        item_topk(*(t.to(device).double() for t in whole(2, 3, 4)), 1)


def test_memory_is_one_chunk(monkeypatch):
    monkeypatch.setattr(_scores, "CHUNK_BYTES", 64 * 200 * 8)
    monkeypatch.setattr(_scores, "MIN_CHUNK", 1)
    hidden, items = whole(64, 4000, 2)
    exclude = torch.randint(0, 4000, (64, 5), generator=torch.Generator().manual_seed(0))
    with backend.use("plain"), LargestTensor() as seen:
        item_topk(hidden, items, 10, exclude=exclude, padding_idx=0)
    assert seen.elements <= 64 * 201


def test_compiles_to_one_graph():
    hidden, items = whole(13, 30, 2)
    exclude = torch.arange(26).reshape(13, 2)

    def step(h):
        return item_topk(h, items, 9, exclude=exclude, padding_idx=0, rows=torch.tensor([0, -1, 7]))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    assert all(torch.equal(a, b) for a, b in zip(step(hidden), compiled, strict=True))


H, W, E = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, 2).long()
ERRORS = {
    "hidden shape": ((H[0], W, 1), {}, ValueError, r"hidden must have shape \(N, D\)"),
    "items dtype": ((H, W.double(), 1), {}, TypeError, "items must .*float32; got torch.float64"),
    "k low": ((H, W, 0), {}, ValueError, "k must be .* 1 to 128; got 0"),
    "k high": ((H, W, MAX_K + 1), {}, ValueError, "k must be .* 1 to 128; got 129"),
    "k kind": ((H, W, 2.0), {}, ValueError, "k must be .* got 2.0"),
    "temperature": ((H, W, 1), {"temperature": -1}, ValueError, "temperature must be > 0; got -1"),
    "rows range": (
        (H, W, 1),
        {"rows": E[0] + 3},
        IndexError,
        "rows must be < 3 .* got 3 at entry 0",
    ),
    "exclude dim": ((H, W, 1), {"exclude": E[0]}, ValueError, r"exclude must have shape \(N, S\)"),
    "exclude rows": ((H, W, 1), {"exclude": E[:2]}, ValueError, "row of hidden, 3; got 2"),
    "exclude dtype": ((H, W, 1), {"exclude": E.int()}, TypeError, "exclude must be int64"),
    "exclude id": ((H, W, 1), {"exclude": E + 5}, IndexError, r"< 5 .*; got 5 at place \(0, 0\)"),
    "padding": ((H, W, 1), {"padding_idx": 5}, ValueError, "padding_idx must .* < 5; got 5"),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=rf"^item_topk: .*{message}"):
        item_topk(*args, **options)

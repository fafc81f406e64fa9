"""target_rank against a count over the full scores, exactly, on scores that have no rounding; score
and lse against the formula in float64."""

import functools
import math

import pytest
import torch
from harness import LargestTensor, check, lanes, run_on
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


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane == "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 48, 64, 100, 128])
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_same_bits_with_any_number_of_rows(lane, dtype, width, has_bias):
    g = torch.Generator().manual_seed(width)
    hidden, items = torch.randn(60, width, generator=g), torch.randn(230, width, generator=g)
    target = torch.randint(0, 230, (60,), generator=g)
    options = {"bias": torch.randn(230, generator=g).to(dtype)} if has_bias else {}
    hidden, items = hidden.to(dtype), items.to(dtype)
    with run_on(lane, "target_rank"):
        rank, *sums = target_rank(hidden, items, target, return_lse=True, **options)
        for n in (*range(1, 10), 16, 17, 33):
            for part in (slice(0, n), slice(60 - n, 60)):
                given = (hidden[part], items, target[part])
                found, *found_sums = target_rank(*given, return_lse=True, **options)
                for a, b in zip([*found, *found_sums], [*rank, *sums], strict=True):
                    assert torch.equal(a, b[part]), n


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


# -- score and lse ---------------------------------------------------------------------------------


@functools.wraps(target_rank)
def score_and_lse(*args, **kwargs):
    return target_rank(*args, **kwargs, return_lse=True)[1:]


def formula(hidden, items, target, bias=None, rows=None, temperature=1.0, ignore_index=-100):
    z = hidden @ items.T
    z = (z if bias is None else z + bias) / temperature
    found = [z.gather(1, target.clamp(min=0)[:, None])[:, 0], z.logsumexp(1)]
    found = [t.where(target != ignore_index, 0.0) for t in found]
    if rows is not None:
        found = [t[rows.clamp(min=0)].where(rows >= 0, 0.0) for t in found]
    return tuple(found)


def uneven(n, v, d, scale=1.0):
    """Rows whose scores have widths from 0.01 to some 10 times scale, with an ignored one."""
    g = torch.Generator().manual_seed(n * 101 + v)
    hidden = torch.randn(n, d, generator=g) * torch.logspace(-2, 1, n)[:, None] * scale
    items = torch.randn(v, d, generator=g) / d**0.5
    target = torch.randint(0, v, (n,), generator=g)
    if n > 4:
        target[3] = -100
    return {"hidden": hidden, "items": items, "target": target}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 3), (37, 29, 5), (49, 389, 33)], ids=str)
@pytest.mark.usefixtures("chunks")
def test_score_and_lse(lane, dtype, shape):
    check(lane, score_and_lse, formula, uneven(*shape), {}, dtype)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("temperature", [0.3, 7.0])
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.usefixtures("chunks")
def test_score_and_lse_with_options(lane, temperature, scale):
    inputs = uneven(20, 200, 8, scale)
    inputs["bias"] = torch.randn(200, generator=torch.Generator().manual_seed(1))
    inputs["bias"][::9] = -math.inf
    inputs["target"] = torch.where(inputs["target"] % 9 == 0, 1, inputs["target"])
    inputs["rows"] = torch.tensor([19, -1, 3, 2, 2, 0, -9, *range(4, 19)])
    check(lane, score_and_lse, formula, inputs, {"temperature": temperature}, torch.float32)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_ranks_are_the_same_with_lse(lane):
    inputs = uneven(40, 290, 24)
    with run_on(lane, "target_rank") as device:
        moved = {name: t.to(device) for name, t in inputs.items()}
        alone = target_rank(**moved)
        rank, score, lse = target_rank(**moved, temperature=0.3, return_lse=True)
    same(rank, [t.cpu() for t in alone])
    assert score[3] == lse[3] == 0
    assert rank.above[3] == -1


@pytest.mark.parametrize("lane", [lane for lane in LANES if not lane.startswith("plain")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lse_does_not_depend_on_other_rows(lane, dtype):
    """Bit for bit: not on their number, their place, or how large their scores are."""
    size, items = (40, 70) if lane == "triton-interpret" else (130, 9000)
    inputs = uneven(size, items, 24)
    inputs["hidden"] = inputs["hidden"].to(dtype)
    inputs["items"] = inputs["items"].to(dtype)
    with run_on(lane, "target_rank") as device:
        moved = {name: t.to(device) for name, t in inputs.items()}
        _, *every = target_rank(**moved, return_lse=True)
        for rows in (range(size - 30, size - 21), range(size - 1, -1, -1), range(0, size, 4)):
            rows = torch.tensor(list(rows), device=device)
            _, *some = target_rank(**moved, rows=rows, return_lse=True)
            for a, b in zip(every, some, strict=True):
                assert torch.equal(a[rows], b)


def test_a_last_chunk_of_few_rows_is_summed_as_the_others():
    """Rows so wide that 48 of them fill the workspace: 3 more do not go by themselves."""
    hidden = torch.randn(60, 2**18, generator=torch.Generator().manual_seed(0))
    items = torch.randn(5, 2**18, generator=torch.Generator().manual_seed(1)) / 2**9
    target = torch.arange(60) % 5
    with run_on("cpu", "target_rank"):
        _, _, every = target_rank(hidden, items, target, return_lse=True)
        _, _, some = target_rank(hidden[:51], items, target[:51], return_lse=True)
    assert torch.equal(every[:51], some)


def test_lse_does_not_depend_on_the_threads():
    inputs = uneven(64, 9001, 32)
    before = torch.get_num_threads()
    found = []
    with run_on("cpu", "target_rank"):
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found.append(target_rank(**inputs, return_lse=True))
        finally:
            torch.set_num_threads(before)
    for rank, score, lse in found[1:]:
        same(rank, found[0][0])
        assert torch.equal(score, found[0][1])
        assert torch.equal(lse, found[0][2])


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_lse_of_what_is_not_finite(lane):
    """-inf takes an item out, the target too; of nothing lse is -inf. nan and inf give nan."""
    bias = torch.zeros(20)
    hidden, items = torch.ones(4, 1), torch.zeros(20, 1)
    found = []
    with run_on(lane, "target_rank") as device:
        for place, value in (
            (3, -math.inf),
            (slice(None), -math.inf),
            (5, math.nan),
            (5, math.inf),
        ):
            changed = bias.clone()
            changed[place] = value
            target = torch.tensor([3, 4, 3, 0])
            moved = [t.to(device) for t in (hidden, items, target)]
            _, score, lse = target_rank(*moved, bias=changed.to(device), return_lse=True)
            assert torch.equal(score.cpu(), changed[target])
            found.append(lse.cpu())
    torch.testing.assert_close(found[0], torch.full((4,), math.log(19)))
    assert torch.equal(found[1], torch.full((4,), -math.inf))
    assert found[2].isnan().all()
    assert found[3].isnan().all()


@pytest.mark.parametrize("lane", LANES)
def test_a_lone_item_has_no_loss(lane):
    hidden = torch.linspace(-300, 300, 41)[:, None]
    with run_on(lane, "target_rank") as device:
        args = (hidden.to(device), torch.full((1, 1), 0.7, device=device))
        target = torch.zeros(41, dtype=torch.int64, device=device)
        _, score, lse = target_rank(*args, target, temperature=0.3, return_lse=True)
    assert torch.equal(score, lse)


def test_memory_is_one_chunk(monkeypatch):
    monkeypatch.setattr(_scores, "CHUNK_BYTES", 64 * 100 * 8)
    monkeypatch.setattr(_scores, "MIN_CHUNK", 1)
    hidden, items, target = whole(64, 2000, 4)
    with backend.use("plain"), LargestTensor() as seen:
        target_rank(hidden, items, target)
        target_rank(hidden, items, target, return_lse=True)
    assert seen.elements <= 64 * 100


def test_no_gradient():
    hidden, items, target = whole(4, 9, 3)
    assert not target_rank(hidden.requires_grad_(), items, target).above.requires_grad
    _, score, lse = target_rank(hidden, items, target, return_lse=True)
    assert not score.requires_grad
    assert not lse.requires_grad


def test_compiles_to_one_graph():
    hidden, items, target = whole(13, 30, 4)
    target[2] = -100

    def step(h):
        rows = torch.tensor([0, 2, -1, 12])
        rank, *sums = target_rank(h, items, target, rows=rows, temperature=2.0, return_lse=True)
        return *rank, *sums, *target_rank(h, items, target, rows=rows)

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
    "temperature": ((H, W, T), {"temperature": 0}, ValueError, "temperature must be > 0; got 0"),
    "rows range": ((H, W, T), {"rows": T}, IndexError, "rows must be < 3 .* got 4 at entry 2"),
    "named target": ((H, W, T + 2), {"rows": T[:1] + 2}, IndexError, "got 6 at entry of rows 0"),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=rf"^target_rank: .*{message}"):
        target_rank(*args, **options)

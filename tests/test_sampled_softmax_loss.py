"""sampled_softmax_loss against F.cross_entropy on the logits of targets and negatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import LargestTensor, check, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st

from t4r_fast import backend
from t4r_fast.ops.sampled_softmax_loss import (
    SAMPLERS,
    SCOPES,
    popularity_table,
    sampled_softmax_loss,
)
from t4r_fast.plain import _scores
from t4r_fast.plain import sampled_softmax_loss as plain
from t4r_fast.torch.model.sampler import LogUniformSampler

LANES = lanes("sampled_softmax_loss")
SEED = torch.tensor([0x1234567890ABCDEF, (3 << 32) + 99])
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
DENSE = {"sparse": False, "seed": SEED}
SAMPLED = {
    "log_uniform": {"sampler": "log_uniform", "low": 2},
    "uniform": {"sampler": "uniform", "low": 1},
    "popularity": {"sampler": "popularity", "alpha": 0.75},
    "t4rec": {"sampler": "t4rec", "low": 1},
}


def probabilities(v, sampler, low=0, popularity=None, alpha=1.0):
    """(V,) float64, from the formulas of the docstring."""
    c = torch.arange(v, dtype=torch.float64) - low
    if sampler == "uniform":
        q = torch.full_like(c, 1 / (v - low))
    elif sampler == "popularity":
        return popularity.double() ** alpha / (popularity.double() ** alpha).sum()
    else:
        q = torch.log1p(1 / (c.clamp(min=0) + 1)) / math.log(v - low + 1)
    return q.where(c >= 0, 0.0)


def drawn(entries, v, k, sampler="log_uniform", scope="batch", low=0, popularity=None, alpha=1.0):
    """ids and valid (M, K) that the op draws for SEED."""
    options = plain.Options(
        k,
        SAMPLERS.index(sampler),
        SCOPES.index(scope),
        low,
        math.log(v - low + 1),
        True,
        True,
        1.0,
        -100,
    )
    cumulative = None if popularity is None else popularity_table(popularity, alpha).cumulative
    entry = torch.arange(entries)
    sets = {"batch": entry * 0, "block": entry // 128, "row": entry}[scope]
    ids, valid = plain._draw(options, SEED, sets, v, cumulative)
    return ids, torch.ones_like(ids, dtype=torch.bool) if valid is None else valid


def naive(
    hidden,
    items,
    target,
    num_negatives,
    sampler="log_uniform",
    popularity=None,
    alpha=1.0,
    scope="batch",
    logq=True,
    remove_accidental_hits=True,
    bias=None,
    rows=None,
    temperature=1.0,
    reduction="mean",
    seed=None,
    low=0,
    sparse=True,
):
    if rows is not None:
        target = torch.where(rows >= 0, target[rows.clamp(min=0)], -100)
        hidden = hidden[rows.clamp(min=0)]
    v, k = items.shape[0], num_negatives
    ids, valid = drawn(len(target), v, k, sampler, scope, low, popularity, alpha)
    q = probabilities(v, sampler, low, popularity, alpha)
    ids = ids.clamp(max=v - 1)
    y = target.clamp(min=0)
    bias = items.new_zeros(v) if bias is None else bias
    scores = hidden @ items.T + bias
    z, z_target = scores.gather(1, ids), scores.gather(1, y[:, None])[:, 0]
    hit = ids == y[:, None]
    if sampler == "t4rec":
        p = torch.log(1 - (1 + q) ** (-2 * k) + 1e-16).to(z.dtype)
        z, z_target = z - p[ids], z_target - p[y]
        z = z.where(~hit, torch.finfo(torch.float16).min / 100.0)
    z, z_target = z / temperature, z_target / temperature
    if sampler != "t4rec" and logq:
        shift = torch.log(k * q)
        if not remove_accidental_hits:
            z_target = z_target - torch.log1p(k * q[y]).to(z.dtype)
            shift = torch.where(hit, torch.log1p(k * q[y])[:, None], shift[ids])
        else:
            shift = shift[ids]
        z = z - shift.to(z.dtype)
    if sampler != "t4rec" and remove_accidental_hits:
        z = z.where(~hit, -math.inf)
    z = z.where(valid, -math.inf)
    alone = (z == -math.inf).all(1)  # logsumexp has no gradient there
    lse = z.masked_fill(alone[:, None], 0.0).logsumexp(1).masked_fill(alone, -math.inf)
    # cross_entropy of [z_target, z] without its rounding of a loss near 0
    loss = torch.logaddexp(lse - z_target, torch.zeros_like(lse))
    loss = loss.where(target != -100, 0.0)
    if reduction == "sum":
        loss = loss.sum()
    return loss.sum() / (target != -100).sum() if reduction == "mean" else loss


def make_inputs(n, v, d, bias=False, popularity=False, scale=1.0):
    g = torch.Generator().manual_seed(n * 10007 + v * 101 + d)
    inputs = {
        "hidden": torch.randn(n, d, generator=g) * scale,
        "items": torch.randn(v, d, generator=g) / d**0.5,
        "target": torch.randint(0, v, (n,), generator=g),
    }
    if bias:
        inputs["bias"] = torch.randn(v, generator=g)
    if popularity:
        inputs["popularity"] = torch.randint(1, 50, (v,), generator=g)
    return inputs


@pytest.fixture(params=[0, 1], ids=["one-chunk", "small-chunks"])
def chunks(request, monkeypatch):
    """Plain PyTorch in chunks of a few rows, so that small tests cross chunks."""
    if request.param:
        monkeypatch.setattr(_scores, "CHUNK_BYTES", 20_000)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 8, 3, 2), (37, 29, 5, 17), (131, 400, 64, 97), (193, 60, 33, 200)]
)
@pytest.mark.usefixtures("chunks")
def test_matches_cross_entropy(lane, dtype, scope, shape):
    *sizes, k = shape
    options = {**DENSE, "num_negatives": k, "scope": scope}
    check(
        lane,
        sampled_softmax_loss,
        naive,
        make_inputs(*sizes),
        options,
        dtype,
        ("hidden", "items"),
    )


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("sampler", SAMPLED)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("logq", [True, False], ids=["logq", "plain"])
@pytest.mark.parametrize("hits", [True, False], ids=["removed", "kept"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_options(lane, sampler, scope, logq, hits, reduction):
    if sampler == "t4rec" and (scope != "batch" or not logq or not hits):
        pytest.skip("t4rec has one form")
    inputs = make_inputs(140, 31, 6, bias=True, popularity=sampler == "popularity")
    inputs["target"][4::9] = -100
    options = {
        **DENSE,
        **SAMPLED[sampler],
        "num_negatives": 25,
        "scope": scope,
        "logq": logq,
        "remove_accidental_hits": hits,
        "temperature": 0.6,
        "reduction": reduction,
    }
    check(
        lane,
        sampled_softmax_loss,
        naive,
        inputs,
        options,
        torch.float32,
        ("hidden", "items", "bias"),
    )


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows(lane, scope, dtype):
    inputs = make_inputs(90, 40, 6, bias=True)
    inputs["target"][5] = -100
    generator = torch.Generator().manual_seed(1)
    inputs["rows"] = torch.randint(-30, 90, (300,), generator=generator)  # many twice, some skipped
    inputs["rows"][128:256] = -1  # a block without rows
    options = {**DENSE, "num_negatives": 11, "scope": scope, "reduction": "sum"}
    check(lane, sampled_softmax_loss, naive, inputs, options, dtype, ("hidden", "items", "bias"))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("scope", SCOPES)
def test_views(lane, scope):
    inputs = make_inputs(16, 40, 10)
    inputs["hidden"] = inputs["hidden"].T.contiguous().T
    inputs["items"] = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))[:, ::2]
    inputs["target"] = torch.full((32,), 39)[::2]
    options = {**DENSE, "num_negatives": 30, "scope": scope}
    check(lane, sampled_softmax_loss, naive, inputs, options, torch.float32, ("hidden", "items"))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scale", [2.0**-13, 2.0**13], ids=["small", "1e4"])
def test_extreme_logits(lane, scope, scale):
    options = {**DENSE, "num_negatives": 30, "scope": scope, "reduction": "none"}
    inputs = make_inputs(40, 60, 8)
    # few bits, so that scores are exact: at 1e4 the order of a sum would decide who wins
    inputs["hidden"] = (inputs["hidden"] * 16).round() / 16 * scale
    inputs["items"] = (inputs["items"] * 16).round() / 16
    check(lane, sampled_softmax_loss, naive, inputs, options, torch.float32, ("hidden", "items"))


@pytest.mark.parametrize("lane", LANES)
def test_gradient_of_a_target_with_all_of_the_weight(lane):
    """1 - p of the target is far below eps there, and must not be lost."""
    hidden = torch.tensor([[8.0, 0.0]])
    items = torch.tensor([[4.0, 0.0], [0.0, 1.0]])
    options = {**DENSE, "num_negatives": 8, "sampler": "uniform", "logq": False, "low": 1}
    with run_on(lane, "sampled_softmax_loss") as device:
        h, w = hidden.to(device).requires_grad_(), items.to(device).requires_grad_()
        target = torch.zeros(1, dtype=torch.int64, device=device)
        loss = sampled_softmax_loss(h, w, target, **{**options, "seed": SEED.to(device)})
        loss.backward()
    rest = 8 * math.exp(-32)
    assert loss.item() == pytest.approx(rest, rel=1e-5)
    torch.testing.assert_close(h.grad.cpu(), rest * torch.tensor([[-4.0, 1.0]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(w.grad.cpu()[0], rest * torch.tensor([-8.0, 0.0]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("scope", SCOPES)
def test_nan_stays_in_its_row(lane, scope):
    inputs = make_inputs(5, 20, 4)
    inputs["hidden"][2, 1] = math.nan
    options = {**DENSE, "num_negatives": 7, "scope": scope, "reduction": "none"}
    check(lane, sampled_softmax_loss, naive, inputs, options, torch.float32)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("empty", ["no rows", "all ignored", "empty list", "skipped list"])
def test_nothing_counted(lane, scope, empty):
    inputs = make_inputs(0 if empty == "no rows" else 4, 9, 3)
    if empty == "all ignored":
        inputs["target"][:] = -100
    if "list" in empty:
        inputs["rows"] = torch.full((0 if empty == "empty list" else 3,), -1)
    with run_on(lane, "sampled_softmax_loss") as device:
        inputs = {k: v.to(device) for k, v in inputs.items()}
        leaves = [inputs["hidden"].requires_grad_(), inputs["items"].requires_grad_()]
        options = {"num_negatives": 5, "scope": scope}
        assert torch.isnan(sampled_softmax_loss(**inputs, **options))
        each = sampled_softmax_loss(**inputs, **options, reduction="none")
        assert torch.equal(each, torch.zeros_like(each))
        assert len(each) == len(inputs.get("rows", inputs["target"]))
        loss = sampled_softmax_loss(**inputs, **options, reduction="sum")
        grads = torch.autograd.grad(loss, leaves)
        assert all(not g.to_dense().any() for g in grads)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("scope", SCOPES)
def test_only_accidental_hits(lane, scope):
    """Where every negative is the target nothing is left to learn."""
    inputs = make_inputs(6, 1, 4)
    with run_on(lane, "sampled_softmax_loss") as device:
        leaves = {k: v.to(device).requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
        loss = sampled_softmax_loss(
            **leaves, num_negatives=3, scope=scope, reduction="none", sparse=False
        )
        loss.sum().backward()
    assert not loss.any()
    assert not leaves["hidden"].grad.any()
    assert not leaves["items"].grad.any()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("sampler", SAMPLED)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_gradients_hold_what_took_part(lane, sampler, scope, dtype):
    if sampler == "t4rec" and scope != "batch":
        pytest.skip("t4rec has scope batch only")
    v, k = 5000, 40
    inputs = make_inputs(150, v, 7, bias=True, popularity=sampler == "popularity")
    inputs["target"][::4] = -100
    counts = inputs.get("popularity")
    options = {**SAMPLED[sampler], "num_negatives": k, "scope": scope}
    grads = []
    with run_on(lane, "sampled_softmax_loss") as device:
        moved = {n: t.to(device) for n, t in inputs.items()}
        for sparse in (True, False):
            leaves = [moved[n].to(dtype).requires_grad_() for n in ("hidden", "items", "bias")]
            both = {"target": moved["target"], "popularity": moved.get("popularity")}
            loss = sampled_softmax_loss(
                *leaves[:2], bias=leaves[2], **both, **options, sparse=sparse, seed=SEED.to(device)
            )
            grads.append(torch.autograd.grad(loss, leaves))
    low, alpha = options.get("low", 0), options.get("alpha", 1.0)
    ids, valid = drawn(150, v, k, sampler, scope, low, counts, alpha)
    target = inputs["target"]
    counted = target != -100
    if scope == "row":
        ids, valid = ids[counted], valid[counted]
    wanted = torch.cat([ids[valid], target[counted]]).unique()
    for sparse, dense in zip(*grads):
        if sparse.is_sparse:
            assert sparse.is_coalesced() == (not lane.startswith("triton"))
            ids = sparse._indices()[0].cpu()
            assert torch.equal(ids[: len(wanted)], wanted)
            assert (ids[len(wanted) :] == wanted[-1]).all()
            assert not sparse._values()[len(wanted) :].any()
        assert torch.equal(sparse.to_dense(), dense)
        assert sparse.dtype == dtype
    assert grads[0][1].is_sparse
    assert grads[0][2].is_sparse


@pytest.mark.parametrize("sampler", ["log_uniform", "uniform", "popularity"])
def test_frequencies_of_negatives(sampler):
    v, k, low = 40, 100_000, 0 if sampler == "popularity" else 3
    counts = torch.arange(v) if sampler == "popularity" else None
    ids, _ = drawn(1, v, k, sampler, "batch", low, counts, 0.5 if counts is not None else 1.0)
    q = probabilities(v, sampler, low, counts, 0.5)
    assert q.sum().item() == pytest.approx(1)
    found, expected = ids[0].bincount(minlength=v), k * q
    kept = q > 0
    assert found[~kept].sum() == 0
    value = ((found - expected) ** 2 / expected)[kept].sum().item()
    freedom = int(kept.sum()) - 1
    assert abs(value - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("sampler", ["log_uniform", "uniform", "popularity"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("hits", [True, False], ids=["removed", "kept"])
def test_gradients_tend_to_the_full_softmax(lane, sampler, scope, hits):
    n = 25 if lane == "triton-interpret" and scope == "row" else 200  # the interpreter is slow
    inputs = make_inputs(n, 30, 5, popularity=sampler == "popularity")
    errors = []
    with run_on(lane, "sampled_softmax_loss") as device:
        moved = {n: t.to(device) for n, t in inputs.items()}
        leaves = [moved["hidden"].requires_grad_(), moved["items"].requires_grad_()]
        full = F.cross_entropy(leaves[0] @ leaves[1].T, moved["target"])
        wanted = torch.autograd.grad(full, leaves)
        for k in (50, 50 * 64):
            loss = sampled_softmax_loss(
                **moved,
                num_negatives=k,
                sampler=sampler,
                scope=scope,
                remove_accidental_hits=hits,
                seed=SEED.to(device),
                sparse=False,
            )
            found = torch.autograd.grad(loss, leaves)
            errors.append([(f - w).norm() / w.norm() for f, w in zip(found, wanted)])
            if hits and k > 50:
                assert loss.item() == pytest.approx(full.item(), abs=0.05)
    for few, many in zip(*errors):
        assert many < 0.08
        assert many < few / 4  # 1 / sqrt(64), with room for chance


def test_sum_of_weights_is_right_on_average():
    """E[exp(z_y) + sum exp(z)] is the full softmax's sum, for any K."""
    inputs = make_inputs(1, 25, 4)
    hidden, items, target = (inputs[n].double() for n in ("hidden", "items", "target"))
    repeats = 40_000
    loss = sampled_softmax_loss(
        hidden.expand(repeats, 4),
        items,
        target.long().expand(repeats),
        num_negatives=3,
        scope="row",
        reduction="none",
        seed=SEED,
    )
    z = (hidden @ items.T)[0]
    found = torch.exp(loss + z[target.long()])
    error = (found.mean() - z.exp().sum()) / (found.std() / math.sqrt(repeats))
    assert abs(error) < 4


@pytest.mark.parametrize("sampler", SAMPLED)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("lane", LANES)
def test_gradcheck(lane, sampler, scope):
    if sampler == "t4rec" and scope != "batch":
        pytest.skip("t4rec has scope batch only")
    inputs = make_inputs(6, 11, 3, bias=True, popularity=sampler == "popularity")
    rows = torch.tensor([0, 2, 2, -1, 5])
    with run_on(lane, "sampled_softmax_loss") as device:
        moved = {n: t.to(device) for n, t in inputs.items()}
        leaves = [moved[k].double().requires_grad_() for k in ("hidden", "items", "bias")]
        for hits in [True] if sampler == "t4rec" else [True, False]:
            assert torch.autograd.gradcheck(
                lambda h, w, b, hits=hits: sampled_softmax_loss(
                    h,
                    w,
                    moved["target"],
                    bias=b,
                    rows=rows.to(device),
                    popularity=moved.get("popularity"),
                    **SAMPLED[sampler],
                    num_negatives=8,
                    scope=scope,
                    remove_accidental_hits=hits,
                    reduction="none",
                    seed=SEED.to(device),
                    sparse=False,
                    temperature=1.5,
                ),
                leaves,
                fast_mode=lane == "triton-interpret",  # two products with a Jacobian, not all of it
            )


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("scope", SCOPES)
def test_same_bits_for_any_number_of_threads(lane, scope):
    interpreted = lane == "triton-interpret"  # slow, and of one thread
    inputs = make_inputs(150 if interpreted else 500, 3000, 24)
    before = torch.get_num_threads()
    found = []
    try:
        with run_on(lane, "sampled_softmax_loss") as device:
            # Plain PyTorch's products are MKL's, whose sums depend on the number of threads.
            for threads in (1, 1) if interpreted or lane == "plain" else (1, 2, 1, 3):
                torch.set_num_threads(threads)
                leaves = {
                    k: v.to(device).requires_grad_(v.is_floating_point()) for k, v in inputs.items()
                }
                loss = sampled_softmax_loss(
                    **leaves, num_negatives=200, scope=scope, seed=SEED.to(device)
                )
                hidden, items = torch.autograd.grad(loss, [leaves["hidden"], leaves["items"]])
                found.append((loss, hidden, items._indices(), items._values()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("scope", ["batch", "block"])
def test_memory_is_that_of_the_candidates(scope):
    inputs = make_inputs(256, 50_000, 8)
    leaves = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    with LargestTensor() as seen:
        sampled_softmax_loss(**leaves, num_negatives=64, scope=scope).backward()
    assert seen.elements <= 256 * 64  # no V x D, no N x V


def test_seed_governs():
    inputs = make_inputs(40, 500, 8)
    torch.manual_seed(5)
    first = sampled_softmax_loss(**inputs, num_negatives=9)
    other = sampled_softmax_loss(**inputs, num_negatives=9)
    torch.manual_seed(5)
    assert torch.equal(sampled_softmax_loss(**inputs, num_negatives=9), first)
    assert not torch.equal(other, first)


def test_t4rec_takes_the_lowest_ids():
    """The reference's bias: twice as many draws, sorted, the first K of them kept."""
    ids, valid = drawn(1, 100_000, 100, "t4rec", low=1)
    kept = ids[valid]
    assert len(kept) == 100
    assert kept.max() < 20_000  # the log-uniform's median of 100 is far above
    assert torch.equal(kept, kept.unique())


# LogUniformSampler(max_n_samples=5, max_id=10, min_id=1).unique_sampling_dist of transformers4rec
# 23.12: what it takes for the chance that ten draws hold an id.
T4REC_CHANCES = [
    0.0, 0.9280340671539307, 0.802489697933197, 0.6918860673904419, 0.6034573316574097,
    0.5332803130149841, 0.4769149124622345, 0.43091583251953125, 0.39278486371040344,
    0.3607213795185089,
]  # fmt: skip


def test_t4rec_corrects_as_the_reference_does():
    ids = torch.arange(10)
    options = plain.Options(5, SAMPLERS.index("t4rec"), 0, 1, math.log(10), True, True, 1.0, -100)
    chances = torch.tensor(T4REC_CHANCES, dtype=torch.float64) + 1e-16
    torch.testing.assert_close(
        plain._expected(options, ids, 10, None), chances.log(), rtol=1e-6, atol=1e-6
    )
    # and at a size where float32 logarithms are nearly those of float64
    sampler = LogUniformSampler(50, 1000, 1, keep_lowest=True)
    options = options._replace(num_negatives=50, log_size=math.log(1000))
    torch.testing.assert_close(
        plain._expected(options, torch.arange(1, 1000), 1000, None).exp(),
        sampler.unique_sampling_dist[1:].double(),
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 47, 48, 49, 127, 128, 129, 200]),
    v=st.sampled_from([1, 2, 95, 96, 97, 1000]),
    d=st.sampled_from([1, 3, 8, 15, 16, 17, 64, 100]),
    k=st.sampled_from([1, 2, 95, 96, 97, 250]),
    scope=st.sampled_from(SCOPES),
    sampler=st.sampled_from(["log_uniform", "uniform"]),
    hits=st.booleans(),
)
def test_any_shape(lane, n, v, d, k, scope, sampler, hits):
    inputs = make_inputs(n, v, d)
    inputs["target"][1::3] = -100
    hits = hits or v < 10  # else sums of equal terms cancel, and rounding is all that is left
    options = {
        **DENSE,
        "num_negatives": k,
        "scope": scope,
        "sampler": sampler,
        "remove_accidental_hits": hits,
        "reduction": "none",
    }
    # Of a few items the terms of a gradient cancel, and what is left of them is rounding, whoever
    # sums them: eps of the largest for each term.
    largest = float(torch.cat([inputs["hidden"], inputs["items"]]).abs().max())
    slack = max(n, k) * torch.finfo(torch.float64).eps * largest if v < 10 else 0.0
    check(
        *(lane, sampled_softmax_loss, naive, inputs, options, torch.float64),
        diff=("hidden", "items"),
        slack=slack,
    )


def test_table_past_2_to_the_31(tmp_path):
    """V * D = 2**31 + 640: offsets of 32 bits would read elsewhere."""
    d, v, used = 64, 2**25 + 10, 50
    path = tmp_path / "items"
    with path.open("wb") as file:
        file.truncate(2 * v * d)  # a file of holes: only the pages used take space
    items = torch.from_file(str(path), shared=True, size=v * d, dtype=torch.bfloat16).view(v, d)
    generator = torch.Generator().manual_seed(0)
    items[v - used :] = torch.randn(used, d, generator=generator).bfloat16()
    hidden = torch.randn(9, d, generator=generator).bfloat16().requires_grad_()
    target = torch.randint(v - used, v, (9,), generator=generator)
    options = {"num_negatives": 30, "sampler": "uniform", "seed": SEED}
    items.requires_grad_()
    loss = sampled_softmax_loss(hidden, items, target, low=v - used, **options)
    dhidden, ditems = torch.autograd.grad(loss, [hidden, items])
    small = items[v - used :].detach().clone().requires_grad_()
    wanted = sampled_softmax_loss(hidden, small, target - (v - used), **options)
    dhidden_small, dsmall = torch.autograd.grad(wanted, [hidden, small])
    assert torch.equal(loss, wanted)
    assert torch.equal(dhidden, dhidden_small)
    assert torch.equal(ditems.indices() - (v - used), dsmall.indices())
    assert torch.equal(ditems.values(), dsmall.values())


def test_popularity_table_is_the_counts():
    inputs = make_inputs(20, 50, 4, popularity=True)
    counts = inputs.pop("popularity")
    options = {"num_negatives": 9, "sampler": "popularity", "seed": SEED}
    table = popularity_table(counts, 0.5)
    loss = sampled_softmax_loss(**inputs, **options, popularity=table)
    assert torch.equal(
        loss, sampled_softmax_loss(**inputs, **options, popularity=counts, alpha=0.5)
    )
    assert not torch.equal(loss, sampled_softmax_loss(**inputs, **options, popularity=counts))
    none = popularity_table(torch.tensor([0, 3, 0, 7]), 0.0).cumulative
    assert torch.equal(none, torch.tensor([0.0, 1, 1, 2], dtype=torch.float64))


@pytest.mark.parametrize(
    ("counts", "alpha", "message"),
    [
        (torch.ones(2, 2), 1.0, r"counts must have shape \(V,\).* got \(2, 2\)"),
        (torch.ones(3), -1.0, "alpha must be >= 0; got -1"),
        (torch.tensor([1.0, -2.0]), 1.0, "counts must be finite and >= 0; got -2.0 at item 1"),
        (torch.tensor([1.0, math.inf]), 1.0, "counts must be finite .* got inf at item 1"),
        (torch.zeros(3), 1.0, "counts must not all be 0"),
    ],
)
def test_popularity_table_errors(counts, alpha, message):
    with pytest.raises(ValueError, match=f"^popularity_table: {message}"):
        popularity_table(counts, alpha)


def test_autocast_does_not_lower_precision():
    inputs = make_inputs(16, 200, 32)
    plain = sampled_softmax_loss(**inputs, num_negatives=9, seed=SEED)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sampled_softmax_loss(**inputs, num_negatives=9, seed=SEED), plain)


def test_backward_takes_the_backend_of_forward():
    inputs = make_inputs(4, 9, 3)
    inputs["hidden"].requires_grad_()
    inputs["items"].requires_grad_()
    with backend.use("plain"):
        loss = sampled_softmax_loss(**inputs, num_negatives=5)
    loss.backward()
    assert inputs["hidden"].grad.abs().max() > 0


def test_second_derivative_is_refused():
    inputs = make_inputs(4, 9, 3)
    hidden = inputs.pop("hidden").requires_grad_()
    loss = sampled_softmax_loss(hidden, **inputs, num_negatives=5)
    (grad,) = torch.autograd.grad(loss**2, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("scope", SCOPES)
def test_compiles_to_one_graph(scope):
    inputs = make_inputs(140, 30, 6)
    inputs["target"][3] = -100
    rows = torch.tensor([4, -1, 3, 0, 0])

    def step(hidden, items):
        return sampled_softmax_loss(
            hidden,
            items,
            inputs["target"],
            rows=rows,
            num_negatives=7,
            scope=scope,
            seed=SEED,
            sparse=False,
        )

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[k].clone().requires_grad_() for k in ("hidden", "items")]
        loss = function(*leaves)
        grads.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*grads):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_opcheck(sparse):
    inputs = make_inputs(9, 30, 6, bias=True)
    tensors = (*(inputs[k] for k in ("hidden", "items", "target", "bias")), None, None, SEED)
    options = (7, 0, 0, 0, math.log(31), True, True, 1.0, -100)
    forward = torch.ops.t4r_fast.sampled_softmax_loss_fwd
    torch.library.opcheck(forward, (*tensors, *options, True))
    found = forward(*tensors, *options, True)
    torch.library.opcheck(
        torch.ops.t4r_fast.sampled_softmax_loss_bwd,
        (torch.ones(9), *tensors, *found, *options, sparse, True, True),
    )


H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 4])
P = {"sampler": "popularity"}
ERRORS = {
    "hidden": ((H[0], W, T), {}, ValueError, r"hidden must have shape \(N, D\); got \(4,\)"),
    "items dtype": ((H, W.double(), T), {}, TypeError, "items must .*float32; got torch.float64"),
    "target range": ((H, W, T + 2), {}, IndexError, "target < 5 .*-100; got 6 at row 2"),
    "rows range": ((H, W, T), {"rows": T}, IndexError, "rows must be < 3 .* got 4 at entry 2"),
    "negatives": ((H, W, T), {"num_negatives": 0}, ValueError, "num_negatives must be >= 1; got 0"),
    "temperature": ((H, W, T), {"temperature": 0.0}, ValueError, "temperature must be > 0; got 0"),
    "sampler": ((H, W, T), {"sampler": "x"}, ValueError, "sampler must be .* t4rec; got 'x'"),
    "scope": ((H, W, T), {"scope": "x"}, ValueError, "scope must be one of batch, .* got 'x'"),
    "reduction": ((H, W, T), {"reduction": "max"}, ValueError, "mean, sum, none; got 'max'"),
    "low": ((H, W, T), {"low": 5}, ValueError, "low must be 0 <= low < 5 .* got 5"),
    "low, popularity": ((H, W, T), {"low": 1, **P}, ValueError, "low must be 0 with .* got 1"),
    "no counts": ((H, W, T), P, ValueError, "popularity must be given .* got none"),
    "counts": ((H, W, T), {"popularity": T}, ValueError, "popularity .* got it with .*'log_un"),
    "counts shape": (
        (H, W, T),
        {"popularity": torch.ones(4), **P},
        ValueError,
        r"popularity must have shape \(V,\), \(5,\); got \(4,\)",
    ),
    "alpha": ((H, W, T), {"alpha": 0.5}, ValueError, "alpha must be 1 without .* got 0.5"),
    "alpha twice": (
        (H, W, T),
        {"alpha": 0.5, "popularity": popularity_table(torch.ones(5)), **P},
        ValueError,
        "alpha must be 1 with a PopularityTable.* got 0.5",
    ),
    "t4rec": (
        (H, W, T),
        {"sampler": "t4rec", "scope": "row"},
        ValueError,
        "sampler 't4rec' must have scope 'batch', .* got 'row', True, True",
    ),
    "seed": ((H, W, T), {"seed": SEED[:1]}, ValueError, r"seed must be int64 \(2,\)"),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=rf"^sampled_softmax_loss: .*{message}"):
        sampled_softmax_loss(*args, **{"num_negatives": 2, **options})

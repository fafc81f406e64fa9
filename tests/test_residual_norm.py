"""residual_norm against F.layer_norm, with draws made one by one in the test."""

import math

import pytest
import torch
import torch.nn.functional as F
from dropout_case import SEED, factor, some_places
from harness import check, lanes, run_on

from t4r_fast import backend
from t4r_fast.ops.residual_norm import residual_norm
from t4r_fast.plain import residual_norm as plain

LANES = lanes("residual_norm")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LEAVES = ("x", "residual", "weight", "norm_bias", "bias")


def naive(
    x,
    residual,
    weight,
    norm_bias,
    places,
    bias=None,
    eps=1e-5,
    dropout=0.0,
    seed=None,
    site=0,
):
    a = x if bias is None else x + bias
    z = a * factor(places, x, dropout, seed, site) + residual
    there = places[:, None] >= 0
    y = F.layer_norm(z.where(there, 0.0), x.shape[1:], weight, norm_bias, eps)
    return y.where(there, 0.0)


def make_inputs(rows, width, bias=True, none=(), shift=0.0):
    g = torch.Generator().manual_seed(rows * 1009 + width)
    inputs = {
        "x": torch.randn(rows, width, generator=g),
        "residual": torch.randn(rows, width, generator=g) + shift,
        "weight": torch.randn(width, generator=g) * 0.5 + 1,
        "norm_bias": torch.randn(width, generator=g),
        "places": some_places(rows, none),
        "seed": SEED,
    }
    if bias:
        inputs["bias"] = torch.randn(width, generator=g)
    return inputs


def named(inputs):
    return tuple(name for name in LEAVES if name in inputs)


def run(lane, inputs, dy=None, **options):
    """y and the gradients of all that have one, on the CPU."""
    with run_on(lane, "residual_norm") as device:
        moved = {k: t.to(device) for k, t in inputs.items()}
        for name in named(inputs):
            moved[name] = moved[name].detach().requires_grad_()
        y = residual_norm(**moved, **options)
        dy = torch.linspace(-1, 2, y.numel()).reshape(y.shape) if dy is None else dy
        grads = torch.autograd.grad(
            y, [moved[name] for name in named(inputs)], dy.to(device, y.dtype)
        )
    return [t.detach().cpu() for t in (y, *grads)]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 16), (37, 5), (70, 67)], ids=str)
def test_matches_layer_norm(lane, dtype, dropout, shape):
    inputs = make_inputs(*shape, none=(shape[0] // 2,) if shape[0] > 1 else ())
    options = {"dropout": dropout, "site": 5}
    check(lane, residual_norm, naive, inputs, options, dtype, named(inputs))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 192])
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_edges_of_vectors_and_blocks(lane, rows, width):
    inputs = make_inputs(rows, width, bias=width % 2 == 0)
    options = {"dropout": 0.0 if width % 3 == 0 else 0.5, "eps": 0.1}
    # gradients of narrow rows cancel to nothing but rounding
    check(lane, residual_norm, naive, inputs, options, torch.float64, named(inputs), 1e-14)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("shift", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3])
def test_means_far_from_zero(lane, shift, eps):
    """The variance is that of differences from the mean: squares of 1e4 would leave nothing of 1.

    A mean is rounded once, and the gradient of weight adds that up over the rows.
    """
    inputs = make_inputs(20, 192, shift=shift)
    options = {"dropout": 0.3, "eps": eps}
    slack = shift * 2**-22
    check(lane, residual_norm, naive, inputs, options, torch.float32, named(inputs), slack)


@pytest.mark.parametrize("lane", LANES)
def test_rows_do_not_know_each_other(lane):
    """Any order, any packing: the same bits of a row."""
    inputs = make_inputs(150, 72, none=(3, 77))
    dy = torch.randn(150, 72, generator=torch.Generator().manual_seed(1))
    y, dx, dresidual, *_ = run(lane, inputs, dy, dropout=0.4)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    # plain PyTorch's sums over a row may go in another order when rows are few
    same = torch.testing.assert_close if lane.startswith("plain") else exactly
    for rows in (order, order[:41], order[:1]):
        part = {k: t[rows] if len(t) == 150 else t for k, t in inputs.items()}
        found = run(lane, part, dy[rows], dropout=0.4)
        same(found[0], y[rows])
        same(found[1], dx[rows])
        same(found[2], dresidual[rows])


def exactly(found, expected):
    assert torch.equal(found, expected)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_rows_for_nothing_are_not_read(lane, dtype, dropout):
    none = [0, 9, 69]
    inputs = make_inputs(70, 33, none=none)
    inputs = {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}
    dy = torch.linspace(-1, 1, 70 * 33).reshape(70, 33)
    clean = run(lane, inputs, dy, dropout=dropout, eps=0.0)
    for t in (inputs["x"], inputs["residual"], dy):
        t[none] = math.nan
    found = run(lane, inputs, dy, dropout=dropout, eps=0.0)
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    for t in found[:3]:
        assert not t[none].any()


@pytest.mark.parametrize("lane", LANES)
def test_drops_what_activation_dropout_drops(lane):
    """dx is 0 where a column was dropped and nowhere else."""
    inputs = make_inputs(60, 130)
    dy = torch.randn(60, 130, generator=torch.Generator().manual_seed(2))
    dx, dresidual = run(lane, inputs, dy, dropout=0.3, site=9)[1:3]
    stays = factor(inputs["places"], inputs["x"], 0.3, SEED, 9)
    torch.testing.assert_close(dx, dresidual * stays)
    assert torch.equal(dx != 0, stays != 0)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views(lane, dtype):
    inputs = make_inputs(21, 40)
    inputs["places"] = torch.stack([inputs["places"]] * 2, 1)[:, 0]
    for name in ("weight", "norm_bias", "bias"):
        inputs[name] = torch.stack([inputs[name]] * 2, 1)[:, 0]
    wide = torch.randn(21, 100, generator=torch.Generator().manual_seed(4))
    for x in (wide[:, 7:47], wide[:, :80:2], wide[:, :40].T.contiguous().T):
        for names in (("x",), ("residual",), ("x", "residual")):
            given = {**inputs, **dict.fromkeys(names, x)}
            check(lane, residual_norm, naive, given, {"dropout": 0.3}, dtype, named(inputs))


@pytest.mark.parametrize("lane", LANES)
def test_gradients_of_any_strides(lane):
    inputs = make_inputs(9, 24)
    dy = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))[:, ::2]
    expected = run(lane, inputs, dy.contiguous(), dropout=0.3)
    for other in (dy, dy.T.contiguous().T):
        torch.testing.assert_close(run(lane, inputs, other, dropout=0.3), expected)
    # of a sum of y: one number for all
    one = run(lane, inputs, torch.ones(()).expand(9, 24), dropout=0.3)
    torch.testing.assert_close(one, run(lane, inputs, torch.ones(9, 24), dropout=0.3))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_there(lane, rows):
    inputs = make_inputs(rows, 8, none=range(rows))
    found = run(lane, inputs, dropout=0.5)
    assert [t.shape for t in found] == [(rows, 8)] * 3 + [(8,)] * 3
    assert not torch.cat([t.flatten() for t in found]).any()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_float32_parameters_beside_low_precision(lane, dropout):
    inputs = make_inputs(30, 24)
    inputs["x"], inputs["residual"] = inputs["x"].bfloat16(), inputs["residual"].bfloat16()
    found = run(lane, inputs, dropout=dropout)
    assert [t.dtype for t in found] == [torch.bfloat16] * 3 + [torch.float32] * 3
    wide = {**inputs, "x": inputs["x"].float(), "residual": inputs["residual"].float()}
    for a, b in zip(found, run(lane, wide, dropout=dropout), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_the_gradients_that_are_needed(lane, dropout):
    inputs = make_inputs(66, 20)
    expected = dict(zip(LEAVES, run(lane, inputs, torch.ones(66, 20), dropout=dropout)[1:]))
    with run_on(lane, "residual_norm") as device:
        for name in LEAVES:
            moved = {k: t.to(device) for k, t in inputs.items()}
            leaf = moved[name] = moved[name].clone().requires_grad_()
            y = residual_norm(**moved, dropout=dropout)
            (grad,) = torch.autograd.grad(y.sum(), [leaf])
            torch.testing.assert_close(grad.cpu(), expected[name], rtol=1e-5, atol=1e-5)


def test_gradcheck():
    inputs = make_inputs(5, 6, none=(2,))
    leaves = [inputs[k].double().requires_grad_() for k in LEAVES]
    for dropout in (0.0, 0.3):
        assert torch.autograd.gradcheck(
            lambda x, r, w, b, c, p=dropout: residual_norm(
                x, r, w, b, inputs["places"], bias=c, dropout=p, seed=SEED
            ),
            leaves,
        )


def test_saves_no_third_matrix():
    """x and residual, which are there anyway, and two numbers a row."""
    inputs = make_inputs(50, 64)
    inputs["x"].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        residual_norm(**inputs, dropout=0.3)
    large = [t for t in saved if t is not None and t.numel() >= 50 * 64]
    assert {t.data_ptr() for t in large} == {inputs["x"].data_ptr(), inputs["residual"].data_ptr()}


def test_autocast_does_not_lower_precision():
    inputs = make_inputs(16, 20)
    expected = residual_norm(**inputs, dropout=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(residual_norm(**inputs, dropout=0.3), expected)


def test_second_derivative_is_refused():
    inputs = make_inputs(4, 9)
    x = inputs.pop("x").requires_grad_()
    loss = residual_norm(x, **inputs).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_to_one_graph(lane, dropout):
    inputs = make_inputs(13, 30)
    fixed = {k: inputs[k] for k in ("places", "seed")}
    with run_on(lane, "residual_norm") as device:
        fixed = {k: t.to(device) for k, t in fixed.items()}

        def step(*leaves):
            return residual_norm(**dict(zip(LEAVES, leaves)), dropout=dropout, **fixed)

        found = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaves = [inputs[k].clone().to(device).requires_grad_() for k in LEAVES]
            y = function(*leaves)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("lane", [lane for lane in LANES if not lane.startswith("plain")])
@pytest.mark.parametrize("full", [True, False])
def test_opcheck(lane, full):
    inputs = make_inputs(13, 30, full)
    with run_on(lane, "residual_norm") as device:
        moved = {k: t.to(device) for k, t in inputs.items()}
        ops = backend.ops(backend.forced(), plain)
        given = [moved[k] for k in ("x", "residual", "weight", "norm_bias", "places")]
        given += [moved["bias"], moved["seed"]] if full else [None, None]
        dropout = 0.3 if full else 0.0
        torch.library.opcheck(ops.residual_norm_fwd, (*given, 1e-5, dropout, 2))
        y, mean, rstd = ops.residual_norm_fwd(*given, 1e-5, dropout, 2)
        del given[3]
        torch.library.opcheck(ops.residual_norm_bwd, (y, *given, mean, rstd, dropout, 2, full))


X, V, P = torch.zeros(3, 4), torch.zeros(4), torch.tensor([0, 1, 1 << 32])
GOOD = {"x": X, "residual": X, "weight": V, "norm_bias": V, "places": P}
ERRORS = {
    "x shape": ({"x": X[0]}, ValueError, r"x must have shape \(R, W\); got \(4,\)"),
    "x dtype": ({"x": X.long()}, TypeError, "x must be float32, .*; got torch.int64"),
    "x width": (
        {"x": X[:, :0], "residual": X[:, :0], "weight": V[:0], "norm_bias": V[:0]},
        ValueError,
        r"x must have W >= 1; got \(3, 0\)",
    ),
    "places shape": ({"places": P[None]}, ValueError, r"places must have .* got \(1, 3\)"),
    "places dtype": ({"places": P.int()}, TypeError, "places must be int64; got torch.int32"),
    "places rows": ({"places": P[:2]}, ValueError, "places must have one entry .* 3; got 2"),
    "places device": ({"places": P.to("meta")}, ValueError, "places must be on .* got meta"),
    "residual shape": ({"residual": X[:2]}, ValueError, r"residual must .* got .*\(2, 4\)"),
    "residual dtype": ({"residual": X.double()}, ValueError, "residual must .*torch.float64"),
    "residual device": ({"residual": X.to("meta")}, ValueError, "residual must be on .*meta"),
    "weight shape": ({"weight": V[:3]}, ValueError, r"weight .* \(W,\), \(4,\); got \(3,\)"),
    "weight dtype": ({"weight": V.half()}, TypeError, "weight must .*; got torch.float16"),
    "weight device": ({"weight": V.to("meta")}, ValueError, "weight must be on .* got meta"),
    "norm_bias shape": ({"norm_bias": X}, ValueError, r"norm_bias .* got \(3, 4\)"),
    "bias shape": ({"bias": V[:3]}, ValueError, r"bias .* \(4,\); got \(3,\)"),
    "eps": ({"eps": -1.0}, ValueError, "eps must be >= 0; got -1.0"),
    "dropout": ({"dropout": 1.0}, ValueError, "dropout must be .* < 1; got 1.0"),
    "seed": ({"seed": P}, ValueError, r"seed must be int64 \(2,\), .*; got .*\(3,\)"),
    "site": ({"site": -1}, ValueError, r"site must be 0 <= site < 2\*\*32; got -1"),
}


@pytest.mark.parametrize(("wrong", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(wrong, kind, message):
    with pytest.raises(kind, match=rf"^residual_norm: .*{message}"):
        residual_norm(**{**GOOD, **wrong})

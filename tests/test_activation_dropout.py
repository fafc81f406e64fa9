"""activation_dropout against torch.nn.functional, with draws made one by one in the test."""

import math

import pytest
import torch
import torch.nn.functional as F
from dropout_case import SEED, factor, kept, some_places
from harness import check, lanes, run_on

from t4r_fast import backend
from t4r_fast.ops.activation_dropout import activation_dropout
from t4r_fast.plain import activation_dropout as plain

LANES = lanes("activation_dropout")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ACTIVATIONS = {
    "none": lambda a: a,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "relu": F.relu,
}


def naive(x, places, bias=None, activation="gelu", dropout=0.0, seed=None, site=0):
    a = x if bias is None else x + bias
    y = ACTIVATIONS[activation](a.where(places[:, None] >= 0, 0.0))
    return y * factor(places, x, dropout, seed, site)


def gelu_truth(x):
    """gelu and its derivative without the cancellation of 1 + erf(x) in the lower tail."""
    share = torch.erfc(x * -(0.5**0.5)) / 2
    return x * share, share + x * torch.exp(-x * x / 2) / math.tau**0.5


def gelu_tanh_truth(x):
    factor = 2 * (2 / math.pi) ** 0.5
    v = factor * (x + 0.044715 * x**3)
    share, slope = torch.sigmoid(v), torch.sigmoid(v) * torch.sigmoid(-v)
    return x * share, share + x * slope * factor * (1 + 3 * 0.044715 * x * x)


TRUTH = {"gelu": gelu_truth, "gelu_tanh": gelu_tanh_truth}


def make_inputs(rows, width, bias=True, none=(), scale=2.0):
    g = torch.Generator().manual_seed(rows * 1009 + width)
    inputs = {
        "x": torch.randn(rows, width, generator=g) * scale,
        "places": some_places(rows, none),
        "seed": SEED,
    }
    if bias:
        inputs["bias"] = torch.randn(width, generator=g)
    return inputs


def run(lane, inputs, dy=None, **options):
    """y and the gradients of x and bias, on the CPU."""
    with run_on(lane, "activation_dropout") as device:
        moved = {k: t.to(device) for k, t in inputs.items()}
        for name in {"x", "bias"} & moved.keys():
            moved[name] = moved[name].detach().requires_grad_()
        leaves = [moved[k] for k in ("x", "bias") if k in moved]
        y = activation_dropout(**moved, **options)
        dy = torch.linspace(-1, 2, y.numel()).reshape(y.shape) if dy is None else dy
        grads = torch.autograd.grad(y, leaves, dy.to(device, y.dtype))
    return [t.detach().cpu() for t in (y, *grads)]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (37, 5), (70, 67)], ids=str)
def test_matches_torch(lane, dtype, activation, shape):
    inputs = make_inputs(*shape, none=(shape[0] // 2,) if shape[0] > 1 else ())
    options = {"activation": activation, "dropout": 0.3, "site": 5}
    check(lane, activation_dropout, naive, inputs, options, dtype, ("x", "bias"))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("width", [1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 192])
@pytest.mark.parametrize("rows", [1, 64, 65])
def test_edges_of_vectors_and_blocks(lane, rows, width):
    inputs = make_inputs(rows, width, bias=width % 2 == 0)
    names = tuple(name for name in ("x", "bias") if name in inputs)
    for dropout in (0.0, 0.5) if rows < 64 else (0.5,):
        options = {"dropout": dropout}
        # PyTorch's lower tail loses its digits to 1 + erf(x)
        slack = 1e-14
        check(lane, activation_dropout, naive, inputs, options, torch.float64, names, slack)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_sizes_of_arguments(lane, activation, dtype):
    """Each number by itself: near 0, in the tails, far out; and nan stays nan."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 12, 200)])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0])]).to(dtype)
    inputs = {"x": x[None], "places": torch.zeros(1, dtype=torch.int64)}
    y, dx = run(lane, inputs, torch.ones(1, len(x)), activation=activation)
    truth = TRUTH[activation](x.double()[None])
    most = 50 if lane.startswith("plain") else 4  # PyTorch's own go up to 9, 30 in float64
    for found, exact in zip((y, dx), truth, strict=True):
        bound = most * torch.finfo(dtype).eps * exact.abs().clamp(min=1)
        assert ((found.double() - exact).abs() <= bound).all()
    inputs["x"] = x[None].clone()
    inputs["x"][0, 7::50] = math.nan
    found = run(lane, inputs, torch.ones(1, len(x)), activation=activation)
    for a, b in zip(found, (y, dx), strict=True):
        b[0, 7::50] = math.nan
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 6, 64, 130])
@pytest.mark.parametrize("seed", [SEED, torch.tensor([0, 0]), torch.tensor([-1, 2**62])], ids=str)
def test_draws_are_those_of_the_counter(lane, dtype, columns, seed):
    """And 0 elsewhere: nothing is left of what is dropped."""
    places = torch.tensor([0, 1, 5 << 32, (2**31 - 1) << 32 | (2**32 - 1), -1, 7 << 32 | 3])
    inputs = {"x": torch.ones(6, columns, dtype=dtype), "places": places, "seed": seed}
    for site, dropout in ((0, 0.3), (2**32 - 1, 0.75)):
        y, dx = run(
            lane, inputs, torch.ones(6, columns), activation="none", dropout=dropout, site=site
        )
        stays = kept(places, columns, dropout, seed.tolist(), site) & (places[:, None] >= 0)
        value = torch.tensor(1 / (1 - dropout), dtype=dtype)
        assert torch.equal(y != 0, stays)
        # Triton's interpreter rounds bfloat16 toward 0
        torch.testing.assert_close(y, torch.where(stays, value, 0))
        assert torch.equal(dx, y)


@pytest.mark.parametrize("lane", LANES)
def test_rows_do_not_know_each_other(lane):
    """Any order, any packing: the same bits of a row."""
    inputs = make_inputs(150, 72, none=(3, 77))
    y, dx, _ = run(lane, inputs, torch.ones(150, 72), dropout=0.4)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    some = order[:41]
    for rows in (order, some, some[:1]):
        part = {**inputs, "x": inputs["x"][rows], "places": inputs["places"][rows]}
        found = run(lane, part, torch.ones(len(rows), 72), dropout=0.4)
        assert torch.equal(found[0], y[rows])
        assert torch.equal(found[1], dx[rows])


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rows_for_nothing_are_not_read(lane, dtype, activation):
    inputs = make_inputs(70, 33, none=(0, 9, 69))
    inputs = {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}
    options = {"activation": activation, "dropout": 0.2}
    dy = torch.linspace(-1, 1, 70 * 33).reshape(70, 33)
    clean = run(lane, inputs, dy, **options)
    none = [0, 9, 69]
    inputs["x"][none], dy[none] = math.nan, math.nan
    found = run(lane, inputs, dy, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, found, strict=True))
    assert not found[0][none].any()
    assert not found[1][none].any()


@pytest.mark.parametrize("lane", LANES)
def test_share_that_stays(lane):
    x, places = torch.ones(200, 256), torch.arange(200) << 32
    for dropout in (0.1, 0.5, 0.9):
        y, _ = run(
            lane, {"x": x, "places": places, "seed": SEED}, activation="none", dropout=dropout
        )
        share = (y != 0).double().mean()
        assert abs(share - (1 - dropout)) < 5 * (dropout * (1 - dropout) / y.numel()) ** 0.5


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views(lane, dtype):
    inputs = make_inputs(21, 40)
    inputs["places"] = torch.stack([inputs["places"]] * 2, 1)[:, 0]
    inputs["bias"] = torch.randn(80, generator=torch.Generator().manual_seed(3))[::2]
    wide = torch.randn(21, 100, generator=torch.Generator().manual_seed(4))
    for x in (wide[:, 7:47], wide[:, :80:2], wide[:, :40].T.contiguous().T):
        inputs["x"] = x
        check(lane, activation_dropout, naive, inputs, {"dropout": 0.3}, dtype, ("x", "bias"))


@pytest.mark.parametrize("lane", LANES)
def test_gradients_of_any_strides(lane):
    inputs = make_inputs(9, 24)
    dy = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))[:, ::2]
    expected = run(lane, inputs, dy.contiguous(), dropout=0.3)
    for other in (dy, dy.T.contiguous().T):
        torch.testing.assert_close(run(lane, inputs, other, dropout=0.3), expected)
    one = run(lane, inputs, torch.ones(()).expand(9, 24), dropout=0.3)
    torch.testing.assert_close(one, run(lane, inputs, torch.ones(9, 24), dropout=0.3))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (5, 8)], ids=str)
def test_nothing_there(lane, shape):
    inputs = make_inputs(*shape, none=range(shape[0]))
    y, dx, dbias = run(lane, inputs, dropout=0.5)
    assert y.shape == dx.shape == shape
    assert dbias.shape == shape[1:]
    assert not torch.cat([y.flatten(), dx.flatten(), dbias]).any()


@pytest.mark.parametrize("lane", LANES)
def test_float32_bias_beside_low_precision(lane):
    inputs = make_inputs(30, 24)
    inputs["x"] = inputs["x"].bfloat16()
    found = run(lane, inputs, dropout=0.3)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    wide = {**inputs, "x": inputs["x"].float()}
    for a, b in zip(found, run(lane, wide, dropout=0.3), strict=True):
        torch.testing.assert_close(a.float(), b.to(a.dtype).float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("lane", LANES)
def test_only_the_gradients_that_are_needed(lane):
    inputs = make_inputs(66, 20)
    expected = run(lane, inputs, torch.ones(66, 20), dropout=0.3)
    with run_on(lane, "activation_dropout") as device:
        for name, wanted in (("x", expected[1]), ("bias", expected[2])):
            moved = {k: t.to(device) for k, t in inputs.items()}
            leaf = {name: moved[name].clone().requires_grad_()}
            y = activation_dropout(**{k: t.detach() for k, t in moved.items()} | leaf, dropout=0.3)
            (grad,) = torch.autograd.grad(y.sum(), [leaf[name]])
            assert torch.equal(grad.cpu(), wanted)


def test_gradcheck():
    inputs = make_inputs(5, 6, none=(2,))
    leaves = [inputs[k].double().requires_grad_() for k in ("x", "bias")]
    for activation in ACTIVATIONS:
        options = {"activation": activation, "dropout": 0.3, "seed": SEED}
        assert torch.autograd.gradcheck(
            lambda x, b, o=options: activation_dropout(x, inputs["places"], bias=b, **o), leaves
        )


def test_seed_of_the_default_generator():
    inputs = make_inputs(40, 16)
    del inputs["seed"]
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append([activation_dropout(**inputs, dropout=0.5) for _ in range(2)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[0][1])
    state = torch.get_rng_state()
    activation_dropout(**inputs)
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_does_not_lower_precision():
    inputs = make_inputs(16, 20)
    expected = activation_dropout(**inputs, dropout=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(activation_dropout(**inputs, dropout=0.3), expected)


def test_second_derivative_is_refused():
    inputs = make_inputs(4, 9)
    x = inputs.pop("x").requires_grad_()
    loss = activation_dropout(x, **inputs).square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("lane", ["plain", *[lane for lane in LANES if lane != "plain"]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_to_one_graph(lane, dropout):
    inputs = make_inputs(13, 30)
    x, bias = inputs.pop("x"), inputs.pop("bias")
    with run_on(lane, "activation_dropout") as device:
        inputs = {k: t.to(device) for k, t in inputs.items()}

        def step(x, bias):
            return activation_dropout(x, bias=bias, dropout=dropout, **inputs)

        found = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            leaves = [t.clone().to(device).requires_grad_() for t in (x, bias)]
            y = function(*leaves)
            found.append((y.detach(), *torch.autograd.grad(y.sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("lane", [lane for lane in LANES if not lane.startswith("plain")])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(lane, bias):
    inputs = make_inputs(13, 30, bias)
    with run_on(lane, "activation_dropout") as device:
        x, places, seed = (inputs[k].to(device) for k in ("x", "places", "seed"))
        vector = inputs["bias"].to(device) if bias else None
        ops = backend.ops(backend.forced(), plain)
        given = (x, places, vector, seed if bias else None, 1, 0.3, 2)
        torch.library.opcheck(ops.activation_dropout_fwd, given)
        torch.library.opcheck(ops.activation_dropout_bwd, (x + 1, *given, bias))


X, P = torch.zeros(3, 4), torch.tensor([0, 1, 1 << 32])
ERRORS = {
    "x shape": ((X[0], P), {}, ValueError, r"x must have shape \(R, W\); got \(4,\)"),
    "x dtype": ((X.long(), P), {}, TypeError, "x must be float32, .*; got torch.int64"),
    "places shape": ((X, P[None]), {}, ValueError, r"places must have shape \(R,\); got \(1, 3\)"),
    "places dtype": ((X, P.int()), {}, TypeError, "places must be int64; got torch.int32"),
    "places rows": (
        (X, P[:2]),
        {},
        ValueError,
        "places must have one entry per row of x, 3; got 2",
    ),
    "device": (
        (X, P.to("meta")),
        {},
        ValueError,
        "places must be on the device of x, cpu; got meta",
    ),
    "bias shape": ((X, P), {"bias": X[0, :3]}, ValueError, r"bias .* \(W,\), \(4,\); got \(3,\)"),
    "bias dtype": ((X, P), {"bias": X[0].half()}, TypeError, "bias must .*; got torch.float16"),
    "bias device": ((X, P), {"bias": X[0].to("meta")}, ValueError, "bias must be on .* got meta"),
    "activation": (
        (X, P),
        {"activation": "tanh"},
        ValueError,
        "activation must be one of none, .*'tanh'",
    ),
    "dropout low": ((X, P), {"dropout": -0.1}, ValueError, "dropout must be 0 <= .*; got -0.1"),
    "dropout high": ((X, P), {"dropout": 1.0}, ValueError, "dropout must be .* < 1; got 1.0"),
    "dropout nan": ((X, P), {"dropout": math.nan}, ValueError, "dropout must be .*; got nan"),
    "seed": ((X, P), {"seed": P}, ValueError, r"seed must be int64 \(2,\), .*; got .*\(3,\)"),
    "seed device": (
        (X, P),
        {"seed": P[:2].to("meta"), "dropout": 0.1},
        ValueError,
        "seed must be on",
    ),
    "site": (
        (X, P),
        {"site": 2**32},
        ValueError,
        r"site must be 0 <= site < 2\*\*32; got 4294967296",
    ),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=rf"^activation_dropout: .*{message}"):
        activation_dropout(*args, **options)

"""tied_softmax_loss against F.cross_entropy on the full logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from harness import LargestTensor, check, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st

from t4r_fast import backend
from t4r_fast.ops.tied_softmax_loss import _stash_items, tied_softmax_loss
from t4r_fast.plain import _scores

LANES = lanes("tied_softmax_loss")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.3},
    "softcap": {"softcap": 2.0},
    "smoothing": {"label_smoothing": 0.1},
    "uniform": {"label_smoothing": 1.0},
    "z_loss": {"z_loss": 0.01},
    "all": {"temperature": 2.0, "softcap": 4.0, "label_smoothing": 0.2, "z_loss": 1e-3},
}


@pytest.fixture(params=[0, 7], ids=["one-chunk", "chunks-of-7"])
def chunks(request, monkeypatch):
    """Plain PyTorch in chunks of 7 items, so that small tests cross chunks."""
    if request.param:
        monkeypatch.setattr(_scores, "CHUNK_BYTES", 1)
        monkeypatch.setattr(_scores, "MIN_CHUNK", request.param)


def naive(
    hidden,
    items,
    target,
    bias=None,
    rows=None,
    temperature=1.0,
    softcap=0.0,
    label_smoothing=0.0,
    z_loss=0.0,
    ignore_index=-100,
    reduction="mean",
    return_lse=False,
):
    if rows is not None:
        target = torch.where(rows >= 0, target[rows.clamp(min=0)], ignore_index)
        hidden = hidden[rows.clamp(min=0)]
    z = hidden @ items.T
    z = z if bias is None else z + bias
    z = z / temperature
    z = softcap * torch.tanh(z / softcap) if softcap else z
    counted = target != ignore_index
    loss = F.cross_entropy(
        z, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    lse = torch.where(counted, z.logsumexp(1), 0.0)
    loss = loss + z_loss * lse**2
    if reduction == "sum":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss.sum() / counted.sum()
    return (loss, lse) if return_lse else loss


def make_inputs(n, v, d, bias=False, scale=1.0):
    g = torch.Generator().manual_seed(n * 10007 + v * 101 + d)
    inputs = {
        "hidden": torch.randn(n, d, generator=g) * scale,
        "items": torch.randn(v, d, generator=g),
        "target": torch.randint(0, v, (n,), generator=g),
    }
    if bias:
        inputs["bias"] = torch.randn(v, generator=g)
    return inputs


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 3), (37, 29, 5), (65, 129, 64)], ids=str)
@pytest.mark.usefixtures("chunks")
def test_matches_cross_entropy(lane, dtype, shape):
    check(lane, tied_softmax_loss, naive, make_inputs(*shape), {}, dtype, ("hidden", "items"))


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane == "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 48, 64, 100, 128])
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_same_bits_with_any_number_of_rows(lane, dtype, width, options, grad):
    """So few products that they are one thread's: the split among threads decides the sums."""
    inputs = make_inputs(50, 230, width, bias=bool(options))
    inputs = {k: t.to(dtype) if t.is_floating_point() else t for k, t in inputs.items()}
    inputs["hidden"].requires_grad_(grad)
    options = {**options, "reduction": "none", "return_lse": True}
    with run_on(lane, "tied_softmax_loss"):
        whole = tied_softmax_loss(**inputs, **options)
        for n in (*range(1, 10), 16, 17, 33):
            for part in (slice(0, n), slice(50 - n, 50)):
                rows = {k: inputs[k][part] for k in ("hidden", "target")}
                found = tied_softmax_loss(**{**inputs, **rows}, **options)
                for a, b in zip(found, whole, strict=True):
                    assert torch.equal(a, b[part]), n


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.usefixtures("chunks")
def test_options_and_lse(lane, options, reduction):
    inputs = make_inputs(13, 30, 6, bias=True)
    inputs["target"][4] = -100
    options = {**options, "reduction": reduction, "return_lse": True}
    check(
        lane,
        tied_softmax_loss,
        naive,
        inputs,
        options,
        torch.float32,
        ("hidden", "items", "bias"),
    )


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.usefixtures("chunks")
def test_rows(lane, dtype, reduction):
    inputs = make_inputs(9, 30, 6, bias=True)
    inputs["target"][5] = -100
    inputs["rows"] = torch.tensor([8, 0, -1, 3, 3, 5, 2, -1, -7])  # one twice, one ignored
    check(
        lane,
        tied_softmax_loss,
        naive,
        inputs,
        {"reduction": reduction},
        dtype,
        ("hidden", "items", "bias"),
    )


# With the items' gradient the C++ kernels make that of hidden in backward, without it in forward.
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_hidden_alone(lane, dtype, options):
    inputs = make_inputs(60, 133, 20, bias=True)
    inputs["target"][5] = -100
    inputs["rows"] = torch.arange(58).flip(0).repeat_interleave(2)  # a panel and more, all twice
    inputs["rows"][3::7] = -1
    options = {**options, "reduction": "none", "return_lse": True}
    check(lane, tied_softmax_loss, naive, inputs, options, dtype, ("hidden",))


@pytest.mark.parametrize("shape", [(1, 97, 3), (3, 300, 130), (8, 96, 16), (70, 200, 130)], ids=str)
@pytest.mark.parametrize("scale", [1 / 16, 64.0], ids=str)
def test_gradient_of_hidden_alone_keeps_small_numbers(shape, scale):
    """Scores are exact, up to 1e4: targets have all of the weight or none, sums move to new tops.

    The C++ kernels take the target out of the mean: a mean less the target would cancel.
    """
    inputs = make_inputs(*shape)
    for name in ("hidden", "items"):
        inputs[name] = inputs[name].round() * (1 if name == "hidden" else scale)
    inputs["target"][::2] = (inputs["hidden"] @ inputs["items"].T).argmax(1)[::2]
    check("cpu", tied_softmax_loss, naive, inputs, {}, torch.float32, ("hidden",))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_views_and_equal_targets(lane):
    inputs = make_inputs(16, 40, 10)
    inputs["hidden"] = inputs["hidden"].T.contiguous().T
    inputs["items"] = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))[:, ::2]
    inputs["target"] = torch.full((32,), 39)[::2]
    check(lane, tied_softmax_loss, naive, inputs, {}, torch.float32, ("hidden", "items"))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("scale", [1e-4, 1e4], ids=str)
@pytest.mark.usefixtures("chunks")
def test_extreme_logits(lane, scale):
    inputs = make_inputs(16, 40, 10, scale=scale)
    check(
        lane,
        tied_softmax_loss,
        naive,
        inputs,
        {"reduction": "none"},
        torch.float32,
        ("hidden", "items"),
    )


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_bias_of_minus_infinity_takes_items_out(lane):
    inputs = make_inputs(6, 20, 4, bias=True)
    inputs["bias"][:9] = -math.inf  # the first chunk of 7 holds nothing
    inputs["target"] = torch.tensor([9, 10, 11, 19, 19, 3])  # the last target is out: loss inf
    options = {"reduction": "none", "return_lse": True}
    check(lane, tied_softmax_loss, naive, inputs, options, torch.float32)
    with run_on(lane, "tied_softmax_loss") as device:
        items = inputs["items"].to(device).requires_grad_()
        moved = {k: v.to(device)[:5] for k, v in inputs.items() if k in ("hidden", "target")}
        tied_softmax_loss(items=items, bias=inputs["bias"].to(device), **moved).backward()
    assert torch.equal(items.grad[:9].cpu(), torch.zeros(9, 4))
    assert items.grad[9:].abs().min() > 0


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.usefixtures("chunks")
def test_nan_stays_in_its_row(lane):
    inputs = make_inputs(5, 20, 4)
    inputs["hidden"][2, 1] = math.nan
    options = {"reduction": "none", "return_lse": True}
    check(lane, tied_softmax_loss, naive, inputs, options, torch.float32)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("empty", ["no rows", "all ignored", "empty list", "skipped list"])
def test_nothing_counted(lane, empty):
    inputs = make_inputs(0 if empty == "no rows" else 4, 9, 3)
    if empty == "all ignored":
        inputs["target"][:] = -100
    if "list" in empty:
        inputs["rows"] = torch.full((0 if empty == "empty list" else 3,), -1)
    with run_on(lane, "tied_softmax_loss") as device:
        inputs = {k: v.to(device) for k, v in inputs.items()}
        leaves = [inputs["hidden"].requires_grad_(), inputs["items"].requires_grad_()]
        assert torch.isnan(tied_softmax_loss(**inputs))
        each, lse = tied_softmax_loss(**inputs, reduction="none", return_lse=True)
        assert torch.equal(each, torch.zeros_like(each))
        assert torch.equal(lse, each)
        assert len(each) == len(inputs.get("rows", inputs["target"]))
        for reduction in ("mean", "sum"):
            grads = torch.autograd.grad(tied_softmax_loss(**inputs, reduction=reduction), leaves)
            assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("lane", LANES)
def test_gradients_of_a_row_sum_to_zero(lane):
    """Sum of p = 1: what moves every item alike moves no loss."""
    inputs = make_inputs(8, 500, 16)
    with run_on(lane, "tied_softmax_loss") as device:
        inputs = {k: v.to(device) for k, v in inputs.items()}
        items = inputs["items"].requires_grad_()
        tied_softmax_loss(**inputs).backward()
    assert items.grad.sum(0).abs().max() < 1e-6


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 23, 24, 25, 48, 49, 96, 97, 193]),
    v=st.sampled_from([1, 2, 95, 96, 97, 193]),
    d=st.sampled_from([1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 65, 129]),
    bias=st.booleans(),
    ignored=st.booleans(),
    options=st.sampled_from(list(OPTIONS.values())),
)
def test_any_shape(lane, n, v, d, bias, ignored, options):
    # Of one item or two, losses and gradients come down to the rounding of a logit of up to 30,
    # which Triton's have: exp2 of scaled logits.
    slack = 1e-13 if v <= 2 and lane.startswith("triton") else 0.0
    inputs = make_inputs(n, v, d, bias, scale=d**-0.5)
    if ignored:
        inputs["target"][::3] = -100
    options = {**options, "reduction": "none", "return_lse": True}
    # dbias is one number per item: some cancel to nothing but rounding
    for leaves in (("hidden", "items"), ("hidden",)):
        check(lane, tied_softmax_loss, naive, inputs, options, torch.float64, leaves, slack)


@pytest.mark.usefixtures("chunks")
def test_gradcheck():
    inputs = make_inputs(6, 11, 3, bias=True)
    leaves = [inputs[k].double().requires_grad_() for k in ("hidden", "items", "bias")]
    rows = torch.tensor([0, 2, 2, -1, 5])
    for options in OPTIONS.values():
        assert torch.autograd.gradcheck(
            lambda h, w, b, o=options: tied_softmax_loss(
                h, w, inputs["target"], bias=b, rows=rows, reduction="none", return_lse=True, **o
            ),
            leaves,
        )


@pytest.mark.parametrize("lane", LANES)
def test_repeats_bit_for_bit(lane):
    inputs = make_inputs(64, 300, 16)
    found = []
    with run_on(lane, "tied_softmax_loss") as device:
        for _ in range(3):
            leaves = {
                k: v.to(device).requires_grad_(v.is_floating_point()) for k, v in inputs.items()
            }
            tied_softmax_loss(**leaves).backward()
            found.append((leaves["hidden"].grad, leaves["items"].grad))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("shape", [(50, 1000, 20), (64, 960, 130), (23, 97, 8), (3, 500, 8)])
def test_workspace_changes_no_bit(lane, shape, options):
    """Scores that are kept are the ones that would be made again."""
    n, v, _ = shape
    inputs = make_inputs(*shape, bias=True)
    inputs["target"][::5] = -100
    found = []
    with run_on(lane, "tied_softmax_loss") as device:
        for kept in (0, 96, v // 2, v, 10 * v):
            leaves = {
                k: t.clone().to(device).requires_grad_(t.is_floating_point())
                for k, t in inputs.items()
            }
            tied_softmax_loss(**leaves, **options, workspace_bytes=4 * n * kept).backward()
            found.append([leaves[k].grad for k in ("hidden", "items", "bias")])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_default_workspace():
    """Wide items and few rows keep their scores; at most 64 MiB with all else; none if narrow."""
    for n, v, d in [(1008, 118335, 256), (64, 118335, 128), (4096, 2000, 1024), (256, 10**7, 192)]:
        items = torch.empty(v, d, device="meta")
        kept = _stash_items(n, items, None) * n * 4
        assert kept + 3 * n * d * 4 <= 64 * 2**20 or kept == 0
    assert _stash_items(1008, torch.empty(118335, 256, device="meta"), None) > 10000
    assert _stash_items(64, torch.empty(118335, 128, device="meta"), None) == 118335
    assert _stash_items(64, torch.empty(118335, 64, device="meta"), None) == 0


def test_workspace_is_only_taken_for_a_gradient():
    inputs = make_inputs(64, 4000, 8)
    leaves = {k: t.requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    for grad, most in ((True, 64 * 4000), (False, 64)):
        with torch.set_grad_enabled(grad), LargestTensor() as seen:
            tied_softmax_loss(**leaves, workspace_bytes=2**30)
        expected = most if backend.pick("tied_softmax_loss", leaves["items"]) == "cpu" else 0
        assert seen.elements >= expected
        assert grad or seen.elements <= most


def test_memory_is_one_chunk(monkeypatch):
    monkeypatch.setattr(_scores, "CHUNK_BYTES", 64 * 100 * 4)
    monkeypatch.setattr(_scores, "MIN_CHUNK", 1)
    inputs = make_inputs(64, 5000, 8)
    leaves = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    with backend.use("plain"), LargestTensor() as seen:
        tied_softmax_loss(**leaves).backward()
    assert seen.elements <= 5000 * 8  # the table's gradient; the logits would be 64 * 5000


def test_autocast_does_not_lower_precision():
    inputs = make_inputs(16, 200, 32)
    plain = tied_softmax_loss(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tied_softmax_loss(**inputs), plain)


def test_backward_takes_the_backend_of_forward():
    inputs = make_inputs(4, 9, 3)
    inputs["hidden"].requires_grad_()
    with backend.use("plain"):
        loss = tied_softmax_loss(**inputs)
    assert loss.grad_fn is not None
    loss.backward()
    assert inputs["hidden"].grad.abs().max() > 0


def test_second_derivative_is_refused():
    inputs = make_inputs(4, 9, 3)
    hidden = inputs.pop("hidden").requires_grad_()
    loss = tied_softmax_loss(hidden, **inputs)
    with pytest.raises(RuntimeError, match=r"first derivatives only.* create_graph=True"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("workspace", [None, 2**20])
def test_compiles_to_one_graph(workspace):
    inputs = make_inputs(13, 30, 6)
    inputs["target"][3] = -100
    rows = torch.tensor([4, -1, 3, 0, 0] * 4)

    def step(hidden, items):
        options = {"z_loss": 0.1, "workspace_bytes": workspace}
        return tied_softmax_loss(hidden, items, inputs["target"], rows=rows, **options)

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[k].clone().requires_grad_() for k in ("hidden", "items")]
        loss = function(*leaves)
        grads.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*grads):
        torch.testing.assert_close(compiled, eager)


H, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([0, 1, 4])
ERRORS = {
    "hidden shape": ((H[0], W, T), {}, ValueError, r"hidden must have shape \(N, D\); got \(4,\)"),
    "items shape": ((H, W[:, :3], T), {}, ValueError, r"items must .* 4; got \(5, 3\)"),
    "no items": ((H, W[:0], T), {}, ValueError, r"items must .* V >= 1 .* got \(0, 4\)"),
    "hidden dtype": ((H.long(), W.long(), T), {}, TypeError, "hidden must be float32.*int64"),
    "items dtype": ((H, W.double(), T), {}, TypeError, "items must .*float32; got torch.float64"),
    "bias shape": ((H, W, T), {"bias": W[:, 0][:4]}, ValueError, r"bias .*\(5,\); got \(4,\)"),
    "bias dtype": ((H, W, T), {"bias": W[:, 0].half()}, TypeError, "bias must .*float16"),
    "device": ((H, W.to("meta"), T), {}, ValueError, "items must be on the device .* got meta"),
    "target shape": ((H, W, T[:2]), {}, ValueError, "one entry per row of hidden, 3; got 2"),
    "target dim": ((H, W, T[None]), {}, ValueError, r"target must have shape \(N,\)"),
    "target dtype": ((H, W, T.int()), {}, TypeError, "target must be int64; got torch.int32"),
    "target range": ((H, W, T + 2), {}, IndexError, "target < 5 .*-100; got 6 at row 2"),
    "target low": ((H, W, T - 1), {}, IndexError, "got -1 at row 0"),
    "rows shape": ((H, W, T), {"rows": T[None]}, ValueError, r"rows must have shape \(M,\)"),
    "rows dtype": ((H, W, T), {"rows": T.int()}, TypeError, "rows must be int64"),
    "rows range": ((H, W, T), {"rows": T}, IndexError, "rows must be < 3 .* got 4 at entry 2"),
    "temperature": ((H, W, T), {"temperature": 0.0}, ValueError, "temperature must be > 0; got 0"),
    "softcap": ((H, W, T), {"softcap": -1.0}, ValueError, "softcap must be >= 0 .*got -1"),
    "smoothing": ((H, W, T), {"label_smoothing": 1.5}, ValueError, "label_smoothing .* got 1.5"),
    "z_loss": ((H, W, T), {"z_loss": math.nan}, ValueError, "z_loss must be >= 0 .*got nan"),
    "workspace": (
        (H, W, T),
        {"workspace_bytes": -1},
        ValueError,
        r"workspace_bytes must be >= 0 .* got -1",
    ),
    "reduction": ((H, W, T), {"reduction": "max"}, ValueError, "mean, sum, none; got 'max'"),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=rf"^tied_softmax_loss: .*{message}"):
        tied_softmax_loss(*args, **options)


def test_ignored_rows_may_hold_any_target_when_skipped():
    """rows decides: a target that no entry of rows names is not looked at."""
    loss = tied_softmax_loss(H, W, torch.tensor([0, 99, 4]), rows=torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(math.log(5))

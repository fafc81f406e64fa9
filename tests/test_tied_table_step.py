"""tied_table_step against torch.optim on the formed gradient."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from harness import LargestTensor, compare, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_kernels import has, python

from t4r_fast import backend
from t4r_fast.ops._table import softmax_rows
from t4r_fast.ops.tied_softmax_loss import tied_softmax_loss
from t4r_fast.ops.tied_table_step import (
    KINDS,
    table_state,
    tied_table_catch_up,
    tied_table_grad_norm,
    tied_table_step,
)
from t4r_fast.plain import _scores
from t4r_fast.plain import tied_softmax_loss as loss_plain

LANES = lanes("tied_table_step")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
LR, DECAY = 0.1, 0.1  # the steps are as large as the items
RULES = {
    "sgd": {"kind": "sgd"},
    "sgd with momentum": {"kind": "sgd", "momentum": 0.9, "weight_decay": DECAY},
    "adagrad": {"kind": "adagrad", "eps": 1e-10, "weight_decay": DECAY},
    "adamw": {"kind": "adamw", "weight_decay": DECAY},
    "adamw slow": {"kind": "adamw", "betas": (0.95, 0.98), "eps": 1e-3},
    "rowwise_adagrad": {"kind": "rowwise_adagrad", "weight_decay": DECAY},
    "rowwise_adamw": {"kind": "rowwise_adamw", "weight_decay": DECAY},
}
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "softcap": {"softcap": 2.0},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "all": {"temperature": 2.0, "softcap": 4.0, "label_smoothing": 0.2, "z_loss": 1e-3},
}


@pytest.fixture(params=[0, 7], ids=["one-chunk", "chunks-of-7"])
def chunks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(_scores, "CHUNK_BYTES", 1)
        monkeypatch.setattr(_scores, "MIN_CHUNK", request.param)


class Rowwise(torch.optim.Optimizer):
    """The row-wise rules, from their definition."""

    def __init__(self, params, kind, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {})
        self.kind, self.lr, self.betas, self.eps, self.decay = kind, lr, betas, eps, weight_decay

    @torch.no_grad()
    def step(self):
        w = self.param_groups[0]["params"][0]
        s, g = self.state[w], w.grad
        if not s:
            s |= {"step": 0, "m": torch.zeros_like(w), "v": torch.zeros_like(w[:, :1])}
        s["step"] += 1
        if self.kind == "rowwise_adagrad":
            g = g + self.decay * w
            s["v"] += (g**2).mean(1, keepdim=True)
            w -= self.lr * g / (s["v"].sqrt() + self.eps)
            return
        b1, b2 = self.betas
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * s["v"] + (1 - b2) * (g**2).mean(1, keepdim=True)
        spread = (s["v"] / (1 - b2 ** s["step"])).sqrt() + self.eps
        w *= 1 - self.lr * self.decay
        w -= self.lr / (1 - b1 ** s["step"]) * s["m"] / spread


def plain_optimizer(w, rule, lr=LR):
    rule = dict(rule)
    kind = rule.pop("kind")
    if kind.startswith("rowwise"):
        eps = 1e-10 if kind == "rowwise_adagrad" else 1e-8
        return Rowwise([w], kind, lr, **({"eps": eps} | rule))
    names = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "adamw": torch.optim.AdamW}
    return names[kind]([w], lr=lr, **({"weight_decay": 0.0} | rule))


def naive_loss(hidden, items, target, bias=None, rows=None, **options):
    z = hidden @ items.T
    z = (z if bias is None else z + bias) / options.get("temperature", 1.0)
    cap = options.get("softcap", 0.0)
    z = cap * torch.tanh(z / cap) if cap else z
    if rows is not None:
        z, target = z[rows.clamp(min=0)], torch.where(rows >= 0, target[rows.clamp(min=0)], -100)
    each = F.cross_entropy(
        z, target, label_smoothing=options.get("label_smoothing", 0.0), reduction="none"
    )
    square = torch.where(target != -100, z.logsumexp(1) ** 2, 0.0)
    return (each + options.get("z_loss", 0.0) * square).sum()


def case(n, v, d, seed=0, bias=False, rows=None, lookups=5):
    g = torch.Generator().manual_seed(n * 10007 + v * 101 + d + seed)
    return {
        "hidden": torch.randn(n, d, generator=g),
        "target": torch.randint(0, v, (n,), generator=g),
        "bias": torch.randn(v, generator=g) if bias else None,
        "rows": rows,
        "ids": torch.randint(0, v, (lookups,), generator=g),
        "values": torch.randn(lookups, d, generator=g) / 8,
    }


def table(v, d, dtype):
    g = torch.Generator().manual_seed(v + d)
    return (torch.randn(v, d, generator=g) * 0.3).to(dtype)


def typed(c, dtype):
    return {k: t.to(dtype) if t is not None and t.is_floating_point() else t for k, t in c.items()}


def pieces(items, c, options):
    """SoftmaxRows and lookup of a case, as the backward passes record them."""
    numbers = {"temperature": 1.0, "softcap": 0.0, "label_smoothing": 0.0, "z_loss": 0.0} | options
    functions = backend.ops(backend.pick("tied_softmax_loss", items), loss_plain)
    inputs = (c["hidden"], items, c["target"], c["bias"], c["rows"])
    _, lse, *_ = functions.tied_softmax_loss_fwd(*inputs, *numbers.values(), -100, 0, False)
    made = softmax_rows(
        torch.ones_like(lse), None, c["hidden"], len(items), c["target"], c["bias"], c["rows"], lse,
        **options,
    )  # fmt: skip
    return [made], [(c["ids"], c["values"])]


def train_naive(items, cases, rule, options):
    """Items after one step per list of cases, by the formed gradient; the float64 truth is this."""
    w = items.clone().requires_grad_()
    optimizer = plain_optimizer(w, rule)
    for together in cases:
        optimizer.zero_grad()
        for c in together:
            parts = {k: c[k] for k in ("hidden", "target", "bias", "rows")}
            (naive_loss(items=w, **parts, **options) + (w[c["ids"]] * c["values"]).sum()).backward()
        optimizer.step()
    return w.detach()


def train_ours(items, cases, rule, options):
    items = items.clone()
    state = table_state(items, rule["kind"], rule.get("momentum", 0.0))
    for step, together in enumerate(cases, 1):
        softmax, lookup = [], []
        for c in together:
            one, two = pieces(items, c, options)
            softmax, lookup = softmax + one, lookup + two
        tied_table_step(items, state, softmax, lookup, step=step, lr=LR, **rule)
    return items


def check_training(lane, dtype, v, d, cases, rule, options=None):
    options = options or {}
    items = table(v, d, dtype)
    cases = [[typed(c, dtype) for c in together] for together in cases]
    wide = [[typed(c, torch.float64) for c in together] for together in cases]
    truth = train_naive(items.double(), wide, rule, options)
    plain = train_naive(items, cases, rule, options).double()
    with run_on(lane, "tied_table_step"):
        ours = train_ours(items, cases, rule, options)
    assert ours.dtype == dtype
    if dtype == torch.float64:
        # Adam divides by the size of the gradient: a gradient that cancels has few exact bits
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    else:
        compare("items", ours.double(), plain, truth, dtype)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.usefixtures("chunks")
def test_three_steps_equal_torch_optim(lane, dtype, rule):
    cases = [[case(20, 30, 6, seed)] for seed in range(3)]
    check_training(lane, dtype, 30, 6, cases, rule)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (0, 5, 3), (7, 97, 17), (130, 193, 64), (50, 95, 128)], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(lane, shape, kind):
    check_training(lane, torch.float32, *shape[1:], [[case(*shape)]], {"kind": kind})


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.sampled_from([0, 1, 2, 24, 25, 47, 48, 49, 97]),
    v=st.sampled_from([1, 2, 95, 96, 97, 193]),
    d=st.sampled_from([1, 3, 8, 15, 16, 17, 33, 64, 65]),
    bias=st.booleans(),
    lookups=st.sampled_from([0, 1, 40]),
    rule=st.sampled_from([RULES["sgd"], {"kind": "adagrad", "eps": 1e-3}, RULES["adamw slow"]]),
)
def test_any_shape(lane, n, v, d, bias, lookups, rule):
    """With a large eps: a quotient of gradients that cancel has few exact bits."""
    c = case(n, v, d, bias=bias, lookups=lookups)
    c["target"][::3] = -100
    check_training(lane, torch.float64, v, d, [[c]], rule)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_counted_moves_nothing(lane, kind):
    items, c = table(97, 5, torch.float32), case(6, 97, 5, lookups=0)
    c["target"][:] = -100
    with run_on(lane, "tied_table_step"):
        softmax, lookup = pieces(items, c, {})
        got = items.clone()
        tied_table_step(got, table_state(items, kind), softmax, lookup, kind=kind, step=1, lr=LR)
        assert tied_table_grad_norm(items, softmax, lookup) == 0
    assert torch.equal(got, items)


@pytest.mark.parametrize("lane", LANES)
def test_gradients_of_a_row_sum_to_zero(lane):
    """Sum of p = 1: the loss moves no column's sum."""
    items, c = table(500, 16, torch.float64), typed(case(8, 500, 16, lookups=0), torch.float64)
    with run_on(lane, "tied_table_step"):
        softmax, _ = pieces(items, c, {})
        got = items.clone()
        tied_table_step(got, {}, softmax, kind="sgd", step=1, lr=1.0)
    moved = got - items
    assert moved.abs().min() > 0
    assert moved.sum(0).abs().max() < 1e-13 * moved.abs().sum(0).max()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.usefixtures("chunks")
def test_options_of_the_loss(lane, options):
    rows = torch.tensor([3, 0, -1, 3, 12, 5])
    together = [case(13, 30, 6, 1, bias=True), case(13, 30, 6, 2, bias=True, rows=rows)]
    together[0]["target"][4] = -100
    rule = {"kind": "sgd"}
    check_training(lane, torch.float32, 30, 6, [together], rule, options)


@pytest.mark.parametrize("lane", LANES)
def test_losses_with_different_options_add_up(lane):
    """Several heads, and micro-batches of each."""
    items, grads = table(40, 8, torch.float32), []
    softmax = []
    with run_on(lane, "tied_table_step"):
        for i, options in enumerate([*OPTIONS.values(), {}, OPTIONS["all"]]):
            c = case(11, 40, 8, i, bias=i % 2 == 0)
            softmax += pieces(items, c, options)[0]
            w = items.double().requires_grad_()
            parts = {k: c[k] for k in ("hidden", "target", "bias", "rows")}
            naive_loss(items=w, **typed(parts, torch.float64), **options).backward()
            grads.append(w.grad)
        got = items.clone()
        tied_table_step(got, {}, softmax, kind="sgd", step=1, lr=1.0)
        norm = tied_table_grad_norm(items, softmax)
    torch.testing.assert_close(items - got, sum(grads).float(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(norm, sum(grads).norm(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("lane", LANES)
def test_lookups_are_added_in_order_whatever_their_ids(lane):
    items = table(20, 5, torch.float32)
    ids = torch.tensor([19, 3, 3, 0, 3, 19, 7])
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    want = torch.zeros_like(items).index_add_(0, ids, values)
    results = []
    with run_on(lane, "tied_table_step"):
        for lookup in ([(ids, values)], [(ids[:3], values[:3]), (ids[3:], values[3:])]):
            got = items.clone()
            tied_table_step(got, {}, lookup=lookup, kind="sgd", step=1, lr=1.0)
            results.append(got)
            norm = tied_table_grad_norm(items, lookup=lookup)
            torch.testing.assert_close(norm, want.double().norm())
        empty = (ids[:0], values[:0])
        got = items.clone()
        tied_table_step(got, {}, lookup=[empty], kind="sgd", step=1, lr=1.0)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], items - want)
    assert torch.equal(got, items)


@pytest.mark.parametrize("lane", LANES)
def test_a_formed_gradient_and_a_scale(lane):
    items, c = table(30, 6, torch.float32), case(9, 30, 6)
    formed = torch.randn(30, 6, generator=torch.Generator().manual_seed(3))
    w = items.clone().requires_grad_()
    (naive_loss(c["hidden"], w, c["target"]) + (w[c["ids"]] * c["values"]).sum()).backward()
    with run_on(lane, "tied_table_step"):
        softmax, lookup = pieces(items, c, {})
        got = items.clone()
        tied_table_step(
            got, {}, softmax, lookup, kind="sgd", step=1, lr=1.0, scale=0.25, gradient=formed
        )
        norm = tied_table_grad_norm(items, softmax, lookup, gradient=formed)
    torch.testing.assert_close(got, items - 0.25 * (w.grad + formed))
    torch.testing.assert_close(norm.float(), (w.grad + formed).norm())


@pytest.mark.parametrize("lane", LANES)
def test_extreme_logits(lane):
    """lse of 1e4: a float32 lse would move every probability by 1e-3."""
    c = case(16, 40, 10)
    c["hidden"] *= 1e4
    c["values"] *= 0
    check_training(lane, torch.float32, 40, 10, [[c]], {"kind": "sgd"})


@pytest.mark.parametrize("lane", LANES)
def test_bias_of_minus_infinity_and_nan(lane):
    items, c = table(200, 4, torch.float32), case(6, 200, 4, bias=True, lookups=0)
    c["bias"][:100] = -math.inf
    c["target"][:] = 150
    with run_on(lane, "tied_table_step"):
        softmax, lookup = pieces(items, c, {})
        got = items.clone()
        tied_table_step(got, {}, softmax, lookup, kind="sgd", step=1, lr=1.0)
        assert torch.equal(got[:100], items[:100])
        assert (got[100:] != items[100:]).any(1).all()
        c["hidden"][2, 1] = math.nan
        softmax, lookup = pieces(items, c, {})
        tied_table_step(got, {}, softmax, lookup, kind="sgd", step=1, lr=1.0)
        assert torch.isnan(got).all()


@pytest.mark.parametrize("lane", LANES)
def test_repeats_bit_for_bit_on_any_number_of_threads(lane):
    v = 200 if lane == "triton-interpret" else 1000
    items, c = table(v, 16, torch.float32), case(100, v, 16, lookups=300)
    found, norms, threads = [], [], torch.get_num_threads()
    with run_on(lane, "tied_table_step"):
        softmax, lookup = pieces(items, c, {})
        for count in (1, 1, 2):
            torch.set_num_threads(count)
            try:
                got, state = items.clone(), table_state(items, "adamw")
                tied_table_step(got, state, softmax, lookup, step=1, lr=LR)
                found.append((got, *state.values()))
                norms.append(tied_table_grad_norm(items, softmax, lookup))
            finally:
                torch.set_num_threads(threads)
    for other in found[1:] if lane == "cpu" else found[1:2]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))
    assert norms[0] == norms[1]


def test_memory_is_one_chunk(monkeypatch):
    monkeypatch.setattr(_scores, "CHUNK_BYTES", 64 * 100 * 4)
    monkeypatch.setattr(_scores, "MIN_CHUNK", 1)
    items, c = table(5000, 8, torch.float32), case(64, 5000, 8)
    state = table_state(items, "adamw")
    for name in LANES:
        with run_on(name, "tied_table_step"):
            softmax, lookup = pieces(items, c, {})
            with LargestTensor() as seen:
                tied_table_step(items, state, softmax, lookup, step=1, lr=LR)
                tied_table_grad_norm(items, softmax, lookup)
            assert seen.elements <= 64 * 100


# Panels of 48 rows, tiles of 96 items, blocks of 192 rows, vectors of 2 to 16.
BOUNDARIES = [
    (n, v, d)
    for i, n in enumerate((1, 4, 5, 17, 47, 49, 97, 192, 193, 385))
    for v, d in [((95, 96, 97, 193, 290)[i % 5], (1, 7, 16, 17, 64, 65, 129)[i % 7])]
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", BOUNDARIES, ids=str)
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adamw"])
def test_block_boundaries(kind, shape, dtype):
    """Every row's movement, on the C++ kernels; what is lost at an edge shows."""
    cases = [[case(*shape, bias=shape[1] % 2 == 0, lookups=40)]]
    cases[0][0]["target"][-1] = shape[1] - 1
    rule = {"kind": kind, "eps": 1e-2, "weight_decay": DECAY}
    if kind == "sgd":
        del rule["eps"]
    check_training("cpu", dtype, *shape[1:], cases, rule, {"temperature": shape[2] ** 0.5})


def test_offsets_past_2_to_the_31():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        items = torch.empty(2**25 + 8, 64, dtype=torch.bfloat16)  # 4 GiB, of which 3 rows are used
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
    ids = torch.tensor([2**25 + 7, 3, 2**25])
    items[ids] = 1.0
    lookup = [(ids, torch.tensor([[0.25], [0.5], [0.75]]).expand(3, 64))]
    with run_on("cpu", "tied_table_step"):
        tied_table_step(items, {}, (), lookup, kind="sgd", step=1, lr=1.0, touched_only=True)
    assert torch.equal(items[ids].float(), 1 - lookup[0][1])


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_other_instruction_sets(isa):
    """The kernels' tests once more in a process that is told what to take."""
    if os.environ.get("T4R_FAST_CPU_ISA"):
        pytest.skip("this process is told already")
    if not has(isa):
        pytest.skip(f"this CPU has no {isa}")
    chosen = "(block_boundaries and float32) or (touched_rows_with and cpu and adam)"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-k", chosen, __file__]
    code = f"import pytest; raise SystemExit(pytest.main({options!r}))"
    done = python(code, T4R_FAST_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout + done.stderr


# -- touched rows ----------------------------------------------------------------------------------


def sparse_steps(v, d, steps):
    """ids and gradients of each step; some rows are never named, some after long gaps."""
    g = torch.Generator().manual_seed(v)
    for step in range(steps):
        few = torch.randint(0, v // 4, (3,), generator=g)
        rare = torch.tensor([v // 2]) if step % 50 == 7 else few[:1]
        ids = torch.cat([few, rare])
        yield ids, torch.randn(len(ids), d, generator=g, dtype=torch.float64) / (1 + step % 5)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_touched_rows_with_catch_up_equal_dense_steps(lane, dtype, rule):
    v, d, steps = 40, 6, 32 if lane == "triton-interpret" else 200
    start = table(v, d, torch.float64)
    lrs = [0.1 * LR * (1 + math.sin(i / 9)) for i in range(steps)]
    results = {}
    for name, kind in (("truth", torch.float64), ("plain", dtype)):
        w = start.to(kind, copy=True).requires_grad_()
        optimizer = plain_optimizer(w, rule)
        for (ids, values), lr in zip(sparse_steps(v, d, steps), lrs):
            w.grad = torch.zeros_like(w).index_add_(0, ids, values.to(kind))
            optimizer.lr = lr
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        results[name] = w.detach().double()
    items = start.to(dtype, copy=True)
    state = table_state(items, rule["kind"], rule.get("momentum", 0.0))
    last, base, rates = torch.zeros(v, dtype=torch.int32), 0, torch.tensor(lrs, dtype=torch.float64)
    with run_on(lane, "tied_table_step"):
        for step, (ids, values) in enumerate(sparse_steps(v, d, steps), 1):
            tied_table_catch_up(
                items, state, last, ids.unique(), rates[base : step - 1], base=base, **rule
            )
            tied_table_step(
                items, state, lookup=[(ids, values.to(dtype))], step=step, lr=lrs[step - 1],
                touched_only=True, **rule,
            )  # fmt: skip
            last[ids] = step
            if step == steps * 45 // 100:
                tied_table_catch_up(items, state, last, None, rates[:step], base=0, **rule)
                base = step
        assert last[v // 4 : v // 2].max() == 0  # rows that were never touched
        tied_table_catch_up(items, state, last, None, rates[base:], base=base, **rule)
    begin = start.to(dtype).double()
    moved = (items.double() - begin, results["plain"] - begin, results["truth"] - begin)
    if dtype == torch.float64:
        torch.testing.assert_close(moved[0], moved[2], rtol=0, atol=1e-14)
        return
    error, allowed = (moved[0] - moved[2]).abs(), (moved[1] - moved[2]).abs()
    size = results["truth"].abs().amax(1, keepdim=True)
    assert (error <= 2 * allowed + 16 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("lane", LANES)
def test_untouched_rows_stay_as_they_are(lane):
    items = table(30, 4, torch.float32)
    before, state = items.clone(), table_state(items, "adamw")
    ids = torch.tensor([7, 3, 7])
    with run_on(lane, "tied_table_step"):
        tied_table_step(
            items, state, lookup=[(ids, torch.ones(3, 4))], step=1, lr=LR, weight_decay=DECAY,
            touched_only=True,
        )  # fmt: skip
    others = [i for i in range(30) if i not in (3, 7)]
    assert torch.equal(items[others], before[others])
    assert (items[[3, 7]] != before[[3, 7]]).all()
    torch.testing.assert_close(state["exp_avg"][7], 0.2 * torch.ones(4))


# -- checks ----------------------------------------------------------------------------------------


def test_a_graph_from_before_the_step_refuses_to_run_backward():
    items, hidden = table(9, 3, torch.float32).requires_grad_(), torch.zeros(2, 3)
    loss = tied_softmax_loss(hidden, items, torch.tensor([1, 2]))
    tied_table_step(items, {}, kind="sgd", step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane != "plain"])
def test_opcheck(lane):
    items, c = table(30, 6, torch.float32), case(9, 30, 6, bias=True)
    from t4r_fast.ops import tied_table_step as module

    softmax, lookup = pieces(items, c, OPTIONS["all"])
    ids, rows = module._sorted(items, lookup)
    flat, rule = module._flat(softmax), module._rule("adamw", 1, LR, (0.9, 0.99), 0.1, 0, 0, 1)
    state = tuple(table_state(items, "adamw").values())
    last, lrs = torch.zeros(30, dtype=torch.int32), torch.full((1,), LR).double()
    with run_on(lane, "tied_table_step"):
        space = backend.ops(backend.pick("tied_table_step", items), None)
        for name, args in (
            ("fwd", (items, *state, *flat, ids, rows, None, *rule)),
            ("norm", (items, *flat, ids, rows, None)),
            ("rows", (items, *state, ids, rows, *rule)),
            ("catch_up", (items, *state, last, None, 0, lrs, torch.zeros(2).double(), *rule)),
        ):
            torch.library.opcheck(getattr(space, f"tied_table_step_{name}").default, args)


W = torch.zeros(5, 4)
STATE = {"exp_avg": torch.zeros(5, 4), "exp_avg_sq": torch.zeros(5, 4)}
IDS, VALUES = torch.tensor([0, 4]), torch.zeros(2, 4)
ROWS = softmax_rows(
    torch.ones(2), None, torch.zeros(2, 4), 5, torch.tensor([1, 2]), None, None, torch.ones(2)
)
ERRORS = {
    "items shape": ({"items": W[0]}, ValueError, r"items must .*\(V, D\).* got \(4,\)"),
    "items strides": ({"items": W.T}, ValueError, r"items must be contiguous .* strides \(1, 4\)"),
    "items dtype": ({"items": W.long()}, TypeError, "items must be float32.*int64"),
    "kind": ({"kind": "adam"}, ValueError, "kind must be one of sgd, .*; got 'adam'"),
    "no state": ({"state": {}}, ValueError, "state must hold exp_avg .* table_state"),
    "state": (
        {"state": {**STATE, "exp_avg": W[:3]}},
        ValueError,
        r"state\['exp_avg'\] must be torch.float32 \(5, 4\); got .*\(3, 4\)",
    ),
    "step": ({"step": 0}, ValueError, "step must be >= 1; got 0"),
    "lr": ({"lr": -1.0}, ValueError, "lr must be >= 0; got -1"),
    "betas": ({"betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\)"),
    "eps": ({"eps": math.nan}, ValueError, "eps must be >= 0; got nan"),
    "decay": ({"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0; got -0.1"),
    "momentum": ({"momentum": 0.5}, ValueError, "momentum must be 0 for 'adamw'; got 0.5"),
    "ids dtype": ({"lookup": [(IDS.int(), VALUES)]}, TypeError, r"ids of lookup\[0\] must be int6"),
    "ids range": ({"lookup": [(IDS + 1, VALUES)]}, IndexError, "id < 5 .*; got 5 at entry 1"),
    "lookup shape": ({"lookup": [(IDS, W)]}, ValueError, r"lookup\[0\] must be floats \(2, 4\)"),
    "gradient": ({"gradient": W[:2]}, ValueError, r"gradient must be torch.float32 \(5, 4\)"),
    "hidden": (
        {"softmax": [ROWS._replace(hidden=ROWS.hidden.double())]},
        ValueError,
        r"softmax\[0\].hidden must be torch.float32 \(2, 4\); got torch.float64",
    ),
    "target": (
        {"softmax": [ROWS._replace(target=ROWS.target + 3)]},
        IndexError,
        r"softmax\[0\].target must be 0 <= target < 5 .*got 5 at row 1",
    ),
    "touched only": (
        {"softmax": [ROWS], "touched_only": True},
        ValueError,
        "touched_only must come without softmax",
    ),
}


@pytest.mark.parametrize(("changes", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(changes, kind, message):
    arguments = {"items": W, "state": STATE, "step": 1, "lr": 0.1, **changes}
    with pytest.raises(kind, match=rf"^tied_table_step: .*{message}"):
        tied_table_step(**arguments)


def test_catch_up_refuses_a_decay_of_one_and_a_wrong_last():
    last, lrs = torch.zeros(5, dtype=torch.int32), torch.ones(2).double()
    with pytest.raises(ValueError, match="lr \\* weight_decay must be < 1"):
        tied_table_catch_up(W, STATE, last, None, lrs, base=0, weight_decay=1.0)
    with pytest.raises(ValueError, match=r"last must be int32 \(5,\); got torch.int64"):
        tied_table_catch_up(W, STATE, last.long(), None, lrs, base=0)

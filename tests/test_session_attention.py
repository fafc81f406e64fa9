"""session_attention against padded attention with an explicit mask, and XLNet's own layer."""

import itertools
import math

import pytest
import torch
from harness import LargestTensor, check, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st

import t4r_fast
from t4r_fast import backend
from t4r_fast.ops.session_attention import Relative, session_attention
from t4r_fast.plain import session_attention as plain
from t4r_fast.plain._dropout import kept, key_of, threshold

OP = "session_attention"
LANES = lanes(OP)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
NAMES = ("q", "k", "v", "relative")
SEED = torch.tensor([11, 5])
INTERPRETED = "triton-interpret"  # a tile of 16 queries and 16 items takes it some 10 ms


def offsets_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def naive(
    q,
    k,
    v,
    offsets,
    rows=None,
    causal=False,
    relative=None,
    scale=None,
    dropout=0.0,
    seed=None,
    site=0,
):
    """Session after session: the scores of its queries and all its items, then a mask."""
    used, heads = int(offsets[-1]), q.shape[1]
    items = torch.arange(q.shape[0]) if rows is None else rows
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    out = q.new_zeros(q.shape)
    for b, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        at = ((items >= start) & (items < end)).nonzero()[:, 0]
        place, n, there = items[at] - start, end - start, torch.arange(end - start)
        asked = q[at] if relative is None else q[at] + relative[1]
        score = torch.einsum("rhd,jhd->hrj", asked, k[start:end])
        if relative is not None:
            every = torch.einsum("rhd,thd->hrt", q[at] + relative[2], relative[0])
            away = relative[0].shape[0] // 2 - (place[:, None] - there)
            score = score + every.gather(2, away.expand(heads, -1, -1))
        score = score * scale
        if causal:
            score = torch.where(there <= place[:, None], score, -torch.inf)
        weight = score.softmax(2)
        if dropout:
            keep = kept(
                key_of(seed, site),
                threshold(dropout),
                torch.full((1, 1), b),
                place,
                torch.arange(heads)[:, None],
                n,
            )
            weight = weight * keep / (1 - dropout)
        out = out.index_put((at,), torch.einsum("hrj,jhd->rhd", weight, v[start:end]))
    return out + 0 * (q[:0].sum() + k[:used].sum() + v[:used].sum())


def attention(q, k, v, offsets, relative=None, **options):
    """For harness.check, whose inputs are tensors and lists of tensors."""
    relative = None if relative is None else Relative(*relative)
    return session_attention(q, k, v, offsets, relative=relative, **options)


attention.__name__ = OP


def make_inputs(lengths, heads, width, *, reach=None, spare=0, rows=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    offsets = offsets_of(lengths)
    size = int(offsets[-1]) + spare
    packed = torch.randn(size, 3, heads, width, generator=g)
    inputs = {
        "q": packed[:, 0],
        "k": packed[:, 1],
        "v": packed[:, 2],
        "offsets": offsets,
    }
    if reach is not None:
        inputs["relative"] = [
            torch.randn(shape, generator=g)
            for shape in ((2 * reach, heads, width), (heads, width), (heads, width))
        ]
    if rows is not None:
        inputs["rows"] = rows
        inputs["q"] = torch.randn(len(rows), heads, width, generator=g)
    return inputs


def check_all(lane, inputs, options, dtype):
    diff = NAMES if "relative" in inputs else NAMES[:3]
    # a query that attends to one item almost alone: its gradient is what is left of numbers of
    # size 1, which cancel
    slack = 4 * torch.finfo(dtype).eps
    check(lane, attention, naive, inputs, options, dtype, diff, slack)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_matches_padded_attention(lane, dtype, relative, causal, dropout):
    lengths, heads = [3, 0, 1, 20, 4, 5, 8, 9, 0, 2], 2
    if lane == INTERPRETED:
        lengths, heads = [3, 0, 18] if dtype == torch.float32 else [3, 2], 1
    inputs = make_inputs(lengths, heads, 24, reach=22 if relative else None)
    options = {"causal": causal, "dropout": dropout, "seed": SEED, "site": 3}
    check_all(lane, inputs, options, dtype)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("heads", "width"), [(1, 1), (1, 3), (4, 16), (3, 17), (4, 48), (2, 64), (1, 100), (1, 150)]
)
def test_heads_and_widths(lane, dtype, heads, width):
    lengths = [5, 17, 1, 12]
    if lane == INTERPRETED:
        lengths = [2, 5] if heads > 1 else [17]
    inputs = make_inputs(lengths, heads, width, reach=17)
    dropout = 0.0 if lane == INTERPRETED and (heads > 1 or dtype == torch.float64) else 0.2
    check_all(lane, inputs, {"dropout": dropout, "seed": SEED}, dtype)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
@pytest.mark.parametrize("length", [1, 4, 15, 16, 17, 31, 33, 64, 127, 128, 129, 300])
def test_lengths(lane, length, causal):
    if lane == INTERPRETED and length > 33:
        length = 16 + length % 16
    inputs = make_inputs([length, 2], 1, 16, reach=length + length % 3)
    check_all(lane, inputs, {"causal": causal}, torch.float32)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("causal", [False, True], ids=["both", "causal"])
def test_rows_in_any_order_repeated_or_skipped(lane, relative, causal):
    lengths = [3, 20, 0, 1, 7]
    rows = torch.tensor([30, 4, 4, -1, 23, 0, 22, 4, 21, -7, 5, 32, 3])  # 32 lies behind
    heads, dropout = 2, 0.4
    if lane == INTERPRETED:
        heads, rows = 1, rows[[0, 1, 2, 3, 6, 11]]
        dropout = 0.4 if causal == relative else 0.0
    inputs = make_inputs(lengths, heads, 20, reach=20 if relative else None, spare=3, rows=rows)
    options = {"causal": causal, "dropout": dropout, "seed": SEED, "scale": 0.3}
    check_all(lane, inputs, options, torch.float32)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_what_lies_behind_the_sessions_is_not_read(lane, relative):
    lengths = [4, 9]
    options = {"dropout": 0.2, "seed": SEED}
    found = []
    for fill in (math.nan, math.inf):
        inputs = make_inputs(lengths, 2, 16, reach=9 if relative else None, spare=6)
        for name in ("q", "k", "v"):
            inputs[name][13:] = fill
        with run_on(lane, OP) as device:
            leaves = [inputs[n].to(device).requires_grad_() for n in ("q", "k", "v")]
            given = Relative(*(t.to(device) for t in inputs["relative"])) if relative else None
            out = session_attention(
                *leaves,
                inputs["offsets"].to(device),
                relative=given,
                **{**options, "seed": SEED.to(device)},
            )
            dout = torch.ones_like(out)
            dout[13:] = fill
            grads = torch.autograd.grad(out, leaves, dout)
        for tensor in (out, *grads):
            assert tensor[:13].abs().sum() > 0
            assert torch.equal(tensor[13:].cpu(), torch.zeros(6, 2, 16))
        found.append([t[:13] for t in (out, *grads)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("lane", LANES)
def test_views(lane):
    """Heads and items of any stride; the last stride may be any too."""
    for case in range(3):
        inputs = make_inputs([3, 5] if lane == INTERPRETED else [6, 3, 11], 3, 8, reach=11)
        if case == 1:  # heads outermost
            for name in ("q", "k", "v"):
                inputs[name] = inputs[name].transpose(0, 1).contiguous().transpose(0, 1)
        elif case == 2:  # elements that do not lie side by side
            for name in ("q", "k", "v"):
                inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
        inputs["offsets"] = torch.stack([inputs["offsets"], inputs["offsets"]], 1)[:, 0]
        check_all(lane, inputs, {}, torch.float32)


@pytest.mark.parametrize("lane", LANES)
def test_gradient_that_is_expanded(lane):
    inputs = make_inputs([6, 3], 2, 8)
    with run_on(lane, OP) as device:
        leaves = [inputs[n].to(device).requires_grad_() for n in ("q", "k", "v")]
        out = session_attention(*leaves, inputs["offsets"].to(device))
        expanded = torch.autograd.grad(out, leaves, out.new_ones(()).expand_as(out))
        out = session_attention(*leaves, inputs["offsets"].to(device))
        full = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(expanded, full))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("lengths", "spare", "queries"),
    [([], 0, None), ([], 5, None), ([0, 0], 4, None), ([3], 0, 0), ([0], 0, 2), ([4], 0, 3)],
    ids=str,
)
def test_nothing_to_do(lane, lengths, spare, queries):
    rows = None if queries is None else torch.full((queries,), -1)
    inputs = make_inputs(lengths, 2, 8, reach=4, spare=spare, rows=rows)
    with run_on(lane, OP) as device:
        leaves = [inputs[n].to(device).requires_grad_() for n in ("q", "k", "v")]
        relative = [t.to(device).requires_grad_() for t in inputs["relative"]]
        out = session_attention(
            *leaves,
            inputs["offsets"].to(device),
            relative=Relative(*relative),
            rows=None if rows is None else rows.to(device),
        )
        grads = torch.autograd.grad(out.sum(), [*leaves, *relative])
    assert out.shape == inputs["q"].shape
    for tensor in (out, *grads):
        assert tensor.count_nonzero() == 0
        assert not tensor.isnan().any()


@pytest.mark.parametrize("lane", LANES)
def test_one_item_attends_to_itself(lane):
    inputs = make_inputs([1], 2, 8, reach=1)
    with run_on(lane, OP) as device:
        v = inputs["v"].to(device)
        out = session_attention(
            inputs["q"].to(device), inputs["k"].to(device), v, offsets_of([1]).to(device)
        )
    # three products of tf32 leave out v's last two bits
    allowed = 2**-21 * v.abs() if lane == "triton" else 0.0
    assert ((out - v).abs() <= allowed).all()


@pytest.mark.parametrize("lane", LANES)
def test_large_scores_do_not_overflow(lane):
    inputs = make_inputs([5, 3], 1, 8)
    inputs["q"] = inputs["q"] * 1000
    check(lane, attention, naive, inputs, {"scale": 1.0}, torch.float32)


# ---- XLNet's own layer


@pytest.mark.parametrize("lane", LANES)
def test_xlnet_layer_on_padded_sessions(lane):
    """transformers' layer, with its rel_shift and attention mask, in float64."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.xlnet.modeling_xlnet")
    heads, lengths = 2, [5, 1, 7, 3]
    config = transformers.XLNetConfig(
        vocab_size=1, d_model=24, n_head=heads, n_layer=1, d_inner=8, dropout=0.0
    )
    layer = modeling.XLNetRelativeAttention(config).double().eval()
    g = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=g)
    longest, offsets = max(lengths), offsets_of(lengths)
    there = torch.arange(longest) < torch.tensor(lengths)[:, None]
    h = torch.randn(len(lengths), longest, 24, generator=g, dtype=torch.float64)
    # places longest to -(longest - 1), as XLNetModel.relative_positional_encoding has them
    pos = torch.randn(2 * longest, 24, generator=g, dtype=torch.float64)
    mask = (~there)[None, :, :, None].permute(0, 2, 1, 3).expand(longest, -1, -1, 1).double()
    padded = layer.rel_attn_core(
        *(torch.einsum("bld,dhw->lbhw", h, getattr(layer, n)) for n in "qkv"),
        torch.einsum("rd,dhw->rhw", pos, layer.r)[:, None].expand(-1, len(lengths), -1, -1),
        attn_mask=mask,
    )
    with run_on(lane, OP) as device:
        q, k, v = (
            torch.einsum("ud,dhw->uhw", h[there], getattr(layer, n)).detach().to(device)
            for n in "qkv"
        )
        relative = Relative(
            torch.einsum("rd,dhw->rhw", pos, layer.r).detach().to(device),
            layer.r_w_bias.detach().to(device),
            layer.r_r_bias.detach().to(device),
        )
        ours = session_attention(q, k, v, offsets.to(device), relative=relative)
    wanted = padded.transpose(0, 1)[there]
    assert (ours.cpu() - wanted).abs().max() <= 1e-12 * wanted.abs().max()


# ---- dropout


def drawn(device, lengths, heads, probability, rows=None, site=0, dtype=torch.float32):
    """(R, H, longest): the probabilities that are kept, as one-hot values show them."""
    offsets, longest = offsets_of(lengths), max(lengths)
    size = int(offsets[-1])
    place = torch.cat([torch.arange(n) for n in lengths])
    v = torch.nn.functional.one_hot(place, longest)[:, None].expand(-1, heads, -1).to(dtype)
    q = torch.zeros(size if rows is None else len(rows), heads, longest, dtype=dtype)
    return session_attention(
        *(t.to(device) for t in (q, torch.zeros_like(v), v, offsets)),
        dropout=probability,
        seed=SEED.to(device),
        site=site,
        rows=None if rows is None else rows.to(device),
    ).cpu()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_dropped_is_the_rule(lane, dtype):
    lengths = [7, 20, 1, 4, 5]
    with run_on(lane, OP) as device:
        found = drawn(device, lengths, 3, 0.3, dtype=dtype)
    session = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    place = torch.cat([torch.arange(n) for n in lengths])
    rule = kept(
        key_of(SEED, 0),
        threshold(0.3),
        session[:, None],
        place[:, None],
        torch.arange(3),
        20,
    )
    length = torch.tensor(lengths)[session][:, None, None]
    rule = rule & (torch.arange(20) < length)
    assert torch.equal(found > 0, rule)
    assert torch.allclose(found, rule.to(dtype) / length / 0.7)


@pytest.mark.parametrize("lane", LANES)
def test_share_that_is_kept(lane):
    lengths = [32] * (2 if lane == INTERPRETED else 6)
    with run_on(lane, OP) as device:
        found = {p: drawn(device, lengths, 2, p) > 0 for p in (0.1, 0.3, 0.9)}
        other = drawn(device, lengths, 2, 0.3, site=1) > 0
    count = found[0.3].numel()  # 12,288; 4,096 interpreted
    for p, keep in found.items():
        assert abs(keep.float().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / count)
    # sites, heads, sessions and columns are independent: equal in 0.3^2 + 0.7^2 of the places
    keep = found[0.3]
    for a, b in (
        (keep, other),
        (keep[:, 0], keep[:, 1]),
        (keep[:32], keep[32:64]),
        (keep[..., :16], keep[..., 16:]),
        (keep[..., ::2], keep[..., 1::2]),
    ):
        share, spread = (a == b).float().mean(), math.sqrt(0.58 * 0.42 / a.numel())
        assert abs(share - 0.58) < 4 * spread


@pytest.mark.parametrize("lane", LANES)
def test_dropout_does_not_depend_on_the_packing(lane):
    rows = torch.tensor([12, 3, 3, 0, 19])
    with run_on(lane, OP) as device:
        every = drawn(device, [5, 9, 6], 2, 0.5)
        some = drawn(device, [5, 9, 6], 2, 0.5, rows=rows)
        longer = drawn(device, [5, 9, 11], 2, 0.5)  # the third session grows
    assert torch.equal(some, every[rows])
    assert torch.equal(longer[:14, :, :9], every[:14])
    assert torch.equal((longer[14:, :, :6] > 0)[:6], (every > 0)[14:, :, :6])


@pytest.mark.parametrize("lane", LANES)
def test_seed_from_torchs_generator(lane):
    inputs = make_inputs([9, 4], 2, 8)
    with run_on(lane, OP) as device:
        args = [inputs[n].to(device) for n in ("q", "k", "v", "offsets")]
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(session_attention(*args, dropout=0.5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# ---- the value of a row does not depend on what stands beside it


@pytest.mark.parametrize("lane", [lane for lane in LANES if not lane.startswith("plain")])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    long=st.sampled_from([0, 0, 0, 127, 300]),
    width=st.sampled_from([8, 16, 20, 48]),
    relative=st.booleans(),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_same_bits_alone_and_among_others(
    lane, lengths, long, width, relative, causal, dtype, data
):
    heads = 2
    if lane == INTERPRETED:
        lengths, long, heads = [min(n, 20) for n in lengths[:2]], 0, 1
    lengths = lengths + [long] * bool(long)
    inputs = make_inputs(lengths, heads, width, reach=max(lengths), spare=2)
    offsets = inputs["offsets"]
    session = data.draw(st.integers(0, len(lengths) - 1))
    start, end = offsets[session : session + 2].tolist()
    place = data.draw(st.integers(0, end - start - 1))
    with run_on(lane, OP) as device:
        q, k, v = (inputs[n].to(device, dtype) for n in ("q", "k", "v"))
        given_relative = None
        if relative:
            given_relative = Relative(*(t.to(device, dtype) for t in inputs["relative"]))

        def run(q, k, v, offsets, rows=None):
            return session_attention(
                *(q, k, v, offsets.to(device)),
                rows=rows,
                causal=causal,
                relative=given_relative,
            )

        every = run(q, k, v, offsets)
        part = slice(start, end)
        one = torch.tensor([start + place], device=device)
        alone = run(q[part], k[part], v[part], offsets_of([end - start]))
        order = torch.randperm(int(offsets[-1]), generator=torch.Generator().manual_seed(0))
        order = (order[:2] if lane == INTERPRETED else order).to(device)
        assert torch.equal(alone, every[part])
        assert torch.equal(run(q[one], k, v, offsets, rows=one), every[one])
        assert torch.equal(run(q[order], k, v, offsets, rows=order), every[order])
        reverse = torch.cat(
            [torch.arange(a, b) for a, b in reversed(list(itertools.pairwise(offsets)))]
        )
        turned = run(*(t[reverse.to(device)] for t in (q, k, v)), offsets_of(lengths[::-1]))
        assert torch.equal(turned, every[reverse.to(device)])


# ---- memory, compilation, errors


@pytest.mark.parametrize("lane", LANES)
def test_no_tensor_of_length_squared(lane):
    """With 2,000 items in one session a (B, H, L, L) tensor would have 4 million elements."""
    length, most = (96, 96 * 96 - 1) if lane == INTERPRETED else (2000, plain.BLOCK_ELEMENTS)
    inputs = make_inputs([length], 1, 1 if lane == INTERPRETED else 4, reach=length)
    with run_on(lane, OP) as device, LargestTensor() as made:
        leaves = [inputs[n].to(device).requires_grad_() for n in ("q", "k", "v")]
        relative = Relative(*(t.to(device) for t in inputs["relative"]))
        out = session_attention(*leaves, inputs["offsets"].to(device), relative=relative)
        torch.autograd.grad(out.sum(), leaves)
    assert made.elements <= most


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("listed", [False, True], ids=["all", "rows"])
def test_compiles_in_one_graph(lane, relative, listed):
    rows = torch.tensor([8, 2, -1, 0]) if listed else None
    heads = 1 if lane == INTERPRETED else 2
    inputs = make_inputs([4, 7], heads, 8, reach=7 if relative else None, spare=1, rows=rows)
    torch._dynamo.reset()
    with run_on(lane, OP) as device:

        def loss(q, k, v, offsets, rows, relative, seed):
            options = {"rows": rows, "dropout": 0.25, "seed": seed, "relative": relative}
            return session_attention(q, k, v, offsets, **options).square().sum()

        found = []
        for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = [inputs[n].to(device).requires_grad_() for n in ("q", "k", "v")]
            extra = [t.to(device).requires_grad_() for t in inputs.get("relative", [])]
            value = call(
                *leaves,
                inputs["offsets"].to(device),
                None if rows is None else rows.to(device),
                Relative(*extra) if relative else None,
                SEED.to(device),
            )
            found.append([value, *torch.autograd.grad(value, [*leaves, *extra])])
    for eager, compiled in zip(*found):
        assert torch.allclose(eager, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lane", [lane for lane in LANES if not lane.startswith("plain")])
@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_opcheck(lane, relative):
    lengths, heads = ([4], 1) if lane == INTERPRETED else ([4, 7], 2)
    inputs = make_inputs(lengths, heads, 8, reach=7 if relative else None, spare=1)
    with run_on(lane, OP) as device:
        q, k, v, offsets = (inputs[n].to(device) for n in ("q", "k", "v", "offsets"))
        extra = [t.to(device) for t in inputs.get("relative", [])] or [None] * 3
        rest = (offsets, None, *extra, True, 0.5, 0.3, SEED.to(device), 2)
        functions = backend.ops(backend.forced(), plain)
        torch.library.opcheck(functions.session_attention_fwd, (q, k, v, *rest))
        out, lse = functions.session_attention_fwd(q, k, v, *rest)
        dout = torch.ones_like(out)
        torch.library.opcheck(functions.session_attention_bwd, (dout, q, k, v, lse, *rest))


def wrong(**changes):
    inputs = make_inputs([4, 3], 2, 8, reach=4)
    relative = Relative(*inputs.pop("relative"))
    for name in Relative._fields:
        if name in changes:
            relative = relative._replace(**{name: changes.pop(name)})
    return {**inputs, "relative": relative, **changes}


ERRORS = {
    "q of two axes": ({"q": torch.ones(7, 8)}, ValueError, "q must have shape (R, H, Dh)"),
    "no width": ({"q": torch.ones(7, 2, 0)}, ValueError, "q must have shape (R, H, Dh)"),
    "integers": ({"q": torch.ones(7, 2, 8).long()}, TypeError, "q must be float32, float16"),
    "k of another width": ({"k": torch.ones(7, 2, 9)}, ValueError, "k must have shape (U, H, Dh)"),
    "v of other heads": ({"v": torch.ones(7, 1, 8)}, ValueError, "v must have shape (U, H, Dh)"),
    "v of fewer items": ({"v": torch.ones(6, 2, 8)}, ValueError, "v must have the shape of k"),
    "k in float64": ({"k": torch.ones(7, 2, 8).double()}, TypeError, "k must have the dtype of q"),
    "fewer queries": ({"q": torch.ones(5, 2, 8)}, ValueError, "one row per item of k, 7; got 5"),
    "rows and queries": (
        {"rows": torch.tensor([1, 2])},
        ValueError,
        "one row per entry of rows, 2; got 7",
    ),
    "int32 offsets": ({"offsets": torch.tensor([0, 7]).int()}, TypeError, "offsets must be int64"),
    "offsets of two axes": ({"offsets": torch.ones(1, 2).long()}, ValueError, "(B + 1,)"),
    "no offsets": ({"offsets": torch.ones(0).long()}, ValueError, "at least one entry"),
    "float rows": ({"rows": torch.ones(7)}, TypeError, "rows must be int64"),
    "offsets that descend": (
        {"offsets": torch.tensor([0, 5, 4, 7])},
        ValueError,
        "offsets must ascend from 0 to at most 7 (the items of k); got 5 and then 4 at entry 2",
    ),
    "offsets that start late": (
        {"offsets": torch.tensor([1, 4])},
        ValueError,
        "offsets must ascend from 0 to at most 7 (the items of k); got 1 to 4",
    ),
    "offsets behind the items": (
        {"offsets": torch.tensor([0, 8])},
        ValueError,
        "offsets must ascend from 0 to at most 7 (the items of k); got 0 to 8",
    ),
    "row behind the items": (
        {"rows": torch.tensor([0, 1, 2, 3, -1, 7, 4])},
        IndexError,
        "rows must be < 7 (the items of k), or negative to skip; got 7 at entry 5",
    ),
    "a session longer than M": (
        {"keys": torch.ones(6, 2, 8)},
        ValueError,
        "M >= the longest session; got M = 3 and session 0 of 4 items",
    ),
    "odd keys": ({"keys": torch.ones(9, 2, 8)}, ValueError, "relative.keys must have shape (2 * M"),
    "keys of another width": ({"keys": torch.ones(8, 2, 9)}, ValueError, "relative.keys must have"),
    "key_bias": ({"key_bias": torch.ones(2, 9)}, ValueError, "relative.key_bias must have shape"),
    "position_bias": ({"position_bias": torch.ones(16)}, ValueError, "relative.position_bias must"),
    "half keys": ({"keys": torch.ones(8, 2, 8).half()}, TypeError, "relative.keys must have the"),
    "dropout of 1": ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1"),
    "dropout of -0.1": ({"dropout": -0.1}, ValueError, "dropout must be at least 0 and below 1"),
    "site": ({"site": 2**32}, ValueError, "site must be at least 0 and below 2**32"),
    "seed": ({"seed": torch.tensor([1])}, ValueError, "seed must be int64 (2,)"),
    "device": ({"k": torch.ones(7, 2, 8, device="meta")}, ValueError, "k must be on the device"),
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", ERRORS)
def test_errors(lane, name):
    changes, kind, text = ERRORS[name]
    with run_on(lane, OP) as device:
        if device != "cpu":
            pytest.skip("values are checked by assertions of the device")
        with pytest.raises(kind) as caught:
            session_attention(**wrong(**changes))
    assert str(caught.value).startswith("session_attention: ")
    assert text in str(caught.value)


def test_it_is_exported():
    assert t4r_fast.Relative is Relative

"""mask_permutation: exact rules, exact random numbers, and the shares of the contract."""

import itertools
import math
import random

import pytest
import torch
from harness import LargestTensor, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask_mlm import boundary_sessions, philox_in_python, sessions, some_sessions

from t4r_fast import backend
from t4r_fast.ops.mask_permutation import mask_permutation
from t4r_fast.plain import mask_permutation as plain

LANES = lanes("mask_permutation")
NATIVE = [lane for lane in LANES if lane in ("cpu", "cuda-on-cpu")]
SEED = torch.tensor([2**62 + 12345, -(2**40) - 6])


def spans_in_python(n, draw, probability, longest):
    """The contract's walk; draw(count) gives a number below count."""
    mask, current = [False] * n, 0
    while current < n:
        span = 1 + draw(longest)
        context = int(span / probability)
        start = current + draw(context - span + 1)
        for i in range(start, min(start + span, n)):
            mask[i] = True
        current += context
    return mask


def rules_in_python(item_ids, mode, probability=1 / 6, longest=5, everything=False, padding_idx=0):
    key, offset = (s % 2**64 for s in SEED.tolist())
    low, kind = offset % 2**32, (offset >> 32) * 8 % 2**32
    sessions, positions = item_ids.shape[0], item_ids.shape[1] + (mode == "next")
    targets = torch.full((sessions, positions), padding_idx)
    mask = torch.zeros(sessions, positions, dtype=torch.bool)
    hidden = torch.zeros(sessions, positions, positions)
    for b, row in enumerate(item_ids.tolist()):
        n = sum(i != padding_idx for i in row)
        order = [-1] * positions
        if mode == "train" and n:
            words = itertools.chain.from_iterable(
                philox_in_python(key, (step, b, kind + 4, low))[:2] for step in itertools.count()
            )
            chosen = [True] * n
            if not everything:
                draw = lambda count, words=words: next(words) * count >> 32  # noqa: E731
                chosen = spans_in_python(n, draw, probability, longest)
            extra, spared = philox_in_python(key, (0, b, kind + 5, low))[:2]
            if not any(chosen):
                chosen[extra * n >> 32] = True
            if all(chosen):
                chosen[spared * n >> 32] = False
            mask[b, :n] = torch.tensor(chosen)
            words = [philox_in_python(key, (i // 4, b, kind + 6, low))[i % 4] for i in range(n)]
            ranked = sorted((i for i in range(n) if chosen[i]), key=lambda i: (words[i], i))
            for place, i in enumerate(ranked):
                order[i] = place
        elif mode == "next":
            mask[b, n] = True
        elif mode == "last" and n:
            mask[b, n - 1] = True
        for i in range(positions):
            if mask[b, i] and mode != "next":
                targets[b, i] = row[i]
            for j in range(positions):
                if mode == "train":
                    hidden[b, i, j] = bool(mask[b, j]) and order[i] <= order[j]
                else:
                    hidden[b, i, j] = bool(mask[b, j]) or j > i
    rows = mask.flatten().nonzero()[:, 0]
    filled = torch.full((sessions * positions,), -1)
    filled[: len(rows)] = rows
    identity = torch.eye(positions).expand(sessions, positions, positions)
    return targets, mask, filled, torch.tensor(len(rows)), hidden, identity


def same(found, expected):
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a.cpu(), b), name


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", ["train", "last", "next"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1), (40, 20), (7, 33), (65, 6)], ids=str)
def test_follows_the_rules(lane, mode, shape):
    item_ids = some_sessions(*shape)
    with run_on(lane, "mask_permutation") as device:
        seed = SEED.to(device) if mode == "train" else None
        found = mask_permutation(item_ids.to(device), mode=mode, seed=seed)
    same(found, rules_in_python(item_ids, mode))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", ["train", "last", "next"])
def test_same_bits_as_plain_pytorch(lane, mode):
    for ids in boundary_sessions():
        options = {"seed": SEED} if mode == "train" else {}
        with backend.use("plain"):
            expected = mask_permutation(ids, mode=mode, **options)
        with run_on(lane, "mask_permutation") as device:
            options = {k: v.to(device) for k, v in options.items()}
            same(mask_permutation(ids.to(device), mode=mode, **options), expected)


@pytest.mark.parametrize("lane", LANES)
def test_same_bits_in_every_order_of_blocks_and_warps(lane):
    ids, first = some_sessions(100, 7), None
    for _ in range(8):  # every launch on the emulated GPU has an order of its own
        with run_on(lane, "mask_permutation") as device:
            found = mask_permutation(ids.to(device), seed=SEED.to(device))
        first = first or [t.cpu() for t in found]
        same(found, first)


@pytest.mark.parametrize("lane", [lane for lane in NATIVE if lane != "cpu"])
def test_one_launch_is_all_and_stops_at_items_behind_padding(lane):
    ids = sessions([9] * 70, 9)
    with run_on(lane, "mask_permutation"), LargestTensor() as seen:
        mask_permutation(ids, seed=SEED)
    assert seen.calls == {"mask_permutation_fwd", "expand"}
    ids[69, 7] = 0
    with (
        run_on(lane, "mask_permutation"),
        pytest.raises(
            RuntimeError,
            match=r"^mask_permutation: item_ids must have its padding on the right only$",
        ),
    ):
        mask_permutation(ids, seed=SEED)


@pytest.mark.parametrize("lane", [lane for lane in NATIVE if lane != "cpu"])
def test_the_longest_span_of_the_kernel(lane):
    ids, options = some_sessions(9, 300), {"probability": 0.9, "seed": SEED}
    with backend.use("plain"):
        expected = mask_permutation(ids, max_span_length=256, **options)
    with run_on(lane, "mask_permutation"):
        same(mask_permutation(ids, max_span_length=256, **options), expected)
        with pytest.raises(
            RuntimeError,
            match=r"^mask_permutation: max_span_length must be at most 256 on backend 'cuda'; "
            "got 257: use backend 'plain'",
        ):
            mask_permutation(ids, max_span_length=257, **options)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("probability", "longest", "everything"),
    [(1.0, 1, False), (1.0, 7, False), (0.31, 3, False), (1e-12, 5, False), (0.5, 2, True)],
)
def test_options(lane, probability, longest, everything):
    item_ids = some_sessions(50, 12)
    with run_on(lane, "mask_permutation") as device:
        found = mask_permutation(
            item_ids.to(device),
            probability=probability,
            max_span_length=longest,
            permute_all=everything,
            seed=SEED.to(device),
        )
    # beyond any session a stretch's length is cut
    longer = max(probability, 2.0**-30)
    same(found, rules_in_python(item_ids, "train", longer, longest, everything))
    n = (item_ids != 0).sum(1)
    counts = found.mask.sum(1).cpu()
    assert torch.equal(counts == 0, n <= 1)  # at least one, never all
    assert (counts < n)[n > 0].all()


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 21), max_size=9),
    spare=st.integers(0, 5),
    padding_idx=st.sampled_from([0, 7, -1]),
    turned=st.booleans(),
    mode=st.sampled_from(["train", "last", "next"]),
    probability=st.sampled_from([1 / 6, 0.5, 1.0]),
    longest=st.integers(1, 6),
    everything=st.booleans(),
)
def test_any_sessions(
    lane, lengths, spare, padding_idx, turned, mode, probability, longest, everything
):
    """Also no session, no position, and sessions of nothing but padding."""
    positions = max([*lengths, 0]) + spare
    ids = sessions(lengths, positions).reshape(len(lengths), positions)
    ids = torch.where(ids == 0, padding_idx, ids + 10)
    options = {"probability": probability, "max_span_length": longest, "permute_all": everything}
    with run_on(lane, "mask_permutation") as device:
        given = (ids.T.contiguous().T if turned else ids).to(device)
        seed = {"seed": SEED.to(device)} if mode == "train" else {}
        found = mask_permutation(given, mode=mode, padding_idx=padding_idx, **options, **seed)
    same(found, rules_in_python(ids, mode, probability, longest, everything, padding_idx))


@pytest.mark.parametrize("lane", LANES)
def test_another_padding_id_and_views(lane):
    item_ids = sessions([3, 0, 7, 1, 5] * 9, 7, padding_idx=2)
    turned = item_ids.T.contiguous().T
    with run_on(lane, "mask_permutation") as device:
        found = mask_permutation(turned.to(device), padding_idx=2, seed=SEED.to(device))
    same(found, rules_in_python(item_ids, "train", padding_idx=2))


def test_shares_are_those_of_the_contract():
    """Against the contract's loop with Python's own random numbers."""
    count, chance = 20_000, random.Random(0)
    for n in (2, 5, 12, 20):
        shares = []
        for _ in range(count):
            mask = spans_in_python(n, chance.randrange, 1 / 6, 5)
            if not any(mask):
                mask[chance.randrange(n)] = True
            shares.append(min(sum(mask), n - 1))
        wanted = torch.tensor(shares, dtype=torch.float64)
        found = mask_permutation(sessions([n] * count, n), seed=SEED).mask.sum(1).double()
        error = math.sqrt((wanted.var() + found.var()) / count)
        assert abs(wanted.mean() - found.mean()) <= 4 * error, n


def test_order_is_any_permutation():
    count = 30_000
    found = mask_permutation(sessions([4] * count, 4), permute_all=True, seed=SEED)
    full = found.mask.sum(1) == 3
    assert full.all()
    # how many of the predicted positions each of them may see: 0, 1, 2 in some order
    sees = (1 - found.perm_mask) * found.mask[:, None, :]
    ranks = sees.sum(2)[found.mask].reshape(count, 3)
    assert torch.equal(ranks.sort(1).values, torch.arange(3.0).expand(count, 3))
    code = (ranks @ torch.tensor([9.0, 3, 1])).long()
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - count / 6) ** 2 / (count / 6)).sum() < 20.5  # chi-square of 5, p = 0.001


@pytest.mark.parametrize("mode", ["train", "last", "next"])
def test_no_answer_is_seen(mode):
    item_ids = some_sessions(64, 15)
    found = mask_permutation(item_ids, mode=mode)
    at = found.rows[: found.count]
    positions = found.mask.shape[1]
    session, position = at // positions, at % positions
    assert found.perm_mask[session, position, position].all()  # not its own item
    if mode == "train":
        # the items that are not predicted see none of those that are
        plain = ~found.mask[:, :, None] & found.mask[:, None, :]
        assert found.perm_mask[plain].all()
        assert not found.perm_mask[~found.mask[:, None, :].expand_as(found.perm_mask)].any()


def test_inference_reads_behind_the_last_item():
    """The reference predicts the last known item again: changing it changed nothing there."""
    found = mask_permutation(torch.tensor([[5, 6, 0], [7, 8, 9]]), mode="next")
    assert found.rows[:2].tolist() == [2, 7]
    assert found.perm_mask[0, 2].tolist() == [0, 0, 1, 1]  # sees both items
    assert found.perm_mask[1, 3].tolist() == [0, 0, 0, 1]
    assert not found.targets.any()


def test_xlnet_learns_nothing_from_hidden_items():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=1, d_model=8, n_layer=2, n_head=2, d_inner=16, dropout=0.0, mem_len=None
    )
    model = transformers.XLNetModel(config).eval()
    drawn = mask_permutation(sessions([6] * 8, 6), probability=0.4, seed=SEED)
    x = torch.randn(8, 6, 8)
    moved = torch.where(drawn.mask[..., None], torch.randn(8, 6, 8), x)  # other answers
    outputs = [
        model(
            inputs_embeds=inputs,
            perm_mask=drawn.perm_mask,
            target_mapping=drawn.target_mapping,
        )[0]
        for inputs in (x, moved)
    ]
    first = torch.where(drawn.mask, (1 - drawn.perm_mask).mul(drawn.mask[:, None]).sum(2), 9)
    rows = first == 0  # the first in the order sees no answer at all
    assert rows.any(1).all()
    torch.testing.assert_close(outputs[0][rows], outputs[1][rows])
    later = drawn.mask & (first > 0)
    assert (outputs[0][later] - outputs[1][later]).abs().max() > 1e-4


def test_seed_governs():
    item_ids = some_sessions(30, 20)
    torch.manual_seed(1)
    first = mask_permutation(item_ids)
    other = mask_permutation(item_ids)
    torch.manual_seed(1)
    same(mask_permutation(item_ids), first)
    assert not torch.equal(other.mask, first.mask)


@pytest.mark.parametrize("lane", LANES)
def test_same_bits_for_any_number_of_threads(lane):
    item_ids = some_sessions(500, 20)
    before = torch.get_num_threads()
    try:
        with run_on(lane, "mask_permutation") as device:
            torch.set_num_threads(1)
            one = mask_permutation(item_ids.to(device), seed=SEED.to(device))
            torch.set_num_threads(2)
            two = mask_permutation(item_ids.to(device), seed=SEED.to(device))
    finally:
        torch.set_num_threads(before)
    same(two, [t.cpu() for t in one])


@pytest.mark.parametrize("name", ["cpu", "plain"])
def test_no_host_sync(name):
    with run_on(name, "mask_permutation"), LargestTensor() as seen:
        mask_permutation(some_sessions(9, 11), seed=SEED)
    # the check that padding is on the right reads one boolean on a CPU only
    assert seen.calls.isdisjoint({"nonzero", "masked_select", "multinomial", "unique"})


@pytest.mark.parametrize("lane", NATIVE)
@pytest.mark.parametrize("mode", ["train", "last", "next"])
def test_compiles_and_passes_opcheck(lane, mode):
    item_ids = some_sessions(9, 11)
    seed = SEED if mode == "train" else None

    def draw(ids):
        return mask_permutation(ids, mode=mode, seed=seed)

    with run_on(lane, "mask_permutation"):
        compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")(item_ids)
        same(compiled, draw(item_ids))
        torch.library.opcheck(
            backend.ops(backend.forced(), plain).mask_permutation_fwd,
            (item_ids, seed, [6, 12, 18], False, ["train", "last", "next"].index(mode), 0),
        )


IDS = torch.tensor([[3, 4, 0], [5, 0, 0]])
ERRORS = {
    "mode": (IDS, {"mode": "all"}, ValueError, "mode must be one of train, last, next; got 'all'"),
    "probability": (IDS, {"probability": 0.0}, ValueError, "probability must be > 0 .* got 0.0"),
    "above one": (IDS, {"probability": 1.5}, ValueError, "probability must be .* got 1.5"),
    "span": (IDS, {"max_span_length": 0}, ValueError, "max_span_length must be >= 1; got 0"),
    "dtype": (IDS.int(), {}, TypeError, "item_ids must be int64; got torch.int32"),
    "shape": (IDS[0], {}, ValueError, r"item_ids must have shape \(B, L\); got \(3,\)"),
    "padding": (IDS.flip(1), {}, ValueError, "padding .* on the right only; got .* row 0"),
    "seed": (IDS, {"seed": SEED[:1]}, ValueError, r"seed must be int64 \(2,\)"),
    "seed, last": (IDS, {"seed": SEED, "mode": "last"}, ValueError, "seed must be None in mode"),
}


@pytest.mark.parametrize(("ids", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(ids, options, kind, message):
    with pytest.raises(kind, match=rf"^mask_permutation: .*{message}"):
        mask_permutation(ids, **options)

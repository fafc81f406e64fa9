"""mask_mlm: exact rules, exact random numbers, and the rates of the contract."""

import pytest
import torch
from harness import LargestTensor, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st

from t4r_fast import backend
from t4r_fast.ops._sequence_mask import PackedMask, SequenceMask
from t4r_fast.ops.mask_mlm import mask_mlm
from t4r_fast.plain import mask_mlm as plain
from t4r_fast.plain._philox import philox

LANES = lanes("mask_mlm")
NATIVE = [lane for lane in LANES if lane in ("cpu", "cuda-on-cpu")]
MODES = ["train", "last", "shifted", "next"]
PACKED_MODES = MODES[:3]
SEED = torch.tensor([2**62 + 12345, -(2**40) - 6])


def sessions(lengths, positions, padding_idx=0):
    """(B, L) distinct ids, padded on the right."""
    ids = torch.arange(len(lengths) * positions).reshape(len(lengths), positions) + 3
    return torch.where(torch.arange(positions) < torch.tensor(lengths)[:, None], ids, padding_idx)


def some_sessions(count, positions):
    g = torch.Generator().manual_seed(count * 100 + positions)
    return sessions(torch.randint(0, positions + 1, (count,), generator=g).tolist(), positions)


# B * L around a warp, a block and the 32 tiles of 32 sessions that are looked at together
SHAPES = [
    (1, 1),
    (31, 1),
    (1, 31),
    (32, 1),
    (1, 32),
    (33, 1),
    (3, 11),
    (1023, 1),
    (33, 31),
    (32, 32),
]
SHAPES += [(41, 25), (5, 205), (256, 20), (3500, 20)]


def boundary_sessions():
    yield from (some_sessions(*shape) for shape in SHAPES)
    yield sessions([0] * 70, 6)
    yield sessions([6] * 70, 6)


def pack(ids, spare=0, padding_idx=0):
    """The items of (B, L), what no one may read behind them, and their offsets."""
    items = ids != padding_idx
    behind = torch.tensor([padding_idx, -7, 2**62])[torch.arange(spare) % 3]
    ends = items.sum(1).cumsum(0)
    return torch.cat([ids[items], behind]), torch.cat([ends.new_zeros(1), ends])


def packed_of(padded, ids, spare=0, padding_idx=0):
    """The PackedMask that says what a SequenceMask of (B, L) says of its items."""
    items = ids != padding_idx
    place = items.flatten().cumsum(0) - 1
    used = padded.rows[: padded.count].cpu()
    used = used[items.flatten()[used]]  # "next" has a row for an empty session
    size, count = int(items.sum()) + spare, len(used)
    rows = torch.full((size,), -1)
    rows[:count] = place[used]
    targets = torch.full((size,), padding_idx)
    targets[:count] = padded.targets.cpu().flatten()[used]
    replaced = torch.zeros(size, dtype=torch.bool)
    replaced[: size - spare] = padded.mask.cpu()[items]
    return PackedMask(replaced, rows, targets, torch.tensor(count))


def philox_in_python(key, counter):
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    c = list(counter)
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            second >> 32 ^ c[1] ^ k0,
            second & 0xFFFFFFFF,
            first >> 32 ^ c[3] ^ k1,
            first & 0xFFFFFFFF,
        ]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c


def rules_in_python(item_ids, mode, probability=0.15, padding_idx=0, seed=SEED):
    """The contract, one session after another."""
    key, offset = (s % 2**64 for s in seed.tolist())
    low, kind = offset % 2**32, (offset >> 32) * 8 % 2**32
    targets, masks, rows = [], [], []
    for b, row in enumerate(item_ids.tolist()):
        n = sum(i != padding_idx for i in row)
        length = len(row) + (mode == "next")
        target, mask = [padding_idx] * length, [False] * length
        if mode == "train" and n:
            for i in range(n):
                word = philox_in_python(key, (i // 4, b, kind, low))[i % 4]
                mask[i] = word < round(probability * 2**32)
            extra, spared = philox_in_python(key, (0, b, kind + 1, low))[:2]
            mask[extra * n >> 32] = True
            if sum(mask) == n:
                mask[spared * n >> 32] = False
        if mode == "last" and n:
            mask[n - 1] = True
        if mode == "shifted":
            mask[: max(n - 1, 0)] = [True] * max(n - 1, 0)
        if mode == "next":
            mask[n] = True
        for i, masked in enumerate(mask):
            if masked and mode != "next":
                target[i] = row[i + (mode == "shifted")]
        rows += [b * length + i for i, masked in enumerate(mask) if masked]
        targets.append(target)
        masks.append(mask)
    length = item_ids.shape[1] + (mode == "next")
    count = len(rows)
    rows += [-1] * (len(item_ids) * length - count)
    return (
        torch.tensor(targets, dtype=torch.int64).reshape(len(item_ids), length),
        torch.tensor(masks, dtype=torch.bool).reshape(len(item_ids), length),
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(count),
    )


def same(found, expected):
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a.cpu(), b), name


def test_philox_known_answers():
    """The vectors of Random123's kat_vectors file."""
    cases = [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for key, counter, wanted in cases:
        signed = torch.tensor(key - 2**64 if key >= 2**63 else key)
        words = philox(signed, tuple(torch.tensor(c) for c in counter))
        assert " ".join(f"{w.item():08x}" for w in words) == wanted
        assert " ".join(f"{w:08x}" for w in philox_in_python(key, counter)) == wanted


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 4), (33, 5), (70, 21), (0, 3), (3, 0)], ids=str)
def test_rules(lane, mode, shape):
    ids = some_sessions(*shape)
    options = {"seed": SEED} if mode == "train" else {}
    with run_on(lane, "mask_mlm") as device:
        options = {k: v.to(device) for k, v in options.items()}
        found = mask_mlm(ids.to(device), mode=mode, **options)
    same(found, rules_in_python(ids, mode))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_as_plain_pytorch(lane, mode):
    for ids in boundary_sessions():
        options = {"seed": SEED} if mode == "train" else {}
        with backend.use("plain"):
            expected = mask_mlm(ids, mode=mode, **options)
        with run_on(lane, "mask_mlm") as device:
            options = {k: v.to(device) for k, v in options.items()}
            same(mask_mlm(ids.to(device), mode=mode, **options), expected)


@pytest.mark.parametrize("lane", LANES)
def test_same_bits_in_every_order_of_blocks_and_warps(lane):
    ids, first = some_sessions(300, 7), None
    for _ in range(8):  # every launch on the emulated GPU has an order of its own
        with run_on(lane, "mask_mlm") as device:
            found = mask_mlm(ids.to(device), seed=SEED.to(device))
        first = first or [t.cpu() for t in found]
        same(found, first)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_probabilities_and_seeds(lane, probability):
    ids = some_sessions(40, 9)
    for seed in (torch.tensor([0, 0]), torch.tensor([-1, -1]), torch.tensor([5, 2**33])):
        with run_on(lane, "mask_mlm") as device:
            found = mask_mlm(ids.to(device), probability=probability, seed=seed.to(device))
        same(found, rules_in_python(ids, "train", probability, seed=seed))
        n = (ids != 0).sum(1)
        if probability == 0.0:
            assert torch.equal(found.mask.sum(1).cpu(), (n > 1).long())
        if probability == 1.0:
            assert torch.equal(found.mask.sum(1).cpu(), (n - 1).clamp(min=0))


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 21), max_size=9),
    spare=st.integers(0, 5),
    padding_idx=st.sampled_from([0, 7, -1]),
    turned=st.booleans(),
    mode=st.sampled_from(MODES),
    probability=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
)
def test_any_sessions(lane, lengths, spare, padding_idx, turned, mode, probability):
    """Also no session, no position, and sessions of nothing but padding."""
    positions = max([*lengths, 0]) + spare
    ids = sessions(lengths, positions).reshape(len(lengths), positions)
    ids = torch.where(ids == 0, padding_idx, ids + 10)
    with run_on(lane, "mask_mlm") as device:
        given = (ids.T.contiguous().T if turned else ids).to(device)
        options = {"mode": mode, "padding_idx": padding_idx}
        if mode == "train":
            options |= {"seed": SEED.to(device), "probability": probability}
        found = mask_mlm(given, **options)
    same(found, rules_in_python(ids, mode, probability, padding_idx))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", MODES)
def test_many_sessions_views_and_another_padding(lane, mode):
    """Enough sessions for several threads; columns far apart in memory."""
    ids = torch.where(some_sessions(3000, 6) == 0, 7, some_sessions(3000, 6) + 10)
    options = {"seed": SEED} if mode == "train" else {}
    expected = rules_in_python(ids, mode, padding_idx=7)
    with run_on(lane, "mask_mlm") as device:
        options = {k: v.to(device) for k, v in options.items()}
        view = ids.T.contiguous().T.to(device)
        same(mask_mlm(view, mode=mode, padding_idx=7, **options), expected)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("n", "rate"), [(1, 0.0), (2, 0.5), (3, 0.424), (5, 0.320), (10, 0.235), (20, 0.193)]
)
def test_rate_per_length(lane, n, rate):
    """The contract's measured share of masked positions, and its exact value."""
    count, p = 4_000 if lane == "cuda-on-cpu" else 20_000, 0.15
    exact = p + (1 - p - p ** (n - 1)) / n
    assert exact == pytest.approx(rate, abs=2e-3)
    with run_on(lane, "mask_mlm") as device:
        mask = mask_mlm(sessions([n] * count, 20).to(device), seed=SEED.to(device)).mask.cpu()
    found = mask.float().sum() / (count * n)
    assert found.item() == pytest.approx(exact, abs=4 * (0.25 / (count * n)) ** 0.5)
    each = mask[:, :n].float().mean(0)  # no position is preferred
    assert (each - exact).abs().max() < 4.5 * (0.25 / count) ** 0.5
    assert not mask[:, n:].any()
    if n > 1:
        assert mask.sum(1).min() >= 1
        assert mask.sum(1).max() <= n - 1


@pytest.mark.parametrize("lane", LANES)
def test_positions_are_independent_but_for_the_rules(lane):
    """Joint law of all masks of 3-item sessions, against the enumerated one."""
    p, law = 0.15, {}
    for bits in range(8):
        for extra in range(3):
            chance = p ** bin(bits).count("1") * (1 - p) ** (3 - bin(bits).count("1")) / 3
            mask = bits | 1 << extra
            for spared in range(3):
                final = mask & ~(1 << spared) if mask == 7 else mask
                law[final] = law.get(final, 0) + chance / 3
    count = 12_000 if lane == "cuda-on-cpu" else 60_000
    with run_on(lane, "mask_mlm") as device:
        ids = sessions([3] * count, 3).to(device)
        mask = mask_mlm(ids, seed=SEED.to(device)).mask.cpu()
    seen = (mask * torch.tensor([1, 2, 4])).sum(1).bincount(minlength=8)
    chi2 = sum((seen[m].item() - count * c) ** 2 / (count * c) for m, c in law.items())
    assert sum(law.values()) == pytest.approx(1)
    assert seen[0] == seen[7] == 0
    assert chi2 < 20.5  # 5 degrees of freedom: exceeded once in a thousand seeds


@pytest.mark.parametrize("lane", LANES)
def test_generator_governs_the_draw(lane):
    ids = sessions([20] * 64, 20)
    with run_on(lane, "mask_mlm") as device:
        ids = ids.to(device)
        torch.manual_seed(5)
        first, second = mask_mlm(ids).mask, mask_mlm(ids).mask
        torch.manual_seed(5)
        assert torch.equal(mask_mlm(ids).mask, first)
        state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
        assert torch.equal(mask_mlm(ids).mask, second)
        (torch.cuda.set_rng_state if device == "cuda" else torch.set_rng_state)(state)
        assert torch.equal(mask_mlm(ids).mask, second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mode", range(4))
def test_plain_never_waits_for_the_host(mode):
    with LargestTensor() as seen:
        plain.mask_mlm_fwd(sessions([3, 0, 5], 5), SEED, 2**30, mode, 0)
    assert not seen.calls & {"_local_scalar_dense", "nonzero", "masked_select", "multinomial"}


@pytest.mark.parametrize("lane", [lane for lane in NATIVE if lane != "cpu"])
def test_one_launch_is_all(lane):
    ids = some_sessions(70, 9)
    with run_on(lane, "mask_mlm"), LargestTensor() as seen:
        mask_mlm(ids, seed=SEED)
    assert seen.calls == {"mask_mlm_fwd"}


@pytest.mark.parametrize("lane", [lane for lane in NATIVE if lane != "cpu"])
def test_the_kernel_stops_at_items_behind_padding(lane):
    for row, position in [(0, 1), (33, 4), (69, 8)]:
        ids = sessions([9] * 70, 9)
        ids[row, position - 1] = 0
        with (
            run_on(lane, "mask_mlm"),
            pytest.raises(
                RuntimeError, match=r"^mask_mlm: item_ids must have its padding on the right only$"
            ),
        ):
            mask_mlm(ids, seed=SEED)


@pytest.mark.parametrize("lane", NATIVE)
@pytest.mark.parametrize("mode", range(4))
def test_opcheck(lane, mode):
    with run_on(lane, "mask_mlm"):
        args = (sessions([3, 0, 5], 5), SEED if mode == 0 else None, 2**30, mode, 0)
        op = backend.ops(backend.forced(), plain).mask_mlm_fwd
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", ["train", "next"])
def test_compiles_to_one_graph(lane, mode):
    with run_on(lane, "mask_mlm") as device:
        ids = sessions([3, 0, 5, 1], 5).to(device)
        options = {"seed": SEED.to(device)} if mode == "train" else {}

        def step(x):
            return tuple(mask_mlm(x, mode=mode, **options))

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(ids)
        assert all(torch.equal(a, b) for a, b in zip(step(ids), compiled, strict=True))


@pytest.mark.parametrize("lane", NATIVE)
def test_native_kernel_guards_its_arguments(lane):
    with run_on(lane, "mask_mlm"):
        op = backend.ops(backend.forced(), plain).mask_mlm_fwd
        ids = sessions([3], 5)
        for args, message in [
            ((ids[0], SEED, 1, 0, 0), r"item_ids must have shape \(B, L\); got 1 dim"),
            ((ids.int(), SEED, 1, 0, 0), "item_ids must be int64"),
            ((ids, None, 1, 0, 0), "seed must be given in mode 'train'"),
            ((ids, SEED[:1], 1, 0, 0), r"seed must have shape \(2,\); got \(1,\)"),
            ((ids, SEED, 1, 9, 0), "mode must be 0 to 3; got 9"),
        ]:
            with pytest.raises(RuntimeError, match=f"^mask_mlm: {message}"):
                op(*args)


X = sessions([3, 2], 4)
ERRORS = {
    "shape": ((X[0],), {}, ValueError, r"item_ids must have shape \(B, L\); got \(4,\)"),
    "dtype": ((X.int(),), {}, TypeError, "item_ids must be int64; got torch.int32"),
    "mode": ((X,), {"mode": "all"}, ValueError, "train, last, shifted, next; got 'all'"),
    "probability": ((X,), {"probability": 1.2}, ValueError, "probability must .* got 1.2"),
    "nan": ((X,), {"probability": float("nan")}, ValueError, "probability must .* got nan"),
    "left": ((X.flip(1),), {}, ValueError, r"padding \(0\) on the right .* row 0, position 1$"),
    "hole": ((torch.tensor([[1, 2], [0, 3]]),), {}, ValueError, "row 1, position 1"),
    "seed shape": ((X,), {"seed": SEED[:1]}, ValueError, r"seed must be int64 \(2,\).*\(1,\)"),
    "seed dtype": ((X,), {"seed": SEED.int()}, ValueError, "seed must .* got torch.int32"),
    "seed use": ((X,), {"seed": SEED, "mode": "last"}, ValueError, "seed must be None in mode"),
    "device": ((X,), {"seed": SEED.to("meta")}, ValueError, "seed must be on device cpu; got meta"),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with backend.use("plain"), pytest.raises(kind, match=rf"^mask_mlm: .*{message}"):
        mask_mlm(*args, **options)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", PACKED_MODES)
def test_packed_sessions_have_the_bits_of_padded_ones(lane, mode):
    for ids in boundary_sessions():
        for spare in (0, 13):
            items, offsets = pack(ids, spare)
            with run_on(lane, "mask_mlm") as device:
                options = {"mode": mode, "seed": SEED.to(device) if mode == "train" else None}
                padded = mask_mlm(ids.to(device), **options)
                found = mask_mlm(items.to(device), offsets=offsets.to(device), **options)
            same(found, packed_of(padded, ids, spare))


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=70),
    spare=st.integers(0, 300),
    padding_idx=st.sampled_from([0, 7, -1]),
    step=st.sampled_from([1, 2]),
    mode=st.sampled_from(PACKED_MODES),
    probability=st.sampled_from([0.0, 0.15, 0.5, 1.0]),
)
def test_any_packed_sessions(lane, lengths, spare, padding_idx, step, mode, probability):
    """Also no session, no item, capacity without items, and views."""
    positions = max([*lengths, 0])
    ids = sessions(lengths, positions).reshape(len(lengths), positions)
    ids = torch.where(ids == 0, padding_idx, ids + 10)
    padded = SequenceMask(*rules_in_python(ids, mode, probability, padding_idx))
    given = [t.repeat_interleave(step) for t in pack(ids, spare, padding_idx)]
    with run_on(lane, "mask_mlm") as device:
        items, offsets = (t.to(device)[::step] for t in given)
        options = {"mode": mode, "padding_idx": padding_idx}
        if mode == "train":
            options |= {"seed": SEED.to(device), "probability": probability}
        found = mask_mlm(items, offsets=offsets, **options)
    same(found, packed_of(padded, ids, spare, padding_idx))


@pytest.mark.parametrize("lane", LANES)
def test_a_packed_example(lane):
    items = torch.tensor([11, 12, 13, 14, 99, 0])
    with run_on(lane, "mask_mlm") as device:
        offsets = torch.tensor([0, 3, 3, 4], device=device)
        last = mask_mlm(items.to(device), offsets=offsets, mode="last")
        shifted = mask_mlm(items.to(device), offsets=offsets, mode="shifted")
    assert last.replaced.tolist() == [False, False, True, True, False, False]
    assert last.rows.tolist() == [2, 3, -1, -1, -1, -1]
    assert last.targets.tolist() == [13, 14, 0, 0, 0, 0]
    assert last.count.item() == 2
    assert shifted.replaced.tolist() == [True, True, False, False, False, False]
    assert shifted.rows.tolist() == [0, 1, -1, -1, -1, -1]
    assert shifted.targets.tolist() == [12, 13, 0, 0, 0, 0]


@pytest.mark.parametrize("lane", LANES)
def test_packed_bits_in_every_order_of_blocks_and_warps(lane):
    (items, offsets), first = pack(some_sessions(300, 7), 500), None
    for _ in range(8):
        with run_on(lane, "mask_mlm") as device:
            found = mask_mlm(items.to(device), offsets=offsets.to(device), seed=SEED.to(device))
        first = first or [t.cpu() for t in found]
        same(found, first)


@pytest.mark.parametrize("mode", range(3))
def test_plain_never_waits_for_the_host_with_packed_sessions(mode):
    items, offsets = pack(sessions([3, 0, 5], 5), 4)
    with LargestTensor() as seen:
        plain.mask_mlm_packed_fwd(items, offsets, SEED, 2**30, mode, 0)
    assert not seen.calls & {"_local_scalar_dense", "nonzero", "masked_select", "multinomial"}


@pytest.mark.parametrize("lane", [lane for lane in NATIVE if lane != "cpu"])
def test_one_launch_is_all_with_packed_sessions(lane):
    items, offsets = pack(some_sessions(70, 9), 40)
    with run_on(lane, "mask_mlm"), LargestTensor() as seen:
        mask_mlm(items, offsets=offsets, seed=SEED)
    assert seen.calls == {"mask_mlm_packed_fwd"}


@pytest.mark.parametrize("lane", [lane for lane in NATIVE if lane != "cpu"])
def test_the_kernel_stops_at_padding_within_packed_sessions_and_at_wrong_offsets(lane):
    for item in (0, 317, 629):
        items, offsets = pack(sessions([9] * 70, 9), 20)
        items[item] = 0
        with (
            run_on(lane, "mask_mlm"),
            pytest.raises(
                RuntimeError, match=r"^mask_mlm: item_ids with offsets must hold no padding$"
            ),
        ):
            mask_mlm(items, offsets=offsets, seed=SEED)
    for entry, value in [(0, 1), (0, -1), (33, 400), (50, -5), (70, 651), (70, 2**40)]:
        items, offsets = pack(sessions([9] * 70, 9), 20)
        offsets[entry] = value
        with (
            run_on(lane, "mask_mlm"),
            pytest.raises(
                RuntimeError, match=r"^mask_mlm: offsets must rise from 0 to at most the items"
            ),
        ):
            mask_mlm(items, offsets=offsets, seed=SEED)


@pytest.mark.parametrize("lane", NATIVE)
@pytest.mark.parametrize("mode", range(3))
def test_opcheck_with_packed_sessions(lane, mode):
    with run_on(lane, "mask_mlm"):
        args = (*pack(sessions([3, 0, 5], 5), 4), SEED if mode == 0 else None, 2**30, mode, 0)
        torch.library.opcheck(backend.ops(backend.forced(), plain).mask_mlm_packed_fwd, args)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", ["train", "last"])
def test_packed_sessions_compile_to_one_graph(lane, mode):
    with run_on(lane, "mask_mlm") as device:
        items, offsets = (t.to(device) for t in pack(sessions([3, 0, 5, 1], 5), 3))
        options = {"seed": SEED.to(device)} if mode == "train" else {}

        def step(x, y):
            return tuple(mask_mlm(x, offsets=y, mode=mode, **options))

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(items, offsets)
        assert all(torch.equal(a, b) for a, b in zip(step(items, offsets), compiled, strict=True))


@pytest.mark.parametrize("lane", NATIVE)
def test_native_kernel_guards_its_arguments_with_packed_sessions(lane):
    with run_on(lane, "mask_mlm"):
        op = backend.ops(backend.forced(), plain).mask_mlm_packed_fwd
        items, offsets = pack(sessions([3], 5))
        for args, message in [
            ((items[None], offsets, SEED, 1, 0, 0), r"item_ids must have shape \(U,\); got 2 dim"),
            ((items.int(), offsets, SEED, 1, 0, 0), "item_ids must be int64"),
            ((items, offsets[None], SEED, 1, 0, 0), r"offsets must have shape \(B \+ 1,\); got 2"),
            ((items, offsets[:0], SEED, 1, 0, 0), r"offsets must have shape \(B \+ 1,\), one"),
            ((items, offsets.int(), SEED, 1, 0, 0), "offsets must be int64"),
            ((items, offsets, None, 1, 0, 0), "seed must be given in mode 'train'"),
            ((items, offsets, SEED, 1, 3, 0), "mode must not be 'next' with offsets"),
            ((items, offsets, SEED, 1, 9, 0), "mode must be 0 to 3; got 9"),
        ]:
            with pytest.raises(RuntimeError, match=f"^mask_mlm: {message}"):
                op(*args)


U, O = pack(X)  # noqa: E741
PACKED_ERRORS = {
    "shape": (X, O, {}, ValueError, r"item_ids must have shape \(U,\) because .*; got \(2, 4\)"),
    "dtype": (U.int(), O, {}, TypeError, "item_ids must be int64; got torch.int32"),
    "offsets shape": (U, O[None], {}, ValueError, r"offsets must have shape \(B \+ 1,\); got"),
    "no offset": (U, O[:0], {}, ValueError, r"one entry at least; got \(0,\)"),
    "offsets dtype": (U, O.int(), {}, TypeError, "offsets must be int64; got torch.int32"),
    "offsets device": (
        U,
        O.to("meta"),
        {},
        ValueError,
        "offsets must be on the device of item_ids",
    ),
    "start": (U, O + 1, {}, ValueError, "rise from 0 to at most 5, .*; got 1 at entry 0$"),
    "fall": (U, O.flip(0) - O[-1], {}, ValueError, "rise from 0 .*; got -2 at entry 1$"),
    "end": (U[:4], O, {}, ValueError, "rise from 0 to at most 4, .*; got 5 at entry 2$"),
    "padding": (U * 0, O, {}, ValueError, r"must hold no padding \(0\); got it at item 0$"),
    "last item": (U, O, {"padding_idx": 8}, ValueError, r"no padding \(8\); got it at item 4$"),
    "mode": (U, O, {"mode": "next"}, ValueError, "append an item to each session .*'last'"),
}


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane in ("plain", "cpu")])
@pytest.mark.parametrize(
    ("items", "offsets", "options", "kind", "message"),
    PACKED_ERRORS.values(),
    ids=PACKED_ERRORS.keys(),
)
def test_packed_errors(lane, items, offsets, options, kind, message):
    with run_on(lane, "mask_mlm"), pytest.raises(kind, match=rf"^mask_mlm: .*{message}"):
        mask_mlm(items, offsets=offsets, **options)

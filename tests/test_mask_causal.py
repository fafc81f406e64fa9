"""mask_causal: the contract's rules, exactly."""

import pytest
import torch
from harness import LargestTensor, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mask_mlm import boundary_sessions, pack, packed_of, same, sessions, some_sessions

from t4r_fast import backend
from t4r_fast.ops._sequence_mask import SequenceMask
from t4r_fast.ops.mask_causal import MODES, mask_causal
from t4r_fast.plain import mask_causal as plain

LANES = lanes("mask_causal")
NATIVE = [lane for lane in LANES if lane in ("cpu", "cuda-on-cpu")]
CASES = [(mode, False) for mode in MODES] + [("train_last", True), ("last", True)]


def rules_in_python(item_ids, mode, hide_history=False, padding_idx=0):
    """The contract, one session after another."""
    length = item_ids.shape[1]
    targets, masks, rows = [], [], []
    for b, row in enumerate(item_ids.tolist()):
        n = sum(i != padding_idx for i in row)
        target, mask = [padding_idx] * length, [i >= n for i in range(length)]
        wanted = {
            "train": range(n - 1),
            "train_last": range(max(n - 2, 0), n - 1),
            "last": range(max(n - 2, 0), n - 1),
            "next": (),
        }[mode]
        for i in wanted:
            target[i] = row[i + 1]
        if mode == "train" or hide_history:
            mask = [i not in wanted for i in range(length)]
        read = [max(n - 1, 0)] if mode == "next" and length else wanted
        rows += [b * length + i for i in read]
        targets.append(target)
        masks.append(mask)
    count = len(rows)
    rows += [-1] * (item_ids.numel() - count)
    return (
        torch.tensor(targets, dtype=torch.int64).reshape(len(item_ids), length),
        torch.tensor(masks, dtype=torch.bool).reshape(len(item_ids), length),
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(count),
    )


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("mode", "hide_history"), CASES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (33, 5), (70, 21), (0, 3), (3, 0)], ids=str)
def test_rules(lane, mode, hide_history, shape):
    ids = some_sessions(*shape)
    with run_on(lane, "mask_causal") as device:
        found = mask_causal(ids.to(device), mode=mode, hide_history=hide_history)
    same(found, rules_in_python(ids, mode, hide_history))


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 21), max_size=9),
    spare=st.integers(0, 5),
    padding_idx=st.sampled_from([0, 7, -1]),
    turned=st.booleans(),
    case=st.sampled_from(CASES),
)
def test_any_sessions(lane, lengths, spare, padding_idx, turned, case):
    """Also no session, no position, and sessions of nothing but padding."""
    positions = max([*lengths, 0]) + spare
    ids = sessions(lengths, positions).reshape(len(lengths), positions)
    ids = torch.where(ids == 0, padding_idx, ids + 10)
    with run_on(lane, "mask_causal") as device:
        given = (ids.T.contiguous().T if turned else ids).to(device)
        found = mask_causal(given, mode=case[0], hide_history=case[1], padding_idx=padding_idx)
    same(found, rules_in_python(ids, *case, padding_idx))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("mode", "hide_history"), CASES)
def test_many_sessions_views_and_another_padding(lane, mode, hide_history):
    ids = torch.where(some_sessions(3000, 6) == 0, 7, some_sessions(3000, 6) + 10)
    expected = rules_in_python(ids, mode, hide_history, padding_idx=7)
    with run_on(lane, "mask_causal") as device:
        view = ids.T.contiguous().T.to(device)
        same(mask_causal(view, mode=mode, hide_history=hide_history, padding_idx=7), expected)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("mode", "hide_history"), CASES)
def test_same_bits_as_plain_pytorch(lane, mode, hide_history):
    for ids in boundary_sessions():
        with backend.use("plain"):
            expected = mask_causal(ids, mode=mode, hide_history=hide_history)
        with run_on(lane, "mask_causal") as device:
            found = mask_causal(ids.to(device), mode=mode, hide_history=hide_history)
        same(found, expected)


@pytest.mark.parametrize("lane", LANES)
def test_same_bits_in_every_order_of_blocks_and_warps(lane):
    ids, first = some_sessions(300, 7), None
    for _ in range(8):  # every launch on the emulated GPU has an order of its own
        with run_on(lane, "mask_causal") as device:
            found = mask_causal(ids.to(device))
        first = first or [t.cpu() for t in found]
        same(found, first)


@pytest.mark.parametrize("lane", [lane for lane in NATIVE if lane != "cpu"])
def test_one_launch_is_all_and_stops_at_items_behind_padding(lane):
    ids = sessions([9] * 70, 9)
    with run_on(lane, "mask_causal"), LargestTensor() as seen:
        mask_causal(ids)
    assert seen.calls == {"mask_causal_fwd"}
    ids[69, 7] = 0
    with (
        run_on(lane, "mask_causal"),
        pytest.raises(
            RuntimeError, match=r"^mask_causal: item_ids must have its padding on the right only$"
        ),
    ):
        mask_causal(ids)


@pytest.mark.parametrize("lane", LANES)
def test_an_example(lane):
    ids = torch.tensor([[11, 12, 13, 0], [14, 0, 0, 0]])
    with run_on(lane, "mask_causal") as device:
        train = mask_causal(ids.to(device))
        last = mask_causal(ids.to(device), mode="last")
        hidden = mask_causal(ids.to(device), mode="last", hide_history=True)
        ahead = mask_causal(ids.to(device), mode="next")
    assert train.targets.tolist() == [[12, 13, 0, 0], [0, 0, 0, 0]]
    assert train.mask.tolist() == [[False, False, True, True], [True] * 4]
    assert train.rows.tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    assert train.count.item() == 2
    assert last.targets.tolist() == [[0, 13, 0, 0], [0, 0, 0, 0]]
    assert last.mask.tolist() == [[False, False, False, True], [False, True, True, True]]
    assert hidden.mask.tolist() == [[True, False, True, True], [True] * 4]
    assert ahead.rows.tolist() == [2, 4, -1, -1, -1, -1, -1, -1]
    assert ahead.targets.sum() == 0


@pytest.mark.parametrize("mode", range(3))
def test_plain_never_waits_for_the_host(mode):
    with LargestTensor() as seen:
        plain.mask_causal_fwd(sessions([3, 0, 5], 5), mode, 0, False)
    assert not seen.calls & {"_local_scalar_dense", "nonzero", "masked_select"}


@pytest.mark.parametrize("lane", NATIVE)
@pytest.mark.parametrize("mode", range(3))
def test_opcheck(lane, mode):
    with run_on(lane, "mask_causal"):
        args = (sessions([3, 0, 5], 5), mode, 0, False)
        torch.library.opcheck(backend.ops(backend.forced(), plain).mask_causal_fwd, args)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", ["train", "next"])
def test_compiles_to_one_graph(lane, mode):
    with run_on(lane, "mask_causal") as device:
        ids = sessions([3, 0, 5, 1], 5).to(device)

        def step(x):
            return tuple(mask_causal(x, mode=mode))

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(ids)
        assert all(torch.equal(a, b) for a, b in zip(step(ids), compiled, strict=True))


@pytest.mark.parametrize("lane", NATIVE)
def test_native_kernel_guards_its_arguments(lane):
    with run_on(lane, "mask_causal"):
        op = backend.ops(backend.forced(), plain).mask_causal_fwd
        ids = sessions([3], 5)
        for args, message in [
            ((ids[0], 0, 0, False), r"item_ids must have shape \(B, L\); got 1 dim"),
            ((ids.int(), 0, 0, False), "item_ids must be int64"),
            ((ids, 3, 0, False), "mode must be 0 to 2; got 3"),
        ]:
            with pytest.raises(RuntimeError, match=f"^mask_causal: {message}"):
                op(*args)


X = sessions([3, 2], 4)
ERRORS = {
    "shape": ((X[0],), {}, ValueError, r"item_ids must have shape \(B, L\); got \(4,\)"),
    "dtype": ((X.int(),), {}, TypeError, "item_ids must be int64; got torch.int32"),
    "mode": ((X,), {"mode": "all"}, ValueError, "train, train_last, last, next; got 'all'"),
    "left": ((X.flip(1),), {}, ValueError, r"padding \(0\) on the right .* row 0, position 1$"),
    "hide": ((X,), {"hide_history": True}, ValueError, "hide_history must be False .* 'train'"),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=rf"^mask_causal: .*{message}"):
        mask_causal(*args, **options)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("mode", "hide_history"), CASES)
def test_packed_sessions_are_masked_as_padded_ones(lane, mode, hide_history):
    options = {"mode": mode, "hide_history": hide_history}
    for ids in boundary_sessions():
        for spare in (0, 13):
            items, offsets = pack(ids, spare)
            with run_on(lane, "mask_causal") as device:
                padded = mask_causal(ids.to(device), **options)
                found = mask_causal(items.to(device), offsets=offsets.to(device), **options)
            same(found, packed_of(padded, ids, spare))


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=70),
    spare=st.integers(0, 300),
    padding_idx=st.sampled_from([0, 7, -1]),
    step=st.sampled_from([1, 2]),
    case=st.sampled_from(CASES),
)
def test_any_packed_sessions(lane, lengths, spare, padding_idx, step, case):
    """Also no session, no item, capacity without items, and views."""
    positions = max([*lengths, 0])
    ids = sessions(lengths, positions).reshape(len(lengths), positions)
    ids = torch.where(ids == 0, padding_idx, ids + 10)
    padded = SequenceMask(*rules_in_python(ids, *case, padding_idx))
    given = [t.repeat_interleave(step) for t in pack(ids, spare, padding_idx)]
    with run_on(lane, "mask_causal") as device:
        items, offsets = (t.to(device)[::step] for t in given)
        options = {"mode": case[0], "hide_history": case[1], "padding_idx": padding_idx}
        found = mask_causal(items, offsets=offsets, **options)
    same(found, packed_of(padded, ids, spare, padding_idx))


@pytest.mark.parametrize("lane", LANES)
def test_a_packed_example(lane):
    items = torch.tensor([11, 12, 13, 14, 99, 0])
    with run_on(lane, "mask_causal") as device:
        given = {"item_ids": items.to(device), "offsets": torch.tensor([0, 3, 3, 4], device=device)}
        train, last = mask_causal(**given), mask_causal(**given, mode="last")
        hidden = mask_causal(**given, mode="last", hide_history=True)
        ahead = mask_causal(**given, mode="next")
    assert train.replaced.tolist() == [False, False, True, True, False, False]
    assert train.rows.tolist() == [0, 1, -1, -1, -1, -1]
    assert train.targets.tolist() == [12, 13, 0, 0, 0, 0]
    assert train.count.item() == 2
    assert not last.replaced.any()
    assert last.rows.tolist() == [1, -1, -1, -1, -1, -1]
    assert last.targets.tolist() == [13, 0, 0, 0, 0, 0]
    assert hidden.replaced.tolist() == [True, False, True, True, False, False]
    assert not ahead.replaced.any()
    assert ahead.rows.tolist() == [2, 3, -1, -1, -1, -1]
    assert ahead.targets.tolist() == [0] * 6
    assert ahead.count.item() == 2


@pytest.mark.parametrize("lane", LANES)
def test_packed_bits_in_every_order_of_blocks_and_warps(lane):
    (items, offsets), first = pack(some_sessions(300, 7), 500), None
    for _ in range(8):
        with run_on(lane, "mask_causal") as device:
            found = mask_causal(items.to(device), offsets=offsets.to(device))
        first = first or [t.cpu() for t in found]
        same(found, first)


@pytest.mark.parametrize("lane", [lane for lane in NATIVE if lane != "cpu"])
def test_one_launch_is_all_and_stops_at_padding_and_wrong_offsets(lane):
    items, offsets = pack(sessions([9] * 70, 9), 20)
    with run_on(lane, "mask_causal"), LargestTensor() as seen:
        mask_causal(items, offsets=offsets)
    assert seen.calls == {"mask_causal_packed_fwd"}
    items[629] = 0
    with (
        run_on(lane, "mask_causal"),
        pytest.raises(
            RuntimeError, match=r"^mask_causal: item_ids with offsets must hold no padding$"
        ),
    ):
        mask_causal(items, offsets=offsets)
    offsets[70] = 651
    with (
        run_on(lane, "mask_causal"),
        pytest.raises(
            RuntimeError, match=r"^mask_causal: offsets must rise from 0 to at most the items"
        ),
    ):
        mask_causal(items, offsets=offsets)


@pytest.mark.parametrize("mode", range(3))
def test_plain_never_waits_for_the_host_with_packed_sessions(mode):
    items, offsets = pack(sessions([3, 0, 5], 5), 4)
    with LargestTensor() as seen:
        plain.mask_causal_packed_fwd(items, offsets, mode, 0, False)
    assert not seen.calls & {"_local_scalar_dense", "nonzero", "masked_select"}


@pytest.mark.parametrize("lane", NATIVE)
@pytest.mark.parametrize("mode", range(3))
def test_opcheck_with_packed_sessions(lane, mode):
    with run_on(lane, "mask_causal"):
        args = (*pack(sessions([3, 0, 5], 5), 4), mode, 0, False)
        torch.library.opcheck(backend.ops(backend.forced(), plain).mask_causal_packed_fwd, args)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("mode", ["train", "next"])
def test_packed_sessions_compile_to_one_graph(lane, mode):
    with run_on(lane, "mask_causal") as device:
        items, offsets = (t.to(device) for t in pack(sessions([3, 0, 5, 1], 5), 3))

        def step(x, y):
            return tuple(mask_causal(x, offsets=y, mode=mode))

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(items, offsets)
        assert all(torch.equal(a, b) for a, b in zip(step(items, offsets), compiled, strict=True))


@pytest.mark.parametrize("lane", NATIVE)
def test_native_kernel_guards_its_arguments_with_packed_sessions(lane):
    with run_on(lane, "mask_causal"):
        op = backend.ops(backend.forced(), plain).mask_causal_packed_fwd
        items, offsets = pack(sessions([3], 5))
        for args, message in [
            ((items[None], offsets, 0, 0, False), r"item_ids must have shape \(U,\); got 2 dim"),
            ((items, offsets[:0], 0, 0, False), r"offsets must have shape \(B \+ 1,\), one"),
            ((items, offsets.int(), 0, 0, False), "offsets must be int64"),
            ((items, offsets, 3, 0, False), "mode must be 0 to 2; got 3"),
        ]:
            with pytest.raises(RuntimeError, match=f"^mask_causal: {message}"):
                op(*args)


U, O = pack(X)  # noqa: E741
PACKED_ERRORS = {
    "shape": (X, O, {}, ValueError, r"item_ids must have shape \(U,\) because .*; got \(2, 4\)"),
    "offsets": (U, O[None], {}, ValueError, r"offsets must have shape \(B \+ 1,\); got"),
    "end": (U[:4], O, {}, ValueError, "rise from 0 to at most 4, .*; got 5 at entry 2$"),
    "padding": (U, O, {"padding_idx": 8}, ValueError, r"no padding \(8\); got it at item 4$"),
    "hide": (U, O, {"hide_history": True}, ValueError, "hide_history must be False .* 'train'"),
}


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane in ("plain", "cpu")])
@pytest.mark.parametrize(
    ("items", "offsets", "options", "kind", "message"),
    PACKED_ERRORS.values(),
    ids=PACKED_ERRORS.keys(),
)
def test_packed_errors(lane, items, offsets, options, kind, message):
    with run_on(lane, "mask_causal"), pytest.raises(kind, match=rf"^mask_causal: .*{message}"):
        mask_causal(items, offsets=offsets, **options)

"""Sessions as values: packing and padding, and the places of items."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from t4r_fast.model import sessions
from t4r_fast.model.sessions import ROW_BLOCK

LENGTHS = st.lists(st.integers(0, 9), min_size=0, max_size=12)


def padded(lengths, width=9):
    """Ids that say where they stand, and numbers that say whose they are."""
    place = torch.arange(width)
    there = place < torch.tensor(lengths, dtype=torch.int64).reshape(-1, 1)
    ids = torch.where(there, 100 * torch.arange(len(lengths))[:, None] + place + 1, 0)
    return {"item": ids, "number": ids * 0.5, "age": torch.arange(len(lengths)) + 0.25}


@pytest.mark.parametrize("fixed", [False, True], ids=["exact", "fixed"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=LENGTHS)
def test_packing_and_padding_are_inverse(fixed, lengths):
    columns = padded(lengths)
    given_lengths = sessions.lengths_of(columns["item"], 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "fixed_capacity", lambda _: fixed)
        packed = sessions.pack(columns, given_lengths)
    total = sum(lengths)
    assert packed.offsets.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    rows = sessions.whole_blocks(total) or (ROW_BLOCK if lengths else 0)
    assert packed.rows == (sessions.whole_blocks(9 * len(lengths)) if fixed else rows)
    want = columns["item"][columns["item"] != 0]
    assert torch.equal(packed.columns["item"][:total], want)
    assert torch.equal(packed.columns["number"][:total], want * 0.5)
    assert torch.equal(packed.columns["age"][:total], (want // 100) + 0.25)
    for name in ("item", "number"):
        back = sessions.pad(packed.columns[name], packed.offsets, 9)
        assert torch.equal(back, columns[name])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=LENGTHS)
def test_places_say_session_and_position(lengths):
    offsets = sessions.offsets_of(torch.tensor(lengths, dtype=torch.int64))
    places = sessions.places_of(offsets, sum(lengths) + 3)
    want = [(b << 32) | i for b, n in enumerate(lengths) for i in range(n)] + [-1] * 3
    assert places.tolist() == want


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_one_more_place_behind_each_session(lengths):
    packed = sessions.pack(padded(lengths), torch.tensor(lengths))
    longer, rows = sessions.with_one_more(packed)
    assert longer.offsets.diff().tolist() == [n + 1 for n in lengths]
    assert rows.tolist() == [int(end) - 1 for end in longer.offsets[1:]]
    assert longer.longest == 10
    ids = sessions.pad(longer.columns["item"], longer.offsets, 10)
    for b, n in enumerate(lengths):
        assert ids[b, :n].tolist() == [100 * b + i + 1 for i in range(n)]
        if n:
            assert ids[b, n] == ids[b, n - 1]


def test_sessions_of_one_length_hold_their_padding():
    layout = sessions.whole_rows(3, 4, torch.device("cpu"))
    assert layout.offsets.tolist() == [0, 4, 8, 12]
    assert layout.longest == 4
    assert layout.places.tolist() == [(b << 32) | i for b in range(3) for i in range(4)]

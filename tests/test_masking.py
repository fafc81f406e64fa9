"""The maskings of the model layer against the contract of the reference."""

from __future__ import annotations

import pytest
import torch

import t4r_fast
from t4r_fast.torch.masking import CausalLanguageModeling, MaskedLanguageModeling, build_masking

IDS = torch.tensor([[4, 5, 6, 0, 0], [7, 8, 9, 10, 11], [12, 0, 0, 0, 0]])
X = torch.arange(1.0, 16.0).view(3, 5, 1).expand(3, 5, 2).clone()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def compat():
    before = t4r_fast.get_compat()
    yield t4r_fast.set_compat
    t4r_fast.set_compat(before)


def positions(masking, x):
    """Which positions of x hold the [MASK] vector."""
    return (x == masking.masked_item_embedding).all(-1)


def test_causal_training():
    m = CausalLanguageModeling(hidden_size=2)
    x = m(X, IDS, training=True)
    want = torch.tensor([[5, 6, 0, 0, 0], [8, 9, 10, 11, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(m.masked_targets, want)
    assert torch.equal(m.mask_schema, want != 0)
    assert torch.equal(positions(m, x), want == 0)
    assert torch.equal(x[want != 0], X[want != 0])


def test_causal_training_on_the_last_item_only():
    m = CausalLanguageModeling(hidden_size=2, train_on_last_item_seq_only=True)
    m(X, IDS, training=True)
    want = torch.tensor([[0, 6, 0, 0, 0], [0, 0, 0, 11, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(m.masked_targets, want)


def test_causal_evaluation_sees_the_history():
    m = CausalLanguageModeling(hidden_size=2)
    x = m(X, IDS, testing=True)
    want = torch.tensor([[0, 6, 0, 0, 0], [0, 0, 0, 11, 0], [0, 0, 0, 0, 0]])
    assert torch.equal(m.masked_targets, want)
    assert torch.equal(positions(m, x), IDS == 0)
    # the last column of a full session is a zero vector, as in the reference
    assert torch.equal(x[1, 4], torch.zeros(2))
    assert torch.equal(x[1, :4], X[1, :4])


def test_causal_evaluation_hides_the_history_at_compat_0_1(compat):
    compat("0.1")
    m = CausalLanguageModeling(hidden_size=2)
    x = m(X, IDS, testing=True)
    target = m.masked_targets != 0
    assert target.sum(1).tolist() == [1, 1, 0]
    assert torch.equal(positions(m, x), ~target)


def test_causal_inference():
    m = CausalLanguageModeling(hidden_size=2)
    x = m(X, IDS)
    assert torch.equal(positions(m, x), IDS == 0)
    assert m.rows[:3].tolist() == [2, 9, 10]


def test_mlm_training_rules():
    m = MaskedLanguageModeling(hidden_size=2, mlm_probability=0.4)
    masked = torch.zeros(3, dtype=torch.int64)
    for _ in range(200):
        x = m(X, IDS, training=True)
        mask = m.mask_schema
        assert torch.equal(m.masked_targets, torch.where(mask, IDS, 0))
        assert torch.equal(positions(m, x), mask)
        assert not mask[IDS == 0].any()
        assert (mask.sum(1)[:2] >= 1).all()
        assert (mask.sum(1)[:2] < torch.tensor([3, 5])).all()
        masked += mask.sum(1)
    assert masked[2] == 0  # a session of one item trains nothing


def test_mlm_evaluation_and_inference():
    m = MaskedLanguageModeling(hidden_size=2)
    m(X, IDS, testing=True)
    want = torch.tensor([[0, 0, 6, 0, 0], [0, 0, 0, 0, 11], [12, 0, 0, 0, 0]])
    assert torch.equal(m.masked_targets, want)
    x = m(X, IDS)
    assert x.shape == (3, 6, 2)
    assert positions(m, x).nonzero().tolist() == [[0, 3], [1, 5], [2, 1]]
    assert torch.equal(x[0, 5], X[0, 4])  # the appended column copies the last one


def test_mlm_masks_follow_torchs_seed():
    m = MaskedLanguageModeling(hidden_size=2)
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        m(X.expand(-1, -1, 2), torch.randint(1, 9, (3, 5)), training=True)
        drawn.append(m.mask_schema)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_errors():
    with pytest.raises(ValueError, match="masking must be one of causal, clm, masked, mlm"):
        build_masking("plm2", hidden_size=2)
    with pytest.raises(ValueError, match="mlm_probability must lie between 0 and 1"):
        MaskedLanguageModeling(2, mlm_probability=1.5)
    with pytest.raises(ValueError, match=r"item ids must be \(sessions, positions\)"):
        MaskedLanguageModeling(2)(X, IDS[0], training=True)

"""LazyLogits: formed only on demand, and then an ordinary tensor."""

from __future__ import annotations

import pytest
import torch
from harness import CountedCalls

from t4r_fast.torch.model.lazy_logits import LazyLogits


@pytest.fixture
def logits():
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 5, 1])
    return LazyLogits(
        torch.randn(4, 3, requires_grad=True),
        torch.randn(6, 3),
        labels,
        bias=torch.randn(6),
        temperature=2.0,
    )


def test_becomes_a_tensor_where_one_is_used(logits):
    kept = logits.labels != 0
    want = (logits.hidden[kept] @ logits.items.T + logits.bias) / 2.0
    assert "not formed" in repr(logits)
    assert logits._dense is None
    torch.testing.assert_close(torch.softmax(logits, -1), want.softmax(-1))
    torch.testing.assert_close(logits + 1, want + 1)
    torch.testing.assert_close(1 - logits, 1 - want)
    torch.testing.assert_close(want @ torch.ones(6, 1), logits @ torch.ones(6, 1))
    torch.testing.assert_close(torch.cat([want, want]), torch.cat([logits, want]))
    assert torch.equal(logits > 0, want > 0)
    assert logits.shape == (3, 6)
    assert torch.equal(logits.argmax(-1), want.argmax(-1))
    assert torch.equal(logits[0], want[0])
    assert len(logits) == 3
    logits.sum().backward()
    assert logits.hidden.grad is not None


@pytest.mark.parametrize("log_probabilities", [False, True])
def test_all_ways_to_read_scores_agree(logits, log_probabilities):
    logits.log_probabilities = log_probabilities
    cut = logits.detach()
    values, ids = cut.topk(4)
    assert cut._dense is None
    assert values.shape == ids.shape == (3, 4)
    every = cut.dense()
    assert torch.equal(cut.float(), every)
    assert torch.equal(cut[1], every[1])
    assert torch.allclose(every.exp().sum(-1), torch.ones(3)) == log_probabilities
    torch.testing.assert_close(values, every.gather(1, ids))
    assert torch.equal(ids, every.topk(4).indices)
    for other in (torch.topk(cut, 4), cut.topk(k=4, dim=1), logits.topk(4)):
        torch.testing.assert_close(other.values.detach(), values)
        assert torch.equal(other.indices, ids)
    torch.testing.assert_close(cut.best(4)[0][cut.labels != 0], values)


def test_rank_and_topk_agree_with_the_formed_scores(logits):
    rank = logits.target_rank()
    dense = logits.dense()
    kept = logits.labels != 0
    own = dense.gather(1, logits.labels[kept][:, None])
    assert torch.equal(rank.above[kept], (dense > own).sum(1))
    assert rank.above[~kept].tolist() == [-1]
    scores, ids = logits.best(3)
    want = dense.topk(3)
    assert torch.equal(ids[kept], want.indices)
    torch.testing.assert_close(scores[kept], want.values)
    assert not logits.detach().hidden.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rank_and_loss_of_one_pass(logits, reduction):
    rank = logits.target_rank()
    with CountedCalls() as seen:
        found, loss = logits.target_rank_and_loss(reduction)
        kept = [logits.target_rank(), logits.detach().target_rank()]
    assert seen.calls == {"target_rank_fwd": 1}
    assert all(one is found for one in kept)
    assert all(map(torch.equal, found, rank))
    dense = logits.dense()
    labels = logits.labels[logits.labels != 0]
    want = torch.nn.functional.cross_entropy(dense, labels, reduction=reduction)
    torch.testing.assert_close(loss if loss.dim() == 0 else loss[logits.labels != 0], want)
    if reduction == "none":
        assert loss.tolist()[1] == 0
    assert not loss.requires_grad


def test_rank_and_loss_refuses_other_reductions(logits):
    with pytest.raises(ValueError, match=r"target_rank_and_loss: reduction .*none; got 'max'"):
        logits.target_rank_and_loss("max")


def test_torch_topk_needs_no_scores(logits):
    cut = logits.detach()
    found = torch.topk(cut, k=2, dim=-1)
    assert cut._dense is None
    want = logits.dense().detach().topk(2)
    assert torch.equal(found.indices, want.indices)
    torch.testing.assert_close(found.values, want.values)
    with torch.no_grad():
        assert torch.equal(torch.topk(logits, 2)[1], want.indices)
    # what the op does not do comes from the scores
    assert torch.equal(torch.topk(cut, 2, largest=False)[1], want_smallest(logits))
    assert torch.topk(logits, 2).values.requires_grad
    with pytest.raises(RuntimeError, match="out of range"):
        torch.topk(cut, 7)


def want_smallest(logits):
    return logits.dense().topk(2, largest=False).indices

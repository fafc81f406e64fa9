"""The harness fails where it must."""

import harness
import pytest
import torch
from harness import compare, run_on


def test_fresh_memory_is_poisoned():
    assert torch.isnan(torch.empty(3)).all()
    assert torch.isnan(torch.ones(3).new_empty(5, dtype=torch.bfloat16)).all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_a_lost_small_row_is_found():
    """10,000 times below the largest value: inside any norm-wise bound for 16-bit inputs."""
    truth = torch.ones(4, 3, dtype=torch.float64)
    truth[2] = 1e-4
    ours = truth.clone()
    compare("ok", ours, truth, truth, torch.bfloat16)
    ours[2] = 0
    with pytest.raises(AssertionError, match=r"row 2: error 0\.0001"):
        compare("lost", ours, truth, truth, torch.bfloat16)


@pytest.mark.parametrize("value", [1.01, float("nan"), float("inf")])
def test_a_wrong_value_is_found(value):
    truth = torch.ones(4, 3, dtype=torch.float64)
    ours = truth.clone()
    ours[1, 1] = value
    with pytest.raises(AssertionError):
        compare("wrong", ours, truth, truth, torch.float32)


def test_twice_the_error_of_plain_pytorch_is_the_limit():
    truth = torch.ones(4, 3, dtype=torch.float64)
    plain = truth + 1e-3
    compare("within", truth - 1.9e-3, plain, truth, torch.float32)
    with pytest.raises(AssertionError, match=r"error 0\.0021"):
        compare("beyond", truth - 2.1e-3, plain, truth, torch.float32)


def test_an_owed_lane_may_not_skip(monkeypatch):
    with pytest.raises(pytest.skip.Exception), run_on("cuda", "mask_causal"):
        pass
    monkeypatch.setattr(harness, "REQUIRED", ["cuda"])
    failure = pytest.raises(pytest.fail.Exception, match="names lane 'cuda', but")
    with failure, run_on("cuda", "mask_causal"):
        pass

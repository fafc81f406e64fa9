"""Old module names give today's modules, never copies of them."""

import importlib

import pytest

from t4r_fast.moved import MOVED, home


@pytest.mark.parametrize("old", sorted(MOVED))
def test_every_old_name_gives_the_module_of_today(old):
    assert importlib.import_module(old) is importlib.import_module(MOVED[old])


def test_what_is_below_a_moved_package_moves_along():
    assert home("t4r_fast.torch.model.base") == "t4r_fast.compat.torch.model.base"
    assert home("t4r_fast.torch.trainer") == "t4r_fast.train.trainer"
    assert home("t4r_fast.ops.item_topk") == "t4r_fast.ops.item_topk"


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("t4r_fast.serving.nothing")

"""The compat level and the one-time warnings."""

from __future__ import annotations

import warnings

import pytest

from t4r_fast import compat


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.setattr(compat, "_level", None)
    monkeypatch.setattr(compat, "_warned", set())
    monkeypatch.delenv("T4R_FAST_COMPAT", raising=False)


def test_level_comes_from_the_call_then_the_environment(monkeypatch):
    assert compat.get_compat() == "23.12"
    monkeypatch.setenv("T4R_FAST_COMPAT", "0.1")
    assert compat.get_compat() == "0.1"
    compat.set_compat("23.12")
    assert compat.get_compat() == "23.12"


def test_unknown_levels_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"one of 0\.1, 23\.12; got '1\.0'"):
        compat.set_compat("1.0")
    monkeypatch.setenv("T4R_FAST_COMPAT", "latest")
    with pytest.raises(ValueError, match=r"T4R_FAST_COMPAT must be one of"):
        compat.get_compat()


def test_warns_once_with_the_option():
    with pytest.warns(compat.CompatWarning, match=r"careful \(option: an_option\)"):
        compat.warn_once("an_option", "careful")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_once("an_option", "careful")

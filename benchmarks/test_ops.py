"""The quick cases under pytest-benchmark, to watch one change or one machine over time:

python -m pytest benchmarks --benchmark-enable [--benchmark-autosave --benchmark-compare]
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench import available, load
from benchmarks.case import Case, Missing, Provider
from benchmarks.check import check, truth

QUICK = [
    pytest.param(load(op), case, provider, id=f"{op}-{case.label}-{provider.name}")
    for op in available()
    for case in load(op).cases
    if case.set == "quick"
    for provider in load(op).providers
    if not provider.slow and provider.takes(case)
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("op", "case", "provider"), QUICK)
def test_op(benchmark, op, case: Case, provider: Provider):
    inputs = op.inputs(case, torch.float32)
    try:
        call = provider.make(case)
    except Missing as error:
        pytest.skip(str(error))
    yardstick = op.providers[1].make(case)(inputs) if provider.ours else None
    check(call(inputs), truth(op, case, inputs), yardstick, torch.float32)
    benchmark.group = f"{op.op} {case.label}"
    benchmark(call, inputs)

"""For all tests: GPU kernels on the CPU where there is no GPU, and fresh memory that is NaN."""

import os

import torch
from cuda_on_cpu import build

if not torch.cuda.is_available():  # before the first import of triton, and of t4r_fast
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if build.why_not("plain") is None:
        os.environ.setdefault("T4R_FAST_CUDA_ON_CPU", str(build.library("plain")))

# Fills what torch.empty and a kernel's new_empty give with NaN (integers: the largest), so that a
# kernel which skips an element fails.
torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_modifyitems(config, items):
    """Only plain PyTorch works in chunks: on other lanes such a case is the same one again."""

    def again(item):
        values = getattr(getattr(item, "callspec", None), "params", {})
        return values.get("chunks") and not values.get("lane", "plain").startswith("plain")

    config.hook.pytest_deselected(items=[item for item in items if again(item)])
    items[:] = [item for item in items if not again(item)]

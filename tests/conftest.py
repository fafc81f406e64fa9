"""For all tests: the interpreter for Triton where there is no GPU, and fresh memory that is NaN."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

# Fills what torch.empty and a kernel's new_empty give with NaN (integers: the largest), so that a
# kernel which skips an element fails.
torch.use_deterministic_algorithms(True, warn_only=True)

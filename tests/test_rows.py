"""One op = one row: every file of a row is there, or ROWS_WITHOUT says why it is not."""

import importlib
import inspect
import re

import pytest
from harness import ROOT

import t4r_fast

CUDA = "no products of matrices: CUDA C++ has it"
TRITON = "products of matrices: Triton's, until a GPU shows what that leaves on the table"
ROW_WISE = "rows by themselves: Triton writes them as well as CUDA C++ would"
ROWS_WITHOUT = {
    "csrc/cpu": {
        "ranking_metrics": "a few elementwise operations on (N, len(ks)): nothing to gain",
    },
    "csrc/cuda": {
        "activation_dropout": ROW_WISE,
        "item_topk": TRITON,
        "ranking_metrics": "a few elementwise operations on (N, len(ks)): nothing to gain",
        "residual_norm": ROW_WISE,
        "sampled_softmax_loss": TRITON,
        "session_attention": TRITON,
        "target_rank": TRITON,
        "tied_softmax_loss": TRITON,
        "tied_table_step": TRITON,
    },
    "kernels/triton": {
        "log_uniform_sample": CUDA,
        "mask_causal": CUDA,
        "mask_mlm": CUDA,
        "mask_permutation": CUDA,
        "ranking_metrics": "a few elementwise operations on (N, len(ks)): nothing to gain",
        "sequence_embedding": CUDA,
    },
}
SUFFIX = {"csrc/cpu": ".cpp", "csrc/cuda": ".cu", "kernels/triton": ".py"}
OPS = sorted(p.stem for p in (ROOT / "t4r_fast/ops").glob("*.py") if not p.stem.startswith("_"))


def test_there_are_ops():
    assert "tied_softmax_loss" in OPS


@pytest.mark.parametrize("op", OPS)
def test_row_is_complete(op):
    assert (ROOT / f"t4r_fast/plain/{op}.py").exists()
    assert (ROOT / f"tests/test_{op}.py").exists()
    assert (ROOT / f"benchmarks/bench_{op}.py").exists()


@pytest.mark.parametrize("folder", ROWS_WITHOUT)
@pytest.mark.parametrize("op", OPS)
def test_kernel_file_or_reason(op, folder):
    exists = (ROOT / folder / f"{op}{SUFFIX[folder]}").exists()
    reason = ROWS_WITHOUT[folder].get(op)
    assert exists != bool(reason), f"{folder}/{op}{SUFFIX[folder]}: " + (
        f"exists, but {reason}" if exists else "is missing"
    )


@pytest.mark.parametrize("folder", ROWS_WITHOUT)
def test_no_kernel_without_an_op(folder):
    files = (ROOT / folder).glob(f"*{SUFFIX[folder]}")
    stems = {p.stem for p in files if not p.stem.startswith("_")}  # shared parts
    stems = {re.sub("_(avx2|avx512|portable)$", "", stem) for stem in stems}
    assert stems <= set(OPS)
    assert set(ROWS_WITHOUT[folder]) <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_public_function_is_exported_and_documented(op):
    function = getattr(importlib.import_module(f"t4r_fast.ops.{op}"), op)
    assert getattr(t4r_fast, op) is function
    doc = inspect.getdoc(function)
    assert doc is not None
    assert "Raises" in doc
    assert "returns" in doc
    for name in inspect.signature(function).parameters:
        assert re.search(rf"\b{name}\b", doc), f"{op}: the docstring does not mention {name}"

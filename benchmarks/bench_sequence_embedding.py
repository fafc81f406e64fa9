"""sequence_embedding: from padded ids to the model's input, and the gradient of the table."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import t4r_fast
from benchmarks.case import (
    TUTORIAL_V,
    Benchmark,
    Call,
    Case,
    Inputs,
    Missing,
    Outputs,
    Provider,
    Work,
    ids,
    in_turn,
    normal,
)

BATCHES = 64  # together their rows are larger than a cache

MANY = 1_000_000

CASES = [
    Case("fwd", {"B": 256, "L": 20, "V": MANY, "D": 64}, "quick", shown=True),
    Case("fwd+bwd", {"B": 256, "L": 20, "V": TUTORIAL_V, "D": 64}, "quick", shown=True),
    Case("fwd+bwd", {"B": 256, "L": 20, "V": MANY, "D": 64}, shown=True),
    Case("fwd+bwd_sparse", {"B": 256, "L": 20, "V": MANY, "D": 64}, wide=True, shown=True),
    Case("fwd+bwd_packed", {"B": 256, "L": 20, "V": TUTORIAL_V, "D": 64}),
]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    return {
        "columns": ids(BATCHES, case["B"], case["L"], below=case["V"]),
        "table": normal(case["V"], case["D"], dtype=dtype),
        "dout": normal(case["B"], case["L"], case["D"], dtype=dtype, seed=1),
    }


def lookup(case: Case, function) -> Call:
    column = None

    def call(x: Inputs) -> Outputs:
        nonlocal column
        column = column or in_turn(x["columns"])
        if case.kind == "fwd":
            with torch.no_grad():
                return {"out": function(column(), x["table"])}
        table = x["table"].detach().requires_grad_()
        out = function(column(), table)
        (dtable,) = torch.autograd.grad(out, [table], x["dout"])
        return {"out": out.detach(), "dtable": dtable}

    return call


def ours(case: Case) -> Call:
    if case.kind == "fwd+bwd_packed":
        offsets = torch.arange(0, case["B"] * case["L"] + 1, case["L"])

        def of_packed(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            out = t4r_fast.sequence_embedding([ids.flatten()], [table], offsets=offsets)
            return out.view(*ids.shape, -1)

        return lookup(case, of_packed)
    sparse = case.kind == "fwd+bwd_sparse"
    return lookup(
        case, lambda ids, table: t4r_fast.sequence_embedding([ids], [table], sparse=sparse)
    )


def eager(case: Case) -> Call:
    sparse = case.kind == "fwd+bwd_sparse"
    return lookup(case, lambda ids, table: F.embedding(ids, table, padding_idx=0, sparse=sparse))


def fbgemm(case: Case) -> Call:
    try:
        import fbgemm_gpu  # noqa: F401
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise Missing(f"pip install fbgemm-gpu-cpu, built for this torch ({reason})") from None
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(case["V"], case["D"], EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=0.0,
        weights_precision=SparseType.FP32,
        pooling_mode=PoolingMode.NONE,
    )
    weights = tables.split_embedding_weights()[0]
    offsets = torch.arange(case["B"] * case["L"] + 1)
    column = None

    def call(x: Inputs) -> Outputs:
        nonlocal column
        if column is None:
            weights.data.copy_(x["table"])
            column = in_turn(x["columns"])
        out = tables(column().reshape(-1), offsets).reshape(case["B"], case["L"], case["D"])
        if case.kind != "fwd":
            out.backward(x["dout"])  # updates the rows it touches: there is no gradient to compare
        return {"out": out.detach()}

    return call


def work(case: Case, size: int) -> Work:
    """Rows gathered and written; backward reads their gradients and adds into the table's rows.

    A dense gradient's zeros are written on top.
    """
    rows = case["B"] * case["L"] * case["D"] * size
    if case.kind == "fwd":
        return Work(gather=rows, written=rows)
    dense = case["V"] * case["D"] * size * (case.kind != "fwd+bwd_sparse")
    return Work(gather=rows, read=rows, written=2 * rows + dense)


BENCHMARK = Benchmark(
    "sequence_embedding",
    CASES,
    inputs,
    [
        Provider("t4r_fast", ours, ours=True),
        Provider("F.embedding", eager),
        Provider("fbgemm-gpu-cpu", fbgemm),
    ],
    work,
)

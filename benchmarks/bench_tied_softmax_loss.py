"""tied_softmax_loss: next-item cross-entropy over all items, with its gradients and alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import t4r_fast
from benchmarks.case import (
    LARGE_V,
    TUTORIAL_V,
    Benchmark,
    Call,
    Case,
    Inputs,
    Missing,
    Provider,
    Work,
    compiled,
    ids,
    normal,
    with_gradients,
)

GRADIENTS = {"fwd+bwd": ("hidden", "items"), "loss": ()}
SHOWN = [
    ("fwd+bwd", 1008, TUTORIAL_V, 64, "standard"),
    ("fwd+bwd", 1008, TUTORIAL_V, 128, "standard"),
    ("fwd+bwd", 1008, TUTORIAL_V, 256, "standard"),
    ("fwd+bwd", 1008, LARGE_V, 64, "standard"),
    ("fwd+bwd", 252, TUTORIAL_V, 64, "quick"),
    ("fwd+bwd", 48, TUTORIAL_V, 64, "quick"),
    ("loss", 252, TUTORIAL_V, 64, "quick"),
    ("loss", 1008, TUTORIAL_V, 64, "standard"),
    ("loss", 1008, TUTORIAL_V, 128, "standard"),
]
GRID = [
    (kind, n, v, d, "full")
    for kind in GRADIENTS
    for n in (48, 252, 1008)
    for v in (TUTORIAL_V, LARGE_V)
    for d in (64, 128, 256)
    if (kind, n, v, d) not in [case[:4] for case in SHOWN]
]
CASES = [
    Case(
        kind,
        {"N": n, "V": v, "D": d},
        set,
        wide=(n, v, d) == (1008, TUTORIAL_V, 64),
        shown=set != "full",
    )
    for kind, n, v, d, set in SHOWN + GRID
]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    n, v, d = case["N"], case["V"], case["D"]
    return {
        "hidden": normal(n, d, dtype=dtype),
        # scores of a trained model: a standard deviation of about 2
        "items": normal(v, d, dtype=dtype, scale=2 / d**0.5, seed=1),
        "target": ids(n, below=v, seed=2),
    }


def eager(x: Inputs) -> torch.Tensor:
    return F.cross_entropy((x["hidden"] @ x["items"].T).float(), x["target"])


def torch_compile(case: Case) -> Call:
    function = compiled(
        lambda hidden, items, target: F.cross_entropy((hidden @ items.T).float(), target)
    )
    return with_gradients(
        lambda x: function(x["hidden"], x["items"], x["target"]), *GRADIENTS[case.kind]
    )


def linear_cross_entropy(chunk: int | None) -> Call:
    """PyTorch's own chunked loss; chunk None leaves the choice to it."""

    def make(case: Case) -> Call:
        if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            raise Missing(f"torch {torch.__version__} has no chunked linear_cross_entropy")
        options = (
            torch.nn.LinearCrossEntropyOptions()
            if chunk is None
            else torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        )
        return with_gradients(
            lambda x: F.linear_cross_entropy(x["hidden"], x["items"], x["target"], options=options),
            *GRADIENTS[case.kind],
        )

    return make


def cut_cross_entropy(case: Case) -> Call:
    """Its implementation by torch.compile, the one of its that runs on a CPU."""
    try:
        import cut_cross_entropy as package
    except ImportError as error:
        raise Missing(f"pip install cut-cross-entropy ({error})") from None
    torch._dynamo.reset()
    return with_gradients(
        lambda x: package.linear_cross_entropy(
            x["hidden"], x["items"], x["target"], impl="torch_compile"
        ),
        *GRADIENTS[case.kind],
    )


def ours(x: Inputs) -> torch.Tensor:
    return t4r_fast.tied_softmax_loss(x["hidden"], x["items"], x["target"])


def work(case: Case, size: int) -> Work:
    """Scores and their sums over items; with gradients the scores again and both products: 8NVD."""
    n, v, d = case["N"], case["V"], case["D"]
    passes = 4 if case.kind == "fwd+bwd" else 1
    scores, table = n * v, v * d * size
    return Work(
        flop=2 * passes * scores * d,
        exp=scores * min(passes, 2),
        read=table * min(passes, 2),
        written=table * (passes > 1),
    )


BENCHMARK = Benchmark(
    "tied_softmax_loss",
    CASES,
    inputs,
    [
        Provider("t4r_fast", lambda case: with_gradients(ours, *GRADIENTS[case.kind]), ours=True),
        Provider("eager", lambda case: with_gradients(eager, *GRADIENTS[case.kind])),
        Provider("torch.compile", torch_compile, slow=True),
        Provider(
            "F.linear_cross_entropy",
            linear_cross_entropy(None),
            slow=True,
            # Several times slower than eager: gradients at one width show it. Its thousand small
            # products take minutes when two threads wait for each other on a busy machine.
            only=lambda case: (
                (case.kind, case["V"], case["D"]) == ("fwd+bwd", TUTORIAL_V, 64)
                and torch.get_num_threads() == 1
            ),
        ),
        Provider("F.linear_cross_entropy(64)", linear_cross_entropy(64)),
        Provider("cut-cross-entropy", cut_cross_entropy, slow=True),
    ],
    work,
)

"""Values are checked where kernels read them: the host reads one only to name what is wrong."""

import functools

import pytest
import torch
from harness import LargestTensor, run_on
from test_cpu_calls import CASES, SHAPES, call
from test_mask_mlm import SEED

import t4r_fast
from t4r_fast.ops._check import checked
from t4r_fast.ops._table import SoftmaxRows
from t4r_fast.ops.tied_table_step import table_state, tied_table_catch_up, tied_table_grad_norm

# ATen ops that wait for a device to give the host a value
READS = {"_local_scalar_dense", "nonzero", "masked_select", "item", "is_nonzero", "equal"}


@pytest.mark.parametrize("op", CASES)
def test_a_call_reads_no_value_on_the_host(op, monkeypatch):
    seen = set()
    function = getattr(t4r_fast, op)

    @functools.wraps(function)
    def watched(*args, **options):
        with LargestTensor() as calls:
            found = function(*args, **options)
        seen.update(calls.calls)
        return found

    monkeypatch.setattr(t4r_fast, op, watched)
    call(op, shape=SHAPES["odd"])
    assert seen
    assert not seen & READS


IDS = torch.tensor([[3, 4, 0], [5, 0, 6]])
H, W, ROWS = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([2, 0, 3])
T = torch.tensor([1, 5, 2])
FACTORS = torch.ones(4, 3, dtype=torch.float64)
SOFTMAX = SoftmaxRows(H, T, FACTORS, None, 1.0, 0.0)
LOOKUP = [(torch.tensor([4, 0]), torch.ones(2, 4)), (torch.tensor([-1]), torch.ones(1, 4))]
STATE = table_state(W, "adamw")
LAST, LRS = torch.zeros(5, dtype=torch.int32), torch.ones(2, dtype=torch.float64)
STEP = {"step": 1, "lr": 0.1}


def embed():
    return t4r_fast.sequence_embedding([IDS - 3, IDS], [W, W])


def step(**given):
    t4r_fast.tied_table_step(W.clone(), STATE, **given, **STEP)


WRONG = {
    "mask_causal": (lambda: t4r_fast.mask_causal(IDS), ValueError, "row 1, position 2$"),
    "mask_mlm": (lambda: t4r_fast.mask_mlm(IDS, seed=SEED), ValueError, "row 1, position 2$"),
    "mask_permutation": (lambda: t4r_fast.mask_permutation(IDS), ValueError, "row 1, position 2$"),
    "sequence_embedding": (embed, IndexError, r"columns\[0\] .* 0 to 4 .*; got -3 at .*\(0, 2\)$"),
    "tied_softmax_loss": (
        lambda: t4r_fast.tied_softmax_loss(H, W, T), IndexError, "got 5 at row 1$"
    ),
    "tied_softmax_loss rows": (
        lambda: t4r_fast.tied_softmax_loss(H, W, T, rows=ROWS), IndexError, "got 3 at entry 2$"
    ),
    "sampled_softmax_loss": (
        lambda: t4r_fast.sampled_softmax_loss(H, W, T, num_negatives=2),
        IndexError,
        "got 5 at row 1$",
    ),
    "target_rank": (lambda: t4r_fast.target_rank(H, W, T), IndexError, "got 5 at row 1$"),
    "item_topk": (
        lambda: t4r_fast.item_topk(H, W, 2, exclude=T[:, None]),
        IndexError,
        r"exclude must be < 5 .*; got 5 at place \(1, 0\)$",
    ),
    "item_topk rows": (
        lambda: t4r_fast.item_topk(H, W, 2, rows=ROWS), IndexError, "got 3 at entry 2$"
    ),
    "tied_table_step": (lambda: step(softmax=[SOFTMAX]), IndexError, "got 5 at row 1$"),
    "tied_table_step lookup": (lambda: step(lookup=LOOKUP), IndexError, "got -1 at entry 2$"),
    "tied_table_step rows": (
        lambda: step(lookup=LOOKUP, touched_only=True), IndexError, "got -1 at entry 2$"
    ),
    "tied_table_step norm": (
        lambda: tied_table_grad_norm(W, (), LOOKUP), IndexError, "got -1 at entry 2$"
    ),
    "tied_table_step norm of softmax": (
        lambda: tied_table_grad_norm(W, [SOFTMAX]), IndexError, "got 5 at row 1$"
    ),
    "tied_table_step catch up": (
        lambda: tied_table_catch_up(W.clone(), STATE, LAST, T[:2], LRS, base=0),
        IndexError,
        "got 5 at entry 1$",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lane", ["cpu", "plain"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(name, lane):
    """By every backend alike; that a C++ kernel refuses them itself is what makes it so."""
    run, kind, message = WRONG[name]
    op = name.partition(" ")[0]
    with run_on(lane, op), pytest.raises(kind, match=f"^{op}: .*{message}") as caught:
        run()
    assert caught.value.__context__ is None


@pytest.mark.parametrize("name", [name for name in WRONG if name != "tied_table_step norm"])
def test_kernels_refuse_wrong_values(name, monkeypatch):
    """Also without the checks of Python, as under torch.compile."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    op = name.partition(" ")[0]
    with run_on("cpu", op), pytest.raises(RuntimeError, match=f"^{op}: "):
        WRONG[name][0]()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", ["mask_mlm", "sequence_embedding"])
def test_kernels_name_the_first_wrong_value(op, threads):
    """Threads only note that there is one."""
    ids = torch.tensor([[3, 4, 0]]).repeat(3000, 1)
    ids[1999], ids[2000] = torch.tensor([0, 9, 1]), torch.tensor([0, 7, 2])
    calls = {
        "mask_mlm": lambda ops: ops.mask_mlm_fwd(ids, None, 0, 1, 0),
        "sequence_embedding": lambda ops: ops.sequence_embedding_fwd(
            [ids], [W], False, None, None, False, 0
        ),
    }
    before, place = torch.get_num_threads(), r"row 1999, position 1$|got 9 at .*\(1999, 1\)$"
    with run_on("cpu", op):
        torch.set_num_threads(threads)
        try:
            with pytest.raises(RuntimeError, match=place):
                calls[op](torch.ops.t4r_fast)
        finally:
            torch.set_num_threads(before)


def test_other_errors_of_a_kernel_stay_as_they_are():
    error = RuntimeError("out of memory")

    def kernel(x):
        raise error

    ran = []
    with pytest.raises(RuntimeError) as caught:
        checked("cpu", lambda: ran.append(1), kernel, 3)
    assert caught.value is error
    assert ran == [1]


def test_checks_run_first_where_the_kernel_has_none():
    order = []
    checked("triton", lambda: order.append("check"), lambda: order.append("kernel"))
    checked("cpu", lambda: order.append("never"), lambda: order.append("kernel"))
    assert order == ["check", "kernel", "kernel"]

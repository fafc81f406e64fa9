"""sequence_embedding against indexing, torch.cat and torch.where."""

import pytest
import torch
from harness import LargestTensor, check, lanes, run_on
from hypothesis import given, settings
from hypothesis import strategies as st

from t4r_fast import backend, optim
from t4r_fast.ops._table import recorder_of, up_to_date
from t4r_fast.ops.sequence_embedding import sequence_embedding
from t4r_fast.plain import sequence_embedding as plain

LANES = lanes("sequence_embedding")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def naive(
    columns,
    tables,
    aggregation="concat",
    mask=None,
    mask_vector=None,
    zero_padding=False,
    padding_idx=0,
    sparse=False,
):
    parts = []
    for column, table in zip(columns, tables):
        if table is None:
            parts.append(column if column.dim() == 3 else column[..., None])
            continue
        found = table[column.clamp(0, len(table) - 1)]
        pad = (column == padding_idx)[..., None]
        parts.append(torch.where(pad, found.detach(), found))  # padding gives no gradient
    out = torch.cat(parts, -1) if aggregation == "concat" else torch.stack(parts).sum(0)
    if zero_padding:
        first = columns[[t is not None for t in tables].index(True)]
        out = torch.where((first == padding_idx)[..., None], 0.0, out)
    return out if mask is None else torch.where(mask[..., None], mask_vector, out)


def make_inputs(sessions, positions, widths, mask=False, numbers=()):
    g = torch.Generator().manual_seed(sessions * 100 + positions)
    rows = [7 + 3 * i for i in range(len(widths))]
    columns = [torch.randint(1, r, (sessions, positions), generator=g) for r in rows]
    for column in columns:  # pads on the right
        lengths = torch.randint(0, positions + 1, (sessions, 1), generator=g)
        column[torch.arange(positions) >= lengths] = 0
    tables = [torch.randn(r, w, generator=g) for r, w in zip(rows, widths)]
    for width in numbers:
        shape = (sessions, positions, width) if width else (sessions, positions)
        columns.insert(1, torch.randn(shape, generator=g))
        tables.insert(1, None)
    inputs = {"columns": columns, "tables": tables}
    if mask:
        inputs["mask"] = torch.rand(sessions, positions, generator=g) < 0.3
        total = sum(widths) + sum(max(w, 1) for w in numbers)
        inputs["mask_vector"] = torch.randn(total, generator=g)
    return inputs


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_padding", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        ((1, 1, [1]), {}),
        ((3, 5, [4]), {"mask": True}),
        ((4, 20, [64, 8, 3]), {"mask": True, "numbers": (0, 2, 1)}),
        ((33, 7, [5, 6]), {"numbers": (0,)}),
    ],
    ids=lambda c: str(c[0]),
)
def test_concat(lane, dtype, zero_padding, case):
    inputs = make_inputs(*case[0], **case[1])
    diff = ("tables", "columns", "mask_vector")[: 3 if "mask" in inputs else 2]
    check(lane, sequence_embedding, naive, inputs, {"zero_padding": zero_padding}, dtype, diff)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 24])
def test_sum(lane, dtype, width):
    inputs = make_inputs(29, 6, [width, width], numbers=(width,))
    inputs["mask"] = torch.eye(29, 6).bool()
    inputs["mask_vector"] = torch.randn(width, generator=torch.Generator().manual_seed(0))
    options = {"aggregation": "sum", "zero_padding": True}
    diff = ("tables", "columns", "mask_vector")
    check(lane, sequence_embedding, naive, inputs, options, dtype, diff)


@pytest.mark.parametrize("lane", LANES)
def test_colliding_ids_and_views(lane):
    inputs = make_inputs(40, 20, [16])
    inputs["columns"] = [torch.full((20, 40), 3).T]
    inputs["tables"] = [torch.randn(7, 32, generator=torch.Generator().manual_seed(0))[:, ::2]]
    check(lane, sequence_embedding, naive, inputs, {}, torch.float32, ("tables",))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_runs_of_ids(lane, dtype):
    """Of 3,000 positions: rows that are sums of one, of 33, of 1,000 and of the other ones."""
    inputs = make_inputs(150, 20, [40])
    ids = torch.full((3000,), 2)
    ids[:1000], ids[1000:1033], ids[1033] = 5, 1, 4
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(0))
    inputs["columns"] = [ids[order].reshape(150, 20)]
    check(lane, sequence_embedding, naive, inputs, {}, dtype, ("tables",))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("aggregation", ["concat", "sum"])
def test_views_that_start_and_step_anywhere(lane, dtype, aggregation):
    """Rows of tables and numbers at every distance from an address that 16 divides."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (6, 5), generator=g)
    with run_on(lane, "sequence_embedding") as device:
        for start in range(4):
            for step in (16, 18, 21):
                memory = torch.randn(9 * step, generator=g).to(device, dtype)
                numbers = torch.randn(6, 5, step, 2, generator=g).to(device, dtype)
                table = memory.as_strided((9, 8), (step, 1), start)
                parts = [
                    numbers[:, :, start : start + 8, 0],
                    numbers[:, :, 2:10].flatten(2)[..., :8],
                ]
                columns = [ids.to(device), *parts]
                out = sequence_embedding(columns, [table, None, None], aggregation=aggregation)
                parts = [table[ids.to(device)], *parts]
                if aggregation == "concat":
                    assert torch.equal(out, torch.cat(parts, -1))
                else:
                    error = out.double() - torch.stack(parts).double().sum(0)
                    assert error.abs().max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("lane", LANES)
def test_mask_wins_over_padding_and_another_padding_id(lane):
    ids = torch.tensor([[4, 2, 2], [2, 2, 2]])
    mask = torch.tensor([[False, True, False], [False, False, True]])
    with run_on(lane, "sequence_embedding") as device:
        table = torch.arange(10.0, device=device).reshape(5, 2).requires_grad_()
        vector = torch.full((2,), -1.0, device=device, requires_grad=True)
        found = sequence_embedding(
            [ids.to(device)],
            [table],
            mask=mask.to(device),
            mask_vector=vector,
            zero_padding=True,
            padding_idx=2,
        )
        found.sum().backward()
    wanted = [[[8.0, 9], [-1, -1], [0, 0]], [[0, 0], [0, 0], [-1, -1]]]
    assert found.tolist() == wanted
    assert table.grad.tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [1, 1]]
    assert vector.grad.tolist() == [2, 2]


@pytest.mark.parametrize("lane", LANES)
def test_padding_row_is_looked_up_but_not_trained(lane):
    with run_on(lane, "sequence_embedding") as device:
        table = torch.ones(3, 2, device=device, requires_grad=True)
        found = sequence_embedding([torch.tensor([[1, 0, 0]], device=device)], [table])
        found.sum().backward()
    assert found.tolist() == [[[1, 1]] * 3]
    assert table.grad.tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty(lane, shape):
    with run_on(lane, "sequence_embedding") as device:
        table = torch.ones(4, 3, device=device, requires_grad=True)
        found = sequence_embedding([torch.zeros(shape, dtype=torch.int64, device=device)], [table])
        found.sum().backward()
    assert found.shape == (*shape, 3)
    assert torch.equal(table.grad.cpu(), torch.zeros(4, 3))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("rows", [200, 60_000, 70_000])
def test_ids_across_the_bytes_that_are_sorted_by(lane, rows):
    """Keys of one, two and three bytes, in which every value occurs."""
    g = torch.Generator().manual_seed(0)
    columns = [torch.randint(0, rows, (160, 20), generator=g) for _ in range(2)]
    weight = torch.randint(-8, 8, (160, 20, 4), generator=g).float()
    with run_on(lane, "sequence_embedding") as device:
        tables = [torch.zeros(rows, 2, device=device, requires_grad=True) for _ in range(2)]
        out = sequence_embedding([c.to(device) for c in columns], tables)
        out.backward(weight.to(device))
    for table, ids, part in zip(tables, columns, weight.split(2, dim=2)):
        wanted = torch.zeros(rows, 2).index_add_(0, ids.flatten(), part.flatten(0, 1))
        wanted[0] = 0  # padding
        assert torch.equal(table.grad.cpu(), wanted)


@pytest.mark.parametrize("lane", LANES)
def test_gradient_repeats_bit_for_bit(lane):
    inputs = make_inputs(256, 20, [16])
    found = []
    with run_on(lane, "sequence_embedding") as device:
        column = inputs["columns"][0].to(device)
        weight = torch.randn(256, 20, 16, generator=torch.Generator().manual_seed(0)).to(device)
        for _ in range(3):
            table = inputs["tables"][0].to(device).requires_grad_()
            sequence_embedding([column], [table]).backward(weight)
            found.append(table.grad)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("count", [31, 32, 33, 64, 96])
def test_one_id_in_all_columns(lane, count):
    """Sorted, two columns lie one behind the other: the second goes on with the same id."""
    weight = torch.randint(-8, 8, (1, count, 6), generator=torch.Generator().manual_seed(0)).float()
    ids = torch.full((1, count), 5)
    with run_on(lane, "sequence_embedding") as device:
        tables = [torch.zeros(7, 3, device=device, requires_grad=True) for _ in range(2)]
        sequence_embedding([ids.to(device)] * 2, tables).backward(weight.to(device))
    for table, part in zip(tables, weight.split(3, dim=2)):
        wanted = torch.zeros(7, 3)
        wanted[5] = part.sum((0, 1))
        assert torch.equal(table.grad.cpu(), wanted)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_gradients_are_the_rows_of_dense_ones(lane, dtype):
    inputs = make_inputs(50, 9, [6, 4], mask=True, numbers=(0,))
    grads = []
    with run_on(lane, "sequence_embedding") as device:
        columns = [c.to(device) for c in inputs["columns"]]
        columns[1] = columns[1].to(dtype)
        options = {
            "mask": inputs["mask"].to(device),
            "mask_vector": inputs["mask_vector"].to(device, dtype),
            "zero_padding": True,
        }
        for sparse in (True, False):
            tables = [inputs["tables"][f].to(device, dtype).requires_grad_() for f in (0, 2)]
            out = sequence_embedding(
                columns, [tables[0], None, tables[1]], sparse=sparse, **options
            )
            grads.append(torch.autograd.grad(out, tables, torch.ones_like(out)))
    for found, dense, ids in zip(*grads, (inputs["columns"][0], inputs["columns"][2])):
        assert found.is_sparse
        found = found.coalesce()
        counted = ~inputs["mask"] & (inputs["columns"][0] != 0) & (ids != 0)
        used = found.indices()[0].cpu()
        if lane == "cpu":  # only what occurs, each id once
            assert torch.equal(used, ids[counted].unique())
        if lane in ("cuda", "cuda-on-cpu"):  # and the padding of positions that count not
            assert torch.equal(used, torch.cat([torch.tensor([0]), ids[counted].unique()]))
        torch.testing.assert_close(found.to_dense(), dense)
        assert not dense[0].any()


@pytest.mark.parametrize("lane", LANES)
def test_same_bits_for_any_number_of_threads(lane):
    inputs = make_inputs(512, 20, [24, 8], mask=True)
    before = torch.get_num_threads()
    found = []
    try:
        with run_on(lane, "sequence_embedding") as device:
            columns = [c.to(device) for c in inputs["columns"]]
            mask = inputs["mask"].to(device)
            weight = torch.randn(512, 20, 32, generator=torch.Generator().manual_seed(0))
            # Plain PyTorch's backward may add in another order with other threads.
            for threads in (1, 1) if lane == "plain" else (1, 2, 3):
                torch.set_num_threads(threads)
                leaves = [t.to(device).requires_grad_() for t in inputs["tables"]]
                vector = inputs["mask_vector"].to(device).requires_grad_()
                out = sequence_embedding(columns, leaves, mask=mask, mask_vector=vector)
                grads = torch.autograd.grad(out, [*leaves, vector], weight.to(device))
                found.append((out, *grads))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sessions=st.sampled_from([0, 1, 3, 13, 64]),
    positions=st.sampled_from([0, 1, 5, 20, 65]),
    widths=st.lists(st.sampled_from([1, 3, 8, 16, 17, 64]), min_size=1, max_size=3),
    numbers=st.sampled_from([(), (0,), (2, 0)]),
    mask=st.booleans(),
    zero_padding=st.booleans(),
    turned=st.booleans(),
)
def test_any_shape(lane, sessions, positions, widths, numbers, mask, zero_padding, turned):
    inputs = make_inputs(sessions, positions, widths, mask, numbers)
    if turned:  # (B, L) over memory (L, B)
        inputs["columns"] = [
            c.transpose(0, 1).contiguous().transpose(0, 1) for c in inputs["columns"]
        ]
    diff = ("tables", "columns", "mask_vector")[: 3 if mask else 2]
    options = {"zero_padding": zero_padding}
    check(lane, sequence_embedding, naive, inputs, options, torch.float64, diff)


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane.startswith("cuda")])
def test_cuda_gives_sparse_rows_of_a_size_that_depends_on_no_value(lane):
    ids = torch.tensor([[3, 1, 3, 0], [3, 5, 0, 0]])
    with run_on(lane, "sequence_embedding") as device:
        table = torch.ones(6, 2, device=device, requires_grad=True)
        out = sequence_embedding([ids.to(device)], [table], sparse=True)
        (grad,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert not grad.is_coalesced()
    assert grad._indices().tolist() == [[1, 3, 3, 3, 5, 0, 0, 0]]
    assert grad._values()[:, 0].tolist() == [1, 3, 0, 0, 1, 0, 0, 0]


@pytest.mark.skipif("cuda-on-cpu" not in LANES, reason="there is no CUDA kernel")
@pytest.mark.parametrize("wrong", [-1, 6, 2**40])
def test_the_cuda_kernel_itself_refuses_ids_out_of_range(wrong):
    """On a GPU it traps, which ends all work of the process: tried on the CPU only."""
    ids = torch.full((3, 40), 2)
    ids[2, 17] = wrong
    with run_on("cuda-on-cpu", "sequence_embedding"):
        emulated = torch.ops.t4r_fast_emulated
    for sum in (False, True):
        with pytest.raises(RuntimeError, match="ids from 0 to the rows of their table - 1"):
            emulated.sequence_embedding_fwd([ids], [torch.ones(6, 2)], sum, None, None, False, 0)
    arguments = [torch.ones(3, 40, 2), [ids], [6], [2], False, None, False, 0, False, [1, 0]]
    with pytest.raises(RuntimeError, match="ids from 0 to the rows of their table - 1"):
        emulated.sequence_embedding_bwd(*arguments)


@pytest.mark.skipif("cuda-on-cpu" not in LANES, reason="there is no CUDA kernel")
def test_the_cuda_op_checks_its_arguments():
    with run_on("cuda-on-cpu", "sequence_embedding"):
        forward = torch.ops.t4r_fast_emulated.sequence_embedding_fwd
    rest = (False, None, None, False, 0)
    with pytest.raises(RuntimeError, match="equally many, 1 to 40; got 41 and 41"):
        forward([I] * 41, [W] * 41, *rest)
    with pytest.raises(RuntimeError, match=r"columns must have shape \(2, 3\)"):
        forward([I, I[:1]], [W, W], *rest)
    with pytest.raises(RuntimeError, match="must be int64; got scalar type 3"):
        forward([I.int()], [W], *rest)
    with pytest.raises(RuntimeError, match="mask and mask_vector must be given together"):
        forward([I], [W], False, M, None, False, 0)


def test_sparse_gradients_for_some_tables():
    ids = torch.tensor([[3, 1, 3]])
    tables = [torch.ones(5, 2, requires_grad=True) for _ in range(2)]
    sequence_embedding([ids, ids], tables, sparse=[True, False]).sum().backward()
    assert [table.grad.is_sparse for table in tables] == [True, False]
    assert torch.equal(tables[0].grad.to_dense(), tables[1].grad)


def test_an_optimizer_may_step_before_backward():
    table = torch.randn(5, 2, requires_grad=True)
    out = sequence_embedding([torch.tensor([[1, 3]])], [table])
    with torch.no_grad():
        table.add_(1)
    out.sum().backward()
    assert table.grad.sum() == 4


def test_table_past_2_to_the_31(tmp_path):
    """V * D = 2**31 + 640: offsets of 32 bits would read elsewhere."""
    d, v, used = 64, 2**25 + 10, 50
    path = tmp_path / "table"
    with path.open("wb") as file:
        file.truncate(2 * v * d)  # a file of holes: only the pages used take space
    table = torch.from_file(str(path), shared=True, size=v * d, dtype=torch.bfloat16).view(v, d)
    generator = torch.Generator().manual_seed(0)
    table[v - used :] = torch.randn(used, d, generator=generator).bfloat16()
    ids = torch.randint(v - used, v, (8, 5), generator=generator)
    out = sequence_embedding([ids], [table.requires_grad_()], sparse=True)
    assert torch.equal(out, table.detach()[v - used :][ids - (v - used)])
    (grad,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert torch.equal(grad.coalesce().indices()[0], ids.unique())
    counts = (ids - (v - used)).flatten().bincount(minlength=used)
    counts = counts[counts > 0, None].expand(-1, d)
    assert torch.equal(grad.coalesce().values().long(), counts)


@pytest.mark.parametrize("sparse", [False, True])
def test_opcheck(sparse):
    inputs = make_inputs(4, 6, [5, 3], mask=True, numbers=(0,))
    columns, tables = inputs["columns"], inputs["tables"]
    masked = (inputs["mask"], inputs["mask_vector"])
    forward = torch.ops.t4r_fast.sequence_embedding_fwd
    torch.library.opcheck(forward, (columns, tables, False, *masked, True, 0))
    torch.library.opcheck(
        torch.ops.t4r_fast.sequence_embedding_bwd,
        (
            torch.randn(4, 6, 9),
            [columns[0], None, columns[2]],
            [len(tables[0]), -1, len(tables[2])],
            [5, 1, 3],
            False,
            masked[0],
            True,
            0,
            sparse,
            [1, 1, 1, 1],
        ),
    )


def test_gradcheck():
    inputs = make_inputs(3, 4, [2, 3], mask=True, numbers=(0,))
    tables = [t if t is None else t.double().requires_grad_() for t in inputs["tables"]]
    number = inputs["columns"][1].double().requires_grad_()
    vector = inputs["mask_vector"].double().requires_grad_()

    def run(first, second, x, v):
        columns = [inputs["columns"][0], x, inputs["columns"][2]]
        return sequence_embedding(
            columns, [first, None, second], mask=inputs["mask"], mask_vector=v, zero_padding=True
        )

    # The table's padding row has no gradient by rule: differences must not move it.
    for column in (inputs["columns"][0], inputs["columns"][2]):
        column.clamp_(min=1)
    assert torch.autograd.gradcheck(run, (tables[0], tables[2], number, vector))


def test_compiles_to_one_graph():
    inputs = make_inputs(4, 6, [5, 3], mask=True, numbers=(0,))

    def step(first, second):
        return sequence_embedding(
            inputs["columns"],
            [first, None, second],
            mask=inputs["mask"],
            mask_vector=inputs["mask_vector"],
        )

    tables = inputs["tables"][0], inputs["tables"][2]
    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tables]
        out = function(*leaves)
        found.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*found))


I, W, X = torch.zeros(2, 3).long(), torch.zeros(5, 4), torch.zeros(2, 3)  # noqa: E741
M, V = torch.zeros(2, 3).bool(), torch.zeros(4)
ERRORS = {
    "sparse": (([I], [W]), {"sparse": [True] * 2}, ValueError, "one per column, 1; got 2"),
    "none": (([], []), {}, ValueError, "equally many, at least one; got 0 and 0"),
    "count": (([I], [W, W]), {}, ValueError, "got 1 and 2"),
    "shape": (([I, I[:1]], [W, W]), {}, ValueError, r"columns\[1\] .*\(2, 3\); got \(1, 3\)"),
    "dim": (([I[0]], [W]), {}, ValueError, r"columns\[0\] must have shape \(B, L\)"),
    "id dim": (([I[..., None]], [W]), {}, ValueError, r"columns\[0\] must have shape \(B, L\) bec"),
    "id dtype": (([I.int()], [W]), {}, TypeError, r"columns\[0\] must be int64; got torch.int32"),
    "table dim": (([I], [V]), {}, ValueError, r"tables\[0\] must have shape \(V, D\); got \(4,\)"),
    "range": (
        ([I, I + torch.tensor([0, 5, 0])], [W, W]),
        {},
        IndexError,
        r"columns\[1\] must hold ids from 0 to 4 \(tables\[1\] has 5 rows\); "
        r"got 5 at position \(0, 1\)",
    ),
    "negative": (([I - 1], [W]), {}, IndexError, r"got -1 at position \(0, 0\)"),
    "dtypes": (([I, X.double()], [W, None]), {}, TypeError, r"float64 in columns\[1\] and .*32"),
    "no float": (([I], [None]), {}, TypeError, r"got torch.int64 in columns\[0\]"),
    "device": (([I], [W.to("meta")]), {}, ValueError, r"tables\[0\] must be on the device"),
    "aggregation": (([I], [W]), {"aggregation": "mean"}, ValueError, "concat, sum; got 'mean'"),
    "widths": (([I, X], [W, None]), {"aggregation": "sum"}, ValueError, r"one width; got \[4, 1\]"),
    "only mask": (([I], [W]), {"mask": M}, ValueError, "must be given together"),
    "mask": (([I], [W]), {"mask": X, "mask_vector": V}, ValueError, "mask must be bool .*float32"),
    "vector": (([I], [W]), {"mask": M, "mask_vector": V[:3]}, ValueError, r"\(4,\); got .*\(3,\)"),
    "zero": (([X], [None]), {"zero_padding": True}, ValueError, "zero_padding needs an id column"),
}


@pytest.mark.parametrize(("args", "options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(args, options, kind, message):
    with pytest.raises(kind, match=rf"^sequence_embedding: .*{message}"):
        sequence_embedding(*args, **options)


def naive_packed(columns, tables, offsets, mask=None, **options):
    """The padded formula for one session that ends where the packed ones do."""
    size, end = columns[0].shape[0], int(offsets[-1])
    if mask is not None:
        options["mask"] = mask[None, :end]
    out = naive([column[None, :end] for column in columns], tables, **options)[0]
    return torch.cat([out, out.new_zeros(size - end, out.shape[1])])


def pack(inputs, spare):
    """Padded inputs without their padding, by the first ids, and what no one may read behind."""
    items = inputs["columns"][0] != 0
    ends = items.sum(1).cumsum(0)
    packed = {**inputs, "columns": [], "offsets": torch.cat([ends.new_zeros(1), ends])}
    for column in inputs["columns"]:
        behind = column.new_full(
            (spare, *column.shape[2:]), float("nan") if column.is_floating_point() else 2**62
        )
        if spare and not column.is_floating_point():
            behind[0] = -5
        packed["columns"].append(torch.cat([column[items], behind]))
    if "mask" in inputs:
        packed["mask"] = torch.cat([inputs["mask"][items], torch.arange(spare) % 2 == 0])
    return packed, items


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spare", [0, 9])
@pytest.mark.parametrize(
    "case",
    [
        ((1, 1, [1]), {}),
        ((3, 5, [4]), {"mask": True}),
        ((4, 20, [64, 8, 3]), {"mask": True, "numbers": (0, 2, 1)}),
        ((33, 7, [5, 6]), {"numbers": (0,)}),
    ],
    ids=lambda c: str(c[0]),
)
def test_packed_concat(lane, dtype, spare, case):
    inputs, _ = pack(make_inputs(*case[0], **case[1]), spare)
    diff = ("tables", "columns", "mask_vector")[: 3 if "mask" in inputs else 2]
    check(lane, sequence_embedding, naive_packed, inputs, {}, dtype, diff)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 24])
def test_packed_sum(lane, dtype, width):
    inputs = make_inputs(29, 6, [width, width], numbers=(width,))
    inputs["mask"] = torch.eye(29, 6).bool()
    inputs["mask_vector"] = torch.randn(width, generator=torch.Generator().manual_seed(0))
    inputs, _ = pack(inputs, 50)
    diff = ("tables", "columns", "mask_vector")
    check(lane, sequence_embedding, naive_packed, inputs, {"aggregation": "sum"}, dtype, diff)


@pytest.mark.parametrize("lane", LANES)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sessions=st.sampled_from([0, 1, 3, 13, 64]),
    positions=st.sampled_from([0, 1, 5, 20, 65]),
    spare=st.sampled_from([0, 1, 40, 900]),
    widths=st.lists(st.sampled_from([1, 3, 8, 16, 17, 64]), min_size=1, max_size=3),
    numbers=st.sampled_from([(), (0,), (2, 0)]),
    mask=st.booleans(),
    step=st.sampled_from([1, 2]),
)
def test_any_packed_shape(lane, sessions, positions, spare, widths, numbers, mask, step):
    """Also no session, no item, capacity without items, and views."""
    inputs, _ = pack(make_inputs(sessions, positions, widths, mask, numbers), spare)
    inputs["columns"] = [c.repeat_interleave(step, 0)[::step] for c in inputs["columns"]]
    inputs["offsets"] = inputs["offsets"].repeat_interleave(step)[::step]
    diff = ("tables", "columns", "mask_vector")[: 3 if mask else 2]
    check(lane, sequence_embedding, naive_packed, inputs, {}, torch.float64, diff)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("sparse", [False, True])
def test_packed_sessions_have_the_bits_of_padded_ones(lane, sparse):
    """Rows of gradients are sums in the order of items, whatever stands between these."""
    inputs = make_inputs(60, 20, [24, 8], mask=True)
    inputs["columns"][1] = inputs["columns"][0] % 10
    inputs["mask"] &= inputs["columns"][0] != 0
    packed, items = pack(inputs, 700)
    dout = torch.randn(60, 20, 32, generator=torch.Generator().manual_seed(0))
    behind = torch.full((700, 32), float("nan"))
    found = []
    with run_on(lane, "sequence_embedding") as device:
        for given, weight in ((inputs, dout), (packed, torch.cat([dout[items], behind]))):
            leaves = [given[k].to(device).requires_grad_() for k in ("mask_vector",)]
            leaves += [t.to(device).requires_grad_() for t in given["tables"]]
            options = {"offsets": given["offsets"].to(device)} if given is packed else {}
            out = sequence_embedding(
                [c.to(device) for c in given["columns"]],
                leaves[1:],
                mask=given["mask"].to(device),
                mask_vector=leaves[0],
                sparse=sparse,
                **options,
            )
            grads = torch.autograd.grad(out, leaves, weight.to(device))
            found.append([out, *(g.to_dense() if g.is_sparse else g for g in grads)])
    padded, found = found
    assert torch.equal(found[0][: items.sum()], padded[0][items.to(device)])
    assert not found[0][items.sum() :].any()
    for a, b in zip(found[1:], padded[1:]):
        if lane.startswith("plain"):  # its sums are in any order
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("lane", LANES)
def test_ids_behind_packed_sessions_are_in_no_sparse_gradient(lane):
    ids = torch.tensor([3, 1, 3, 99, -4, 2])
    with run_on(lane, "sequence_embedding") as device:
        table = torch.ones(6, 2, device=device, requires_grad=True)
        offsets = torch.tensor([0, 1, 3], device=device)
        out = sequence_embedding([ids.to(device)], [table], offsets=offsets, sparse=True)
        (grad,) = torch.autograd.grad(out, table, torch.ones_like(out))
    assert out.tolist() == [[1, 1]] * 3 + [[0, 0]] * 3
    assert grad.to_dense()[:, 0].tolist() == [0, 1, 0, 2, 0, 0]
    used = set(grad.coalesce().indices()[0].tolist())
    assert used <= ({0, 1, 3} if lane.startswith(("cuda", "plain")) else {1, 3})


@pytest.mark.parametrize("lane", LANES)
def test_padding_id_within_packed_sessions_is_looked_up_but_not_trained(lane):
    with run_on(lane, "sequence_embedding") as device:
        table = torch.ones(3, 2, device=device, requires_grad=True)
        offsets = torch.tensor([0, 3], device=device)
        ids = torch.tensor([1, 0, 0, 2], device=device)
        found = sequence_embedding([ids], [table], offsets=offsets)
        found.sum().backward()
    assert found.tolist() == [[1, 1]] * 3 + [[0, 0]]
    assert table.grad.tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane in ("plain", "cpu")])
def test_a_managed_table_learns_from_packed_sessions_as_from_padded_ones(lane):
    trained = []
    for spare in (None, 30):
        generator = torch.Generator().manual_seed(0)
        table = torch.nn.Parameter(torch.randn(40, 4, generator=generator).double())
        optimizer = optim.for_model(torch.nn.ParameterList([table]), items=[table], lr=0.1)
        for step in range(5):
            inputs = make_inputs(6, 5 + step, [1])
            inputs["columns"] = [inputs["columns"][0] * (step + 1)]
            weight = torch.randn(6, 5 + step, 4, generator=generator).double()
            with run_on(lane, "sequence_embedding"):
                if spare is None:
                    sequence_embedding(inputs["columns"], [table]).backward(weight)
                else:
                    packed, items = pack(inputs, spare)
                    weight = torch.cat([weight[items], weight.new_full((spare, 4), float("nan"))])
                    out = sequence_embedding(packed["columns"], [table], offsets=packed["offsets"])
                    out.backward(weight)
            assert recorder_of(table).lookup
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        trained.append(up_to_date(table).detach().clone())
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane == "cuda-on-cpu"])
def test_one_launch_is_all_with_packed_sessions(lane):
    packed, _ = pack(make_inputs(5, 6, [4], mask=True), 7)
    with run_on(lane, "sequence_embedding"), LargestTensor() as seen:
        sequence_embedding(**packed)
    assert seen.calls == {"sequence_embedding_fwd", "unsqueeze", "select"}


def test_plain_never_waits_for_the_host_with_packed_sessions():
    packed, _ = pack(make_inputs(5, 6, [4], mask=True, numbers=(0,)), 7)
    columns = [column[None] for column in packed["columns"]]
    masked = packed["mask"][None], packed["mask_vector"]
    with LargestTensor() as seen:
        plain.sequence_embedding(
            columns, packed["tables"], *masked, packed["offsets"], False, False, 0, (False,) * 2
        )
    assert not seen.calls & {"_local_scalar_dense", "nonzero", "masked_select"}


@pytest.mark.skipif("cuda-on-cpu" not in LANES, reason="there is no CUDA kernel")
@pytest.mark.parametrize("end", [-1, 41, 2**40])
def test_the_cuda_kernel_itself_refuses_offsets_out_of_range(end):
    ids, offsets = torch.full((1, 40), 2), torch.tensor([0, end])
    with run_on("cuda-on-cpu", "sequence_embedding"):
        emulated = torch.ops.t4r_fast_emulated
    for sum in (False, True):
        rest = (sum, None, None, False, 0, offsets)
        with pytest.raises(RuntimeError, match="offsets must end at 0 to the items"):
            emulated.sequence_embedding_fwd([ids], [torch.ones(6, 2)], *rest)
    for column in (ids, None):
        rest = (False, None, False, 0, False, [1, 0], offsets)
        with pytest.raises(RuntimeError, match="offsets must end at 0 to the items"):
            emulated.sequence_embedding_bwd(torch.ones(1, 40, 2), [column], [6], [2], *rest)


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane in ("cpu", "cuda-on-cpu")])
def test_native_ops_check_offsets(lane):
    with run_on(lane, "sequence_embedding"):
        forward = backend.ops(backend.forced(), plain).sequence_embedding_fwd
    rest = (False, None, None, False, 0)
    for offsets, message in [
        (torch.tensor([[0, 3]]), r"offsets must have shape \(B \+ 1,\)"),
        (torch.tensor([0, 3]).int(), "offsets must be int64"),
        (torch.tensor([]).long(), "offsets must have one entry at least"),
    ]:
        with pytest.raises(RuntimeError, match=f"^sequence_embedding: {message}"):
            forward([I[:1]], [W], *rest, offsets)
    with pytest.raises(RuntimeError, match="columns with them one session"):
        forward([I], [W], *rest, torch.tensor([0, 3]))


@pytest.mark.parametrize("sparse", [False, True])
def test_opcheck_with_packed_sessions(sparse):
    packed, _ = pack(make_inputs(4, 6, [5, 3], mask=True, numbers=(0,)), 5)
    columns = [column[None] for column in packed["columns"]]
    tables, mask, offsets = packed["tables"], packed["mask"][None], packed["offsets"]
    torch.library.opcheck(
        torch.ops.t4r_fast.sequence_embedding_fwd,
        (columns, tables, False, mask, packed["mask_vector"], False, 0, offsets),
    )
    torch.library.opcheck(
        torch.ops.t4r_fast.sequence_embedding_bwd,
        (
            torch.randn(*mask.shape, 9),
            [columns[0], None, columns[2]],
            [len(tables[0]), -1, len(tables[2])],
            [5, 1, 3],
            False,
            mask,
            False,
            0,
            sparse,
            [1, 1, 1, 1],
            offsets,
        ),
    )


def test_packed_sessions_compile_to_one_graph():
    packed, _ = pack(make_inputs(4, 6, [5, 3], mask=True, numbers=(0,)), 5)
    tables = packed["tables"][0], packed["tables"][2]

    def step(first, second):
        return sequence_embedding(**{**packed, "tables": [first, None, second]})

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tables]
        out = function(*leaves)
        found.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("tables", [1, 2, 3])
def test_packed_sessions_compile_without_a_gradient(tables):
    """For any number of columns: see the forward of the op's autograd function."""
    packed, _ = pack(make_inputs(4, 6, [3] * tables), 5)
    compiled = torch.compile(sequence_embedding, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(**packed), sequence_embedding(**packed))


P, O = I[0], torch.tensor([0, 2])  # noqa: E741
PACKED_ERRORS = {
    "shape": (([P, P[:1]], [W, W]), {}, ValueError, r"columns\[1\] .*\(U,\) .*\(3,\); got \(1,\)"),
    "dim": (([I], [W]), {}, ValueError, r"columns\[0\] must have shape \(U,\) because it has a t"),
    "number": (([P, X[None]], [W, None]), {}, ValueError, r"columns\[1\] must have shape \(U,\)"),
    "mask": (([P], [W]), {"mask": M, "mask_vector": V}, ValueError, r"mask must be bool \(3,\)"),
    "zero": (([P], [W]), {"zero_padding": True}, ValueError, "zero_padding must be False with off"),
    "offsets": (([P], [W]), {"offsets": O[None]}, ValueError, r"offsets must have shape \(B \+ 1"),
    "none": (([P], [W]), {"offsets": O[:0]}, ValueError, "one entry at least"),
    "dtype": (([P], [W]), {"offsets": O.int()}, TypeError, "offsets must be int64"),
    "device": (([P], [W]), {"offsets": O.to("meta")}, ValueError, "offsets must be on the device"),
    "end": (([P], [W]), {"offsets": O * 2}, ValueError, "end at 0 to 3, the items .*; got 4$"),
    "negative": (([P], [W]), {"offsets": -O}, ValueError, "end at 0 to 3, the items .*; got -2$"),
    "range": (([P + 5], [W]), {}, IndexError, r"columns\[0\] must hold ids .*; got 5 at item 0$"),
}


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane in ("plain", "cpu")])
@pytest.mark.parametrize(
    ("args", "options", "kind", "message"), PACKED_ERRORS.values(), ids=PACKED_ERRORS.keys()
)
def test_packed_errors(lane, args, options, kind, message):
    with (
        run_on(lane, "sequence_embedding"),
        pytest.raises(kind, match=rf"^sequence_embedding: .*{message}"),
    ):
        sequence_embedding(*args, **{"offsets": O, **options})

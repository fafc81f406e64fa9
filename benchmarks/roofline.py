"""Predicted time of every op on GPUs that nobody has measured it on, from counted work.

    python benchmarks/roofline.py [--gpu H100] [--json]      predictions, every one labelled so

Counted: tensor-core operations, exponentials, other float32 instructions, bytes of device memory,
launches. `floor` lets all of them overlap perfectly; `expected` adds exponentials and arithmetic
to tensor time at the rate that attention kernels written in Triton reach. `make gpu` puts
measurements beside these numbers; `sass_mix` checks the counts against compiled code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks/results/gpu-budget.json"


class Gpu(NamedTuple):
    """Dense rates of the vendor's datasheets, without sparsity.

    tensor  TFLOP/s of bfloat16 with float32 sums; tf32 is half of it on the data-center parts
    memory  TB/s
    clock   GHz, boost
    lanes   float32 lanes per SM
    """

    arch: int
    sms: int
    clock: float
    tensor: float
    tf32: float
    memory: float
    lanes: int

    @property
    def exps(self) -> float:
        """Exponentials per second: 16 per clock and SM from sm_80 to sm_120."""
        return 16 * self.sms * self.clock * 1e9

    @property
    def floats(self) -> float:
        """Float32 instructions per second and lane."""
        return self.lanes * self.sms * self.clock * 1e9


# Sources: NVIDIA A100, H100, H200 and L4 datasheets, Blackwell architecture brief (B200), Ada and
# RTX Blackwell GPU architecture whitepapers (RTX 4090, 5090); SXM parts where there are several.
GPUS = {
    "A100": Gpu(80, 108, 1.41, 312, 156, 2.04, 64),
    "H100": Gpu(90, 132, 1.83, 989, 494, 3.35, 128),
    "H200": Gpu(90, 132, 1.83, 989, 494, 4.8, 128),
    "B200": Gpu(100, 148, 1.85, 2250, 1125, 8.0, 128),
    "RTX 4090": Gpu(89, 128, 2.52, 165, 82.6, 1.01, 128),
    "RTX 5090": Gpu(120, 170, 2.41, 210, 105, 1.79, 128),
    "L4": Gpu(89, 58, 2.04, 121, 60.5, 0.30, 128),
}
# Share of the tensor rate that Triton's attention reaches at head width 64, 128, 256; 329 to 477 of
# 989 TFLOP/s are published for H100 (flash-attention and torchbench, width 128).
TRITON_SHARE = {64: 0.33, 128: 0.43, 256: 0.43}
# Share of the memory rate that streaming kernels reach.
MEMORY_SHARE = 0.85
# Seconds per launch: of one of our kernels, and of an eager op with its dispatch.
LAUNCH, EAGER_LAUNCH = 3e-6, 6e-6
# Float32 instructions per logit, counted in the formula; sass_mix compares them with the compiled
# loops. Forward: scale, maximum, subtract, add, convert. Backward: scale, subtract, multiply,
# convert. Rank: three comparisons.
FORWARD_FLOATS, BACKWARD_FLOATS, RANK_FLOATS = 5, 4, 3
# Exponentials and float32 instructions per logit that the model counts.
COUNTED = {
    "_tied_softmax_loss_fwd_kernel": (1, FORWARD_FLOATS),
    "_tied_softmax_loss_items_kernel": (1, BACKWARD_FLOATS),
    "_target_rank_fwd_kernel": (0, RANK_FLOATS),
}


class Work(NamedTuple):
    """Of one call: tensor FLOPs, exponentials, float32 instructions, device bytes, launches."""

    flops: float = 0
    exps: float = 0
    floats: float = 0
    bytes: float = 0
    launches: int = 1
    width: int = 64  # D, which picks the tensor share


class Peer(NamedTuple):
    """A baseline whose kernels run one after the other."""

    flops: float = 0
    bytes: float = 0
    launches: int = 1


class Case(NamedTuple):
    op: str
    sizes: dict[str, int]
    work: Work
    peers: dict[str, Peer]


def seconds(gpu: Gpu, work: Work, tf32: bool = False) -> tuple[float, float]:
    """(floor, expected)."""
    tensor = work.flops / ((gpu.tf32 if tf32 else gpu.tensor) * 1e12)
    exps, floats = work.exps / gpu.exps, work.floats / gpu.floats
    memory = work.bytes / (gpu.memory * 1e12)
    launch = work.launches * LAUNCH
    floor = max(tensor, exps, floats, memory, launch)
    # The share already holds the exponentials and the arithmetic of attention, whose tiles are the
    # same; below it they are what is left when they cannot hide.
    busy = max(tensor / TRITON_SHARE[work.width], exps + floats) if work.flops else floats
    return floor, max(busy, memory / MEMORY_SHARE) + launch


def peer_seconds(gpu: Gpu, peer: Peer, tf32: bool = False) -> float:
    tensor = peer.flops / (0.8 * (gpu.tf32 if tf32 else gpu.tensor) * 1e12)
    return tensor + peer.bytes / (MEMORY_SHARE * gpu.memory * 1e12) + peer.launches * EAGER_LAUNCH


# -- the ops -------------------------------------------------------------------------------------
# Bytes per logit of the baselines, bfloat16 (decision in docs/gpu.md): eager writes and reads the
# logits, their float32 copy, log-softmax and three gradients: 42; torch.compile fuses them to 14.
EAGER_BYTES, COMPILED_BYTES = 42, 14
# Logits written and read by topk's several passes.
TOPK_BYTES = 10


def tied_softmax_loss(n: int, v: int, d: int, size: int = 2) -> Case:
    logits, table = n * v, v * d * size
    work = Work(
        flops=8 * logits * d,
        exps=2 * logits,
        floats=(FORWARD_FLOATS + BACKWARD_FLOATS) * logits,
        bytes=3 * table + 4 * n * d * size,
        launches=4,
        width=d,
    )
    return Case(
        "tied_softmax_loss",
        {"N": n, "V": v, "D": d},
        work,
        {
            "eager": Peer(6 * logits * d, EAGER_BYTES * logits + 4 * table, 12),
            "torch.compile": Peer(6 * logits * d, COMPILED_BYTES * logits + 4 * table, 6),
        },
    )


def target_rank(n: int, v: int, d: int, size: int = 2) -> Case:
    logits, table = n * v, v * d * size
    work = Work(2 * logits * d, 0, RANK_FLOATS * logits, table + n * d * size, 3, d)
    peers = {"matmul + topk(20)": Peer(2 * logits * d, (size + TOPK_BYTES) * logits + table, 6)}
    return Case("target_rank", {"N": n, "V": v, "D": d}, work, peers)


def item_topk(n: int, v: int, d: int, size: int = 2) -> Case:
    logits, table = n * v, v * d * size
    work = Work(2 * logits * d, 0, 2 * logits, table + n * d * size, 2, d)
    peers = {"matmul + topk(100)": Peer(2 * logits * d, (size + TOPK_BYTES) * logits + table, 5)}
    return Case("item_topk", {"N": n, "V": v, "D": d, "K": 100}, work, peers)


def sampled_softmax_loss(n: int, v: int, d: int, k: int, size: int = 2) -> Case:
    logits, rows = n * k, (n + k) * d * size
    work = Work(
        8 * logits * d,
        2 * logits,
        (FORWARD_FLOATS + BACKWARD_FLOATS) * logits,
        4 * rows + 3 * n * d * size,
        8,
        d,
    )
    # The reference draws from a table of V probabilities and forms a V x D gradient.
    reference = Peer(6 * logits * d, 24 * logits + 2 * v * d * size + 12 * v, 60)
    return Case(
        "sampled_softmax_loss",
        {"N": n, "V": v, "D": d, "K": k},
        work,
        {"Transformers4Rec's ops": reference},
    )


def tied_table_step(n: int, v: int, d: int, size: int = 4) -> Case:
    logits, elements = n * v, v * d
    work = Work(
        4 * logits * d, logits, BACKWARD_FLOATS * logits, 6 * elements * size, 2, d
    )  # AdamW: weight and two moments read and written
    formed = Peer(4 * logits * d, (6 + 1) * elements * size + elements * size, 3)
    return Case(
        "tied_table_step",
        {"N": n, "V": v, "D": d},
        work,
        {"gradient formed, fused AdamW": formed},
    )


def sequence_embedding(b: int, length: int, d: int, size: int = 4) -> Case:
    rows = b * length * d * size
    work = Work(bytes=2 * rows + 8 * b * length, launches=1)
    peers = {"eager": Peer(0, 6 * rows, 6)}
    return Case("sequence_embedding", {"B": b, "L": length, "D": d}, work, peers)


def mask_mlm(b: int, length: int) -> Case:
    work = Work(bytes=25 * b * length, launches=1)
    return Case("mask_mlm", {"B": b, "L": length}, work, {"eager": Peer(0, 200 * b * length, 25)})


def cases() -> Iterator[Case]:
    for d in (64, 128, 256):
        yield tied_softmax_loss(1024, 118_335, d)
    for n, v in ((256, 118_335), (2048, 1_000_000), (2048, 10_000_000)):
        yield tied_softmax_loss(n, v, 64)
    for op in (target_rank, item_topk):
        yield op(256, 118_335, 64)
        yield op(2048, 1_000_000, 64)
    yield sampled_softmax_loss(1024, 1_000_000, 64, 4096)
    yield tied_table_step(1024, 1_000_000, 64)
    yield sequence_embedding(256, 20, 64)
    yield mask_mlm(256, 20)


def predictions(names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        gpu = GPUS[name]
        for case in cases():
            floor, expected = seconds(gpu, case.work)
            yield {
                "kind": "prediction",
                "gpu": name,
                "op": case.op,
                "sizes": case.sizes,
                "floor_ms": floor * 1e3,
                "expected_ms": expected * 1e3,
                "bound": bound(gpu, case.work),
                "peers_ms": {p: peer_seconds(gpu, w) * 1e3 for p, w in case.peers.items()},
            }


def bound(gpu: Gpu, work: Work) -> str:
    """What the floor is made of."""
    parts = {
        "tensor": work.flops / (gpu.tensor * 1e12),
        "exp": work.exps / gpu.exps,
        "float32": work.floats / gpu.floats,
        "memory": work.bytes / (gpu.memory * 1e12),
        "launches": work.launches * LAUNCH,
    }
    return max(parts, key=parts.__getitem__)


# -- the check against compiled code -------------------------------------------------------------


def sass_mix(rows: list[dict[str, Any]], kernel: str, arch: str) -> dict[str, float]:
    """Exponentials and float32 instructions per logit in the main loop of a compiled kernel.

    Takes the bfloat16 variant of D = 64 from the rows of gpu-budget.json. The loop holds one tile
    of BLOCK_N x BLOCK_V logits; instructions are per warp.
    """
    for row in rows:
        if row["arch"] == arch and row["kernel"] == kernel and row["variant"] == "bf16 D64":
            tile = row["blocks"]["BLOCK_N"] * row["blocks"]["BLOCK_V"]
            threads = 32 * row["warps"]
            return {
                part: row["loop"].get(part, 0) * threads / tile for part in ("exp", "fp32", "int")
            }
    raise LookupError(f"{KEPT.name} has no bfloat16 D64 variant of {kernel} for {arch}")


def show_mix(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Compiled main loops: instructions per logit (counted)", title_justify="left"
    )
    for column in ("kernel", "arch", "exp", "float32", "integer"):
        table.add_column(column)
    for kernel, (exps, floats) in COUNTED.items():
        for arch in sorted({row["arch"] for row in rows}):
            mix = sass_mix(rows, kernel, arch)
            table.add_row(
                kernel.strip("_"),
                arch,
                f"{mix['exp']:.1f} ({exps})",
                f"{mix['fp32']:.1f} ({floats})",
                f"{mix['int']:.1f}",
            )
    Console().print(table)


def show(found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Predictions, not measurements", title_justify="left")
    for column in ("GPU", "op", "sizes", "floor ms", "expected ms", "bound by", "expected ratio"):
        table.add_column(column, justify="right" if "ms" in column else "left")
    for p in found:
        sizes = " ".join(f"{k}={v:,}" for k, v in p["sizes"].items())
        ratios = ", ".join(f"{t / p['expected_ms']:.1f}x {n}" for n, t in p["peers_ms"].items())
        table.add_row(
            p["gpu"],
            p["op"],
            sizes,
            f"{p['floor_ms']:.3f}",
            f"{p['expected_ms']:.3f}",
            p["bound"],
            ratios,
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Predicted times from counted work")
    parser.add_argument("--gpu", action="append", choices=sorted(GPUS), help="default: all")
    parser.add_argument("--json", action="store_true", help="one JSON line per prediction")
    options = parser.parse_args()
    found = list(predictions(options.gpu or list(GPUS)))
    if options.json:
        for line in found:
            print(json.dumps(line))
    else:
        show(found)
        show_mix(json.loads(KEPT.read_text())["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

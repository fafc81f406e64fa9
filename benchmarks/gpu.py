"""Everything that only a GPU can show, in under ten minutes: `make gpu`.

    make gpu                                  build, test, sanitize, capture, time; write the report
    make gpu ARGS="--only bench --minutes 4"  a part of it
    python benchmarks/gpu.py --device cpu     rehearse the script: interpreted kernels, tiny sizes

Writes benchmarks/results/<gpu>.jsonl and <gpu>.md, where predictions of benchmarks/roofline.py
stand beside what was measured. A step that cannot run says why; a step that fails fails the run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks/results"
STEPS = ("build", "test", "sanitize", "capture", "bench")
# Share of the whole time that a step may take.
SHARES = {"build": 0.15, "test": 0.35, "sanitize": 0.15, "capture": 0.1, "bench": 0.25}
Record = dict[str, Any]


class Skip(Exception):
    """A step that cannot run here; the text says why."""


class Setting(NamedTuple):
    device: str
    name: str  # of the GPU, or of the rehearsal
    capability: int  # 90 for sm_90; 0 in the rehearsal
    seconds: dict[str, float]  # per step

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


def setting(device: str, minutes: float) -> Setting:
    import torch

    seconds = {step: 60 * minutes * share for step, share in SHARES.items()}
    if device == "cpu":
        return Setting("cpu", "rehearsal", 0, seconds)
    if not torch.cuda.is_available():
        raise SystemExit("make gpu: torch sees no GPU here; --device cpu rehearses the script")
    major, minor = torch.cuda.get_device_capability()
    return Setting("cuda", torch.cuda.get_device_name(), 10 * major + minor, seconds)


def command(line: Sequence[str], limit: float, **variables: str) -> str:
    """Run it; its last line. RuntimeError with its last lines when it fails or takes too long."""
    try:
        done = subprocess.run(
            line,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit,
            env={**os.environ, **variables},
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(line)}: took longer than {limit:.0f} s") from None
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode != 0:
        tail = "\n".join(lines[-15:])
        raise RuntimeError(f"{' '.join(line)}: exit status {done.returncode}\n{tail}")
    return lines[-1] if lines else ""


# -- the steps -----------------------------------------------------------------------------------


def build(where: Setting) -> str:
    """The CUDA library for this GPU alone."""
    if where.rehearsal:
        raise Skip("the rehearsal builds nothing")
    if shutil.which("nvcc") is None:
        raise Skip("nvcc is not on the path: the ops of csrc/cuda run in plain PyTorch")
    arch = f"{where.capability}{'a' if where.capability == 90 else ''}"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    command([*pip, "-e", "."], where.seconds["build"], T4R_FAST_CUDA="1", T4R_FAST_CUDA_ARCHS=arch)
    return f"sm_{arch}"


def kernel_tests(folder: str, suffix: str) -> list[str]:
    stems = sorted(p.stem for p in (ROOT / folder).glob(f"*{suffix}"))
    return [f"tests/test_{stem}.py" for stem in stems if (ROOT / f"tests/test_{stem}.py").exists()]


def test(where: Setting) -> str:
    """The tests of all ops with kernels; a GPU lane that is missing fails."""
    files = sorted({*kernel_tests("kernels/triton", ".py"), *kernel_tests("csrc/cuda", ".cu")})
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if where.rehearsal:
        if not files:
            raise Skip("there is no kernel yet")
        return command([*pytest, "-k", "interpret and bf16", files[-1]], where.seconds["test"])
    lanes = ["triton"] + ["cuda"] * (shutil.which("nvcc") is not None)
    return command([*pytest, *files], where.seconds["test"], T4R_FAST_REQUIRE=",".join(lanes))


def sanitize(where: Setting) -> str:
    """compute-sanitizer over the small cases of the CUDA ops."""
    if where.rehearsal:
        raise Skip("the rehearsal has no GPU")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Skip("compute-sanitizer is not on the path; it comes with the CUDA toolkit")
    files = kernel_tests("csrc/cuda", ".cu")
    line = [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x"]
    return command([*line, "-k", "cuda", "-m", "not slow", *files], where.seconds["sanitize"])


def capture(where: Setting) -> str:
    """A train step of each tutorial model as one CUDA graph gives the losses of eager steps."""
    from benchmarks import gpu_step

    if where.rehearsal:
        losses = gpu_step.eager_losses("gru", "cpu", items=500, steps=2)
        raise Skip(
            f"the rehearsal has no CUDA graphs; eager losses {losses[0]:.3f}, {losses[1]:.3f}"
        )
    shown = []
    for model in gpu_step.MODELS:
        found = gpu_step.compare_graph(model, "cuda")
        shown.append(
            f"{model}: {found['graph_ms']:.2f} ms a step, {found['eager_ms']:.2f} without a graph"
        )
    return "; ".join(shown)


# -- timing --------------------------------------------------------------------------------------

# Which call of an op's benchmark the prediction is about.
KINDS = {
    "tied_softmax_loss": "fwd+bwd",
    "target_rank": "rank",
    "item_topk": "topk",
    "sampled_softmax_loss": "fwd+bwd",
    "tied_table_step": "step",
    "sequence_embedding": "fwd",
    "mask_mlm": "train",
}
# Above so many logits the float64 truth takes too long or too much memory: not checked, and the
# record says so. Smaller cases check the same kernels.
LARGEST_CHECK = 2**28


def time_calls(
    calls: dict[str, Callable[[], object]], device: str, seconds: float
) -> dict[str, tuple[float, float, float]]:
    """Milliseconds (p20, p50, p80) of each call; rounds go through all of them."""
    import torch

    from benchmarks.timing import percentiles

    times: dict[str, list[float]] = {name: [] for name in calls}
    # Larger than any L2, so that each call finds its inputs in device memory.
    flush = torch.empty(2**26 if device == "cuda" else 1, dtype=torch.int32, device=device)
    stop = time.perf_counter() + seconds
    for round_ in range(50):
        if round_ >= 3 and time.perf_counter() > stop:
            break
        for name, call in calls.items():
            flush.zero_()
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                torch.cuda.synchronize()
                times[name].append(start.elapsed_time(end))
            else:
                begin = time.perf_counter()
                call()
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: percentiles(values) for name, values in times.items()}


def on_device(inputs: Any, device: str) -> Any:
    import torch

    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def measure(op: str, sizes: dict[str, int], where: Setting, seconds: float) -> list[Record]:
    """Records of one case, ours and the baselines."""
    import torch

    from benchmarks import bench
    from benchmarks.case import Case, Missing
    from benchmarks.check import Wrong, check, truth

    benchmark = bench.load(op)
    case = Case(KINDS[op], sizes)
    dtype = torch.float32 if where.rehearsal else torch.bfloat16
    if op in ("tied_table_step", "sequence_embedding"):
        dtype = torch.float32
    inputs = on_device(benchmark.inputs(case, dtype), where.device)
    checked = case.sizes.get("N", 1) * case.sizes.get("V", 1) <= LARGEST_CHECK
    true = truth(benchmark, case, inputs) if checked else None
    shared = {
        "kind": "measurement",
        "gpu": where.name,
        "op": op,
        "sizes": sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "checked": checked,
    }
    calls: dict[str, Callable[[], object]] = {}
    records: list[Record] = []
    for provider in [*benchmark.providers, *gpu_peers(op)]:
        record = {**shared, "provider": provider.name, "ours": provider.ours}
        try:
            call = provider.make(case)
            found = call(inputs)
            if true is not None and provider.ours:
                check(found, true, None if dtype == torch.float32 else {}, dtype)
        except Missing as error:
            records.append({**record, "status": "missing", "reason": str(error)})
        except torch.OutOfMemoryError:
            records.append({**record, "status": "missing", "reason": "out of memory"})
        except Wrong:
            raise
        except Exception as error:
            if provider.ours:
                raise
            reason = f"failed: {type(error).__name__}: {str(error).splitlines()[:1]}"
            records.append({**record, "status": "missing", "reason": reason})
        else:
            calls[provider.name] = lambda call=call: call(inputs)
            records.append({**record, "status": "ok"})
    timings = time_calls(calls, where.device, seconds)
    for record in records:
        if record["status"] == "ok":
            record["ms"] = dict(zip(("p20", "p50", "p80"), timings[record["provider"]]))
    return records


def gpu_peers(op: str) -> list[Any]:
    """Baselines that run on a GPU only."""
    from benchmarks.case import Missing, Provider, with_gradients

    if op != "tied_softmax_loss":
        return []

    def cut(impl: str) -> Any:
        def make(case: Any) -> Any:
            try:
                from cut_cross_entropy import linear_cross_entropy
            except ImportError as error:
                raise Missing(f"pip install cut-cross-entropy ({error})") from None
            return with_gradients(
                lambda x: linear_cross_entropy(x["hidden"], x["items"], x["target"], impl=impl),
                "hidden",
                "items",
            )

        return make

    def liger(case: Any) -> Any:
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError as error:
            raise Missing(f"pip install liger-kernel ({error})") from None
        loss = LigerFusedLinearCrossEntropyLoss()
        return with_gradients(
            lambda x: loss(x["items"], x["hidden"], x["target"]), "hidden", "items"
        )

    return [
        Provider("cut-cross-entropy cce", cut("cce")),
        Provider("cut-cross-entropy cce_exact", cut("cce_exact")),
        Provider("Liger", liger),
    ]


REHEARSED = [
    ("tied_softmax_loss", {"N": 24, "V": 150, "D": 16}),
    ("target_rank", {"N": 24, "V": 150, "D": 16}),
]


def bench(where: Setting) -> list[Record]:
    from benchmarks import roofline
    from t4r_fast import backend

    real = [(case.op, case.sizes) for case in roofline.cases()]
    cases = REHEARSED if where.rehearsal else real
    seconds = where.seconds["bench"] / len(cases)
    records: list[Record] = []
    for op, sizes in cases:
        if where.rehearsal and backend.why_not(op, "triton", "cpu") is None:
            with backend.use("triton"):
                records += measure(op, sizes, where, seconds)
        else:
            records += measure(op, sizes, where, seconds)
    return records


# -- the report ----------------------------------------------------------------------------------


def gpu_key(name: str) -> str | None:
    """The name in benchmarks/roofline.py of the GPU that calls itself `name`."""
    from benchmarks import roofline

    return next((key for key in roofline.GPUS if key.lower() in name.lower()), None)


def report(steps: list[Record], records: list[Record], predictions: list[Record]) -> str:
    """Markdown: what ran, and each measurement beside its prediction."""
    lines = ["| step | | seconds | |", "|---|---|---|---|"]
    for step in steps:
        note = step["note"].replace("\n", " ").replace("|", "/")
        lines.append(f"| {step['step']} | {step['status']} | {step['seconds']:.0f} | {note} |")
    lines += ["", "| op | sizes | predicted ms | measured ms | of the prediction | baselines |"]
    lines.append("|---|---|---|---|---|---|")
    expected = {(p["op"], json.dumps(p["sizes"])): p for p in predictions}
    cases = list(dict.fromkeys((r["op"], json.dumps(r["sizes"])) for r in records))
    for op, sizes in cases:
        own = [r for r in records if (r["op"], json.dumps(r["sizes"])) == (op, sizes)]
        ours = next(r for r in own if r["ours"])["ms"]["p50"]
        shown = ", ".join(f"{k} = {v:,}" for k, v in json.loads(sizes).items())
        found = expected.get((op, sizes))
        predicted = share = ""
        if found:
            predicted = f"{found['floor_ms']:.3f} to {found['expected_ms']:.3f}"
            share = f"{ours / found['expected_ms']:.2f}x"
        others = []
        for r in own:
            if not r["ours"]:
                ratio = f"{r['ms']['p50'] / ours:.1f}x" if r["status"] == "ok" else r["reason"]
                others.append(f"{r['provider']}: {ratio}")
        lines.append(
            f"| {op} | {shown} | {predicted} | {ours:.3f} | {share} | {'; '.join(others)} |"
        )
    return "\n".join(lines)


def file_stem(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(where: Setting, chosen: Sequence[str]) -> tuple[list[Record], list[Record]]:
    """(what became of each step, the measurements)."""
    functions = {"build": build, "test": test, "sanitize": sanitize, "capture": capture}
    steps, records = [], []
    for name in chosen:
        begin, note, status = time.perf_counter(), "", "ok"
        try:
            if name == "bench":
                records = bench(where)
                note = f"{len(records)} measurements"
            else:
                note = functions[name](where)
        except Skip as reason:
            status, note = "skipped", str(reason)
        except Exception as error:
            status, note = "failed", f"{type(error).__name__}: {error}"
        seconds = time.perf_counter() - begin
        steps.append({"step": name, "status": status, "seconds": seconds, "note": note})
        print(f"{name}: {status}, {seconds:.0f} s. {note}", flush=True)
    return steps, records


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build, test and time on a GPU")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else list(STEPS)
    if set(chosen) - set(STEPS):
        parser.error(f"--only must name steps of {', '.join(STEPS)}; got {options.only}")
    if options.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    where = setting(options.device, options.minutes)
    steps, records = run(where, chosen)

    from benchmarks import machine, roofline

    key = gpu_key(where.name)
    predictions = list(roofline.predictions([key])) if key else []
    shared = {
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **machine.origin(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{file_stem(where.name)}.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        for record in [*({"kind": "step", **s} for s in steps), *records]:
            file.write(json.dumps({**shared, **record}) + "\n")
    path.with_suffix(".md").write_text(report(steps, records, predictions) + "\n")
    print(f"written: {path} and {path.with_suffix('.md')}")
    return int(any(step["status"] == "failed" for step in steps))


if __name__ == "__main__":
    sys.exit(main())

"""The package needs no CUDA, no RAPIDS and no Merlin package: not to install, nor to train."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys

NOT_NEEDED = [
    "cupy", "cudf", "rmm", "numba", "nvidia", "pynvml", "dask", "distributed", "merlin",
    "nvtabular", "tensorflow", "betterproto", "google.protobuf", "torchmetrics", "pandas",
    "triton",
]  # fmt: skip

SCRIPT = """
import importlib.machinery, pkgutil, sys, tempfile

finder = importlib.machinery.PathFinder
find_spec = finder.find_spec

def hidden(name, path=None, target=None):
    if not any(name == n or name.startswith(n + ".") for n in HIDDEN):
        return find_spec(name, path, target)

finder.find_spec = hidden
import torch
assert not torch.cuda.is_available()
import t4r_fast, t4r_fast.torch
names = [m.name for m in pkgutil.walk_packages(t4r_fast.__path__, "t4r_fast.")]
# the Triton kernels, the C++ ops, and what answers the names of Transformers4Rec
left_out = ("kernels", "libt4r", "dropin.transformers4rec", "dropin.merlin")
names = [n for n in names if not n.startswith(tuple("t4r_fast." + n for n in left_out))]
for name in names:
    __import__(name)
sys.path.insert(0, sys.argv[1])
from training_case import make_trainer, write_sessions
folder = tempfile.mkdtemp()
data = write_sessions(folder + "/data.parquet")
trainer = make_trainer(folder, data, max_steps=2, save_strategy="no")
trainer.train()
assert 0 <= trainer.evaluate()["eval_/next-item/recall_at_20"] <= 1
print("trained,", len(names), "modules")
"""


def test_no_requirement_is_for_a_gpu():
    required = importlib.metadata.requires("t4r_fast")
    assert len(required) > 5
    for requirement in required:
        if "extra ==" not in requirement:
            name = re.match(r"[\w.-]+", requirement).group().lower()
            assert not name.startswith(("cuda", *NOT_NEEDED)), requirement
            assert "cu1" not in name, requirement


def test_training_without_any_of_them():
    script = f"HIDDEN = {NOT_NEEDED!r}\n{SCRIPT}"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("T4R_FAST_")},
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, os.path.dirname(__file__)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "trained," in run.stdout

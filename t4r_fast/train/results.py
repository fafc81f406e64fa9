"""results.txt in the tutorial's format, and results.json with everything that was measured."""

from __future__ import annotations

import os
import platform
from importlib import metadata

from t4r_fast.train.models import KINDS
from t4r_fast.version import __version__

METRICS = ("ndcg_at_10", "ndcg_at_20", "recall_at_10", "recall_at_20")
METRIC_TITLES = {
    "ndcg_at_10": "NDCG@10",
    "ndcg_at_20": "NDCG@20",
    "recall_at_10": "Recall@10",
    "recall_at_20": "Recall@20",
}


def results_text(models: dict[str, dict]) -> str:
    """The tutorial's results.txt: per model its title and the metrics of the last window.

    models  {kind: {"windows": [{"metrics": {"ndcg_at_10": float, ...}}, ...]}}
    """
    blocks = []
    for name, model in models.items():
        last = model["windows"][-1]["metrics"]
        lines = [f"next-item/{metric}:{value}" for metric, value in last.items()]
        blocks.append("\n".join([KINDS[name].results_title, *lines]) + "\n")
    return "\n".join(blocks)


def versions() -> dict[str, str]:
    """Versions of this package and of what computes for it."""
    names = ("torch", "transformers", "polars", "pyarrow", "numpy")
    found = {"t4r_fast": __version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str | int]:
    """The machine in words: system, processor, cores this process may use, threads, GPU."""
    import torch

    affinity = getattr(os, "sched_getaffinity", None)
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def final_metrics(records: list[dict]) -> dict[str, float]:
    """The metrics of the last window."""
    return records[-1]["metrics"]


def gain_over_popularity(results: dict, name: str, metric: str = "ndcg_at_20") -> float | None:
    """metric of `name` / that of the popularity baseline, in the last window; None if that is 0."""
    part = "models" if name in results["models"] else "baselines"
    value = final_metrics(results[part][name]["windows"])[metric]
    popular = final_metrics(results["baselines"]["popularity"]["windows"])[metric]
    return value / popular if popular else None

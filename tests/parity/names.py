"""Every public name of Transformers4Rec 23.12 beside ours; writes it into docs/compatibility.md.

    python tests/parity/names.py

reads names.json, which record_names.py made beside the real package.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from spelling import plain

from t4r_fast.dropin import names as dropin
from t4r_fast.dropin import uninstall

uninstall()  # the table of names alone is wanted, not the hook that the import puts in

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "names.json").read_text())
DOCUMENT = HERE.parents[1] / "docs" / "compatibility.md"
BEGIN, END = "<!-- names: tests/parity/names.py writes this -->", "<!-- names end -->"

T = "transformers4rec.torch."
# What differs on purpose: name -> what is better.
BETTER: dict[str, str] = {
    f"{T}model.base.Model.evaluate": "without dropout and gradients",
    f"{T}model.base.Model.fit": "scales gradients of float16; counts metrics over all items",
    f"{T}model.base.Model.load": "runs no code from the file",
    f"{T}model.base.Model.save": "JSON and safetensors instead of a pickle",
    f"{T}model.base.Model.output_schema": "states top_k entries, not as many as there are items",
    f"{T}model.base.Head.pop_labels": "by the names of the targets",
    f"{T}experimental.PostContextFusion": "takes a context of the session, too",
    f"{T}masking.PermutationLanguageModeling": "can predict the next item: append_mask",
    f"{T}masking.ReplacementLanguageModeling": "mlm_probability counts; ReplacedItemPredictionTask",
    f"{T}model.prediction_task.NextItemPredictionTask": "no scores formed; samplers without bias",
    f"{T}ranking_metric.RankingMetric": "constant memory; ties by lowest id",
    f"{T}tabular.base.SequentialTabularTransformations": "append works",
    f"{T}tabular.transformations.StochasticSwapNoise": "can spare the targets: noise_targets",
    f"{T}trainer.Trainer": "resumes bit for bit; metrics by ranks; several processes agree",
    f"{T}utils.data_utils.MerlinDataLoader": "needs no Merlin; checks ids",
    f"{T}utils.data_utils.MerlinDataLoader.output_schema": "our Schema, which blocks take",
    f"{T}utils.data_utils.PyarrowDataLoader": "shuffles, reads ahead, larger than memory",
    f"{T}utils.data_utils.ShuffleDataset": "works",
    f"{T}utils.torch_utils.LossMixin": "compute_loss works in heads, models and tasks",
    f"{T}model.base.Model.to_lightning": "takes batches of (inputs, targets)",
    "transformers4rec.config.trainer.T4RecTrainingArguments": "warmup_ratio counts; unread fields"
    " say so",
    "transformers4rec.data.synthetic.generate_session_interactions": "works",
    "transformers4rec.data.yoochoose.process_clicks": "a Polars frame, no cuDF",
    f"{T}utils.schema_utils.random_data_from_schema": "leaves random states alone",
    "transformers4rec.utils.data_utils.session_aggregator": "needs no NVTabular",
    "transformers4rec.utils.dependencies.is_merlin_dataloader_available": "False where it is not",
}
# Names that are there with less: name -> what is missing.
IN_PART: dict[str, str] = {
    "merlin_standard_lib.schema.schema.ColumnSchema": "a plain class: of protobuf's fields name,"
    " type, domains, value_count, shape and annotation",
    "merlin_standard_lib.schema.schema.Schema": "a plain class that holds `feature`",
}
# Names that make no sense here, and why.
WHY_NOT: dict[str, str] = {
    "transformers4rec.config.trainer.T4RecTrainingArgumentsTF": "TensorFlow",
    "transformers4rec.data.dataset.Dataset.tf_synthetic_data": "TensorFlow",
}
# Their arguments are those of transformers.
CONFIGS = "transformers4rec.config.transformer."
# Called by the blocks themselves, with arguments by place.
BY_PLACE = ("forward", "build", "forward_output_size", "update", "apply_mask_to_inputs")


def ours(module: str) -> Any:
    """Our module behind a name of the reference, or None."""
    try:
        target = dropin.target(module)
    except KeyError:
        return None
    return None if target is None else importlib.import_module(target)


def arguments(call: Any) -> dict[str, inspect.Parameter]:
    found = inspect.signature(call).parameters.values()
    return {p.name: p for p in found if p.name not in ("self", "cls")}


def same_default(theirs: Any, parameter: inspect.Parameter) -> bool:
    if theirs == {}:
        return True  # they need it; with a default of ours their calls work
    if parameter.default is parameter.empty:
        return False
    own = plain(parameter.default)
    if own == theirs:
        return True
    # None stands for an object that is made anew for each call, where theirs is shared by all
    shared = isinstance(theirs, (dict, list)) and (theirs == [] or "object" in str(theirs))
    return own is None and shared


def unlike(theirs: dict[str, Any], call: Any) -> list[str]:
    """Arguments of theirs that ours lacks or gives another default."""
    own = arguments(call)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in own.values())
    found = []
    for name, default in theirs.items():
        if name.startswith("*"):
            continue  # what they take and name nowhere
        if name not in own:
            if not takes_any:
                found.append(name)
        elif not same_default(default, own[name]):
            found.append(f"{name}={plain(own[name].default)}")
    return found


def compare() -> list[tuple[str, str, str]]:
    """(name, "same" | "better" | "in part" | "not yet" | "differs", what) in the order of names.

    A method or property has a row only where it is not the same.
    """
    rows = []
    for module, names in sorted(RECORDED["modules"].items()):
        target = ours(module)
        for name, recorded in sorted(names.items()):
            full, own = f"{module}.{name}", getattr(target, name, None)
            rows.append((full, *judged(full, recorded.get("arguments"), own)))
            for member, args in sorted((recorded.get("members") or {}).items()):
                if own is None:
                    break
                of_class = f"{full}.{member}"
                args = None if member in BY_PLACE else args
                row = judged(of_class, args, inspect.getattr_static(own, member, None), own)
                if row[0] != "same":
                    rows.append((of_class, *row))
    return rows


def judged(full: str, theirs: dict | None, own: Any, of: Any = None) -> tuple[str, str]:
    last = full.rpartition(".")[2]
    if last in getattr(of, "__dataclass_fields__", {}):
        return "same", ""
    if own is None and (of is None or not hasattr(of, last)):
        return "not yet", WHY_NOT.get(full, "")
    if full in BETTER:
        return "better", BETTER[full]
    if full in IN_PART:
        return "in part", IN_PART[full]
    if theirs is None or isinstance(own, property) or (full.startswith(CONFIGS) and of is None):
        return "same", ""
    call = getattr(own, "__func__", own)
    if not callable(call):
        return "same", ""
    differs = unlike(theirs, call.__init__ if inspect.isclass(call) else call)
    return ("differs", ", ".join(differs)) if differs else ("same", "")


# -- the document ----------------------------------------------------------------------------------


def table() -> str:
    """One row for each module of the reference."""
    by_module: dict[str, dict[str, list[str]]] = {}
    for full, status, what in compare():
        module = next(m for m in sorted(RECORDED["modules"], key=len)[::-1] if full.startswith(m))
        name = f"`{full[len(module) + 1 :]}`"
        kinds = by_module.setdefault(module, {"same": [], "better": [], "not yet": []})
        if status in ("better", "in part"):
            said = f"{name}: {what}" if status == "better" else f"{name} in part: {what}"
            kinds["better"].append(said)
        else:
            kinds[status].append(f"{name} ({what})" if what else name)
    lines = ["| module | same | better, or in part | not yet |", "|---|---|---|---|"]
    for module, kinds in by_module.items():
        short = module.replace("transformers4rec.", "").replace("merlin_standard_lib", "msl")
        cells = [", ".join(kinds["same"]), "; ".join(kinds["better"]), ", ".join(kinds["not yet"])]
        lines.append(f"| {short} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rewritten(text: str) -> str:
    """The document with the table as it is today."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    wrong = [row for row in compare() if row[1] == "differs"]
    for name, _, what in wrong:
        print(f"{name}: {what}")
    if wrong:
        raise SystemExit("say in BETTER or IN_PART why these differ, or make them the same")
    DOCUMENT.write_text(rewritten(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()

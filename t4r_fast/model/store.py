"""The saved form of a model: two files, neither of which can run code.

<name>.safetensors  weights; a tensor that several modules share is stored once
<name>.json         the architecture (architecture.py), the compat level, the schemas of inputs and
                    outputs, and the checksum of the weights; of a training run also "trained", how
                    it came about (t4r_fast.train.saved_model)
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_model as load_into
from safetensors.torch import save_model as save_from

from t4r_fast.compat import compat_level
from t4r_fast.errors import InputError
from t4r_fast.model import architecture
from t4r_fast.ops._table import up_to_date
from t4r_fast.version import __version__

if TYPE_CHECKING:
    from t4r_fast.compat.torch.model.base import Model

FORMAT = "t4r_fast model 1"
DEFAULT_NAME = "t4rec_model_class"


def save(
    model: Model,
    folder: str | os.PathLike[str],
    name: str = DEFAULT_NAME,
    trained: dict[str, Any] | None = None,
) -> None:
    """See Model.save. trained  how the model came about, for JSON"""
    description = architecture.describe(model)
    with compat_level(model._level):
        architecture.check(model, description)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{name}.safetensors"
    partial = folder / f".{name}.safetensors.partial"
    for parameter in model.parameters():
        up_to_date(parameter)  # rows that t4r_fast.optim has not come to yet
    save_from(model, str(partial))
    inputs, outputs = model.input_schema, model.output_schema
    stored = {
        "format": FORMAT,
        "t4r_fast": __version__,
        "compat": model._level,
        "architecture": description,
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "input_schema": None if inputs is None else inputs.to_proto_text(),
        "output_schema": outputs.to_proto_text(),
        "weights": {"file": weights.name, "sha256": _checksum(partial)},
        **({} if trained is None else {"trained": trained}),
    }
    text = json.dumps(stored, indent=1, allow_nan=False)
    partial_text = folder / f".{name}.json.partial"
    partial_text.write_text(text + "\n", encoding="utf-8")
    # A process killed between the two leaves a checksum that says so.
    os.replace(partial, weights)
    os.replace(partial_text, folder / f"{name}.json")


def load_model(path: str | os.PathLike[str]) -> Model:
    """The model that Model.save or a training run wrote, in evaluation mode, on the CPU.

    path  the folder, or its JSON file where it holds several models

    Builds classes of a closed list and those that were decorated with `saveable`, with the
    behaviour of the compat level at which the model was saved, and runs no code from the files.
    Raises InputError when the files are missing, damaged, of different models, or name a class that
    is not on the list.
    """
    return read(path)[0]


def read(path: str | os.PathLike[str]) -> tuple[Model, dict[str, Any]]:
    """load_model(path), and what the JSON file says."""
    path = Path(path)
    if is_version_1(path):
        # its models are built by the training application, which is built on this package
        from t4r_fast.train.saved_model import read_version_1

        return read_version_1(path)
    file = _description_in(path)
    stored = _read(file)
    weights = file.with_name(stored["weights"]["file"])
    if not weights.is_file():
        raise InputError(f"load_model: {weights} is missing")
    if _checksum(weights) != stored["weights"]["sha256"]:
        raise InputError(
            f"load_model: {weights} is not the file that {file.name} was written with; saving was"
            " interrupted, or one of the two was replaced. Save the model again"
        )
    with compat_level(stored["compat"]):
        model = architecture.rebuild(stored["architecture"])
    try:
        load_into(model, str(weights))
    except RuntimeError as e:
        raise InputError(f"load_model: {weights} does not fit {file.name}: {e}") from e
    frozen = set(stored["frozen"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model.eval(), stored


def is_version_1(folder: Path) -> bool:
    """Whether a training run wrote the folder before there was one format: config.json, weights,
    schema.pbtxt."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    found = _json(file)
    return isinstance(found, dict) and found.get("format") == 1 and "model" in found


def load_named(folder: str | os.PathLike[str], name: str = DEFAULT_NAME) -> Model:
    """See Model.load."""
    file = Path(folder) / f"{name}.json"
    if file.is_file():
        return load_model(file)
    if name == DEFAULT_NAME and is_version_1(Path(folder)):
        return load_model(folder)
    _refuse_pickles(Path(folder))
    raise InputError(f"Model.load: there is no {file}; give model_name, or call load_model(folder)")


def _refuse_pickles(path: Path) -> None:
    pickles = sorted(path.glob("*.pkl"))
    if pickles:
        raise InputError(
            f"load_model: {pickles[0]} is a pickle of Transformers4Rec, which runs code when it is"
            " read. Load it there, save its state_dict() as pytorch_model.bin, build the model by"
            " t4r_fast.torch and call t4r_fast.torch.load_weights(model, folder)"
        )


def _description_in(path: Path) -> Path:
    if path.suffix == ".json" and path.is_file():
        return path
    found = [file for file in sorted(path.glob("*.json")) if _is_ours(file)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise InputError(f"load_model: {path} holds several models, {names}; give one of the files")
    _refuse_pickles(path)
    raise InputError(
        f"load_model: {path} holds no saved model; give a folder that Model.save or a training run"
        " wrote, such as OUT/models/xlnet_mlm"
    )


def _is_ours(file: Path) -> bool:
    with open(file, encoding="utf-8", errors="replace") as f:
        return FORMAT in f.read(100)


def _read(file: Path) -> dict[str, Any]:
    stored = _json(file)
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise InputError(f"load_model: {file} is no saved model of the format {FORMAT!r}")
    return stored


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise InputError(f"load_model: {file} is damaged: {e}") from e


def _checksum(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""A trained model in a folder: weights, schema, and how to build it again. No pickles.

model.safetensors  weights; tensors shared between modules are stored once
config.json        model, options, compat level, versions, windows trained on
schema.pbtxt       the columns it was built from
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from t4r_fast.compat import compat_level, get_compat
from t4r_fast.errors import InputError
from t4r_fast.schema import Schema
from t4r_fast.tutorial import state
from t4r_fast.tutorial.models import KINDS, build

if TYPE_CHECKING:
    from t4r_fast.torch import Model

FORMAT = 1
WEIGHTS = "model.safetensors"


@dataclasses.dataclass
class SavedModel:
    """A model read back: `model` in evaluation mode, and what config.json says."""

    name: str
    model: Model
    schema: Schema
    config: dict

    @property
    def max_sequence_length(self) -> int:
        return int(self.config["options"]["max_sequence_length"])


def save(folder: Path, name: str, model: Model, schema: Schema, options: dict, **more) -> None:
    """Write the folder under a temporary name and rename it into place.

    options  the keyword arguments of `build`
    more     further entries of config.json
    """
    from safetensors.torch import save_model

    from t4r_fast.tutorial.results import versions

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, str(partial / WEIGHTS))
    schema.to_proto_text(partial / "schema.pbtxt")
    config = {
        "format": FORMAT,
        "model": name,
        "compat": get_compat(),
        "options": options,
        "versions": versions(),
        **more,
    }
    state.write_json(partial / "config.json", config)
    state.replace_folder(partial, folder)


def load(folder: str | os.PathLike[str]) -> SavedModel:
    """Build the model of a folder again, with its weights, at the compat level it was trained at.

    Raises InputError when the folder is no saved model or its parts do not fit together.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: is no saved model, config.json is missing; give a folder such as"
            " OUT/models/xlnet_mlm"
        )
    config = state.read_json(folder / "config.json")
    if config.get("format") != FORMAT or config.get("model") not in KINDS:
        raise InputError(
            f"{folder / 'config.json'}: format {config.get('format')!r}, model"
            f" {config.get('model')!r}; this version reads format {FORMAT} of {', '.join(KINDS)}"
        )
    schema = Schema().from_proto_text(folder / "schema.pbtxt")
    with compat_level(config["compat"]):
        model = build(config["model"], schema, **config["options"])
    try:
        load_model(model, str(folder / WEIGHTS))
    except Exception as e:
        reason = str(e).splitlines()[0]
        raise InputError(
            f"{folder / WEIGHTS}: does not hold the weights of this model ({reason})"
        ) from e
    return SavedModel(config["model"], model.eval(), schema, config)

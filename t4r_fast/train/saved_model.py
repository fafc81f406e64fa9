"""The models of a training run, as t4r_fast.model.store writes them, with how they came about.

"trained" in the JSON file: model (its kind), options of `build`, versions, the schema, windows
trained on, metrics of the last one.

Runs before there was one format wrote a folder of three files, which is still read:
config.json (model, options, compat level, versions, ...), model.safetensors, schema.pbtxt.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t4r_fast.compat import compat_level
from t4r_fast.errors import InputError
from t4r_fast.model import store
from t4r_fast.schema import Schema
from t4r_fast.train import state
from t4r_fast.train.models import KINDS, build

if TYPE_CHECKING:
    from t4r_fast.compat.torch import Model


@dataclasses.dataclass
class SavedModel:
    """A model read back.

    name     its kind, of a training run; else None
    model    in evaluation mode
    schema   the columns that it reads
    compat   the level that it was built at
    trained  how it came about, of a training run; else empty
    """

    name: str | None
    model: Model
    schema: Schema
    compat: str
    trained: dict[str, Any]

    @property
    def title(self) -> str:
        """What it is called in tables."""
        if self.name in KINDS:
            return KINDS[self.name].title
        return self.model.name or "Model"

    @property
    def max_sequence_length(self) -> int:
        """Positions that its sessions are padded to."""
        from t4r_fast.serve.recommender import served_length

        return served_length(self.model, None)


def save(folder: Path, name: str, model: Model, schema: Schema, options: dict, **more) -> None:
    """Write the folder under a temporary name and rename it into place.

    options  the keyword arguments of `build`
    more     further entries of "trained"
    """
    from t4r_fast.train.results import versions

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    trained = {
        "model": name,
        "options": options,
        "versions": versions(),
        "schema": schema.to_proto_text(),
        **more,
    }
    store.save(model, partial, trained=state.finite(trained))
    state.replace_folder(partial, folder)


def load(folder: str | os.PathLike[str]) -> SavedModel:
    """The model of a training run's folder, old or new, or of one that Model.save wrote.

    Raises InputError when the folder is no saved model, or its parts do not fit together.
    """
    model, stored = store.read(folder)
    trained = stored.get("trained", {})
    schema = model.input_schema
    if "schema" in trained:
        schema = Schema().from_proto_text(trained["schema"])
    if schema is None:
        raise InputError(f"{folder}: the model has no schema of its columns, which commands need")
    return SavedModel(trained.get("model"), model, schema, stored["compat"], trained)


def read_version_1(folder: Path) -> tuple[Model, dict[str, Any]]:
    """As t4r_fast.model.store.read, of the three files that runs wrote before."""
    from safetensors.torch import load_model

    config = state.read_json(folder / "config.json")
    if config["model"] not in KINDS:
        raise InputError(
            f"{folder / 'config.json'}: model {config['model']!r}; this version knows"
            f" {', '.join(KINDS)}"
        )
    schema = Schema().from_proto_text(folder / "schema.pbtxt")
    with compat_level(config["compat"]):
        # models saved before there was a choice attend to padding
        model = build(config["model"], schema, **{"attend_padding": True, **config["options"]})
    weights = folder / "model.safetensors"
    try:
        load_model(model, str(weights))
    except Exception as e:
        reason = str(e).splitlines()[0]
        raise InputError(f"{weights}: does not hold the weights of this model ({reason})") from e
    own = ("format", "compat")
    trained = {key: value for key, value in config.items() if key not in own}
    trained["schema"] = schema.to_proto_text()
    return model.eval(), {"compat": config["compat"], "trained": trained}

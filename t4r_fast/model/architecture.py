"""A model as JSON: which classes of a closed list were built with which arguments. No pickles.

Classes on the list note the arguments of their constructor (or of from_schema) when they are built.
describe() walks from the model through these arguments; rebuild() calls the same constructors
again. An object that stands in two places, such as an input block that is given to the body and to
the head, is written once.

    {"new": "MLPBlock", "id": 3, "arguments": {"dimensions": [64], ...}}   a call
    {"same": 3}                                                            that object once more
    {"part_of": 1, "path": "_masking"}                                     a submodule of object 1
    {"torch": "GRU", "id": 4, "arguments": {...}}                          a module of torch.nn
    {"config": "XLNetConfig", "id": 5, "values": {...}}                    of a Transformer
    {"class": "ReLU"}, {"tuple": []}, {"dict": {}}, {"schema": "text"}, {"number": "inf"}
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

import torch
import transformers
from torch import nn

from t4r_fast.errors import InputError
from t4r_fast.schema import Schema

_Class = TypeVar("_Class", bound=type)

#: What may be built: name -> class or classmethod. `saveable` adds to it.
_KNOWN: dict[str, Callable[..., Any]] = {}

# They matter for fresh weights alone; a saved model brings its own.
_FRESH_ONLY = ("initializer", "emb_initializer", "embeddings_initializers")


# -- noting how an object is built -----------------------------------------------------------------


def saveable(cls: _Class) -> _Class:
    """Class decorator: models with objects of this class can be saved and loaded.

    A model's description then holds the class by its name and the arguments that it was built with,
    by its constructor or by its classmethod `from_schema`. A model can be loaded where the class
    was decorated, too. Arguments must be numbers, strings, lists, dicts, schemas, or objects that
    can be saved themselves. Raises ValueError when another class has the name.
    """
    if _KNOWN.get(cls.__name__, cls) is not cls:
        raise ValueError(f"saveable: there is another class named {cls.__name__}; rename yours")
    changed: Any = cls
    changed.__init__ = _noting_init(cls, changed.__init__)
    _KNOWN[cls.__name__] = cls
    if "from_schema" in cls.__dict__:
        changed.from_schema = classmethod(_noting_from_schema(changed.from_schema.__func__))
    if hasattr(cls, "from_schema"):
        _KNOWN[f"{cls.__name__}.from_schema"] = changed.from_schema
    return cls


def _noting_init(cls: type, original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is cls:  # a subclass notes its own arguments
            bound = signature.bind(self, *args, **kwargs)
            object.__setattr__(self, "_built_by", (cls.__name__, _arguments(bound, 1)))

    return __init__


def _noting_from_schema(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def from_schema(cls: type, *args: Any, **kwargs: Any) -> Any:
        built = original(cls, *args, **kwargs)
        if type(built) is cls:
            bound = signature.bind(cls, *args, **kwargs)
            name = f"{cls.__name__}.from_schema"
            object.__setattr__(built, "_built_by", (name, _arguments(bound, 1)))
        return built

    return from_schema


def _arguments(bound: inspect.BoundArguments, skip: int) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments with defaults; callable defaults are left to the class."""
    bound.apply_defaults()
    parameters = bound.signature.parameters
    given: list[Any] = []
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[skip:]:
        kind = parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            given.extend(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update({n: v for n, v in value.items() if n not in _FRESH_ONLY})
        elif name not in _FRESH_ONLY and not (
            callable(value) and value is parameters[name].default
        ):
            named[name] = value
    return given, named


# -- torch.nn by attributes ------------------------------------------------------------------------

_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
# Attributes that are the arguments of the constructor; a "bias" that is a tensor means True.
_TORCH: dict[str, tuple[str, ...]] = {
    "BatchNorm1d": ("num_features", "eps", "momentum", "affine", "track_running_stats"),
    "Dropout": ("p",),
    "ELU": ("alpha",),
    "GELU": ("approximate",),
    "GRU": (*_RECURRENT, "bidirectional"),
    "Identity": (),
    "LSTM": (*_RECURRENT, "bidirectional", "proj_size"),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine"),
    "LeakyReLU": ("negative_slope",),
    "Linear": ("in_features", "out_features", "bias"),
    "RNN": (*_RECURRENT, "bidirectional", "nonlinearity"),
    "ReLU": (),
    "SELU": (),
    "SiLU": (),
    "Sigmoid": (),
    "Softmax": ("dim",),
    "Softplus": ("beta", "threshold"),
    "Tanh": (),
    "BCELoss": ("reduction",),
    "BCEWithLogitsLoss": ("reduction",),
    "CrossEntropyLoss": ("ignore_index", "reduction", "label_smoothing"),
    "HuberLoss": ("delta", "reduction"),
    "L1Loss": ("reduction",),
    "MSELoss": ("reduction",),
    "NLLLoss": ("ignore_index", "reduction"),
    "SmoothL1Loss": ("beta", "reduction"),
}
_OPTIMIZERS = ("Adagrad", "Adam", "AdamW", "RMSprop", "SGD", "SparseAdam")


def _is_torch(value: Any) -> bool:
    name = type(value).__name__
    return name in _TORCH and type(value) is getattr(nn, name)


# -- from a model to JSON --------------------------------------------------------------------------


class _Writer:
    def __init__(self) -> None:
        self.known: dict[int, dict[str, Any]] = {}
        self.kept: list[Any] = []  # keeps the ids of objects from being used again

    def value(self, value: Any, where: str) -> Any:
        """The JSON form of an argument. Raises InputError for one that has none."""
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, Enum):
            return self.value(value.value, where)
        if isinstance(value, float):
            return value if math.isfinite(value) else {"number": str(value)}
        if isinstance(value, str):
            return value
        if id(value) in self.known:
            return self.known[id(value)]
        if isinstance(value, list):
            return [self.value(v, f"{where}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, tuple):
            return {"tuple": self.value(list(value), where)}
        if isinstance(value, Mapping):
            return {"dict": self._named(value, where)}
        if isinstance(value, Schema):
            return {"schema": value.to_proto_text()}
        if isinstance(value, type):
            return {"class": _class_name(value, where)}
        return self._object(value, where)

    def _named(self, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {name: self.value(v, f"{where}.{name}") for name, v in arguments.items()}

    def _object(self, value: Any, where: str) -> dict[str, Any]:
        if isinstance(value, transformers.PretrainedConfig):
            return self._remembered(value, {"config": type(value).__name__}, _config_values(value))
        if isinstance(value, transformers.PreTrainedModel):
            written = {"transformer": self.value(value.config, where)}
            return self._remembered(value, written, {})
        if _is_torch(value):
            return self._remembered(value, self._torch(value, where), {})
        if type(value) is nn.Sequential:
            children = [self.value(m, f"{where}[{i}]") for i, m in enumerate(value)]
            return self._remembered(value, {"torch": "Sequential", "children": children}, {})
        name, (given, named) = getattr(value, "_built_by", (None, ((), {})))
        if name not in _KNOWN or type(value).__name__ != name.partition(".")[0]:
            raise InputError(
                f"Model.save: {where} is a {type(value).__name__}, which is not on the list of"
                " what can be saved; decorate the class with t4r_fast.torch.saveable, or keep the"
                " weights alone: safetensors.torch.save_model, and t4r_fast.torch.load_weights"
            )
        written = {"new": name}
        if given:
            written["given"] = [self.value(v, f"{where}[{i}]") for i, v in enumerate(given)]
        for attribute in getattr(value, "_saved_as_set", ()):
            named = {**named, attribute: getattr(value, attribute)}
        return self._remembered(value, {**written, "arguments": self._named(named, where)}, {})

    def _torch(self, module: nn.Module, where: str) -> dict[str, Any]:
        name = type(module).__name__
        for tensor in ("weight", "pos_weight"):
            if name.endswith("Loss") and getattr(module, tensor, None) is not None:
                raise InputError(
                    f"Model.save: {where}: torch.nn.{name} with {tensor} cannot be saved; write a"
                    " loss class of your own and decorate it with t4r_fast.torch.saveable"
                )
        attributes = {n: getattr(module, n) for n in _TORCH[name]}
        for n, v in attributes.items():
            if n == "bias" and not isinstance(v, bool):
                attributes[n] = v is not None
        return {"torch": name, "arguments": self._named(attributes, where)}

    def _remembered(
        self, value: Any, written: dict[str, Any], values: dict[str, Any]
    ) -> dict[str, Any]:
        """`written` with a number; its submodules can be spoken of from here on."""
        number = len(self.kept)
        self.kept.append(value)
        self.known[id(value)] = {"same": number}
        if isinstance(value, nn.Module):
            for path, module in value.named_modules():
                self.known.setdefault(id(module), {"part_of": number, "path": path})
        return {**written, "id": number, **({"values": values} if values else {})}


def _class_name(cls: type, where: str) -> str:
    name = cls.__name__
    for home, names in ((nn, _TORCH), (torch.optim, _OPTIMIZERS)):
        if name in names and getattr(home, name) is cls:
            return name
    if _KNOWN.get(name) is cls:
        return name
    raise InputError(
        f"Model.save: {where} is the class {cls.__module__}.{name}, which is not on the list of"
        " what can be saved; use a class of torch.nn, or decorate yours with"
        " t4r_fast.torch.saveable"
    )


def _config_values(config: transformers.PretrainedConfig) -> dict[str, Any]:
    own = ("_name_or_path", "transformers_version", "auto_map", "architectures")
    return {n: v for n, v in config.to_dict().items() if n not in own}


def describe(model: nn.Module) -> dict[str, Any]:
    """The description of a model, for rebuild(); JSON can hold it.

    Raises InputError, naming the place, when a part of the model is not on the list.
    """
    return _Writer().value(model, type(model).__name__)


# -- from JSON to a model --------------------------------------------------------------------------


class _Reader:
    def __init__(self) -> None:
        self.objects: dict[int, Any] = {}

    def value(self, written: Any) -> Any:
        if isinstance(written, list):
            return [self.value(w) for w in written]
        if not isinstance(written, dict):
            return written
        for kind in ("same", "part_of", "tuple", "dict", "schema", "number", "class"):
            if kind in written:
                return getattr(self, f"_{kind}")(written)
        for kind in ("new", "torch", "config", "transformer"):
            if kind in written:
                made = getattr(self, f"_{kind}")(written)
                self.objects[written["id"]] = made
                return made
        raise InputError(f"load_model: the description holds {sorted(written)}, which is no object")

    def _same(self, written: dict) -> Any:
        return self.objects[written["same"]]

    def _part_of(self, written: dict) -> nn.Module:
        return self.objects[written["part_of"]].get_submodule(written["path"])

    def _tuple(self, written: dict) -> tuple:
        return tuple(self.value(written["tuple"]))

    def _dict(self, written: dict) -> dict[str, Any]:
        return {name: self.value(v) for name, v in written["dict"].items()}

    def _schema(self, written: dict) -> Schema:
        return Schema().from_proto_text(written["schema"])

    def _number(self, written: dict) -> float:
        return float(written["number"])

    def _class(self, written: dict) -> Any:
        name = written["class"]
        if name in _TORCH:
            return getattr(nn, name)
        if name in _OPTIMIZERS:
            return getattr(torch.optim, name)
        return _known(name)

    def _new(self, written: dict) -> Any:
        given = [self.value(w) for w in written.get("given", ())]
        named = {name: self.value(w) for name, w in written["arguments"].items()}
        return _known(written["new"])(*given, **named)

    def _torch(self, written: dict) -> nn.Module:
        name = written["torch"]
        if name == "Sequential":
            return nn.Sequential(*(self.value(w) for w in written["children"]))
        if name not in _TORCH:
            raise InputError(f"load_model: torch.nn.{name} is not on the list of what is built")
        return getattr(nn, name)(**{n: self.value(w) for n, w in written["arguments"].items()})

    def _config(self, written: dict) -> transformers.PretrainedConfig:
        # the names of Transformers4Rec are built on this package, not the other way round
        from t4r_fast.compat.config.transformer import T4RecConfig, transformer_registry

        name, values = written["config"], written["values"]
        for cls in transformer_registry.values():
            if cls.__name__ == name and issubclass(cls, T4RecConfig):
                return cls(**values)
        cls = transformers.CONFIG_MAPPING[values.get("model_type", "")]
        return cls(**values)

    def _transformer(self, written: dict) -> nn.Module:
        return transformers.AutoModel.from_config(self.value(written["transformer"]))


def _known(name: str) -> Callable[..., Any]:
    if name not in _KNOWN:
        raise InputError(
            f"load_model: there is no class {name!r} here; import the module that defines it and"
            " decorates it with t4r_fast.torch.saveable"
        )
    return _KNOWN[name]


def rebuild(description: dict[str, Any]) -> Any:
    """A model of a description, with fresh weights; torch's random state stays as it is.

    Builds nothing but classes on the list. Raises InputError for any other.
    """
    # puts the classes of t4r_fast.torch on the list; they are built on this package
    import t4r_fast.compat.torch  # noqa: F401

    with torch.random.fork_rng(devices=[]):
        return _Reader().value(description)


# -- whether a description says all ----------------------------------------------------------------


def check(model: nn.Module, description: dict[str, Any]) -> None:
    """Raise InputError unless the description builds a model like this one, weights aside."""
    with torch.device("meta"):
        again = rebuild(description)
    told, built = _outline(model), _outline(again)
    for place in sorted({*told, *built}):
        if told.get(place) != built.get(place):
            raise InputError(
                f"Model.save: {place} was changed after the model was built: it is"
                f" {told.get(place)}, and would be {built.get(place)} in the loaded model; give it"
                " as an argument when building, or keep the weights alone:"
                " safetensors.torch.save_model"
            )


# What an evaluation leaves in a masking; no part of how it is built.
_STATE = ("one_target_per_session",)


def _outline(model: nn.Module) -> dict[str, Any]:
    """Weights by shape, modules by kind, and every plain public attribute."""
    found: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        found[name] = (tuple(tensor.shape), str(tensor.dtype))
    for path, module in model.named_modules():
        found[f"{path} (module)"] = f"{type(module).__name__}({module.extra_repr()})"
        for name, value in vars(module).items():
            plain = type(value) in (bool, int, float, str)
            if plain and name not in ("training", *_STATE) and not name.startswith("_"):
                found[f"{path}.{name}".lstrip(".")] = value
    return found

"""Which module of t4r_fast stands behind which import name."""

from __future__ import annotations

import importlib.util

from t4r_fast.moved import home

# Import roots by the distribution that they really come with.
ROOTS = {
    "transformers4rec": ("transformers4rec", "merlin_standard_lib"),
    "nvtabular": ("nvtabular",),
}

# None: a package of the reference with nothing in it but submodules.
MODULES: dict[str, str | None] = {
    "transformers4rec": "t4r_fast.compat.dropin.transformers4rec",
    "transformers4rec.torch": "t4r_fast.compat.torch",
    "transformers4rec.torch.model.model": "t4r_fast.compat.torch.model.base",  # its place in 0.1
    "transformers4rec.torch.utils": None,
    "transformers4rec.torch.utils.data_utils": "t4r_fast.compat.torch.data",
    "transformers4rec.torch.utils.examples_utils": "t4r_fast.compat.dropin.examples",
    "transformers4rec.torch.utils.torch_utils": "t4r_fast.compat.dropin.torch_utils",
    "transformers4rec.torch.utils.padding": "t4r_fast.compat.torch.padding",
    "transformers4rec.torch.utils.schema_utils": "t4r_fast.compat.data.random_data",
    "transformers4rec.config": "t4r_fast.compat.config",
    "transformers4rec.data": "t4r_fast.compat.data",
    "transformers4rec.data.testing.music_streaming": None,
    "transformers4rec.data.testing.music_streaming.dataset": "t4r_fast.compat.data.testing.dataset",
    "transformers4rec.data.testing.tabular_data": None,
    "transformers4rec.data.testing.tabular_data.dataset": "t4r_fast.compat.data.testing.dataset",
    "transformers4rec.utils": None,
    "transformers4rec.utils.data_utils": "t4r_fast.compat.data.preprocessing",
    "transformers4rec.utils.dependencies": "t4r_fast.compat.data.dependencies",
    "merlin_standard_lib": "t4r_fast.compat.dropin.merlin_standard_lib",
    "merlin_standard_lib.schema": "t4r_fast.compat.dropin.merlin_standard_lib.schema",
    "merlin_standard_lib.schema.schema": "t4r_fast.schema",
    "merlin_standard_lib.schema.tag": "t4r_fast.schema",
    "merlin_standard_lib.utils": None,
    "merlin_standard_lib.utils.embedding_utils": "t4r_fast.schema",
    "nvtabular": "t4r_fast.compat.dropin.nvtabular",
}

# Below these every module of ours has its name of the reference.
SUBTREES = {
    "transformers4rec.torch.": "t4r_fast.torch.",
    "transformers4rec.config.": "t4r_fast.compat.config.",
    "nvtabular.": "t4r_fast.compat.dropin.nvtabular.",
    "transformers4rec.data.": "t4r_fast.compat.data.",
}


def target(name: str) -> str | None:
    """The module of t4r_fast behind an import name.

    Raises KeyError for a name that has none.
    """
    if name in MODULES:
        return MODULES[name]
    for theirs, ours in SUBTREES.items():
        if name.startswith(theirs):
            found = home(ours + name.removeprefix(theirs))
            if _exists(found):
                return found
    raise KeyError(name)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        return False

"""The import names of Transformers4Rec: the modules of t4r_fast themselves, and who wins."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
import textwrap
import types
import warnings

import pytest

import t4r_fast.config.trainer
import t4r_fast.config.transformer
import t4r_fast.schema
import t4r_fast.torch
import t4r_fast.torch.block.base
import t4r_fast.torch.experimental
import t4r_fast.torch.model.base
from t4r_fast.compat import CompatWarning, forget_warnings, set_compat
from t4r_fast.dropin import answered, examples, install, uninstall
from t4r_fast.errors import InputError

ROOTS = ("transformers4rec", "merlin_standard_lib")


@pytest.fixture(autouse=True)
def names():
    """Each test finds the names answered, as the import of t4r_fast.dropin leaves them."""
    forget_warnings()
    install(replace=False)
    yield
    uninstall()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("transformers4rec.torch", t4r_fast.torch),
        ("transformers4rec.torch.ranking_metric", t4r_fast.torch.ranking_metric),
        ("transformers4rec.torch.masking", t4r_fast.torch.masking),
        ("transformers4rec.torch.block.base", t4r_fast.torch.block.base),
        ("transformers4rec.torch.model.base", t4r_fast.torch.model.base),
        ("transformers4rec.torch.model.model", t4r_fast.torch.model.base),
        ("transformers4rec.torch.experimental", t4r_fast.torch.experimental),
        ("transformers4rec.torch.utils.data_utils", t4r_fast.torch.data),
        ("transformers4rec.torch.utils.examples_utils", examples),
        ("transformers4rec.config", t4r_fast.config),
        ("transformers4rec.config.trainer", t4r_fast.config.trainer),
        ("transformers4rec.config.transformer", t4r_fast.config.transformer),
        ("transformers4rec.config.schema", t4r_fast.config.schema),
        ("merlin_standard_lib.schema.schema", t4r_fast.schema),
        ("merlin_standard_lib.schema.tag", t4r_fast.schema),
    ],
)
def test_a_module_is_ours_and_stays_whole(theirs, ours):
    spec, path = ours.__spec__, getattr(ours, "__path__", None)
    assert importlib.import_module(theirs) is ours
    assert ours.__spec__ is spec
    assert getattr(ours, "__path__", None) is path
    assert ours.__name__ == spec.name


def test_the_imports_of_the_examples_work():
    code = """
        import transformers4rec.torch as tr
        import transformers4rec
        from transformers4rec import torch as also_tr
        from transformers4rec.torch import masking, ranking_metric
        from transformers4rec.torch.ranking_metric import NDCGAt, AvgPrecisionAt, RecallAt
        from transformers4rec.config.trainer import T4RecTrainingArguments
        from transformers4rec.torch import Trainer
        from transformers4rec.torch.utils.examples_utils import fit_and_evaluate, wipe_memory
        from transformers4rec.torch.utils.data_utils import MerlinDataLoader
        from transformers4rec.torch.utils.schema_utils import random_data_from_schema
        from transformers4rec.torch.utils.padding import pad_inputs
        from transformers4rec.data import tabular_sequence_testing_data
        from transformers4rec.data.synthetic import generate_session_interactions
        from transformers4rec.data.dataset import ParquetDataset
        from transformers4rec.data.testing.dataset import tabular_sequence_testing_data as again
        from transformers4rec.data.testing.tabular_data.dataset import tabular_testing_data
        from transformers4rec.data.testing.music_streaming.dataset import (
            music_streaming_testing_data,
        )
        from transformers4rec.data.yoochoose import process_clicks
        from transformers4rec.utils.dependencies import is_merlin_dataloader_available
        from transformers4rec.utils.data_utils import save_time_based_splits
        from merlin_standard_lib import Schema, Tag
        import merlin_standard_lib as msl
    """
    found: dict[str, object] = {}
    exec(textwrap.dedent(code), found)
    assert found["tr"] is found["also_tr"] is t4r_fast.torch
    assert found["transformers4rec"].torch is t4r_fast.torch
    assert found["NDCGAt"] is t4r_fast.torch.ranking_metric.NDCGAt
    assert found["Schema"] is t4r_fast.schema.Schema
    assert found["again"] is found["tabular_sequence_testing_data"]
    assert found["tabular_testing_data"] is t4r_fast.data.tabular_testing_data
    column = found["msl"].ColumnSchema.create_categorical(
        "item", 3, value_count=found["msl"].schema.ValueCount(1, 20), tags=[found["Tag"].ITEM_ID]
    )
    assert isinstance(column, t4r_fast.schema.ColumnSchema)


@pytest.mark.parametrize("first", ["config.transformer", "config.trainer", "torch.data", "torch"])
def test_any_module_may_be_imported_first(first):
    code = f"import t4r_fast.dropin, transformers4rec.{first} as m; print(m.__name__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"t4r_fast.compat.{first}"


def test_pickles_of_the_other_name_load_as_ours():
    pickled = b"ctransformers4rec.torch.ranking_metric\nNDCGAt\n."
    assert pickle.loads(pickled) is t4r_fast.torch.ranking_metric.NDCGAt


def test_the_version_follows_the_level():
    import transformers4rec

    try:
        set_compat("0.1")
        assert transformers4rec.__version__.startswith("0.1.0+t4r.fast.")
        set_compat("23.12")
        assert transformers4rec.__version__.startswith("23.12.0+t4r.fast.")
    finally:
        t4r_fast.compat._level = None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        transformers4rec.nothing  # noqa: B018


@pytest.mark.parametrize(
    "name", ["transformers4rec.tf", "transformers4rec.torch.no.such", "merlin_standard_lib.proto"]
)
def test_a_module_that_is_not_there_is_named(name):
    with pytest.raises(ModuleNotFoundError, match=r"dropin has no module .*compatibility\.md"):
        importlib.import_module(name)


def test_uninstall_takes_the_names_back():
    importlib.import_module("transformers4rec.torch")
    uninstall()
    assert answered() == ()
    assert not [name for name in sys.modules if name.partition(".")[0] in ROOTS]
    with pytest.raises(ModuleNotFoundError, match="No module named 'transformers4rec'"):
        importlib.import_module("transformers4rec")
    uninstall()
    assert set(ROOTS) <= set(install())


# -- where the real package is installed ----------------------------------------------------------


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A package of the name `transformers4rec` that Python finds."""
    uninstall()
    (tmp_path / "transformers4rec").mkdir()
    (tmp_path / "transformers4rec" / "__init__.py").write_text("real = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    uninstall()
    sys.modules.pop("transformers4rec", None)


def test_the_real_package_wins_and_the_warning_names_the_option(real):
    with pytest.warns(CompatWarning, match=r"install\(replace=True\), or T4R_FAST_DROPIN=replace"):
        roots = install()
    assert not set(ROOTS) & set(roots)
    assert importlib.import_module("transformers4rec").real
    with pytest.raises(RuntimeError, match="transformers4rec is already imported"):
        install(replace=True)


@pytest.mark.parametrize("by", ["argument", "environment"])
@pytest.mark.filterwarnings("error")
def test_it_is_replaced_on_request(real, monkeypatch, by):
    if by == "environment":
        monkeypatch.setenv("T4R_FAST_DROPIN", "replace")
    install(replace=True if by == "argument" else None)
    assert importlib.import_module("transformers4rec.torch") is t4r_fast.torch


@pytest.mark.parametrize(
    ("value", "replace", "roots"),
    [
        ("", False, ()),
        ("replace", True, ROOTS),
        ("replace-all", "all", (*ROOTS, "nvtabular")),
    ],
)
def test_nvtabular_is_replaced_only_by_all(real, tmp_path, monkeypatch, value, replace, roots):
    (tmp_path / "nvtabular.py").write_text("real = True\n")
    monkeypatch.setenv("T4R_FAST_DROPIN", value)
    assert install() == install(replace) == roots
    if "nvtabular" in roots:
        assert importlib.import_module("nvtabular").Dataset.__module__.startswith("t4r_fast.")
        return
    try:
        assert importlib.import_module("nvtabular").real
    finally:
        del sys.modules["nvtabular"]
    forget_warnings()
    with pytest.warns(CompatWarning, match=r"nvtabular is .*\(replace='all'\), or .*=replace-all"):
        install(replace)


def test_what_asks_for_replacing_takes_few_words(monkeypatch):
    with pytest.raises(InputError, match="replace must be True, False or 'all'; got 'nvtabular'"):
        install(replace="nvtabular")
    monkeypatch.setenv("T4R_FAST_DROPIN", "yes")
    with pytest.raises(InputError, match="must be 'replace' or 'replace-all', or not set; got"):
        install()


# -- examples_utils --------------------------------------------------------------------------------


class _Days:
    """Takes the calls of a Trainer down."""

    def __init__(self):
        self.calls = []

    def __setattr__(self, name, value):
        if name != "calls":
            self.calls.append((name, value))
        super().__setattr__(name, value)

    def reset_lr_scheduler(self):
        self.calls.append("reset_lr_scheduler")

    def train(self):
        self.calls.append("train")

    def evaluate(self, metric_key_prefix):
        self.calls.append(f"evaluate {metric_key_prefix}")
        return {"eval/loss": 1.0, "eval/next-item/ndcg_at_10": len(self.calls) / 100}


def test_fit_and_evaluate_goes_from_window_to_window(tmp_path, capsys):
    for window in (1, 2, 3):
        (tmp_path / str(window)).mkdir()
        for part in ("train", "valid"):
            (tmp_path / str(window) / f"{part}.parquet").touch()
    trainer = _Days()
    found = examples.fit_and_evaluate(trainer, 1, 2, tmp_path)
    one = ["reset_lr_scheduler", "train", "evaluate eval"]
    files = {
        n: [str(tmp_path / str(n) / f"{p}.parquet") for p in ("train", "valid")] for n in (1, 2, 3)
    }
    assert trainer.calls == [
        ("train_dataset_or_path", files[1][:1]), ("eval_dataset_or_path", files[2][1:]), *one,
        ("train_dataset_or_path", files[2][:1]), ("eval_dataset_or_path", files[3][1:]), *one,
    ]  # fmt: skip
    assert found == {"indexed_by_time_eval/next-item/ndcg@10": [0.05, 0.1]}
    assert " eval/next-item/ndcg@10 = 0.1\n" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"there is no .*4/valid.parquet; check the range"):
        examples.fit_and_evaluate(trainer, 3, 3, tmp_path)


def test_the_printing_examples(tmp_path, capsys):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.txt").touch()
    (tmp_path / "a" / "y.txt").touch()
    examples.list_files(tmp_path / "a")
    assert capsys.readouterr().out == "a/\n    y.txt\n    b/\n        x.txt\n"

    import numpy as np
    import polars as pl

    batch = pl.DataFrame({"session_id": [7, 7, 5]})
    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.2, 0.7]])
    response = types.SimpleNamespace(as_numpy={"output": scores}.get)
    examples.visualize_response(batch, response, 2)
    assert capsys.readouterr().out == (
        "- Top-2 predictions for session `7`: 1 || 2\n\n"
        "- Top-2 predictions for session `5`: 2 || 0\n\n"
    )


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "transformers4rec").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "transformers4rec" in install()

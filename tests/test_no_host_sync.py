"""A train step of the tutorial's models, by the Trainer as it is by default, waits for no device.

What a mode sees on a CPU is what a GPU would be given: the layer takes the same way on both. Only
checks of values branch on the device, below.
"""

import pytest
import torch
from session_files import session_schema, walks, write_windows
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from t4r_fast.config.trainer import T4RecTrainingArguments
from t4r_fast.ops._check import check_last_offset, check_target_values
from t4r_fast.ops._sequence_mask import check_packed, check_padding
from t4r_fast.torch.trainer import Trainer
from t4r_fast.tutorial import models

# These give the host a value, or a shape that depends on one; lift_fresh makes a tensor of numbers
# that the host has, a copy to the device.
WAITS = {
    "_local_scalar_dense",
    "item",
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique2",
    "lift_fresh",
}


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch):
    """Shapes of packed sessions depend on no value, as on a GPU and under torch.compile."""
    monkeypatch.setattr("t4r_fast.model.sessions.fixed_capacity", lambda _: True)


class Waits(TorchDispatchMode):
    """Counts all calls, and names those that make the host wait for the device or copy to it."""

    def __init__(self):
        super().__init__()
        self.calls, self.found = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.calls += 1
        copies = name == "_to_copy" and kwargs.get("device") is not None
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in WAITS or copies or by_mask:
            self.found.add(name)
        return func(*args, **kwargs)


class DuringSteps(TrainerCallback):
    """The watch is on from the beginning of the third step to the end of the fourth."""

    def __init__(self):
        self.watch = Waits()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.watch.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.watch.__exit__(None, None, None)


def train(folder, kind, callback, **arguments):
    data = write_windows(folder, {1: {"train": walks(0, 80, 60)}}, 60, side=True)
    schema = session_schema(60, side=True)
    arguments = T4RecTrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=16,
        num_train_epochs=1,
        max_sequence_length=20,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    assert arguments.max_grad_norm == 1.0
    Trainer(
        models.build(kind, schema),
        arguments,
        schema=schema.select_by_name(models.feature_columns(kind, schema)),
        train_dataset_or_path=str(data / "sessions_by_day/1/train.parquet"),
        callbacks=[callback],
    ).train()


@pytest.mark.parametrize("kind", models.KINDS)
def test_a_train_step_waits_for_nothing(kind, tmp_path):
    """Two whole steps: forward, backward, clipping, optimizer, schedule, the batch from the loader
    on the host included."""
    during = DuringSteps()
    train(tmp_path, kind, during)
    assert during.watch.calls > 300
    assert not during.watch.found


def test_what_the_watch_would_find(tmp_path):
    during = DuringSteps()
    train(tmp_path, "gru", during, logging_nan_inf_filter=True)
    assert during.watch.found == {"_local_scalar_dense"}
    mask, watch = torch.tensor([True, False]), Waits()
    with watch:
        mask[mask].cumsum(0)
        mask.to("meta")
        torch.tensor([3])
    assert watch.found == {"index", "_to_copy", "lift_fresh"}


def test_checks_of_values_do_not_wait_for_a_device():
    """On any device but the CPU they are assertions of the device, whatever the values."""
    hidden, items = torch.empty(3, 4, device="meta"), torch.empty(9, 4, device="meta")
    target = torch.empty(3, dtype=torch.int64, device="meta")
    with Waits() as watch:
        check_target_values("op", hidden, items, target, target, -100)
        check_padding("op", target[None], 0)
        check_packed("op", target, target, 0)
        check_last_offset("op", target, 3)
    assert watch.calls
    assert not watch.found

"""Training arguments: defaults by compat level, names of old, refusals."""

from __future__ import annotations

import pytest

import t4r_fast
from t4r_fast.compat import CompatWarning, forget_warnings
from t4r_fast.config.trainer import T4RecTrainingArguments
from t4r_fast.errors import InputError


@pytest.fixture(autouse=True)
def _level():
    yield
    t4r_fast.set_compat("23.12")
    forget_warnings()


def arguments(**options):
    return T4RecTrainingArguments(output_dir="out", **{"use_cpu": True, **options})


@pytest.mark.parametrize(
    ("level", "engine", "top_k"), [("0.1", "nvtabular", 10), ("23.12", "merlin", 100)]
)
def test_defaults_follow_the_level(level, engine, top_k):
    t4r_fast.set_compat(level)
    args = arguments()
    assert (args.data_loader_engine, args.predict_top_k) == (engine, top_k)
    assert (args.max_sequence_length, args.shuffle_buffer_size) == (None, 0)
    assert (args.eval_steps_on_train_set, args.compute_metrics_each_n_steps) == (20, 1)
    assert args.learning_rate_num_cosine_cycles_by_epoch == 1.25
    assert args.log_predictions is args.eval_on_test_set is False
    assert args.experiments_group == "default"


def test_the_arguments_of_the_tutorial_are_taken_without_a_warning(recwarn):
    args = T4RecTrainingArguments(
        local_rank=-1,
        dataloader_drop_last=False,
        report_to=[],
        gradient_accumulation_steps=1,
        per_device_train_batch_size=256,
        per_device_eval_batch_size=32,
        output_dir="./tmp",
        max_sequence_length=20,
        learning_rate=0.00071,
        num_train_epochs=3,
        logging_steps=200,
    )
    assert args.report_to == []
    assert (args.train_batch_size, args.eval_batch_size) == (256, 32)
    assert not [w for w in recwarn if issubclass(w.category, CompatWarning)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"no_cuda": True}, {"use_cpu": True}),
        ({"evaluation_strategy": "epoch"}, {"eval_strategy": "epoch"}),
        ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"per_gpu_eval_batch_size": 3}, {"per_device_eval_batch_size": 3}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}),
        ({"push_to_hub_model_id": "m"}, {"hub_model_id": "m"}),
    ],
)
@pytest.mark.filterwarnings("ignore::t4r_fast.compat.CompatWarning")
def test_old_names_are_mapped(old, new):
    args = T4RecTrainingArguments(output_dir="out", **old)
    for name, value in new.items():
        assert getattr(args, name) == value


def test_warmup_ratio_is_a_share_of_the_steps_unless_steps_are_given():
    assert arguments(warmup_ratio=0.1).get_warmup_steps(50) == 5
    assert arguments(warmup_ratio=0.1, warmup_steps=7).get_warmup_steps(50) == 7
    assert arguments(warmup_ratio=1).get_warmup_steps(50) == 50
    with pytest.raises(InputError, match="warmup_ratio must be between 0 and 1"):
        arguments(warmup_ratio=2)


@pytest.mark.parametrize(
    "gone",
    [
        {"overwrite_output_dir": True},
        {"logging_dir": "logs"},
        {"save_safetensors": False},
        {"group_by_length": True},
        {"fp16_backend": "apex"},
        {"eval_on_test_set": True},
        {"experiments_group": "mine"},
    ],
)
def test_names_without_a_successor_warn_once(gone, recwarn):
    name = next(iter(gone))
    with pytest.warns(CompatWarning, match=f"{name}.* has no effect"):
        arguments(**gone)
    recwarn.clear()
    arguments(**gone)
    assert not [w for w in recwarn if issubclass(w.category, CompatWarning)]


def test_unknown_names_and_contradictions_are_refused():
    with pytest.raises(TypeError, match="learning_rat"):
        arguments(learning_rat=1)
    with pytest.raises(InputError, match="evaluation_strategy is the old name of eval_strategy"):
        arguments(evaluation_strategy="epoch", eval_strategy="steps")
    for name, value in (("predict_top_k", -1), ("compute_metrics_each_n_steps", 0)):
        with pytest.raises(InputError, match=f"{name} must be >="):
            arguments(**{name: value})
    with pytest.raises(InputError, match="max_sequence_length must be >= 1"):
        arguments(max_sequence_length=0)

"""Training arguments: those of today's transformers, the reference's own, and the names of old."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from transformers import TrainingArguments

from t4r_fast.compat import get_compat, warn_once
from t4r_fast.errors import InputError

# Names of transformers 4 that live on under another one.
_RENAMED = {
    "no_cuda": "use_cpu",
    "evaluation_strategy": "eval_strategy",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "torchdynamo": "torch_compile_backend",
}

# Names of transformers 4 without a successor, with the value that asks for nothing.
_GONE: dict[str, Any] = {
    "local_rank": -1,
    "overwrite_output_dir": False,
    "logging_dir": None,
    "save_safetensors": True,
    "group_by_length": False,
    "fp16_backend": "auto",
    "half_precision_backend": "auto",
    "fp16_opt_level": "O1",
    "past_index": -1,
    "include_inputs_for_metrics": False,
    "jit_mode_eval": False,
    "use_ipex": False,
    "use_mps_device": False,
    "use_legacy_prediction_loop": False,
    "mp_parameters": "",
    "ray_scope": "last",
    "sharded_ddp": "",
    "fsdp_min_num_params": 0,
    "fsdp_transformer_layer_cls_to_wrap": None,
    "push_to_hub_organization": None,
    "tpu_metrics_debug": False,
    "tpu_num_cores": None,
    "xpu_backend": None,
}

# Fields of the reference that it never reads.
_UNREAD = {"eval_on_test_set": False, "experiments_group": "default"}

# The rules of t4r_fast.optim for the item table.
_TABLE_RULES = ("sgd", "adagrad", "adamw", "rowwise_adagrad", "rowwise_adamw")


@dataclasses.dataclass
class _Fields(TrainingArguments):
    max_sequence_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Width of every batch; longer sessions are cut to it."}
    )
    shuffle_buffer_size: int = dataclasses.field(
        default=0,
        metadata={
            "help": "Sessions mixed at a time where the data do not fit in memory; 0: what fits."
        },
    )
    data_loader_engine: str | None = dataclasses.field(
        default=None,
        metadata={"help": "'parquet', a name of the reference's engines, or a registered one."},
    )
    eval_on_test_set: bool = dataclasses.field(
        default=False, metadata={"help": "No effect, as in the reference."}
    )
    eval_steps_on_train_set: int = dataclasses.field(
        default=20,
        metadata={"help": "Batches of evaluate(metric_key_prefix='train'); 0: all of them."},
    )
    predict_top_k: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Best items that predict() keeps per session; 0: the scores of all."},
    )
    learning_rate_num_cosine_cycles_by_epoch: float = dataclasses.field(
        default=1.25, metadata={"help": "Waves of a cosine schedule per epoch."}
    )
    log_predictions: bool = dataclasses.field(
        default=False,
        metadata={"help": "Give the best items of each batch to trainer.log_predictions_callback."},
    )
    compute_metrics_each_n_steps: int = dataclasses.field(
        default=1, metadata={"help": "Count every n-th evaluation batch into the metrics."}
    )
    table_optimizer: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Step the item table without forming its gradient: sgd, adagrad, adamw,"
            " rowwise_adagrad or rowwise_adamw."
        },
    )
    logging_nan_inf_filter: bool = dataclasses.field(
        default=False,
        metadata={
            "help": "Leave nan and infinite losses out of the logged mean. transformers then reads"
            " the loss on the host after every step, which makes a GPU wait: off by default here."
        },
    )
    experiments_group: str = dataclasses.field(
        default="default", metadata={"help": "No effect, as in the reference."}
    )


class T4RecTrainingArguments(_Fields):
    """transformers.TrainingArguments with the reference's fields; names of transformers 4 are read.

    max_sequence_length       width of every batch; None: the longest session of the batch
    shuffle_buffer_size       sessions mixed at a time where data do not fit in memory; 0: what fits
    data_loader_engine        "parquet" reads every column of the schema; "merlin", "nvtabular" and
                              "pyarrow" are the same loader over the columns that the reference's
                              read; or a name in dataloader_registry. Default "merlin", at compat
                              0.1 "nvtabular"
    eval_steps_on_train_set   batches of evaluate(metric_key_prefix="train"); 0: all
    predict_top_k             best items that predict() keeps; 0: all scores. Default 100, at
                              compat 0.1 10
    learning_rate_num_cosine_cycles_by_epoch   waves of a cosine schedule per epoch
    log_predictions           call trainer.log_predictions_callback on evaluation batches
    compute_metrics_each_n_steps   count every n-th evaluation batch into the metrics
    table_optimizer           step the item table without forming its gradient, by "adamw", "sgd",
                              "adagrad", "rowwise_adamw" or "rowwise_adagrad", and the rest by
                              AdamW: t4r_fast.optim.for_model. None: `optim` steps all
    logging_nan_inf_filter    leave nan and infinite losses out of the logged mean; off by default,
                              unlike in transformers: it makes the host wait for every step's loss
    eval_on_test_set, experiments_group        no effect, as in the reference

    Old names with a successor are mapped (no_cuda, evaluation_strategy, per_gpu_*_batch_size,
    adafactor, warmup_ratio, optim="adamw_hf", ...); those without one are accepted, with a warning
    where they ask for something. warmup_ratio is honoured; the reference ignored it. Unknown names
    raise TypeError. Replaces transformers4rec.config.trainer.T4RecTrainingArguments.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **_today(options))

    def __post_init__(self) -> None:
        old = get_compat() == "0.1"
        if self.data_loader_engine is None:
            self.data_loader_engine = "nvtabular" if old else "merlin"
        if self.predict_top_k is None:
            self.predict_top_k = 10 if old else 100
        for name, least in (
            ("shuffle_buffer_size", 0),
            ("eval_steps_on_train_set", 0),
            ("predict_top_k", 0),
            ("compute_metrics_each_n_steps", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(
                    f"T4RecTrainingArguments: {name} must be >= {least}; got {getattr(self, name)}"
                )
        if self.max_sequence_length is not None and self.max_sequence_length < 1:
            raise InputError(
                "T4RecTrainingArguments: max_sequence_length must be >= 1 or None; got"
                f" {self.max_sequence_length}"
            )
        if self.table_optimizer not in (None, *_TABLE_RULES):
            raise InputError(
                f"T4RecTrainingArguments: table_optimizer must be one of {', '.join(_TABLE_RULES)},"
                f" or None; got {self.table_optimizer!r}"
            )
        for name, nothing in _UNREAD.items():
            if getattr(self, name) != nothing:
                warn_once(f"T4RecTrainingArguments {name}", f"{name} has no effect")
        super().__post_init__()


def _today(options: dict[str, Any]) -> dict[str, Any]:
    """The options under today's names."""
    options = dict(options)
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
    for old, new in _RENAMED.items():
        if old in options and old not in known:
            _set(options, old, new, options.pop(old))
    if "adafactor" in options and "adafactor" not in known and options.pop("adafactor"):
        _set(options, "adafactor", "optim", "adafactor")
    if "warmup_ratio" in options and "warmup_ratio" not in known:
        ratio = options.pop("warmup_ratio")
        if not 0 <= ratio <= 1:
            raise InputError(
                f"T4RecTrainingArguments: warmup_ratio must be between 0 and 1; got {ratio}"
            )
        # warmup_steps below 1 is a ratio; in transformers 4 a number of steps won over the ratio
        if not options.get("warmup_steps"):
            options["warmup_steps"] = min(ratio, math.nextafter(1.0, 0.0))
    if options.get("optim") == "adamw_hf":
        options["optim"] = "adamw_torch"
        warn_once("T4RecTrainingArguments optim", "optim='adamw_hf' is gone; taking adamw_torch")
    for name in sorted(set(_GONE) & set(options) - known):
        value = options.pop(name)
        if value != _GONE[name]:
            warn_once(f"T4RecTrainingArguments {name}", f"{name}={value!r} has no effect any more")
    return options


def _set(options: dict[str, Any], old: str, new: str, value: Any) -> None:
    if value is None:
        return
    if new in options and options[new] != value:
        raise InputError(
            f"T4RecTrainingArguments: {old} is the old name of {new}; give one of them, not both"
        )
    options[new] = value


# -- what the Trainer can keep ---------------------------------------------------------------------

# Training arguments of transformers that would change results and cannot be kept here, with the
# way to go instead.
_REFUSED = {
    "label_smoothing_factor": "give the prediction task loss=CrossEntropyLoss(label_smoothing=...)",
    "fp16_full_eval": "use bf16=True or fp16=True, which evaluate in mixed precision",
    "bf16_full_eval": "use bf16=True or fp16=True, which evaluate in mixed precision",
    "deepspeed": "start one process per GPU with torchrun",
    "fsdp": "start one process per GPU with torchrun",
    "push_to_hub": "upload the checkpoint folder yourself",
    "use_liger_kernel": "leave it out: the model calls fused ops of its own",
    "neftune_noise_alpha": "leave it out: it is for language models",
    "activation_checkpointing": "lower per_device_train_batch_size and accumulate gradients",
}

# Arguments that steer data loading or evaluation of transformers, which are not used here.
_WITHOUT_EFFECT = {
    "dataloader_num_workers": "the loader reads ahead in one thread",
    "dataloader_persistent_workers": "the loader reads ahead in one thread",
    "eval_accumulation_steps": "evaluation keeps no scores",
    "batch_eval_metrics": "metrics are always counted batch by batch",
    "include_for_metrics": "metrics see the ranks of the targets",
    "label_names": "the model knows its targets",
}


def check_arguments(args: Any) -> None:
    """Refuse what the Trainer cannot do, warn once about what it does not need."""
    if not isinstance(args, T4RecTrainingArguments):
        raise TypeError(
            f"Trainer: args must be T4RecTrainingArguments; got {type(args).__name__}. Both take"
            " the same arguments"
        )
    for name, instead in _REFUSED.items():
        if getattr(args, name, None) not in (None, False, 0, 0.0, "", [], {}):
            raise InputError(f"Trainer: {name} is not supported; {instead}")
    for name, why in _WITHOUT_EFFECT.items():
        if getattr(args, name, None) not in (None, False, 0, []):
            warn_once(f"Trainer {name}", f"{name} has no effect: {why}")
    if args.table_optimizer is not None:
        if args.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise InputError(
                f"Trainer: optim={args.optim.value!r} does not go with table_optimizer, which steps"
                " all other parameters by AdamW; leave one of them out"
            )
        if args.fp16:
            raise InputError(
                "Trainer: fp16 does not go with table_optimizer, whose gradient no scaler can look"
                " through; use bf16=True"
            )
    if args.train_sampling_strategy not in ("random", "sequential"):
        warn_once(
            "Trainer train_sampling_strategy",
            f"train_sampling_strategy={args.train_sampling_strategy!r} has no effect: sessions are"
            " shuffled; 'sequential' keeps their order",
        )
    if args.world_size > 1 and args.table_optimizer is not None:
        raise InputError(
            f"Trainer: table_optimizer={args.table_optimizer!r} works in one process, and"
            f" {args.world_size} were started: it forms no gradient that processes could exchange."
            " Leave it out, or start without torchrun"
        )
    if args.n_gpu > 1:
        warn_once(
            "Trainer n_gpu",
            f"one of {args.n_gpu} GPUs is used; choose it with CUDA_VISIBLE_DEVICES, or start a"
            f" process for each with torchrun --nproc-per-node {args.n_gpu}",
        )
        args._n_gpu = 1

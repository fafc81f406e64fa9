"""The Trainer: the training loop of transformers around session models and parquet files.

Evaluation streams: it keeps a loss sum and the metrics' counters, never the scores of a batch.
"""

from __future__ import annotations

import gc
import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_utils import (
    EvalLoopOutput,
    PredictionOutput,
    SchedulerType,
    get_last_checkpoint,
    has_length,
)

from t4r_fast.compat import get_compat, warn_once
from t4r_fast.compat.config.trainer import T4RecTrainingArguments, check_arguments
from t4r_fast.compat.torch.data import ParquetDataLoader, T4RecDataLoader
from t4r_fast.compat.torch.model.fitting import inputs_and_targets
from t4r_fast.compat.torch.model.prediction_task import Asked
from t4r_fast.compat.torch.padding import check_padding, model_padding
from t4r_fast.errors import InputError
from t4r_fast.schema import Schema
from t4r_fast.train import distributed
from t4r_fast.train.checkpoint import Checkpoints, _complete
from t4r_fast.train.evaluation import (
    KeptPredictions,
    KeptRecommendations,
    LossSum,
    target_rows,
)
from t4r_fast.train.given import GivenLoader, resumable
from t4r_fast.train.notebook import show_metrics
from t4r_fast.train.optim import ModelOptimizer, for_model

LOG = logging.getLogger("t4r_fast")


class Trainer(Checkpoints, transformers.Trainer):
    """Trains, evaluates and predicts with a session model.

    model                     t4r_fast.torch.Model, or a module that takes and gives the same
    args                      T4RecTrainingArguments
    schema                    columns to read from parquet files
    *_dataset_or_path         parquet file, pattern, folder, list of these, or a table
    *_dataloader              an iterable of (inputs, targets) or of inputs, with `_batch_size`, in
                              place of the files
    callbacks                 as in transformers
    compute_metrics           True: evaluate() gives the ranking metrics; else the loss alone
    incremental_logging       count logged steps on over several train() calls
    further options           those of transformers.Trainer; `tokenizer` is read as processing_class

    All data attributes can be set between calls, as in `trainer.train_dataset_or_path = paths`.
    Each train() keeps the optimizer's moments and starts a new learning rate schedule.

    evaluate() gives floats under `eval/loss` and `eval/next-item/ndcg_at_10` at compat 0.1, and
    under `eval_/...` at 23.12, beside eval_runtime, eval_samples_per_second, eval_steps_per_second.
    The loss is the mean over target rows; the reference weighs the last, smaller batch like a full
    one. predict() gives (ids, scores) of the predict_top_k best items for each session's last item,
    with its labels.

    Under torchrun there is one process per device. Each takes its part of every training step's
    sessions, and evaluate() and predict() give in every process what one alone would give.
    Replaces transformers4rec.torch.Trainer.
    """

    #: Called on each evaluation batch where args.log_predictions is on, with labels,
    #: pred_item_ids, pred_item_scores, metrics and dataset_type.
    log_predictions_callback: Callable[..., None] | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: T4RecTrainingArguments | None = None,
        schema: Schema | None = None,
        train_dataset_or_path: Any = None,
        eval_dataset_or_path: Any = None,
        test_dataset_or_path: Any = None,
        train_dataloader: Any = None,
        eval_dataloader: Any = None,
        test_dataloader: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        compute_metrics: bool | None = None,
        incremental_logging: bool = False,
        **options: Any,
    ) -> None:
        if compute_metrics not in (None, True, False):
            raise TypeError(
                "Trainer: compute_metrics must be True, False or None; give functions of your own"
                f" as metrics of the prediction task. Got {compute_metrics!r}"
            )
        for name in ("data_collator", "compute_loss_func", "preprocess_logits_for_metrics"):
            if options.pop(name, None) is not None:
                raise TypeError(f"Trainer: {name} is not supported: batches come from the loader")
        if "tokenizer" in options:
            options.setdefault("processing_class", options.pop("tokenizer"))
        args = T4RecTrainingArguments(output_dir="tmp_trainer") if args is None else args
        check_arguments(args)
        self.schema = schema
        self.train_dataloader = train_dataloader
        self.eval_dataloader = eval_dataloader
        self.test_dataloader = test_dataloader
        self.test_dataset_or_path = test_dataset_or_path
        self.incremental_logging = incremental_logging
        self._asked: Asked | None = None  # of predict()
        self.train_dataset_or_path = options.pop("train_dataset", train_dataset_or_path)
        self.eval_dataset_or_path = options.pop("eval_dataset", eval_dataset_or_path)
        counting = [IncrementalLoggingCallback(self)] if incremental_logging else []
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.train_dataset_or_path,
            eval_dataset=self.eval_dataset_or_path,
            callbacks=[_Bookkeeping(self), *counting, *(callbacks or [])],
            **options,
        )
        # transformers asks of its compute_metrics to be a function
        self.compute_metrics = compute_metrics
        self.model_accepts_loss_kwargs = False
        show_metrics(self)

    # The names under which transformers looks for data; a loader wins over files.

    @property
    def train_dataset(self) -> Any:
        return self.train_dataset_or_path

    @train_dataset.setter
    def train_dataset(self, data: Any) -> None:
        self.train_dataset_or_path = data

    @property
    def eval_dataset(self) -> Any:
        return self.eval_dataset_or_path if self.eval_dataloader is None else self.eval_dataloader

    @eval_dataset.setter
    def eval_dataset(self, data: Any) -> None:
        if data is not self.eval_dataloader:
            self.eval_dataset_or_path = data

    # -- data ------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """The loader set as train_dataloader, else one over the training files, shuffled."""
        if self.train_dataloader is not None:
            check_padding(self.model, self.train_dataloader, "Trainer")
            if self.args.world_size > 1:
                return distributed.own_part(self.train_dataloader, self.args.device)
            return resumable(self.train_dataloader)
        shuffle = self.args.train_sampling_strategy != "sequential"
        data = self.train_dataset_or_path
        return resumable(self._loader(data, "train", self._train_batch_size, shuffle))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """A loader over `eval_dataset`, else the one set, else one over the evaluation files.

        `eval_dataset` may be a key of eval_dataset_or_path where that is a dict.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        files = self.eval_dataset_or_path
        if isinstance(files, dict) and isinstance(eval_dataset, str) and eval_dataset in files:
            data = files[eval_dataset]
        return self._loader(data, "eval", self.args.eval_batch_size, False)

    def get_test_dataloader(self, test_dataset: Any = None) -> Any:
        """A loader over `test_dataset`, else the one set, else one over the test files."""
        data = test_dataset
        if data is None:
            data = self.test_dataloader
        if data is None:
            data = self.test_dataset_or_path
        return self._loader(data, "test", self.args.eval_batch_size, False)

    def _loader(self, data: Any, kind: str, batch_size: int, shuffle: bool) -> Any:
        if data is None:
            raise InputError(
                f"Trainer: there are no {kind} data; set trainer.{kind}_dataset_or_path to parquet"
                f" files, or trainer.{kind}_dataloader"
            )
        if (
            isinstance(data, DataLoader)
            or hasattr(data, "_batch_size")
            or hasattr(data, "batch_size")
        ):
            check_padding(self.model, data, "Trainer")
            return data
        if self.schema is None:
            raise InputError("Trainer: give a schema; it says which columns to read from the files")
        args, engine = self.args, T4RecDataLoader.parse(self.args.data_loader_engine)
        shared_out = kind == "train" and args.world_size > 1
        options: dict[str, Any] = {}
        if shared_out:
            options = {"global_size": args.world_size, "global_rank": args.process_index}
        if isinstance(engine, type) and issubclass(engine, ParquetDataLoader):
            options["seed"] = args.seed if args.data_seed is None else args.data_seed
            options["prefetch"] = args.dataloader_prefetch_factor or 4
            pads = {n: p for n, p in model_padding(self.model).items() if p and n in self.schema}
            if pads:
                options["padding_idx"] = pads
        else:  # a user's: exactly what the reference's Trainer gives
            options = {"global_size": None, "global_rank": None, **options}
            options["device"] = args.device if args.world_size > 1 else None
        loader = engine.from_schema(
            self.schema,
            data,
            batch_size,
            max_sequence_length=args.max_sequence_length,
            shuffle=shuffle,
            shuffle_buffer_size=args.shuffle_buffer_size,
            drop_last=args.dataloader_drop_last,
            **options,
        )
        if shared_out and not isinstance(loader, ParquetDataLoader):
            return distributed.own_part(loader, args.device, shared_out=True)
        return loader

    def num_examples(self, dataloader: Any) -> int:
        """Sessions in one pass of the loader."""
        if isinstance(dataloader, GivenLoader):
            dataloader = dataloader.loader
        dataset = getattr(dataloader, "dataset", None)
        # NVTabular: a DataLoader of an iterator, whose length is in batches, of a Dataset
        rows = getattr(getattr(dataset, "dataset", None), "num_rows", None)
        if rows is not None:
            return rows
        if dataset is not None and has_length(dataset):
            return len(dataset)
        return len(dataloader) * _batch_size(dataloader)

    # -- learning rate ---------------------------------------------------------------------------

    def reset_lr_scheduler(self) -> None:
        """Let the next train() make a new schedule, also in place of one given by `optimizers`."""
        self.lr_scheduler = None

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule named by lr_scheduler_type; cosines wave by
        learning_rate_num_cosine_cycles_by_epoch x num_train_epochs unless lr_scheduler_kwargs
        says otherwise."""
        if self.lr_scheduler is None:
            args = self.args
            options = dict(args.lr_scheduler_kwargs or {})
            schedule = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(args.lr_scheduler_type)]
            if "num_cycles" in inspect.signature(schedule).parameters:
                cycles = args.learning_rate_num_cosine_cycles_by_epoch * args.num_train_epochs
                options.setdefault("num_cycles", cycles)
            self.lr_scheduler = get_scheduler(
                args.lr_scheduler_type,
                optimizer=self.optimizer if optimizer is None else optimizer,
                num_warmup_steps=args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=options,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    @staticmethod
    def get_scheduler(
        name: str | SchedulerType,
        optimizer: torch.optim.Optimizer,
        num_warmup_steps: int | None = None,
        num_training_steps: int | None = None,
        num_cycles: float = 0.5,
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """A schedule of transformers by name; num_cycles goes to those that wave.

        Raises ValueError when the schedule needs a number of steps that is not given.
        """
        schedule = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]
        waves = "num_cycles" in inspect.signature(schedule).parameters
        return get_scheduler(
            name,
            optimizer=optimizer,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=num_training_steps,
            scheduler_specific_kwargs={"num_cycles": num_cycles} if waves else {},
        )

    # -- the optimizer ---------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments; with table_optimizer that of t4r_fast.optim."""
        args, model = self.args, self.model if model is None else model
        if args.table_optimizer is None or self.optimizer is not None:
            if self.optimizer is None:
                _check_dense(model)
            return super().create_optimizer(model)
        decay = set(self.get_decay_parameter_names(model))
        self.optimizer = for_model(
            model,
            args.learning_rate,
            args.table_optimizer,
            weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            no_decay=[
                name
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and name not in decay
            ],
        )
        return self.optimizer

    def _model_optimizer(self) -> ModelOptimizer | None:
        """The optimizer, below its wrapper, if it is one of t4r_fast.optim."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, ModelOptimizer) else None

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        optimizer = self._model_optimizer()
        if optimizer is None:
            return super()._clip_grad_norm(model)
        return optimizer.clip_grad_norm_(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # Without clipping nobody pays for the norm of the table's gradient, and none is logged.
        if self._model_optimizer() is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return None

    # -- training --------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train on the training data.

        resume_from_checkpoint  a checkpoint folder of an interrupted train(), or True for the last
                                one in args.output_dir: continues as if it had not been interrupted,
                                to the last bit, when the same data and arguments are set

        Raises InputError when there is no such checkpoint.
        """
        if resume_from_checkpoint is True:
            folder = self.args.output_dir
            resume_from_checkpoint = get_last_checkpoint(folder) if os.path.isdir(folder) else None
            if resume_from_checkpoint is None:
                raise InputError(f"checkpoint: there is none in {folder}; train from the start")
        if resume_from_checkpoint:
            resume_from_checkpoint = str(_complete(resume_from_checkpoint))
        return super().train(resume_from_checkpoint or None, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's training loss on a batch, inputs or (inputs, targets)."""
        features, targets = inputs_and_targets(inputs)
        outputs = model(features, targets=targets, training=True)
        if self.args.world_size > 1:
            loss, sessions = outputs["loss"], _rows(inputs)
            rows = target_rows(outputs["labels"], outputs["predictions"], sessions, loss.device)
            outputs["loss"] = distributed.weighted_loss(loss, rows, self.args.world_size)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    # -- evaluation ------------------------------------------------------------------------------

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        training: bool = False,
        testing: bool = True,
    ) -> tuple[torch.Tensor | None, Any, Any, None]:
        """(loss, predictions, labels, None) of a batch, without gradients."""
        features, targets = inputs_and_targets(self._prepare_inputs(inputs))
        inference = not training and not testing
        asked = {"asked": self._asked} if inference and self._asked is not None else {}
        with torch.no_grad(), self.accelerator.autocast():
            outputs = model(features, targets=targets, training=training, testing=testing, **asked)
        if inference:
            return None, outputs, None, None
        if prediction_loss_only:
            return outputs["loss"], None, outputs["labels"], None
        return outputs["loss"], outputs["predictions"], outputs["labels"], None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """One pass over the loader in evaluation mode; see evaluate() and predict().

        The model's metrics are reset first and hold this pass afterwards.
        """
        model, args = self.model, self.args
        LOG.info("***** Running %s *****", description)
        if (optimizer := self._model_optimizer()) is not None:
            optimizer.flush()
        model.eval()
        several = args.world_size > 1
        if several:
            distributed.share_buffers(model)
        parts = args.world_size if several and not distributed.is_shared_out(dataloader) else 1
        self.callback_handler.eval_dataloader = dataloader
        keep = description == "Prediction"
        if keep and get_compat() != "0.1":
            return self._recommendations(dataloader, parts)
        counting = bool(self.compute_metrics) and not args.prediction_loss_only
        if counting:
            model.reset_metrics()
        log = self._logs_predictions()
        limit = args.eval_steps_on_train_set if metric_key_prefix == "train" else 0
        loss = LossSum(args.device)
        kept = KeptPredictions(args.predict_top_k)
        for step, batch in enumerate(dataloader):
            if limit and step == limit:
                break
            if step % parts != args.process_index % parts:
                continue
            batch_loss, predictions, labels, _ = self.prediction_step(
                model, batch, prediction_loss_only=args.prediction_loss_only and not (keep or log)
            )
            loss.add(batch_loss, labels, predictions, _rows(batch))
            found = None
            if counting and step % args.compute_metrics_each_n_steps == 0:
                found = model.calculate_metrics(predictions, labels)
            if keep:
                kept.add(predictions, labels, step)
            if log:
                self._log_predictions(predictions, labels, found, metric_key_prefix)
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        if several:
            distributed.add_up(model, loss, counting)
            if keep:
                distributed.gather(kept)
        metrics = {"loss": loss.mean(description)}
        if counting:
            metrics.update(process_metrics(model.compute_metrics()))
        prefix = metric_key_prefix if get_compat() == "0.1" else f"{metric_key_prefix}_"
        metrics = {f"{prefix}/{key}": value for key, value in metrics.items()}
        ids_and_scores, labels = kept.arrays() if keep else (None, None)
        return EvalLoopOutput(ids_and_scores, labels, metrics, loss.sessions)

    def predict(
        self,
        test_dataset_or_path: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Recommend the item that comes after the last one of each session.

        predictions  (ids, scores), two arrays (N, predict_top_k), best first; with predict_top_k=0
                     the scores of all items, (N, V), or of the model's top_k. Of another task its
                     predictions; of several tasks a dict of them by task name
        label_ids    None: nobody knows the next item
        metrics      the speed, under `test_...`

        N counts the sessions. At compat 0.1 the last item is predicted from those before it, for
        the sessions that have one; label_ids (N,) are the last items and metrics those of
        evaluate().
        """
        return super().predict(test_dataset_or_path, ignore_keys, metric_key_prefix)

    def _recommendations(self, dataloader: Any, processes: int) -> EvalLoopOutput:
        """One pass of inference; each process takes its part of the batches."""
        model, args = self.model, self.args
        kept, sessions = KeptRecommendations(), 0
        # not an argument of prediction_step, which programs override with the reference's arguments
        self._asked = Asked(args.predict_top_k or model.top_k)
        try:
            for step, batch in enumerate(dataloader):
                if step % processes != args.process_index % processes:
                    continue
                _, output, _, _ = self.prediction_step(model, batch, testing=False)
                kept.add(output, step)
                sessions += _rows(batch)
                self.control = self.callback_handler.on_prediction_step(
                    args, self.state, self.control
                )
        finally:
            self._asked = None
        if args.world_size > 1:
            distributed.gather(kept)
            sessions = kept.rows
        return EvalLoopOutput(kept.by_task(), None, {}, sessions)

    def _logs_predictions(self) -> bool:
        if self.args.log_predictions and self.log_predictions_callback is None:
            warn_once(
                "log_predictions",
                "log_predictions is on and trainer.log_predictions_callback is not set, so no"
                " predictions are logged",
            )
        return self.args.log_predictions and self.log_predictions_callback is not None

    def _log_predictions(self, predictions: Any, labels: Any, found: Any, prefix: str) -> None:
        kept = KeptPredictions(max(1, self.args.predict_top_k))
        kept.add(predictions, labels)
        (ids, scores), labels = kept.arrays()
        self.log_predictions_callback(
            labels=labels,
            pred_item_ids=ids,
            pred_item_scores=scores,
            metrics=found,
            dataset_type=prefix,
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # transformers looks for "eval_" + metric_for_best_model: let "next-item/ndcg_at_20",
        # "loss" and the full keys of both compat levels name the metric
        named = dict(metrics)
        for key, value in metrics.items():
            named[f"eval_{key}"] = value
            named[f"eval_{key.partition('/')[2]}"] = value
        return super()._determine_best_metric(named, trial)

    # -- logging and memory ----------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Send values to the log history and the callbacks."""
        self._with_seconds_before(logs)
        step = self.state.global_step
        if self.incremental_logging:
            self.state.global_step = step + self._past_steps
        try:
            super().log(logs, start_time)
        finally:
            self.state.global_step = step

    def wipe_memory(self) -> None:
        """Collect garbage and give cached GPU memory back; model and optimizer stay."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _Bookkeeping(TrainerCallback):
    """Steps in at the places of the training loop where transformers offers no method."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.trainer._begin_run()
        if args.world_size > 1:
            distributed.part_ways()
        if (optimizer := self.trainer._model_optimizer()) is not None:
            optimizer.zero_grad()  # what a train() that broke off left recorded

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.trainer._end_run()

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        # The loop tells its loader the epoch, but not when it resumes inside an epoch: the loader
        # then is wrapped to skip the batches that were seen.
        dataset = getattr(train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch") and has_length(train_dataloader):
            steps = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
            dataset.set_epoch(state.global_step // steps)


class IncrementalLoggingCallback(TrainerCallback):
    """Counts logged steps on over several train() calls; Trainer(incremental_logging=True) has one.

    trainer  whose steps are counted, and to which it is added: trainer.add_callback(this)
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        trainer = self.trainer
        trainer.incremental_logging = True
        trainer._past_steps += trainer._steps_of_last_run
        trainer._steps_of_last_run = 0

    def on_train_end(self, args, state, control, model=None, **kwargs) -> None:
        self.trainer._steps_of_last_run = state.global_step


class DatasetMock(Dataset):
    """A data set that has a length and no rows: `train_dataset` of a Trainer that gets loaders."""

    def __init__(self, nsteps: int = 1) -> None:
        self.nsteps = nsteps

    def __len__(self) -> int:
        return self.nsteps


# -- batches ---------------------------------------------------------------------------------------


def _check_dense(model: nn.Module) -> None:
    """Refuse sparse gradients: the optimizers of transformers and its clipping take none."""
    modules = model.named_modules()
    found = [name for name, module in modules if getattr(module, "sparse", None) is True]
    if found:
        raise InputError(
            f"Trainer: {', '.join(found)}: sparse=True gives sparse gradients, which the optimizers"
            " of transformers do not take; set T4RecTrainingArguments(table_optimizer='adamw'),"
            " which needs no sparse=True, or train in your own loop with torch.optim.SparseAdam"
        )


def process_metrics(
    metrics: Mapping[str, Any], prefix: str = "", to_cpu: bool = True
) -> dict[str, Any]:
    """Values by prefix and their own keys; those of several tasks come as dicts by task name.

    to_cpu  as numbers; False: the tensors as they are
    """
    found: dict[str, Any] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found.update(process_metrics(value, prefix, to_cpu))
        else:
            number = to_cpu and isinstance(value, torch.Tensor)
            found[f"{prefix}{key}"] = value.item() if number else value
    return found


def _rows(batch: Any) -> int:
    features = inputs_and_targets(batch)[0]
    for name, column in features.items():
        if name.endswith("__offsets"):
            return len(column) - 1
    return len(next(iter(features.values())))


def _batch_size(loader: Any) -> int:
    size = getattr(loader, "_batch_size", None) or getattr(loader, "batch_size", None)
    if size is None:
        raise InputError(
            f"Trainer: {type(loader).__name__} must tell its size: give it a sized `dataset` or"
            " `_batch_size`"
        )
    return size

"""Checkpoints of the Trainer: the whole state in one folder, written aside and renamed.

A folder holds model.safetensors (a tensor that several keys share is stored once), optimizer.pt,
scheduler.pt, rng_state.pth, trainer_state.json, progress.json and training_args.json: the file
names of transformers, so that train(resume_from_checkpoint=...) reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from t4r_fast.errors import InputError
from t4r_fast.train.distributed import mean_over_processes

WEIGHTS = "model.safetensors"
OLD_WEIGHTS = "pytorch_model.bin"
ARGUMENTS = "training_args.json"
PROGRESS = "progress.json"


def load_weights(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Load the weights in a checkpoint folder into the model, in place.

    Reads model.safetensors, else the reference's pytorch_model.bin (keys with or without its
    "module." in front), which is loaded without running code from the file. Raises InputError when
    there is neither, or when the weights are of another model.
    """
    folder = Path(folder)
    try:
        if (folder / WEIGHTS).is_file():
            load_model(model, folder / WEIGHTS, strict=True)
        elif (folder / OLD_WEIGHTS).is_file():
            state = torch.load(folder / OLD_WEIGHTS, map_location="cpu", weights_only=True)
            if all(key.startswith("module.") for key in state):
                state = {key.removeprefix("module."): value for key, value in state.items()}
            model.load_state_dict(state)
        else:
            raise InputError(
                f"checkpoint: {folder} holds no {WEIGHTS} and no {OLD_WEIGHTS}; give a folder"
                " written by the Trainer"
            )
    except RuntimeError as e:
        raise InputError(f"checkpoint: {folder} is of another model: {e}") from e


class Checkpoints:
    """The saving and loading half of the Trainer."""

    # Seconds, steps and losses before the run now in the process; see _progress.
    _resumed_from: str | None = None
    _seconds_before = 0.0
    _started: float | None = None
    _past_steps = 0
    _steps_of_last_run = 0

    def save_checkpoint(self, path: str | os.PathLike[str]) -> str:
        """Write weights, optimizer, schedule, random state and trainer state to the folder `path`.

        The folder is written under another name and renamed when complete: a process killed here
        leaves the former folder, or none. In a callback during training set
        control.should_save = True instead: the Trainer then saves after the step is logged.
        Of several processes all must call it, with a `path` that all of them see.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        former = _former(path)
        writes = self.args.process_index == 0
        if writes:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self._wait_for_all()
        self._write_state(str(part))
        self._wait_for_all()
        if writes:
            if path.exists():
                shutil.rmtree(former, ignore_errors=True)
                path.rename(former)
            part.rename(path)
            shutil.rmtree(former, ignore_errors=True)
        self._wait_for_all()
        return str(path)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Take over everything save_checkpoint wrote; the next train() starts anew from there.

        To go on in the middle of a train() that was interrupted, call
        train(resume_from_checkpoint=path) instead. Raises InputError when `path` is no checkpoint.
        """
        folder = _complete(path)
        load_weights(self.model, folder)
        if (folder / OPTIMIZER_NAME).is_file():
            if self.optimizer is None:
                self.create_optimizer()
            self.optimizer.load_state_dict(_loaded(folder / OPTIMIZER_NAME))
        # A schedule of the Trainer's own is made anew by train(); only a given one has a state.
        if self.lr_scheduler is not None and (folder / SCHEDULER_NAME).is_file():
            self.lr_scheduler.load_state_dict(_loaded(folder / SCHEDULER_NAME))
        self._load_scaler(str(folder))
        self._load_rng_state(str(folder))
        if (folder / TRAINER_STATE_NAME).is_file():
            self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        progress = _progress_in(folder)
        self._past_steps = progress.get("past_steps", 0)
        self._steps_of_last_run = progress.get("steps_of_last_run", 0)

    def _save_model_and_checkpoint(self, save_model_class: bool = False) -> None:
        """Write checkpoint-<step> below args.output_dir; with save_model_class the model too, so
        that t4r_fast.torch.load_model reads it from there."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.save_checkpoint(folder)
        if save_model_class:
            self.model.save(folder)

    def load_model_trainer_states_from_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], model: nn.Module | None = None
    ) -> None:
        """Take over weights, random state and trainer state of a checkpoint, and not the optimizer.

        model  None: the model that _save_model_and_checkpoint(save_model_class=True) saved there

        For all of a checkpoint: load_checkpoint. Raises InputError when it is none.
        """
        folder = _complete(checkpoint_path)
        if model is None:
            from t4r_fast.model.store import load_named

            model = load_named(folder)
        self.model = self.model_wrapped = model.to(self.args.device)
        self.optimizer = self.lr_scheduler = None  # they stepped the former model
        load_weights(self.model, folder)
        self._load_rng_state(str(folder))
        if (folder / TRAINER_STATE_NAME).is_file():
            self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))

    # -- writing ---------------------------------------------------------------------------------

    def _wait_for_all(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def _write_state(self, folder: str) -> None:
        progress = self._progress()
        if self.args.process_index:
            if not self.args.save_only_model:
                self._save_rng_state(folder)
            return
        self.save_model(folder, _internal_call=True)
        if not self.args.save_only_model:
            if self.optimizer is None:
                self.create_optimizer()
            torch.save(self.optimizer.state_dict(), os.path.join(folder, OPTIMIZER_NAME))
            if self.lr_scheduler is not None:
                torch.save(self.lr_scheduler.state_dict(), os.path.join(folder, SCHEDULER_NAME))
            self._save_scaler(folder)
            self._save_rng_state(folder)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        Path(folder, PROGRESS).write_text(json.dumps(progress, indent=1))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(folder, exist_ok=True)
        save_model(self.model, os.path.join(folder, WEIGHTS), metadata={"format": "pt"})
        Path(folder, ARGUMENTS).write_text(self.args.to_json_string())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if trial is None:
            self.store_flos()
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.state.best_global_step:
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == folder or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        self.save_checkpoint(folder)
        if self.args.process_index:
            return
        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    # -- reading ---------------------------------------------------------------------------------

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(self.model if model is None else model, resume_from_checkpoint)
        self._resumed_from = resume_from_checkpoint

    def _load_best_model(self) -> None:
        load_weights(self.model, self.state.best_model_checkpoint)

    # -- what the training loop of transformers forgets over an interruption ---------------------

    def _progress(self) -> dict[str, float]:
        """Loss sums between two logs, seconds and steps: with them a resumed run logs the same."""
        loss = getattr(self, "_tr_loss", 0.0)
        if self.args.world_size > 1:
            loss = mean_over_processes(loss, self.args.device)
        running = 0.0 if self._started is None else time.time() - self._started
        return {
            "loss_since_log": float(loss),
            "loss_logged": float(getattr(self, "_total_loss_scalar", 0.0)),
            "last_logged_step": int(getattr(self, "_globalstep_last_logged", 0)),
            "seconds": self._seconds_before + running,
            "past_steps": self._past_steps,
            "steps_of_last_run": self._steps_of_last_run,
        }

    def _begin_run(self) -> None:
        """At the start of train(): go on with the sums of the run that is resumed, or from zero."""
        self._started = time.time()
        self._seconds_before = 0.0
        folder, self._resumed_from = self._resumed_from, None
        if folder is None:
            return
        progress = _progress_in(Path(folder))
        if not progress:
            return
        self._tr_loss += progress["loss_since_log"]
        self._total_loss_scalar = progress["loss_logged"]
        self._globalstep_last_logged = progress["last_logged_step"]
        self._initial_global_step = 0
        self._seconds_before = progress["seconds"]
        self._past_steps = progress["past_steps"]
        self._steps_of_last_run = 0

    def _end_run(self) -> None:
        self._started = None

    def _with_seconds_before(self, logs: dict[str, float]) -> None:
        """Count the seconds before an interruption into the speeds that train() reports."""
        runtime = logs.get("train_runtime")
        if not runtime or not self._seconds_before:
            return
        whole = runtime + self._seconds_before
        logs["train_runtime"] = round(whole, 4)
        for name in ("train_samples_per_second", "train_steps_per_second"):
            if name in logs:
                logs[name] = round(logs[name] * runtime / whole, 3)


def _former(path: Path) -> Path:
    return path.with_name(f".{path.name}.former")


def _complete(path: str | os.PathLike[str]) -> Path:
    """The checkpoint at `path`, or the one it was replacing when the process was killed."""
    for folder in (Path(path), _former(Path(path))):
        if folder.is_dir():
            return folder
    raise InputError(f"checkpoint: there is no folder {path}")


def _loaded(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _progress_in(folder: Path) -> dict[str, float]:
    file = folder / PROGRESS
    return json.loads(file.read_text()) if file.is_file() else {}

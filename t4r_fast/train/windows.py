"""Sliding windows: train on one, evaluate on the next, go on. Killed at any moment, it resumes.

The numbers of a resumed run equal those of an uninterrupted one: every window starts from its own
seed, a window's end and (every `checkpoint_steps`) its middle are on disk with weights, optimizer
and random generators, and what was done after the last of these points is done again.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from t4r_fast.errors import InputError
from t4r_fast.train import models, saved_model
from t4r_fast.train.progress import Progress
from t4r_fast.train.sessions import SessionData, WindowPair
from t4r_fast.train.state import ModelState

if TYPE_CHECKING:
    from t4r_fast.compat.torch import Trainer

CURVE_POINTS = 40
LOGGING_STEPS = 200


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """What the tutorial fixes, adjustable.

    epochs              per window, >= 1
    batch_size          sessions per training step, >= 1
    eval_batch_size     sessions per evaluation step; the printed GRU's metrics depend on it
    learning_rate       None: the tutorial's, .00071 for a GRU and .000666 for an XLNet
    d_model, n_layer    width and layers of the body; None: the tutorial's
    n_head              attention heads of XLNet
    item_dim            width of the embedding tables
    embedding_std       deviation of fresh embeddings, > 0
    dropout             of XLNet
    max_sequence_length L; longer sessions keep their last items
    seed                of weights, order of sessions, masks and dropout
    checkpoint_steps    steps between checkpoints inside a window, for `--resume`
    as_printed          XLNet attends to padding, as in the tutorial
    """

    epochs: int = 3
    batch_size: int = 256
    eval_batch_size: int = 32
    learning_rate: float | None = None
    d_model: int | None = None
    n_layer: int | None = None
    n_head: int = 4
    item_dim: int = 64
    embedding_std: float = 0.05
    dropout: float = 0.3
    max_sequence_length: int = 20
    seed: int = 0
    checkpoint_steps: int = 500
    as_printed: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_batch_size", "n_head", "item_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.max_sequence_length < 2:
            raise InputError(
                f"max_sequence_length must be at least 2; got {self.max_sequence_length}"
            )
        if self.checkpoint_steps < 1:
            raise InputError(f"checkpoint_steps must be at least 1; got {self.checkpoint_steps}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise InputError(f"learning_rate must be above 0; got {self.learning_rate}")
        if not self.embedding_std > 0:
            raise InputError(f"embedding_std must be above 0; got {self.embedding_std}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1; got {self.dropout}")

    def model_options(self) -> dict:
        """The keyword arguments of `models.build`."""
        return {
            "d_model": self.d_model,
            "n_head": self.n_head,
            "n_layer": self.n_layer,
            "item_dim": self.item_dim,
            "embedding_std": self.embedding_std,
            "dropout": self.dropout,
            "max_sequence_length": self.max_sequence_length,
            "attend_padding": self.as_printed,
        }


def train_windows(
    name: str,
    data: SessionData,
    pairs: list[WindowPair],
    options: TrainingOptions,
    out: Path,
    progress: Progress | None = None,
    overall: str | None = None,
) -> ModelState:
    """Train and evaluate model `name` over the windows, from where OUT/state says it stands.

    Writes OUT/state/<name>.json after every window and OUT/models/<name>/ at the end, and removes
    its checkpoints then. `overall` is a step of `progress` that counts windows. Returns the
    finished state with one record per window.
    """
    state = ModelState(out, name)
    progress = progress or Progress()
    run = _Run(name, data, options, out, state, progress)
    if overall is not None:
        progress.advance(overall, len(state.windows))
    if not state.done:
        run.prepare()
        for pair in pairs[len(state.windows) :]:
            run.window(pair, last=pair is pairs[-1])
            if overall is not None:
                progress.advance(overall)
    shutil.rmtree(run.folder, ignore_errors=True)
    return state


class _Run:
    """One model on its way through the windows."""

    def __init__(
        self,
        name: str,
        data: SessionData,
        options: TrainingOptions,
        out: Path,
        state: ModelState,
        progress: Progress,
    ) -> None:
        self.name, self.data, self.options = name, data, options
        self.out, self.state, self.progress = out, state, progress
        self.folder = out / "checkpoints" / name
        self.steps_folder = self.folder / "steps"
        self.schema = data.schema.select_by_name(models.feature_columns(name, data.schema))

    def prepare(self) -> None:
        """The model and its Trainer, as they stood after the last finished window."""
        import transformers

        transformers.set_seed(self.options.seed)
        self.model = models.build(self.name, self.data.schema, **self.options.model_options())
        self.state.parameters = sum(p.numel() for p in self.model.parameters())
        self.clock = _clock(self)
        self.trainer = self._trainer()
        if self.state.checkpoint is not None:
            self.trainer.load_checkpoint(self.out / self.state.checkpoint)

    def _trainer(self) -> Trainer:
        from transformers import PrinterCallback

        from t4r_fast.compat.config.trainer import T4RecTrainingArguments
        from t4r_fast.compat.torch import Trainer

        o = self.options
        arguments = T4RecTrainingArguments(
            output_dir=str(self.steps_folder),
            max_sequence_length=o.max_sequence_length,
            data_loader_engine="parquet",
            num_train_epochs=o.epochs,
            per_device_train_batch_size=o.batch_size,
            per_device_eval_batch_size=o.eval_batch_size,
            learning_rate=o.learning_rate or models.KINDS[self.name].learning_rate,
            dataloader_drop_last=False,
            gradient_accumulation_steps=1,
            report_to=[],
            save_strategy="steps",
            save_total_limit=2,
            disable_tqdm=True,
            seed=o.seed,
        )
        trainer = Trainer(
            model=self.model,
            args=arguments,
            schema=self.schema,
            compute_metrics=True,
            callbacks=[self.clock],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def window(self, pair: WindowPair, last: bool) -> None:
        """Train on one window, evaluate on the next, and put both on disk."""
        import transformers

        train_rows = self.data.rows(pair.train, "train")
        steps = -(-train_rows // self.options.batch_size) * self.options.epochs
        self._log_every(steps)
        checkpoint = self._checkpoint_inside(pair.train)
        if checkpoint is None:
            shutil.rmtree(self.steps_folder, ignore_errors=True)
            self.state.partial = None
        transformers.set_seed(self.options.seed + 1_000 * pair.train)
        trainer = self.trainer
        trainer.train_dataset_or_path = str(self.data.file(pair.train, "train"))
        trainer.eval_dataset_or_path = str(self.data.file(pair.evaluate, "valid"))
        trainer.reset_lr_scheduler()
        self.clock.begin(pair, steps, self.state.partial)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.state.global_step += 1
        train_seconds = self.clock.seconds()
        record = {
            "train_window": pair.train,
            "eval_window": pair.evaluate,
            "epochs": self.options.epochs,
            "steps": steps,
            "train_sessions": train_rows,
            "train_seconds": round(train_seconds, 3),
            "train_sessions_per_second": round(train_rows * self.options.epochs / train_seconds, 1),
            "loss_curve": _curve(trainer.state.log_history),
        }
        record["train_loss"] = record["loss_curve"][-1][1] if record["loss_curve"] else None
        record |= self._evaluate(pair)
        self._keep(pair, record, last)

    def _log_every(self, steps: int) -> None:
        every = max(1, min(LOGGING_STEPS, steps // CURVE_POINTS))
        wanted = self.options.checkpoint_steps
        self.trainer.args.logging_steps = every
        # a checkpoint right after a logged point, or the resumed curve would differ by one point
        self.trainer.args.save_steps = max(every, wanted - wanted % every)

    def _checkpoint_inside(self, window: int) -> str | None:
        partial = self.state.partial
        if partial is None or partial["window"] != window:
            return None
        path = self.out / partial["checkpoint"]
        return str(path) if path.is_dir() else None

    def _evaluate(self, pair: WindowPair) -> dict:
        rows = self.data.rows(pair.evaluate, "valid")
        start = time.perf_counter()
        found = self.trainer.evaluate(metric_key_prefix="eval")
        seconds = time.perf_counter() - start
        metrics = self.model.compute_metrics()
        loss = next(v for k, v in found.items() if k.endswith("/loss"))
        self.trainer.wipe_memory()
        return {
            "eval_loss": float(loss),
            "eval_sessions": rows,
            "eval_seconds": round(seconds, 3),
            "eval_sessions_per_second": round(rows / seconds, 1),
            "metrics": {k.split("/")[-1]: float(v) for k, v in metrics.items()},
        }

    def _keep(self, pair: WindowPair, record: dict, last: bool) -> None:
        """First the checkpoint or the model, then the state that names it, then the cleaning."""
        state = self.state
        before = state.checkpoint
        state.windows.append(record)
        state.partial = None
        if last:
            saved_model.save(
                self.out / "models" / self.name,
                self.name,
                self.model,
                self.schema,
                self.options.model_options(),
                trained_on=[r["train_window"] for r in state.windows],
                metrics=record["metrics"],
                max_session_items=self.options.max_sequence_length,
            )
            state.checkpoint, state.done = None, True
        else:
            path = self.folder / f"window-{pair.train}"
            self.trainer.save_checkpoint(path)
            state.checkpoint = path.relative_to(self.out).as_posix()
        state.write()
        if before is not None:
            shutil.rmtree(self.out / before, ignore_errors=True)
        score = f"NDCG@20 {record['metrics']['ndcg_at_20']:.4f}"
        self.progress.finish(self.clock.label, f"{score} on window {pair.evaluate}")


def _curve(history: list[dict]) -> list[list[float]]:
    """[[step, training loss]] of a window."""
    return [[h["step"], float(h["loss"])] for h in history if "loss" in h]


def _clock(run: _Run):
    """A Trainer callback: progress, seconds of training, and which checkpoint is whole."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        label = ""

        def begin(self, pair: WindowPair, steps: int, partial: dict | None) -> None:
            title = models.KINDS[run.name].title
            self.pair = pair
            self.label = f"{title}: window {pair.train}"
            self.earlier = partial["seconds"] if partial else 0.0
            self.started = time.perf_counter()
            run.progress.start(self.label, steps)

        def seconds(self) -> float:
            return self.earlier + time.perf_counter() - self.started

        def on_train_begin(self, args, state, control, **kwargs):
            run.progress.advance(self.label, state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            run.progress.advance(self.label)

        def on_save(self, args, state, control, **kwargs):
            path = run.steps_folder / f"checkpoint-{state.global_step}"
            run.state.partial = {
                "window": self.pair.train,
                "checkpoint": path.relative_to(run.out).as_posix(),
                "seconds": round(self.seconds(), 3),
            }
            run.state.write()

    return Clock()

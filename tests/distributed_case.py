"""What two processes train and evaluate, for test_distributed.py, which does the same in one.

torchrun --nproc-per-node 2 distributed_case.py FOLDER writes FOLDER/<rank>.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from training_case import LENGTH, SCHEMA, make_trainer
from transformers import TrainerCallback

import t4r_fast.torch as tr
from t4r_fast.errors import InputError
from t4r_fast.torch.data import ParquetDataLoader, dataloader_registry

BATCH = 8  # of a process


@dataloader_registry.register("dealt")
class Dealt(tr.T4RecDataLoader):
    """A user's engine, whose loader takes each n-th batch and does not say that it does."""

    _batch_size = BATCH

    def __init__(self, batches):
        self.batches = batches

    @classmethod
    def from_schema(cls, schema, paths, batch_size, max_sequence_length, **options):
        whole = list(ParquetDataLoader(paths, schema, batch_size, max_sequence_length))
        return cls(whole[options["global_rank"] :: options["global_size"]])

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def make_model(masking, dropout, attn_type, *more):
    torch.manual_seed(1)
    inputs = tr.TabularSequenceFeatures.from_schema(
        SCHEMA,
        max_sequence_length=LENGTH,
        aggregation="concat",
        d_output=16,
        masking=masking,
        embedding_dim_default=8,
    )
    config = tr.XLNetConfig.build(16, 2, 1, LENGTH, dropout=dropout, attn_type=attn_type)
    body = tr.SequentialBlock(inputs, tr.TransformerBlock(config, masking=inputs.masking), *more)
    task = tr.NextItemPredictionTask(weight_tying=True)
    return tr.Model(tr.Head(body, task, inputs=inputs))


def causal_model():
    """Nothing in a step is random."""
    return make_model("causal", 0.0, "uni")


def masked_model():
    """Masks and dropout are drawn, and a batch norm has buffers."""
    return make_model("mlm", 0.3, "bi", tr.MLPBlock([16], normalization="batch_norm"))


class Losses(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen.append(logs["loss"])


def trained(folder, data, model, batch, **options):
    """(weights, losses, steps) after two epochs on `data`."""
    losses = Losses()
    trainer = make_trainer(
        folder,
        data,
        model,
        callbacks=[losses],
        per_device_train_batch_size=batch,
        num_train_epochs=2,
        logging_steps=1,
        save_strategy="no",
        **options,
    )
    trainer.train()
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    return weights, losses.seen, trainer.state.global_step


def judged(folder, data, model):
    """(metrics, predictions) of the model as it is."""
    trainer = make_trainer(folder, data, model, per_device_eval_batch_size=BATCH)
    metrics = {k: v for k, v in trainer.evaluate().items() if "/" in k}
    found = trainer.predict(data)
    return metrics, found.predictions, found.label_ids


class _Listed(list):
    _batch_size = BATCH


def _own(args):
    return {"global_size": args.world_size, "global_rank": args.process_index}


def main(folder: Path) -> None:
    data, odd, bare = (str(folder / f"{name}.parquet") for name in ("data", "odd", "bare"))
    out = {"trained": trained(folder / "t", data, causal_model(), BATCH)}
    out["bare"] = trained(
        folder / "b", bare, causal_model(), 2, train_sampling_strategy="sequential"
    )
    # 97 sessions leave one over that no batch of 16 takes
    model = masked_model()
    whole = make_trainer(
        folder / "odd",
        odd,
        model,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="steps",
        save_steps=4,
    )
    whole.train()
    out["odd_steps"] = whole.state.global_step
    out["odd_weights"] = {k: v.clone() for k, v in whole.model.state_dict().items()}
    out["draw"] = torch.rand(())
    again = make_trainer(
        folder / "odd",
        odd,
        masked_model(),
        per_device_train_batch_size=BATCH,
        num_train_epochs=2,
        save_strategy="no",
    )
    again.train(resume_from_checkpoint=str(folder / "odd" / "checkpoint-8"))
    out["resumed"] = {k: v.clone() for k, v in again.model.state_dict().items()}
    out["judged"] = judged(folder / "e", odd, model)
    batches = _Listed(ParquetDataLoader(odd, SCHEMA, BATCH, LENGTH))
    given = make_trainer(
        folder / "g",
        None,
        causal_model(),
        trainer_options={"train_dataloader": batches},
        num_train_epochs=1,
        save_strategy="no",
    )
    given.train()
    out["given_steps"] = given.state.global_step
    dealt = make_trainer(
        folder / "d",
        odd,
        causal_model(),
        data_loader_engine="dealt",
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        save_strategy="no",
    )
    dealt.train()
    out["dealt_batches"] = len(Dealt.from_schema(SCHEMA, odd, BATCH, LENGTH, **_own(dealt.args)))
    out["dealt_steps"] = dealt.state.global_step
    try:
        make_trainer(folder / "r", data, table_optimizer="adamw")
    except InputError as e:
        out["refused"] = str(e)
    torch.save(out, folder / f"{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))

"""Transformers4Rec's XLNet and torch.topk on encoded sessions; runs in its environment.

python t4rec_serving.py SCHEMA.pbtxt SECONDS K BATCH...    prints one JSON line
"""

import json
import logging
import sys
import time
import warnings

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import torch  # noqa: E402, silenced first
import transformers4rec.torch as tr  # noqa: E402

ITEM, LENGTH = "product_id-list_seq", 20


def main() -> None:
    schema = tr.Schema().from_proto_text(sys.argv[1])
    seconds, k, batches = float(sys.argv[2]), int(sys.argv[3]), map(int, sys.argv[4:])
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, max_sequence_length=LENGTH, d_output=192, masking="mlm"
    )
    config = tr.XLNetConfig.build(d_model=192, n_head=4, n_layer=2, total_seq_length=LENGTH)
    block = tr.TransformerBlock(config, masking=inputs.masking)
    body = tr.SequentialBlock(inputs, tr.MLPBlock([192]), block)
    model = tr.Model(tr.Head(body, tr.NextItemPredictionTask(weight_tying=True), inputs=inputs))
    model.eval()
    rows = schema.select_by_name(ITEM).feature[0].int_domain.max + 1
    found = {}
    for batch in batches:
        sessions = {ITEM: torch.randint(3, rows, (batch, LENGTH))}

        def call(sessions=sessions):
            with torch.no_grad():
                return torch.topk(model(sessions, training=False, testing=False), k)

        wall, cpu = [], []
        call()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(wall) < 10:
            start, used = time.perf_counter(), time.process_time()
            call()
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - used)
        found[batch] = {"wall": wall, "cpu": cpu}
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "found": found}))


if __name__ == "__main__":
    main()

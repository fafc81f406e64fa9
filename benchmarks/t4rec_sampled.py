"""bench_t4rec.py with the sampled softmax of Transformers4Rec; runs in its environment.

python t4rec_sampled.py NEGATIVES PATH/bench_t4rec.py --model gru --items 118335 ...
"""

import functools
import runpy
import sys

import transformers4rec.torch as tr


def main() -> None:
    negatives, script = int(sys.argv[1]), sys.argv[2]
    tr.NextItemPredictionTask = functools.partial(
        tr.NextItemPredictionTask, sampled_softmax=True, max_n_samples=negatives
    )
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

"""Sessions as NVTabular 23.8 writes them, for tests where there is none.

PYTHON_WITH_NVTABULAR tests/nvtabular/record.py makes tests/nvtabular/recorded again:
    events.csv        events of t4r_fast.generate, some without category, brand or price
    etl/              what t4r_fast.etl.run(engine="nvtabular") makes of them
    sessions_by_day/  what NVTabular's own to_parquet makes of them, by day, and its schema
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import nvtabular as nvt
import polars as pl
from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

from t4r_fast import etl
from t4r_fast.etl.events import open_events
from t4r_fast.etl.features import sort_and_drop_repeats
from t4r_fast.etl.nvtabular_engine import for_pandas
from t4r_fast.generate import generate_events

HERE = Path(__file__).parent / "recorded"
SEED = 5


def with_gaps(path: Path) -> None:
    """Take some categories, brands and prices away."""
    events = pl.read_csv(path, infer_schema=False).with_row_index("at")
    for column, every in (("category_id", 17), ("brand", 13), ("price", 29)):
        missing = pl.col("at") % every == 4
        events = events.with_columns(
            pl.when(missing).then(None).otherwise(pl.col(column)).alias(column)
        )
    events.drop("at").write_csv(path)


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    events = HERE / "events.csv"
    generate_events(events, items=60, sessions_per_day=60, days=2, seed=SEED)
    with_gaps(events)
    etl.run(events, HERE / "etl", engine="nvtabular", seed=SEED)
    shutil.rmtree(HERE / "etl" / "nvtabular_workflow")  # pickles
    (HERE / "etl" / "summary.json").unlink()  # names folders
    with tempfile.TemporaryDirectory() as scratch:
        by_nvtabular(Path(scratch))


def by_nvtabular(scratch: Path) -> None:
    """The same sessions through a saved nvtabular.Workflow and merlin's own writer."""
    etl.run(HERE / "events.csv", scratch / "etl", engine="nvtabular", seed=SEED)
    workflow = nvt.Workflow.load(str(scratch / "etl" / "nvtabular_workflow"))
    source = open_events(HERE / "events.csv")
    clean = for_pandas(sort_and_drop_repeats(pl.concat(list(source.batches()))), source.roles)
    made = workflow.transform(nvt.Dataset(clean, npartitions=1))
    frame = made.to_ddf().compute()
    day = frame["time_first"] // (24 * 3600 * 1_000_000)
    for number, (_, part) in enumerate(frame.groupby(day), 1):
        folder = HERE / "sessions_by_day" / str(number)
        parts = {"valid": part[::5], "test": part[1::5]}
        parts["train"] = part.drop(parts["valid"].index).drop(parts["test"].index)
        for name, rows in parts.items():
            out = scratch / f"{number}-{name}"
            nvt.Dataset(rows, schema=made.schema, npartitions=1).to_parquet(
                str(out), output_files=1
            )
            folder.mkdir(parents=True, exist_ok=True)
            (written,) = out.glob("*.parquet")
            shutil.copy(written, folder / f"{name}.parquet")
    text = TensorflowMetadata.from_merlin_schema(made.schema).to_proto_text()
    text = re.sub(r'"[^"]*/categories/', '"categories/', text)  # no folders of this machine
    (HERE / "sessions_by_day" / "schema.pbtxt").write_text(text)


if __name__ == "__main__":
    main()

"""Sessions of an invented shop under the names that the tutorial's cells ask for."""

from __future__ import annotations

import shutil
from pathlib import Path

from t4r_fast import etl
from t4r_fast.generate import generate_events


def prepare(folder: str = "printed_data") -> str:
    """Make FOLDER/sessions_by_day/1 to 4, FOLDER/workflow_etl and ./schema_tutorial.pb, once.

    Returns FOLDER. Four days of 400 sessions over 200 items: a second to make, and enough to run
    every cell; a model learns little from it.
    """
    data = Path(folder)
    if not data.exists():
        generate_events("printed_events.parquet", sessions_per_day=400, days=4, items=200)
        etl.run("printed_events.parquet", data)
        shutil.copytree(data / "workflow", data / "workflow_etl")
    shutil.copy(data / "schema.pbtxt", "schema_tutorial.pb")
    return folder

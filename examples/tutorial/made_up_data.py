"""Sessions of an invented shop under the names that the tutorial's cells ask for."""

from __future__ import annotations

import shutil
from pathlib import Path

from t4r_fast import etl
from t4r_fast.generate import generate_events


def prepare(folder: str = "printed_data") -> str:
    """Make FOLDER/sessions_by_day/1 to 4, FOLDER/workflow_etl and ./schema_tutorial.pb, once.

    Returns FOLDER. Four days of 1,500 sessions over 500 items: seconds to make, and enough to run
    every cell; a model learns little from it.
    """
    data = Path(folder)
    if not data.exists():
        generate_events("printed_events.parquet", sessions_per_day=1500, days=4, items=500)
        etl.run("printed_events.parquet", data)
        shutil.copytree(data / "workflow", data / "workflow_etl")
    shutil.copy(data / "schema.pbtxt", "schema_tutorial.pb")
    return folder

"""Events to sessions: `run` for files of any size, `Workflow` for new events when serving."""

from t4r_fast.etl.columns import parse_map
from t4r_fast.etl.pipeline import Summary, Window, run
from t4r_fast.etl.workflow import SessionRules, Workflow

__all__ = ["SessionRules", "Summary", "Window", "Workflow", "parse_map", "run"]

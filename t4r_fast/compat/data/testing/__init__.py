"""Data of a known shape, to try models with."""

from t4r_fast.compat.data.testing.dataset import (
    music_streaming_testing_data,
    tabular_sequence_testing_data,
    tabular_testing_data,
)

__all__ = ["music_streaming_testing_data", "tabular_sequence_testing_data", "tabular_testing_data"]
